"""The serving engine: requests come and go, one step at a time.

    engine = Engine(model, "vllm", kv_memory="64MiB")
    engine.add("a", "def main():", max_tokens=32)
    while engine.busy:
        for output in engine.step():
            print(output.request, output.tokens, output.finished)

    for token in engine.stream("import ", max_tokens=16): ...

`step` decides what to compute, dispatches it, and while the device works reads what the step before has computed: tokens are known one
step after they were dispatched. Greedy output does not depend on what else is being served, in which order, or on preemptions.
An interrupt (Ctrl-C) comes between two calls, never in the midst of one, so the engine can go on after it.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import checks
from kvjax.cache import Strategy, stage
from kvjax.cache.policies.base import NO_GUIDE
from kvjax.cache.pool import extent_sizes
from kvjax.engine import programs
from kvjax.engine.blocks import BlockManager
from kvjax.engine.memory import Budget, machine_memory, parse_memory, serving_strategy, spend, staged_slots
from kvjax.engine.metrics import Sample
from kvjax.engine.scheduler import Chunk, Limits, Need, Scheduler, Sequence, Status
from kvjax.errors import InputError, MemoryLimitError, SpecError
from kvjax.generation import as_strategy, cache_shape, encode, placed
from kvjax.interrupts import held
from kvjax.models import Model
from kvjax.sampling import Sampling, SamplingArrays, per_row

SMALLEST_CHUNK = 16
SMALLEST_CONTEXT = 128
COPIES = 8
"""Pages copied per call."""


class RequestRefused(InputError):
    """A request that could never be served; nothing was queued."""


@dataclasses.dataclass(slots=True)
class Output:
    """News of one sample of a request.

    Attributes:
      index: which sample of the request.
      tokens: generated since the last news.
      finished: there will be no more.
      reason: once finished: `stop` (a stop token), `length` (max_tokens), `abort`, or `error: ...`.
      time: when this was known, on the clock of time.perf_counter.
    """

    request: str
    index: int
    tokens: tuple[int, ...]
    finished: bool
    reason: str | None
    time: float


@dataclasses.dataclass(frozen=True)
class Pending:
    """Tokens under way: entry i of `tokens` belongs to `sequences[i]` (None: nobody is interested)."""

    tokens: jax.Array
    sequences: list[Sequence | None]


class Engine:
    """Serves requests on one model under one strategy within one memory limit.

    Attributes:
      strategy: as asked for.
      sampling: of requests that bring none of their own.
      budget: how the memory is spent.
    """

    def __init__(
        self,
        model: Model,
        strategy: str | Strategy = "vllm",
        *,
        kv_memory: str | int = "64MiB",
        host_memory: str | int | None = None,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        prefill_chunk: int = 256,
        prefix_caching: bool = False,
        watermark: float = 0.01,
        extents: int = 3,
        sampling: Sampling = Sampling(),
    ):
        """Allocates everything; nothing is compiled yet (see `warm_up`).

        Args:
          kv_memory: bytes for pages, metadata and staging together, or text such as "64MiB".
          host_memory: the same for the pool of a host store, which is no device memory; None: twice the seats that there are rows.
          max_num_seqs: sequences computed at a time.
          max_model_len: prompt and output of a request together; None: what the model has positions for.
          max_num_batched_tokens: tokens of a step, one per decoding sequence and the rest prefill; None: max_num_seqs + prefill_chunk.
          prefill_chunk: tokens of a prefill call; a longer prompt comes in pieces, between which others decode.
          prefix_caching: keep the pages of ended requests for prompts that begin alike.
          watermark: share of the pages kept free at admission, for running requests to grow into.
          extents: arrays the pool is cut into, low pages first; decoding skips those without a page in use.
          sampling: how requests choose their tokens that do not say so themselves.

        Raises:
          SpecError: an unknown strategy, or an option that does not go with it.
          InputError: memory for less than one request, or a `sampling` that is none.
        """
        self.model = model
        self.strategy = as_strategy(strategy)
        (self.sampling,) = per_row(sampling, 1, "engine")
        limit = model.config.max_position
        longest = limit if max_model_len is None else checks.whole("max_model_len", max_model_len)
        max_num_seqs, prefill_chunk = checks.whole("max_num_seqs", max_num_seqs), checks.whole("prefill_chunk", prefill_chunk)
        extents, watermark = checks.whole("extents", extents), checks.number("watermark", watermark, 0, 1)
        max_num_batched_tokens = checks.optional_whole("max_num_batched_tokens", max_num_batched_tokens)
        if not 2 <= longest <= limit:
            raise SpecError(f"max_model_len={longest}: model {model.config.name} has {limit} positions; give 2 to {limit}")
        if max_num_seqs < 1 or prefill_chunk < 1:
            raise SpecError(f"max_num_seqs={max_num_seqs} and prefill_chunk={prefill_chunk} must both be at least 1")
        if extents < 1:
            raise SpecError(f"extents={extents}: a pool has at least one")
        batched = max_num_seqs + prefill_chunk if max_num_batched_tokens is None else max_num_batched_tokens
        if batched <= max_num_seqs:
            raise SpecError(f"max_num_batched_tokens={batched} leaves no room for prompts beside max_num_seqs={max_num_seqs}; give more")
        if prefix_caching and not self.strategy.policy.exact:
            raise SpecError(
                f"prefix caching needs pages that depend on the prefix alone; {self.strategy.policy.describe()} drops or skips tokens by "
                "what comes later, so its pages are a request's own"
            )
        serving, contiguous = serving_strategy(self.strategy, longest, extents)
        if prefix_caching and contiguous:
            raise SpecError("prefix caching shares pages; choose the paged store (vllm, or --store=paged)")
        need = Need(serving, longest, contiguous)
        shape = cache_shape(model)
        tier = serving.store.tier
        if host_memory is not None and not tier.fetches:
            raise SpecError(f"host_memory is for the host store; {self.strategy.describe()} has none")
        if serving.policy.guesses and "guide" not in model.params:
            raise SpecError(f"{self.strategy.describe()} {NO_GUIDE}")
        host = None if host_memory is None else parse_memory(host_memory)
        self.budget: Budget = spend(need, shape, parse_memory(kv_memory), max_num_seqs, host)
        if (all_of_it := self.budget.total + self.budget.num_pages * self.budget.seat) > (there := machine_memory()):
            raise MemoryLimitError(f"the cache of the engine takes {all_of_it} bytes, and this machine has {there}; give it less memory")
        self.limits = Limits(self.budget.rows, batched, prefill_chunk, longest)
        self._caching = prefix_caching
        sizes = extent_sizes(self.budget.num_pages, extents)
        blocks = BlockManager(
            self.budget.num_pages,
            need.page_size,
            extents=sizes,
            prefix_caching=prefix_caching,
            watermark=watermark if need.grows else 0.0,
        )
        self.scheduler = Scheduler(need, self.limits, blocks)
        self.programs = programs.Programs(model.decoder, serving, self.budget.num_pages)
        self._device = model.placement  # as results have it: another would compile anew
        layers = programs.allocate(serving, shape, self.budget.num_pages, self.budget.rows, need.capacity)
        staging: Any = stage(serving.store, serving.observes, shape, [0], staged_slots(longest)).layers if need.stages else None
        layers, self._staging, self._tokens = placed(model, (layers, staging, jnp.zeros(self.budget.rows, jnp.int32)))
        self._layers: programs.Layers = layers
        self._sampling = SamplingArrays.of([Sampling()] * self.budget.rows, np.zeros(self.budget.rows, np.int32))
        self._prompts = np.zeros(self.budget.rows, np.int32)
        self._swapped: dict[int, Any] = {}  # what the device held of sequences that wait with their pages
        self._pending: collections.deque[Pending] = collections.deque()
        self._outputs: list[Output] = []
        self._streams: dict[str, collections.deque[Output]] = {}
        self._sequences: dict[str, list[Sequence]] = {}
        self._copies = 1 if tier.fetches else COPIES
        self._bounds_context = need.stages or tier.fetches or serving.store.platform != "cpu"
        self._count = 0
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.busy or self._pending or self._outputs)

    @property
    def requests(self) -> tuple[str, ...]:
        """Names of the requests that are being served."""
        return tuple(self._sequences)

    @held()
    def add(
        self,
        request: str,
        prompt: str | Several[int] | np.ndarray,
        *,
        max_tokens: int = 64,
        n: int = 1,
        seed: int = 0,
        sampling: Sampling | Several[Sampling] | None = None,
        stop_tokens: Several[int] | None = None,
    ) -> None:
        """Queues a request.

        Args:
          request: a name nobody else in the engine has.
          prompt: text or token ids.
          n: samples of the prompt; sample i has the seed `seed + i`, and they share the pages of the prompt where the strategy allows.
          seed: a whole number from 0; it and the `n - 1` after it fit 32 bits with a sign. What is drawn depends on it and on the request.
          sampling: how tokens are chosen: one for all samples, or one each; None: the engine's. Any may be served beside any other.
          stop_tokens: ids that end a sample; None: the model's own.

        Raises:
          RequestRefused: it could never be served, with the reason.
          InputError: an empty prompt, unknown ids, a name in use, a number that is none, or not as many samplings as samples.
        """
        if not isinstance(request, str):
            raise InputError(f"the name of a request is text, not {request!r}")
        if request in self._sequences:
            raise InputError(f"request {request!r} is being served already; give it another name")
        where = f"request {request!r}: "
        max_tokens, n = (checks.whole(where + name, value, 1, error=InputError) for name, value in (("max_tokens", max_tokens), ("n", n)))
        seed = checks.seed(where + "seed", seed, n)
        ids = encode(self.model, [prompt])[0][0]  # type: ignore[arg-type]
        stops = frozenset(self.model.config.stop_tokens if stop_tokens is None else checks.token_set(where + "stop_tokens", stop_tokens))
        samplings = per_row(self.sampling if sampling is None else sampling, n, "samples", where)
        sequences = [
            Sequence(self._count + i, request, i, ids, max_tokens, seed + i, stops, n if i == 0 else 1, samplings[i]) for i in range(n)
        ]
        self._check_fits(sequences[0])
        self._count += n
        self._sequences[request] = sequences
        self.scheduler.add(sequences[0])

    @held()
    def abort(self, request: str) -> None:
        """Ends a request, whatever it is doing. Raises InputError for one that is not being served."""
        if request not in self._sequences:
            raise InputError(f"no request {request!r} is being served")
        for sequence in list(self._sequences[request]):
            if not sequence.status.ended:
                self._end(sequence, Status.ABORTED, "abort")

    @held()
    def preempt(self, request: str, swap: bool = False) -> None:
        """Takes a request's row and queues it again. For tests, experiments, and whoever has something more urgent to serve.

        Without `swap` its pages are taken too, as the engine does by itself when pages run out, and its tokens are computed again. With
        `swap` the host pool keeps its tokens, what the device held besides is copied to the host, and it goes on where it was (a request
        whose prompt is not in yet is computed again all the same). Raises SpecError for `swap` without a host store.
        """
        if swap and not self.strategy.store.tier.fetches:
            raise SpecError(f"preemption by swap needs a pool in host memory; {self.strategy.describe()} has none")
        self._drain()
        for sequence in self._sequences.get(request, []):
            if sequence.row < 0:
                continue
            swaps = swap and sequence.status is Status.RUNNING and not sequence.replay
            if swaps:
                row = np.asarray([sequence.row], np.int32)
                self._swapped[sequence.id] = jax.device_get(programs.swap_out(self._layers, row))
            self.scheduler.preempt(sequence, swaps)

    def step(self) -> list[Output]:
        """Computes one turn and returns what has become known, mostly of the turn before. What belongs to a `stream` goes there."""
        self._turn()
        outputs, self._outputs = self._outputs, []
        return outputs

    @held()
    def _turn(self) -> None:
        scheduler = self.scheduler
        if scheduler.shortage():
            self._drain()
            while scheduler.shortage():
                scheduler.preempt(scheduler.last_admitted())
        turn = scheduler.turn()
        behind = len(self._pending)
        self._copy(turn.copies)
        for sequence in turn.resumed:
            saved = jax.device_put(self._swapped.pop(sequence.id), self._device)
            self._seat(sequence)
            self._layers = programs.swap_in(self._layers, saved, np.asarray([sequence.row], np.int32))
        if turn.decode:
            self._decode(turn.decode)
        for chunk in turn.chunks:
            self._prefill(chunk)
        self.steps += not turn.empty
        for _ in range(behind):
            self._read(self._pending.popleft())

    def stream(self, prompt: str | Several[int] | np.ndarray, **options: Any) -> Iterator[int]:
        """Adds a request of one sample and yields its tokens; others are served meanwhile, their news come with the next `step`.

        Options as in `add`. A stream that is closed early aborts its request.
        """
        if options.get("n", 1) != 1:
            raise InputError("a stream is one sample; open one for each, with a seed of its own")
        name = f"stream-{self._count}"
        self.add(name, prompt, **options)
        news = self._streams[name] = collections.deque()
        try:
            while news or name in self._sequences:
                if news:
                    yield from news.popleft().tokens
                else:
                    self._turn()
        finally:
            if name in self._sequences:
                self.abort(name)
            del self._streams[name]

    def warm_up(
        self,
        prompt_lengths: Several[int] | None = None,
        progress: Callable[[str], None] = lambda what: None,
        samples: bool = True,
    ) -> int:
        """Compiles every program a load can need, so that none is compiled while requests wait. Returns how many calls that took.

        Args:
          prompt_lengths: of the requests to come; None: anything up to max_model_len.
          samples: False if all of them are greedy, which leaves the programs that draw out: one for every size of decode call.
        """
        assert not self.scheduler.busy, "warm up before adding requests"
        calls = 0
        longest = self.limits.max_model_len - 1
        if prompt_lengths is not None and not self.scheduler.need.exact:  # else what a request has generated may be fed like a prompt
            longest = max(prompt_lengths, default=1)
        nobody = self._packed([], 1)
        for batch in _buckets(1, self.limits.max_num_seqs):
            draws = SamplingArrays.of([Sampling()] * batch, np.zeros(batch, np.int32)) if samples else None
            result = programs.decode(self.programs, self.model.params, self._layers, self._tokens, self._packed([], batch), draws)
            self._layers, self._tokens, _ = result
            progress(f"decode, {batch} rows")
            calls += 1
        for size in self._chunk_sizes(longest):
            nothing = np.zeros((1, size), np.int32)
            for context in (c for c in self._contexts(longest) if c >= self._context(size // 2 + 1)):
                logits = self._chunk_call(nobody, nothing, 0, context)
                progress(f"prefill, {size} tokens" + (f" of {context}" if context else ""))
                calls += 1
        for context in self._contexts(longest) if self._staging else ():
            self._commit_prompt(nobody, context)
            calls += 1
        for draws in (None, SamplingArrays.of([Sampling()], np.zeros(1, np.int32))) if samples else (None,):
            self._tokens, _ = programs.begin(self._tokens, logits, nobody, draws)
            calls += 1
        self._copy_pages([])
        if self.strategy.store.tier.fetches:
            row = np.asarray([self.limits.max_num_seqs], np.int32)
            saved = jax.device_put(jax.device_get(programs.swap_out(self._layers, row)), self._device)
            self._layers = programs.swap_in(self._layers, saved, row)
            calls += 2
        jax.block_until_ready((self._layers, self._tokens))
        return calls + 1

    def sample(self, now: float) -> Sample:
        """The engine's state at this moment, for a time series."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        empty, in_use = scheduler.empty(), blocks.used_blocks * blocks.block_size
        return Sample(
            time=now,
            running=len(scheduler.running) + len(scheduler.prefilling),
            waiting=len(scheduler.waiting),
            kv_usage=blocks.used_blocks / blocks.num_blocks,
            kv_live_tokens=in_use - empty,
            kv_fragmentation=empty / in_use if in_use else 0.0,
            preemptions=scheduler.preemptions,
            prefix_hit_tokens=blocks.prefix_hit_tokens,
            prefix_query_tokens=blocks.prefix_query_tokens,
            context_tokens=scheduler.seen(),
        )

    def traffic(self) -> np.ndarray:
        """What a host store has moved so far, per layer: tokens, rows held, wanted, moved [L, 4]; empty without one."""
        moved = [np.asarray(layer.traffic) for layer in self._layers if layer.traffic is not None]
        return np.stack(moved).astype(np.float64) if moved else np.zeros((0, 4))

    def _check_fits(self, sequence: Sequence) -> None:
        limit = self.limits.max_model_len
        if len(sequence.prompt) + sequence.max_tokens > limit:
            raise RequestRefused(
                f"request {sequence.request!r} with {len(sequence.prompt)} prompt tokens and max_tokens={sequence.max_tokens} exceeds "
                f"max_model_len={limit}; shorten one of them"
            )

    def _decode(self, sequences: list[Sequence]) -> None:
        packed = self._packed(sequences, _bucket(len(sequences), 1, self.limits.max_num_seqs))
        packed[: len(sequences), 1] -= 1  # the scheduler has booked the token that is fed now
        wanted: list[Sequence | None] = list(sequences)
        for i, sequence in enumerate(sequences):
            if sequence.replay:
                packed[i, 3] = sequence.outputs[len(sequence.outputs) - sequence.replay]
                sequence.replay -= 1
            if sequence.replay:
                wanted[i] = None
            else:
                sequence.dispatched += 1
        sampling = self._draws(sequences, len(packed))
        result = programs.decode(self.programs, self.model.params, self._layers, self._tokens, packed, sampling)
        self._layers, self._tokens, chosen = result
        self._pending.append(Pending(chosen, wanted))
        if not self._caching:
            for sequence in sequences:
                if sequence.dispatched == sequence.max_tokens:
                    self.scheduler.retire(sequence)

    def _prefill(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        size = chunk.end - chunk.start
        self._seat(sequence)
        packed = self._packed([sequence], 1)
        packed[0, 1] = chunk.start
        tokens = np.zeros((1, _bucket(size, SMALLEST_CHUNK, self.limits.chunk)), np.int32)
        tokens[0, :size] = sequence.target[chunk.start : chunk.end]
        context = self._context(chunk.end)
        logits = self._chunk_call(packed, tokens, size, context)
        if self._caching:
            self.scheduler.blocks.commit(sequence.id, sequence.target, chunk.end)
        if not chunk.last:
            return
        packed = packed.copy()  # the device may still be reading the old one
        packed[0, 1] = chunk.end
        if self._staging is not None:
            self._commit_prompt(packed, context)
        self.scheduler.prefilled(sequence)
        self._begin(sequence, logits, packed)
        if sequence.samples > 1:
            children = self._sequences[sequence.request][1:]
            self.scheduler.waiting.extendleft([child for child in children if not self._fork(sequence, child, logits)][::-1])
            sequence.samples = 1

    def _chunk_call(self, packed: np.ndarray, tokens: np.ndarray, size: int, context: int):
        valid = np.asarray([size], np.int32)
        if self._staging is None:
            result = programs.prefill(self.programs, context or None, self.model.params, self._layers, packed, tokens, valid)
            self._layers, logits = result
        else:
            self._staging, logits = programs.stage(self.programs, context, self.model.params, self._staging, packed, tokens, valid)
        return logits

    def _commit_prompt(self, packed: np.ndarray, context: int) -> None:
        self._layers = programs.commit(self.programs, context, self.model.params, self._layers, self._staging, packed)

    def _begin(self, sequence: Sequence, logits, packed: np.ndarray) -> None:
        """The first token after a prefill, unless it is known and about to be fed again."""
        if sequence.replay:
            return
        self._tokens, chosen = programs.begin(self._tokens, logits, packed, self._draws([sequence], 1))
        sequence.dispatched += 1
        self._pending.append(Pending(chosen, [sequence]))

    def _seat(self, sequence: Sequence) -> None:
        """Notes what calls must know of a sequence, in the row it has got."""
        self._sampling.put(sequence.row, sequence.sampling, sequence.seed)
        self._prompts[sequence.row] = len(sequence.prompt)

    def _draws(self, sequences: list[Sequence], batch: int) -> SamplingArrays | None:
        """How the rows of a call sample; None if all are greedy."""
        return self._sampling.rows([sequence.row for sequence in sequences], batch)

    def _fork(self, parent: Sequence, child: Sequence, logits) -> bool:
        """Starts another sample from the state a prompt has left. Returns whether there was room; else it queues like a request."""
        if not self.scheduler.fork(parent, child):
            return False
        self._seat(child)
        if not self.scheduler.need.grows:
            table = self.scheduler.blocks.table
            self._copy(list(zip(table(parent.id), table(child.id), strict=True)), (parent.row, child.row))
        packed = self._packed([child], 1)
        self._begin(child, logits, packed)
        return True

    def _copy(self, pairs: list[tuple[int, int]], rows: tuple[int, int] | None = None) -> None:
        """Copies pages, and the metadata of a row: (from, to) each."""
        for start in range(0, len(pairs), self._copies):
            self._copy_pages(pairs[start : start + self._copies], rows)

    def _copy_pages(self, pairs: list[tuple[int, int]], rows: tuple[int, int] | None = None) -> None:
        pages = np.full((2, self._copies), self.budget.num_pages, np.int32)
        for i, pair in enumerate(pairs):
            pages[:, i] = pair
        nobody = (self.limits.max_num_seqs, self.limits.max_num_seqs)
        self._layers = programs.copy(self.programs, self._layers, pages, np.asarray(rows or nobody, np.int32))

    def _packed(self, sequences: list[Sequence], batch: int) -> np.ndarray:
        """What a call must know of its rows: HEADER and block table, rows of nobody filled up."""
        scheduler = self.scheduler
        packed = np.zeros((batch, programs.HEADER + scheduler.pages.shape[1]), np.int32)
        packed[:, 0], packed[:, 3], packed[:, programs.HEADER :] = self.limits.max_num_seqs, -1, scheduler.no_page
        rows = [s.row for s in sequences]
        live = packed[: len(rows)]
        live[:, 0], live[:, 1], live[:, 2] = rows, scheduler.length[rows], self._prompts[rows]
        live[:, programs.HEADER :] = scheduler.pages[rows]
        return packed

    def _drain(self) -> None:
        """Waits for everything that is under way."""
        while self._pending:
            self._read(self._pending.popleft())

    def _read(self, pending: Pending) -> None:
        tokens = np.asarray(pending.tokens).tolist()
        now = time.perf_counter()
        for token, sequence in zip(tokens, pending.sequences, strict=False):
            if sequence is None or sequence.status.ended:
                continue
            if token < 0:
                self._end(sequence, Status.FAILED, "error: logits are not finite")
                continue
            sequence.outputs.append(token)
            stopped = token in sequence.stops
            if stopped or len(sequence.outputs) == sequence.max_tokens:
                self._end(sequence, Status.FINISHED, "stop" if stopped else "length", (token,), now)
                continue
            if self._caching and (len(sequence.prompt) + len(sequence.outputs) - 1) % self.scheduler.blocks.block_size == 0:
                self._commit(sequence)
            self._tell(Output(sequence.request, sequence.index, (token,), False, None, now))

    def _commit(self, sequence: Sequence) -> None:
        """Registers the pages that generated tokens have filled; the last token has not been fed yet."""
        if sequence.row >= 0:
            known = sequence.known()
            self.scheduler.blocks.commit(sequence.id, known, min(len(known) - 1, int(self.scheduler.length[sequence.row])))

    def _end(self, sequence: Sequence, status: Status, reason: str, tokens: tuple[int, ...] = (), now: float | None = None) -> None:
        if self._caching and status is Status.FINISHED:
            self._commit(sequence)
        if sequence.index and sequence.status is Status.WAITING and sequence not in self.scheduler.waiting:
            sequence.status = status  # a sample that never got its turn
        else:
            self.scheduler.end(sequence, status)
        self._swapped.pop(sequence.id, None)
        sequence.reason = reason
        siblings = self._sequences[sequence.request]
        if all(s.status.ended for s in siblings):
            del self._sequences[sequence.request]
        self._tell(Output(sequence.request, sequence.index, tokens, True, reason, time.perf_counter() if now is None else now))

    def _tell(self, output: Output) -> None:
        self._streams.get(output.request, self._outputs).append(output)

    def _chunk_sizes(self, longest: int) -> list[int]:
        return _buckets(min(SMALLEST_CHUNK, self.limits.chunk), _bucket(min(longest, self.limits.chunk), SMALLEST_CHUNK, self.limits.chunk))

    def _context(self, length: int) -> int:
        return 0 if not self._bounds_context else _bucket(length, SMALLEST_CONTEXT, staged_slots(self.limits.max_model_len))

    def _contexts(self, longest: int) -> list[int]:
        return [0] if not self._bounds_context else _buckets(min(SMALLEST_CONTEXT, self._context(longest)), self._context(longest))


def _bucket(count: int, smallest: int, largest: int) -> int:
    """The least power of two times `smallest` that is at least `count`, or `largest`."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)


def _buckets(smallest: int, largest: int) -> list[int]:
    """Every size that `_bucket` gives between these."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * 2, largest))
    return sizes
