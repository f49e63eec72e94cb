"""The scheduler by itself, and the engine's bookkeeping in long random traces over a device that is a dictionary."""

import collections
import dataclasses
import zlib
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.cache import parse_strategy
from kvjax.engine import engine as engine_module
from kvjax.engine import programs
from kvjax.engine.blocks import BlockManager
from kvjax.engine.engine import Engine
from kvjax.engine.memory import serving_strategy, spend
from kvjax.engine.scheduler import Limits, Need, Scheduler, Sequence, Status
from kvjax.generation import cache_shape
from kvjax.sampling import Sampling, SamplingArrays

# ------------------------------------------------------------------------------------------------------------------------ one scheduler


def make(num_pages=8, rows=3, spec="full", page_size=4, longest=24, batched=64, chunk=64, watermark=0.0, contiguous=False) -> Scheduler:
    need = Need(parse_strategy(spec, "paged", page_size=page_size), longest, contiguous)
    return Scheduler(need, Limits(rows, batched, chunk, longest), BlockManager(num_pages, page_size, watermark=watermark))


def request(id: int, prompt: int, max_tokens: int = 9) -> Sequence:
    return Sequence(id, f"request {id}", 0, np.full(prompt, id, np.int32), max_tokens, 0, frozenset())


def run(scheduler: Scheduler):
    """A turn whose tokens are known at once, as (decoded ids, chunks as (id, start, end), copies)."""
    turn = scheduler.turn()
    for chunk in turn.chunks:
        if chunk.last:
            scheduler.prefilled(chunk.sequence)
    for sequence in (*turn.decode, *(chunk.sequence for chunk in turn.chunks if chunk.last)):
        sequence.dispatched += 1
        sequence.outputs.append(0)
    return [s.id for s in turn.decode], [(c.sequence.id, c.start, c.end) for c in turn.chunks], turn.copies


def test_running_first_then_prompts_under_way_then_the_queue():
    scheduler = make(batched=10, chunk=4)
    for sequence in (request(0, 3), request(1, 14), request(2, 5)):
        scheduler.add(sequence)
    assert run(scheduler) == ([], [(0, 0, 3), (1, 0, 4), (1, 4, 7)], []), "ten tokens a turn, four a chunk"
    assert run(scheduler) == ([0], [(1, 7, 11), (1, 11, 14), (2, 0, 2)], []), "one of the ten is for the running request"
    assert run(scheduler) == ([0, 1], [(2, 2, 5)], [])
    assert run(scheduler) == ([0, 1, 2], [], [])


def test_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = make(num_pages=4)
    for sequence in (request(0, 8), request(1, 6), request(2, 1)):
        scheduler.add(sequence)
    assert run(scheduler) == ([], [(0, 0, 8)], []), "request 1 needs two pages, one is left; request 2 waits behind it"
    assert [s.id for s in scheduler.waiting] == [1, 2]


def test_rows_limit_admission():
    scheduler = make(rows=2)
    for i in range(3):
        scheduler.add(request(i, 1))
    assert run(scheduler)[1] == [(0, 0, 1), (1, 0, 1)]
    scheduler.end(scheduler.running[0], Status.FINISHED)
    assert run(scheduler) == ([1], [(2, 0, 1)], [])
    assert sorted(s.row for s in scheduler.running) == [0, 1]


def test_growing_takes_a_page_when_the_last_one_is_full():
    scheduler = make()
    scheduler.add(request(0, 3))
    held = []
    for _ in range(7):
        run(scheduler)
        held.append(scheduler.blocks.used_blocks)
    assert held == [1, 1, 2, 2, 2, 2, 3], "3 tokens, then 4, then one that needs a second page"
    assert scheduler.length[0] == 9


def test_a_policy_with_a_budget_takes_what_it_can_ever_need_at_once():
    scheduler = make(spec="streaming(sinks=2,window=5)", num_pages=4)
    for sequence in (request(0, 20, 4), request(1, 1, 3), request(2, 20, 4)):
        scheduler.add(sequence)
    run(scheduler)
    assert [len(scheduler.blocks.table(i)) for i in (0, 1)] == [2, 1], "7 kept and one new; no more than the 4 there will ever be"
    run(scheduler)
    assert [s.id for s in scheduler.waiting] == [2], "one page is left, two are needed"
    for _ in range(3):
        assert not scheduler.shortage()
        run(scheduler)
    assert len(scheduler.blocks.table(0)) == 2


def test_contiguous_requests_take_the_longest():
    scheduler = make(page_size=24, num_pages=2, contiguous=True)
    for i in range(3):
        scheduler.add(request(i, 1))
    assert run(scheduler)[1] == [(0, 0, 1), (1, 0, 1)]
    assert scheduler.blocks.free_blocks == 0


@pytest.mark.parametrize(("watermark", "admitted"), [(0.0, 3), (0.2, 2)])
def test_watermark_is_kept_at_admission(watermark, admitted):
    scheduler = make(num_pages=5, watermark=watermark)
    for sequence in (request(0, 7), request(1, 7), request(2, 3)):
        scheduler.add(sequence)
    assert len(run(scheduler)[1]) == admitted
    assert len(scheduler.waiting) == 3 - admitted


def test_watermark_is_there_to_grow_into():
    scheduler = make(num_pages=3, watermark=0.4)
    for sequence in (request(0, 3), request(1, 3)):
        scheduler.add(sequence)
    assert len(run(scheduler)[1]) == 2
    run(scheduler)
    assert scheduler.shortage(), "two new pages, one left"
    scheduler.preempt(scheduler.last_admitted())
    assert not scheduler.shortage()
    assert run(scheduler) == ([0], [], []), "the page that is free again stays free: the watermark"


def test_preemption_takes_the_last_admitted_and_puts_it_first():
    scheduler = make(num_pages=4, rows=4)
    for i in range(5):
        scheduler.add(request(i, 3))
    run(scheduler)
    run(scheduler)
    assert scheduler.shortage()
    victims = []
    while scheduler.shortage():
        victims.append(scheduler.last_admitted())
        scheduler.preempt(victims[-1])
    assert [s.id for s in victims] == [3, 2]
    assert [s.id for s in scheduler.waiting] == [2, 3, 4]
    assert {(s.row, s.computed, s.preemptions, s.status) for s in victims} == {(-1, 0, 1, Status.WAITING)}
    assert scheduler.preemptions == 2
    assert run(scheduler) == ([0, 1], [], [])
    for _ in (0, 1):
        scheduler.end(scheduler.running[0], Status.FINISHED)
    assert run(scheduler)[1] == [(2, 0, 5), (3, 0, 5)], "prompt and outputs come back as one prompt"


def test_a_prompt_under_way_is_preempted_before_those_that_run():
    scheduler = make(num_pages=4, batched=4, chunk=4)
    scheduler.add(request(0, 3, 20))
    scheduler.add(request(1, 11))
    run(scheduler)
    assert [s.id for s in scheduler.prefilling] == [1]
    run(scheduler)
    assert scheduler.shortage()
    assert scheduler.last_admitted().id == 1


def test_what_was_generated_is_fed_again_where_the_state_depends_on_how():
    scheduler = make(spec="h2o(heavy=2,recent=2)")
    scheduler.add(request(0, 6))
    for _ in range(3):
        run(scheduler)
    (sequence,) = scheduler.running
    scheduler.preempt(sequence)
    scheduler.turn()
    assert (len(sequence.target), sequence.replay) == (6, 3)


def test_one_prompt_is_staged_at_a_time():
    scheduler = make(spec="streaming(sinks=2,window=2)", batched=10, chunk=8)
    for sequence in (request(0, 16), request(1, 3), request(2, 20)):
        scheduler.add(sequence)
    assert run(scheduler)[1] == [(0, 0, 8), (0, 8, 10)]
    assert [s.id for s in scheduler.waiting] == [1, 2], "a row and pages are free, the staging row is not"
    assert run(scheduler)[1] == [(0, 10, 16), (1, 0, 3), (2, 0, 1)], "one after the other in a turn"


def fork(scheduler: Scheduler, parent: Sequence, id: int) -> Sequence:
    child = dataclasses.replace(request(id, len(parent.prompt)), prompt=parent.prompt, index=1)
    assert scheduler.fork(parent, child)
    child.dispatched, child.outputs = 1, [0]
    return child


def test_forks_share_pages_until_they_write():
    scheduler = make(num_pages=8, rows=4)
    parent = request(0, 6)
    scheduler.add(parent)
    run(scheduler)
    children = [fork(scheduler, parent, id) for id in (1, 2)]
    tables = [list(scheduler.blocks.table(i)) for i in range(3)]
    assert tables[1:] == tables[:1] * 2
    assert scheduler.blocks.used_blocks == 2
    assert scheduler.empty() == 2
    assert not scheduler.shortage()
    decoded, _, copies = run(scheduler)
    assert decoded == [0, 1, 2]
    assert [source for source, _ in copies] == [tables[0][1]] * 2, "the last page twice: one of three may keep it"
    tails = [scheduler.blocks.table(i)[1] for i in range(3)]
    assert len(set(tails)) == 3
    assert {target for _, target in copies} == set(tails) - {tables[0][1]}
    assert [scheduler.pages[s.row, 1] for s in (parent, *children)] == tails
    assert scheduler.empty() == 3
    assert run(scheduler)[2] == []


@pytest.mark.parametrize(("free", "short"), [(2, False), (1, True)])
def test_shortage_counts_the_copies_of_shared_pages(free, short):
    scheduler = make(num_pages=2 + free, rows=4)
    parent = request(0, 6)
    scheduler.add(parent)
    run(scheduler)
    for id in (1, 2):
        fork(scheduler, parent, id)
    assert scheduler.shortage() == short
    if short:
        scheduler.preempt(scheduler.last_admitted())
        assert not scheduler.shortage()
    assert len(run(scheduler)[2]) == free


def test_shared_full_pages_cost_nothing():
    scheduler = make(num_pages=4, rows=3, page_size=4)
    parent = request(0, 8)
    scheduler.add(parent)
    run(scheduler)
    fork(scheduler, parent, 1)
    assert scheduler.blocks.used_blocks == 3
    assert run(scheduler)[2] == [(2, 3)]
    assert [list(scheduler.blocks.table(i)) for i in (0, 1)] == [[0, 1, 3], [0, 1, 2]]


def test_fork_without_a_row_or_pages_changes_nothing():
    child = request(1, 5)
    for scheduler in (make(rows=1), make(spec="h2o(heavy=2,recent=2)", num_pages=3)):
        parent = request(0, 5)
        scheduler.add(parent)
        run(scheduler)
        used = scheduler.blocks.used_blocks
        assert not scheduler.fork(parent, child)
        assert (child.row, child.status, scheduler.blocks.used_blocks, len(scheduler.running)) == (-1, Status.WAITING, used, 1)
        scheduler.blocks.check()


def test_ending_gives_everything_back_wherever_it_is():
    scheduler = make(batched=9, chunk=4)
    sequences = [request(0, 3), request(1, 12), request(2, 3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run(scheduler)
    assert [s.status for s in sequences] == [Status.RUNNING, Status.PREFILL, Status.WAITING]
    for sequence in sequences:
        scheduler.end(sequence, Status.ABORTED)
    assert not scheduler.busy
    assert scheduler.blocks.used_blocks == 0
    assert (scheduler.pages == scheduler.no_page).all()
    assert not scheduler.length.any()
    assert not scheduler.slots.any()


def test_a_retired_sequence_ends_without_a_row():
    scheduler = make()
    sequence = request(0, 3)
    scheduler.add(sequence)
    run(scheduler)
    scheduler.retire(sequence)
    assert (sequence.row, sequence.status, scheduler.blocks.used_blocks) == (-1, Status.RUNNING, 0)
    scheduler.end(sequence, Status.FINISHED)
    assert sequence.status is Status.FINISHED


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("full", [3, 10, 15]),
        ("streaming(sinks=2,window=5)", [3, 7, 7]),
        ("h2o(heavy=0.2,recent=0.3)", [3, 5, 5]),
        ("h2o(heavy=2,recent=3,decode=False)", [3, 5, 10]),
    ],
)
def test_tokens_held_after_3_of_the_prompt_all_10_and_5_more(spec, held):
    need = Need(parse_strategy(spec, "paged"), 32, False)
    assert [need.held(10, length) for length in (3, 10, 15)] == held


# -------------------------------------------------------------------------------------------- the engine over a device that is a dictionary

LONGEST = 24
BAD = 5
"""The token after which logits are not finite."""

DEFAULT = Sampling(2.0)
"""Of the engine, for requests that bring none."""


def following(text: tuple[int, ...], sampling: Sampling, seed: int) -> int:
    """What the imaginary model says after a text; every token of it counts, and so does their order. Greedy, no seed counts."""
    draw = [seed, int(sampling.temperature), sampling.top_k] if sampling.temperature else []
    return -1 if BAD in text else zlib.crc32(np.array([*draw, *text], np.int32).tobytes()) % BAD


def drawn(sampling: SamplingArrays | None, row: int) -> tuple[Sampling, int]:
    """What a call says of one of its rows."""
    if sampling is None:
        return Sampling(), 0
    temperature, top_k, top_p, seed = (array[row].item() for array in jax.tree.leaves(sampling))
    return Sampling(temperature, top_k, top_p), seed


class Device:
    """Stands in for the programs of an engine. Pages hold the tokens that were fed instead of keys; what is read is checked to be there.

    For a policy with a budget, whose pages mean nothing token by token, each page of a row holds the row's whole text, and so does its
    metadata: they must never come apart.

    Attributes:
      calls: shapes and static arguments of the programs called.
    """

    def __init__(self, engine: Engine):
        self.rows, self.size = engine.budget.rows, engine.scheduler.blocks.block_size
        self.num_pages, self.staged = engine.budget.num_pages, engine.scheduler.need.stages
        self.pages: dict = {}
        self.metadata: dict[int, tuple[int, ...]] = {}
        self.staging = [BAD] * 256
        self.calls: set = set()
        self._arguments: collections.deque = collections.deque(maxlen=16)

    def install(self, monkeypatch):
        for name in ("decode", "prefill", "stage", "commit", "begin", "copy"):
            monkeypatch.setattr(programs, name, getattr(self, name))

    def decode(self, _, params, layers, tokens, packed, sampling):
        self._note("decode", packed)
        if sampling is not None:  # a program of its own
            self._note("draw", *jax.tree.leaves(sampling))
        tokens, chosen = np.array(tokens), np.zeros(len(packed), np.int32)
        live = [(i, *self._unpacked(p)) for i, p in enumerate(packed) if p[0] < self.rows]
        texts = {}
        fed = [(row, length, table, tokens[row] if forced < 0 else forced) for _, row, length, _, forced, table in live]
        if self.staged:
            for row, length, table, token in fed:
                assert len(self.metadata[row]) == length
                assert {self.pages[page] for page in table} == {self.metadata[row]}
                texts[row] = self.metadata[row] = (*self.metadata[row], int(token))
                self.pages |= dict.fromkeys(table, texts[row])
        else:
            written = [(table[length // self.size], length % self.size) for _, length, table, _ in fed]
            assert len(set(written)) == len(written), "two rows write one slot"
            self.pages |= {slot: int(token) for slot, (*_, token) in zip(written, fed, strict=True)}
            texts = {row: self._read(table, length + 1) for row, length, table, _ in fed}
        for i, row, *_ in live:
            chosen[i] = following(texts[row], *drawn(sampling, i))
            tokens[row] = max(chosen[i], 0)
        assert len({row for row, *_ in fed}) == len(fed), "a row twice"
        return layers, tokens, chosen

    def prefill(self, _, context, params, layers, packed, chunk, num_valid):
        assert not self.staged
        self._note("prefill", packed, chunk, num_valid)
        _, start, _, _, table = self._unpacked(packed[0])
        end = start + int(num_valid[0])
        for i in range(start, end):
            self.pages[table[i // self.size], i % self.size] = int(chunk[0, i - start])
        return layers, self._read(table, end)

    def stage(self, _, context, params, staging, packed, chunk, num_valid):
        assert self.staged
        self._note("stage", packed, chunk, num_valid, context)
        start, end = int(packed[0, 1]), int(packed[0, 1] + num_valid[0])
        assert end <= context
        self.staging[start:end] = chunk[0, : end - start].tolist()
        return staging, tuple(self.staging[:end])

    def commit(self, _, context, params, layers, staging, packed):
        self._note("commit", packed, context)
        row, length, prompt_length, _, table = self._unpacked(packed[0])
        if row < self.rows:
            assert length == prompt_length <= context
            self.metadata[row] = tuple(self.staging[:length])
            self.pages |= dict.fromkeys(table, self.metadata[row])
        return layers

    def begin(self, tokens, logits, packed, sampling):
        self._note("begin", packed, *jax.tree.leaves(sampling))
        row, length, *_ = self._unpacked(packed[0])
        tokens, chosen = np.array(tokens), following(logits, *drawn(sampling, 0))
        if row < self.rows:
            assert len(logits) == length
            tokens[row] = max(chosen, 0)
        return tokens, np.array([chosen], np.int32)

    def copy(self, _, layers, pages, rows):
        self._note("copy", pages, rows)
        found = [(source, target, self._page(source)) for source, target in pages.T.tolist() if target < self.num_pages]
        for source, target, content in found:
            for slot in range(self.size):
                self.pages.pop((target, slot), None)
            for key, value in content.items():
                self.pages[target if key == source else (target, key[1])] = value
        if rows[1] < self.rows:
            self.metadata[int(rows[1])] = self.metadata[int(rows[0])] if self.staged else ()
        return layers

    def _page(self, page: int) -> dict:
        keys = [page, *((page, slot) for slot in range(self.size))]
        return {key: self.pages[key] for key in keys if key in self.pages}

    def _read(self, table: list[int], length: int) -> tuple[int, ...]:
        return tuple(self.pages[table[i // self.size], i % self.size] for i in range(length))

    def _unpacked(self, packed: np.ndarray):
        row, length, prompt_length, forced = packed[: programs.HEADER].tolist()
        return row, length, prompt_length, forced, [p for p in packed[programs.HEADER :].tolist() if p < self.num_pages]

    def _note(self, program: str, *arguments):
        """Remembers what decides on compilation, and that an array which the device may still read has not changed since."""
        self.calls.add((program, *(a.shape if isinstance(a, np.ndarray) else a for a in arguments)))
        self._arguments.extend((a, a.copy()) for a in arguments if isinstance(a, np.ndarray))
        for array, before in self._arguments:
            assert array.tobytes() == before.tobytes(), "changed after it had been handed to the device"


def check(scheduler: Scheduler):
    """What must hold between any two calls."""
    scheduler.blocks.check()
    active = [*scheduler.prefilling, *scheduler.running]
    rows = [s.row for s in active]
    assert sorted([*rows, *scheduler._rows]) == list(range(scheduler.limits.max_num_seqs)), "every row is free or somebody's"
    assert {s.status for s in scheduler.prefilling} <= {Status.PREFILL}
    assert {s.status for s in scheduler.running} <= {Status.RUNNING}
    assert {(s.status, s.row, s.computed) for s in scheduler.waiting} <= {(Status.WAITING, -1, 0)}
    assert len({id(s) for s in (*active, *scheduler.waiting)}) == len(active) + len(scheduler.waiting)
    assert sorted(scheduler.blocks._tables) == sorted(s.id for s in active)
    for sequence in active:
        table, row = list(scheduler.blocks.table(sequence.id)), sequence.row
        assert scheduler.pages[row].tolist() == table + [scheduler.no_page] * (scheduler.pages.shape[1] - len(table))
        assert scheduler.slots[row] == len(table) * scheduler.blocks.block_size
        held = int(scheduler.length[row])
        assert held < len(sequence.prompt) + sequence.max_tokens
        if scheduler.need.stages:
            held = scheduler.need.held(len(sequence.prompt), held)
        assert 0 <= held <= scheduler.slots[row]
    assert scheduler._forked <= {s.id for s in scheduler.running}
    assert (scheduler.pages[scheduler._rows] == scheduler.no_page).all()
    assert not scheduler.length[scheduler._rows].any()
    assert scheduler.empty() == scheduler.blocks.used_blocks * scheduler.blocks.block_size - live_tokens(scheduler)


def live_tokens(scheduler: Scheduler) -> int:
    """Tokens in the pages, those of shared pages once."""
    if scheduler.need.stages:
        return sum(scheduler.need.held(len(s.prompt), int(scheduler.length[s.row])) for s in scheduler.running)
    size = scheduler.blocks.block_size
    filled: dict[int, int] = {}
    for sequence in (*scheduler.prefilling, *scheduler.running):
        for i, page in enumerate(scheduler.blocks.table(sequence.id)):
            filled[page] = max(filled.get(page, 0), min(max(int(scheduler.length[sequence.row]) - i * size, 0), size))
    return sum(filled.values())


def checking(scheduler: Scheduler):
    """`scheduler.turn`, with the rules that a turn keeps to."""
    plan, limits = scheduler.turn, scheduler.limits

    def turn():
        assert not scheduler.shortage()
        queue = list(scheduler.waiting)
        wanting = [s for s in scheduler.running if s.replay or s.dispatched < s.max_tokens]
        found = plan()
        assert found.decode == wanting, "whoever runs gets a token"
        assert len(found.decode) + sum(c.end - c.start for c in found.chunks) <= limits.max_num_batched_tokens
        assert all(0 < c.end - c.start <= limits.chunk for c in found.chunks)
        admitted = len(queue) - len(scheduler.waiting)
        assert list(scheduler.waiting) == queue[admitted:]
        assert scheduler.prefilling[len(scheduler.prefilling) - admitted :] == queue[:admitted]
        if scheduler.need.stages:
            assert sum(s.computed < len(s.target) for s in scheduler.prefilling) <= 1
        return found

    return turn


@dataclasses.dataclass
class Asked:
    """A request of a trace and what has been heard of its samples."""

    prompt: list[int]
    max_tokens: int
    n: int
    seed: int
    stops: list[int]
    sampling: Sampling | None = None
    aborted: bool = False
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)

    def alone(self, index: int) -> tuple[list[int], str]:
        text, reason = list(self.prompt), "length"
        while len(text) < len(self.prompt) + self.max_tokens:
            token = following(tuple(text), self.sampling or DEFAULT, self.seed + index)
            if token < 0:
                reason = "error: logits are not finite"
                break
            text.append(token)
            if token in self.stops:
                reason = "stop"
                break
        return text[len(self.prompt) :], reason

    def verify(self):
        assert sorted(self.reasons) == list(range(self.n)), "each sample ends"
        for index, reason in self.reasons.items():
            tokens, due = self.alone(index)
            if reason == "abort":
                assert self.aborted
                assert self.tokens[index] == tokens[: len(self.tokens[index])]
            else:
                assert (self.tokens[index], reason) == (tokens, due)


class Trace:
    """Random calls on an engine, with prompts of up to `longest` tokens."""

    def __init__(self, engine: Engine, rng: np.random.Generator, longest: int):
        self.engine, self.rng, self.longest = engine, rng, longest
        self.asked: dict[str, Asked] = {}
        self.streams: list[tuple] = []
        self.families = rng.integers(0, BAD, (3, LONGEST))

    def request(self, n: int) -> Asked:
        rng = self.rng
        length = int(rng.integers(1, self.longest + 1))
        prompt = self.families[rng.integers(3)][:length].tolist()
        if rng.random() < 0.5:
            prompt[length // 2 :] = rng.integers(0, BAD, length - length // 2).tolist()
        if rng.random() < 0.1:
            prompt[int(rng.integers(length))] = BAD
        stops = rng.integers(0, BAD, int(rng.integers(0, 2))).tolist()
        sampling = (None, Sampling(), Sampling(3.0), Sampling(1.0, 4))[int(rng.integers(4))]
        return Asked(prompt, int(rng.integers(1, LONGEST - length + 1)), n, int(rng.integers(0, 3)), stops, sampling)

    def options(self, asked: Asked) -> dict[str, Any]:
        return dict(max_tokens=asked.max_tokens, seed=asked.seed, stop_tokens=asked.stops, sampling=asked.sampling)

    def add(self):
        asked = self.request(n=int(self.rng.choice([1, 1, 1, 2, 4])))
        name = f"r{len(self.asked)}"
        self.engine.add(name, asked.prompt, n=asked.n, **self.options(asked))
        self.asked[name] = asked

    def open_stream(self):
        asked = self.request(n=1)
        found: list[int] = []
        stream = self.engine.stream(asked.prompt, **self.options(asked))
        self.streams.append((asked, stream, found))

    def advance_stream(self):
        if self.streams:
            which = int(self.rng.integers(len(self.streams)))
            asked, stream, found = self.streams[which]
            token = next(stream, None)
            if token is None:
                assert found == asked.alone(0)[0]
            else:
                found.append(token)
                if self.rng.random() < 0.9:
                    return
                stream.close()
                assert found == asked.alone(0)[0][: len(found)]
            del self.streams[which]

    def abort(self):
        if live := [name for name in self.asked if name in self.engine._sequences]:
            name = str(self.rng.choice(live))
            self.asked[name].aborted = True
            self.engine.abort(name)

    def preempt(self):
        if live := list(self.engine._sequences):
            self.engine.preempt(str(self.rng.choice(live)))

    def step(self):
        for output in self.engine.step():
            asked = self.asked[output.request]
            assert output.index not in asked.reasons, "news after the end"
            assert output.finished == (output.reason is not None)
            asked.tokens[output.index] += output.tokens
            if output.finished:
                asked.reasons[output.index] = output.reason

    def run(self, count: int):
        calls = {self.step: 10, self.add: 3, self.preempt: 1, self.abort: 0.3, self.open_stream: 0.5, self.advance_stream: 2}
        weights = np.array(list(calls.values())) / sum(calls.values())
        for call in self.rng.choice(np.array(list(calls), object), count, p=weights):
            call()
            check(self.engine.scheduler)
        self.streams, left = [], self.streams
        for asked, stream, found in left:
            assert [*found, *stream] == asked.alone(0)[0]
        for _ in range(2000):
            if not self.engine.busy:
                break
            self.step()
            check(self.engine.scheduler)
        assert not self.engine.busy, "it ends"


def memory(model, strategy, pages: int, rows: int) -> int:
    """Bytes for that many pages, or for one request if that is more."""
    serving, contiguous = serving_strategy(strategy, LONGEST, 1)
    need = Need(serving, LONGEST, contiguous)
    price = spend(need, cache_shape(model), 1 << 40, rows)
    return price.staging + rows * price.row + max(pages, rows, need.pages(need.capacity)) * price.page


SPECS = {
    "vllm": "full+paged",
    "prefix-caching": "full+paged",
    "dense": "full",
    "oracle": "oracle_topk(k=3)+paged",
    "oracle-dense": "oracle_topk(k=3)",
    "streaming": "streaming(sinks=2,window=5)+paged",
    "h2o-dense": "h2o(heavy=2,recent=3)",
    "h2o-prompt": "h2o(heavy=0.2,recent=0.2,decode=False)+paged",
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", SPECS)
def test_random_traces(byte_model, monkeypatch, kind, seed):
    """Whatever is added, aborted, preempted and streamed: every sample is what it is alone, ends once, and leaves nothing behind."""
    rng = np.random.default_rng([seed, *kind.encode()])
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 2)
    monkeypatch.setattr(engine_module, "SMALLEST_CONTEXT", 4)
    monkeypatch.setattr(programs, "allocate", lambda *_: ())
    page_size, rows, chunk = (int(rng.integers(low, high)) for low, high in ((1, 6), (1, 6), (1, 12)))
    strategy = parse_strategy(SPECS[kind], page_size=page_size)
    engine = Engine(
        byte_model, strategy, kv_memory=memory(byte_model, strategy, int(rng.integers(1, 60 // page_size)), rows), max_num_seqs=rows,
        max_model_len=LONGEST, max_num_batched_tokens=rows + int(rng.integers(1, 16)), prefill_chunk=chunk,
        prefix_caching=kind == "prefix-caching", watermark=float(rng.choice([0.0, 0.01, 0.2])), extents=int(rng.integers(1, 5)),
        sampling=DEFAULT,
    )  # fmt: skip
    device = Device(engine)
    device.install(monkeypatch)
    longest_prompt = int(rng.integers(1, LONGEST))
    engine.warm_up([longest_prompt])
    compiled, device.calls = device.calls, set()
    monkeypatch.setattr(engine.scheduler, "turn", checking(engine.scheduler))
    trace = Trace(engine, rng, longest_prompt)
    trace.run(300)
    for asked in trace.asked.values():
        asked.verify()
    assert engine.scheduler.blocks.used_blocks == 0
    assert not engine._streams
    assert device.calls <= compiled, "something would have been compiled under load"
