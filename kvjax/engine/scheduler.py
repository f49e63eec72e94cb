"""What to compute next: continuous batching with chunked prefill, admission by need, preemption by recompute. Host only.

One scheduler for every strategy. A turn serves running requests first (one token each), then fills the rest of its token budget with chunks
of prompts: of those that are under way, then of waiting requests, first come first served, as long as rows and pages last. When a running
request needs a page and none is free, the request admitted last loses its pages and goes back to the front of the queue, with its tokens
(recomputation, vLLM's default). Strategies differ only in `Need`: what a request takes at admission and whether it grows.
"""

import collections
import dataclasses
import enum
import functools
import heapq

import numpy as np
from jaxtyping import Int

from kvjax.cache import Strategy
from kvjax.engine.blocks import BlockManager, OutOfBlocks
from kvjax.sampling import Sampling


class Status(enum.Enum):
    """Where a sequence is. It ends exactly once, in one of the last three."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (Status.FINISHED, Status.ABORTED, Status.FAILED)


@dataclasses.dataclass(eq=False)
class Sequence:
    """One sample of a request on its way through the engine.

    Attributes:
      id: unique in the engine.
      request: what the caller knows it by; `index` counts the samples of a request.
      prompt: token ids.
      max_tokens: tokens it may generate.
      samples: sequences that start from its prefill, itself included.
      sampling: how its tokens are chosen, with `seed`.
      outputs: tokens generated so far, known on the host.
      dispatched: tokens generated so far, those still being computed included.
      row: its row in the engine's arrays; -1 while it waits.
      computed: tokens of `target` whose prefill has been dispatched.
      target: tokens its prefill feeds: the prompt, and after a preemption what had been generated where that gives the same state.
      replay: generated tokens fed once more through decoding after a preemption.
      swapped: tokens it has in its pages while it waits without a row (preemption by swap); -1: none.
    """

    id: int
    request: str
    index: int
    prompt: Int[np.ndarray, " N"]
    max_tokens: int
    seed: int
    stops: frozenset[int]
    samples: int = 1
    sampling: Sampling = Sampling()
    outputs: list[int] = dataclasses.field(default_factory=list)
    status: Status = Status.WAITING
    dispatched: int = 0
    row: int = -1
    computed: int = 0
    target: Int[np.ndarray, " S"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    replay: int = 0
    swapped: int = -1
    preemptions: int = 0
    reason: str | None = None

    def known(self) -> Int[np.ndarray, " S"]:
        """Prompt and outputs."""
        return np.concatenate([self.prompt, np.asarray(self.outputs, np.int32)])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a sequence's prefill: tokens `start` to `end` of its target; `last` completes it."""

    sequence: Sequence
    start: int
    end: int

    @property
    def last(self) -> bool:
        return self.end == len(self.sequence.target)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What to run now.

    Attributes:
      decode: sequences that get a token each.
      chunks: pieces of prefills, in order.
      copies: (from, to) pages to copy before anything else.
      resumed: sequences that have got a row again for the pages they had kept; they decode from the next turn on.
    """

    decode: list[Sequence]
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    resumed: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.decode or self.chunks or self.copies or self.resumed)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a turn may hold.

    Attributes:
      max_num_seqs: sequences with a row at a time.
      max_num_batched_tokens: tokens of a turn, decoding and prefill together.
      chunk: tokens of a prefill call.
      max_model_len: prompt and output of a request.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 320
    chunk: int = 256
    max_model_len: int = 2048


@dataclasses.dataclass(frozen=True)
class Need:
    """What a strategy asks of the pool.

    Attributes:
      strategy: over the store of an engine.
      contiguous: every request takes the slots of the longest one (a dense store); otherwise what it can come to need.
    """

    strategy: Strategy
    max_model_len: int
    contiguous: bool

    @property
    def grows(self) -> bool:
        """Whether a request takes pages as it gets longer; otherwise it takes all it can ever use when it is admitted."""
        return not self.strategy.policy.evicts and not self.contiguous

    @functools.cached_property
    def capacity(self) -> int:
        """Slots of the longest row there can be."""
        longest = self.max_model_len
        if not self.strategy.policy.evicts:
            return longest
        return max(self.strategy.slots(prompt, longest) for prompt in range(1, longest + 1))

    @property
    def exact(self) -> bool:
        """Whether the state is a function of the tokens, however they were fed: then prefixes can be shared and recomputed at will."""
        return self.strategy.policy.exact

    def slots(self, prompt: int, total: int) -> int:
        """Slots that a request of `total` tokens, `prompt` of them its prompt, uses at most."""
        return self.capacity if self.contiguous else min(self.strategy.slots(prompt, total), total)

    @property
    def stages(self) -> bool:
        """Whether a prompt stands outside the pool until it is complete and compressed."""
        return self.strategy.policy.evicts

    def held(self, prompt: int, length: int) -> int:
        """Tokens per kv head that a request holds once `length` tokens have been fed."""
        budget = self.strategy.policy.most_kept(prompt)
        if budget is None:
            return length
        if self.strategy.policy.evicts_in_decode:
            return min(budget, length)
        return min(budget, prompt) + length - prompt if length > prompt else min(budget, length)

    def pages(self, slots: int) -> int:
        """Pages that hold `slots` slots of a request; where a page is a row, one, however many."""
        return self.strategy.store.pages_of(slots)

    @property
    def page_size(self) -> int:
        """Slots of a page; where a page is a row, those of the longest."""
        return self.strategy.store.page(self.capacity)


class Scheduler:
    """Owns the queue, the rows and the pages; says what a turn computes.

    Attributes:
      waiting, prefilling, running: sequences, in the order in which they are served.
      length: per row, tokens fed so far (dispatched).
      pages: per row, its block table; `no_page` where there is none.
      preemptions: how often a sequence lost its pages.
    """

    def __init__(self, need: Need, limits: Limits, blocks: BlockManager):
        self.need, self.limits, self.blocks = need, limits, blocks
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        rows, width = limits.max_num_seqs, need.pages(need.strategy.store.rounded(need.capacity))
        self.no_page = blocks.num_blocks
        self.length = np.zeros(rows, np.int32)
        self.pages = np.full((rows, width), self.no_page, np.int32)
        self.slots = np.zeros(rows, np.int32)
        self.preemptions = 0
        self._rows = list(range(rows))
        self._forked: set[int] = set()  # ids of sequences whose last page may be shared

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def end(self, sequence: Sequence, status: Status) -> None:
        """Takes a sequence out, wherever it is, and gives back what it holds."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            if sequence.swapped >= 0:
                self.blocks.release(sequence.id)
                sequence.swapped = -1
        elif sequence.row >= 0:
            self._leave(sequence)
        sequence.status = status

    def preempt(self, sequence: Sequence, swap: bool = False) -> None:
        """Takes pages and row from a sequence and puts it in front of the queue; all its tokens must be known on the host.

        `swap`: it keeps its pages, and goes on where it was as soon as it has a row again.
        """
        assert sequence.dispatched == len(sequence.outputs), "a token is still being computed"
        if swap:
            assert sequence.status is Status.RUNNING
            assert not sequence.replay
            sequence.swapped = int(self.length[sequence.row])
        self._leave(sequence, keep_pages=swap)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def last_admitted(self) -> Sequence:
        """The first to lose its pages when there are too few."""
        return (self.prefilling or self.running)[-1]

    def retire(self, sequence: Sequence) -> None:
        """Frees what a sequence holds although its last token is still being computed: what is dispatched later runs later."""
        self._leave(sequence)

    def shortage(self) -> bool:
        """Whether the next tokens of the running sequences need more pages than are free."""
        return self.need.grows and self._missing() > self.blocks.free_blocks

    def turn(self) -> Turn:
        """The next turn; its effects on lengths and tables are booked at once. Call while there is no `shortage`.

        A prompt takes all that is left of the budget until it is complete, so there is one staged prompt at a time.
        """
        decode = self._decoding()
        copies = self._grow(decode) if self.need.grows else []
        budget = max(self.limits.max_num_batched_tokens - len(decode), 1)
        chunks: list[Chunk] = []
        resumed: list[Sequence] = []
        for sequence in list(self.prefilling):
            budget -= self._advance(sequence, budget, chunks)
        while budget > 0 and self.waiting:
            head = self.waiting[0]
            if head.swapped >= 0:
                if not self._rows:
                    break
                self._resume(head)
                resumed.append(head)
            elif self._admit(head):
                budget -= self._advance(head, budget, chunks)
            else:
                break
        rows = [s.row for s in decode]
        self.length[rows] += 1
        return Turn(decode, chunks, copies, resumed)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Gives `child` a row with what `parent` holds: the same pages where the state may be shared, as many of its own otherwise.

        Returns whether there was room; without it nothing has changed.
        """
        if not self._rows:
            return False
        if self.need.grows:
            self.blocks.fork(parent.id, child.id)
            self._forked |= {parent.id, child.id}
        else:
            try:
                self.blocks.admit(child.id, len(self.blocks.table(parent.id)))
            except OutOfBlocks:
                return False
        self._enter(child)
        child.status, child.target, child.computed = Status.RUNNING, parent.target, parent.computed
        self.length[child.row] = self.length[parent.row]
        self.running.append(child)
        return True

    def prefilled(self, sequence: Sequence) -> None:
        """A sequence's prefill has been dispatched whole: it runs from now on."""
        self.prefilling.remove(sequence)
        self.running.append(sequence)
        sequence.status = Status.RUNNING

    def empty(self) -> int:
        """Slots of the pages in use that hold no token."""
        rows = [s.row for s in (*self.prefilling, *self.running)]
        slots = int(self.slots[rows].sum())
        if self.need.stages:
            return slots - sum(self.need.held(len(s.prompt), int(self.length[s.row])) for s in self.running)
        shared = [(self.blocks.table(s.id)[-1], int(self.slots[s.row] - self.length[s.row])) for s in self.running if s.id in self._forked]
        twice = sum(empty for _, empty in shared) - sum(dict(shared).values())  # the unwritten end of a page that forks still share
        return slots - int(self.length[rows].sum()) - twice

    def seen(self) -> int:
        """Tokens of context that the sequences in rows have behind them."""
        return int(sum(self.length[s.row] for s in (*self.prefilling, *self.running)))

    def _admit(self, sequence: Sequence) -> bool:
        """Moves the head of the queue to prefill if there is room for it."""
        if not self._rows:
            return False
        tokens = sequence.known() if self.need.exact else sequence.prompt
        slots = len(tokens) + 1 if self.need.grows else self.need.slots(len(sequence.prompt), len(sequence.prompt) + sequence.max_tokens)
        try:
            hits = self.blocks.admit(sequence.id, self.need.pages(slots), tokens if self.need.exact else None)
        except OutOfBlocks:
            return False
        self.waiting.popleft()
        self._enter(sequence)
        sequence.status, sequence.target, sequence.computed = Status.PREFILL, tokens, hits
        sequence.replay = 0 if self.need.exact else len(sequence.outputs)
        self.length[sequence.row] = hits
        self.prefilling.append(sequence)
        return True

    def _resume(self, sequence: Sequence) -> None:
        """Gives a sequence that waits with its pages a row; its last token is known and has not been fed."""
        self.waiting.popleft()
        self._enter(sequence)
        self.length[sequence.row] = sequence.swapped
        sequence.status, sequence.swapped, sequence.replay = Status.RUNNING, -1, 1
        self.running.append(sequence)

    def _advance(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Plans chunks of a prefill within the budget; returns the tokens planned."""
        planned = 0
        while budget - planned > 0 and sequence.computed < len(sequence.target):
            size = min(budget - planned, self.limits.chunk, len(sequence.target) - sequence.computed)
            chunks.append(Chunk(sequence, sequence.computed, sequence.computed + size))
            sequence.computed += size
            planned += size
        self.length[sequence.row] = sequence.computed
        return planned

    def _decoding(self) -> list[Sequence]:
        return [s for s in self.running if s.dispatched < s.max_tokens or s.replay]

    def _missing(self) -> int:
        """Pages to take before every running sequence can have its next token, copies of shared ones included."""
        decode = self._decoding()
        rows = [s.row for s in decode]
        short = int((self.length[rows] >= self.slots[rows]).sum())
        shared = 0
        if self._forked:
            size = self.blocks.block_size
            tails = [self._tail(s, size) for s in decode if s.id in self._forked and self.length[s.row] < self.slots[s.row]]
            taken = collections.Counter(tails)
            shared = sum(min(count, self.blocks.ref_count(block) - 1) for block, count in taken.items())
        return short + shared

    def _tail(self, sequence: Sequence, size: int) -> int:
        return self.blocks.table(sequence.id)[int(self.length[sequence.row]) // size]

    def _grow(self, decode: list[Sequence]) -> list[tuple[int, int]]:
        """Makes sure that every sequence has a page of its own for its next token; returns the pages to copy."""
        if not decode:
            return []
        rows = np.asarray([s.row for s in decode])
        for i in np.flatnonzero(self.length[rows] >= self.slots[rows]):
            self.blocks.grow(decode[i].id, self.need.pages(int(self.length[rows[i]]) + 1))
            self._write_table(decode[i])
        copies = []
        for sequence in [s for s in decode if s.id in self._forked]:
            pair = self.blocks.writable(sequence.id, int(self.length[sequence.row]) // self.blocks.block_size)
            self._forked.discard(sequence.id)
            if pair is not None:
                copies.append(pair)
                self._write_table(sequence)
        return copies

    def _enter(self, sequence: Sequence) -> None:
        sequence.row = heapq.heappop(self._rows)
        self._write_table(sequence)

    def _write_table(self, sequence: Sequence) -> None:
        table = self.blocks.table(sequence.id)
        self.pages[sequence.row, : len(table)] = table
        self.slots[sequence.row] = len(table) * self.blocks.block_size

    def _leave(self, sequence: Sequence, keep_pages: bool = False) -> None:
        """Gives back row and pages."""
        (self.prefilling if sequence.status is Status.PREFILL else self.running).remove(sequence)
        if not keep_pages:
            self.blocks.release(sequence.id)
        self._forked.discard(sequence.id)
        self.pages[sequence.row] = self.no_page
        self.slots[sequence.row] = self.length[sequence.row] = 0
        heapq.heappush(self._rows, sequence.row)
        sequence.row, sequence.computed, sequence.replay = -1, 0, 0
