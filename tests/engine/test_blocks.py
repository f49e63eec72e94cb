"""The block manager against a naive model that knows every token, and its rules one by one."""

import copy
import inspect
import math
import types

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvjax.engine import blocks
from kvjax.engine.blocks import BlockManager, OutOfBlocks
from kvjax.errors import InputError, KvjaxError


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def snapshot(manager: BlockManager) -> dict:
    return copy.deepcopy(vars(manager))


def cached(num_blocks: int, block_size: int = 2, **options) -> BlockManager:
    return BlockManager(num_blocks, block_size, prefix_caching=True, **options)


def run(manager: BlockManager, seq: int, tokens: np.ndarray) -> int:
    """Admits a prompt and computes all of it."""
    hit = manager.admit(seq, math.ceil(len(tokens) / manager.block_size), tokens)
    manager.commit(seq, tokens, len(tokens))
    return hit


class Naive:
    """What the manager should do, in lists: prefixes are keyed by all of their tokens, counts are taken anew each time."""

    def __init__(self, num_blocks, block_size, extents, prefix_caching, watermark):
        self.size = block_size
        self.extent = [number for number, size in enumerate(extents) for _ in range(size)]
        self.caching = prefix_caching
        self.reserve = int(watermark * num_blocks)
        self.idle = list(range(num_blocks))[::-1]  # free and not cached, last freed at the end
        self.lru = []  # free and cached, last freed at the end
        self.registered = {}  # prefix -> block
        self.tables = {}
        self.done = {}  # sequence -> full blocks that were committed
        self.queried = self.hit = 0

    def refs(self, block):
        return sum(table.count(block) for table in self.tables.values())

    def free(self):
        return len(self.idle) + len(self.lru)

    def is_registered(self, block):
        return block in self.registered.values()

    def take(self):
        if not self.idle:
            block = self.lru.pop(0)
            self.registered = {prefix: other for prefix, other in self.registered.items() if other != block}
            return block
        lowest = min(self.extent[block] for block in self.idle)
        block = [block for block in self.idle if self.extent[block] == lowest][-1]
        self.idle.remove(block)
        return block

    def lookup(self, tokens):
        found = []
        for end in range(self.size, len(tokens), self.size):
            if tuple(tokens[:end]) not in self.registered:
                break
            found.append(self.registered[tuple(tokens[:end])])
        return found

    def shared(self, num_blocks, tokens):
        return [] if tokens is None else self.lookup(tokens)[:num_blocks]

    def can_admit(self, num_blocks, tokens):
        hits = self.shared(num_blocks, tokens)
        left = self.free() - (num_blocks - len(hits)) - sum(block in self.lru for block in hits)
        return left >= (self.reserve if any(self.tables.values()) else 0)

    def admit(self, seq, num_blocks, tokens):
        hits = self.shared(num_blocks, tokens)
        self.lru = [block for block in self.lru if block not in hits]
        self.tables[seq] = hits + [self.take() for _ in range(num_blocks - len(hits))]
        if self.caching:
            self.done[seq] = len(hits)
            if tokens is not None:
                self.queried += len(tokens)
                self.hit += len(hits) * self.size
        return len(hits) * self.size

    def grow(self, seq, num_blocks):
        added = [self.take() for _ in range(num_blocks - len(self.tables[seq]))]
        self.tables[seq] += added
        return added

    def commit(self, seq, tokens, computed):
        if seq not in self.done:
            return
        for index in range(self.done[seq], computed // self.size):
            self.registered.setdefault(tuple(tokens[: (index + 1) * self.size]), self.tables[seq][index])
            self.done[seq] = index + 1

    def fork(self, parent, child):
        self.tables[child] = list(self.tables[parent])
        if parent in self.done:
            self.done[child] = self.done[parent]

    def writable(self, seq, index):
        source = self.tables[seq][index]
        if self.refs(source) == 1:
            return None
        self.tables[seq][index] = self.take()
        return source, self.tables[seq][index]

    def release(self, seq):
        for block in reversed(self.tables.pop(seq)):
            if not self.refs(block):
                (self.lru if self.is_registered(block) else self.idle).append(block)
        self.done.pop(seq, None)

    def reset(self):
        self.idle += reversed(self.lru)
        self.lru, self.registered, self.done = [], {}, {}


TOKENS = st.sampled_from([0, 1])
FAMILIES = st.builds(lambda text, length: (text * 4)[:length], st.sampled_from([[0], [0, 1], [0, 0, 1]]), st.integers(1, 10))
PROMPTS = FAMILIES | st.lists(TOKENS, min_size=1, max_size=8)


class Traces(RuleBasedStateMachine):
    """Sequences that come, compute, branch and go, with the tokens that every page would hold on a device."""

    source = blocks  # the module under test; broken copies below

    @initialize(
        block_size=st.sampled_from([1, 2, 3]),
        extents=st.sampled_from([(6,), (2, 1, 3), (1, 7), (5, 4, 3)]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.2, 0.5]),
    )
    def start(self, block_size, extents, prefix_caching, watermark):
        options = dict(extents=extents, prefix_caching=prefix_caching, watermark=watermark)
        self.manager = self.source.BlockManager(sum(extents), block_size, **options)
        self.naive = Naive(sum(extents), block_size, **options)
        self.pages = [[None] * block_size for _ in range(sum(extents))]
        self.texts = {}  # sequence -> all of its tokens
        self.computed = {}  # sequence -> how many of them are in its pages
        self.named = 0

    def sequence(self, data):
        return data.draw(st.sampled_from(sorted(self.texts)), label="seq")

    def new_name(self):
        self.named += 1
        return self.named

    def attempt(self, possible, call, *args):
        """The call's result; None where it must find no block and leave everything as it was."""
        if possible:
            try:
                return call(*args)
            except self.source.OutOfBlocks as error:
                raise AssertionError("there were blocks enough") from error
        before = snapshot(self.manager)
        with pytest.raises(self.source.OutOfBlocks):
            call(*args)
        assert snapshot(self.manager) == before
        return None

    def held(self, seq):
        """The tokens in the pages of a sequence, as far as it computed them."""
        return [token for block in self.manager.table(seq) for token in self.pages[block]][: self.computed[seq]]

    @rule(prompt=PROMPTS, num_blocks=st.integers(0, 5), look=st.sampled_from([True, True, True, False]))
    def admit(self, prompt, num_blocks, look):
        self.admit_with(prompt, num_blocks, look)

    @rule(prompt=FAMILIES)
    def serve(self, prompt):
        """The life of most sequences: admitted with its prompt, which is computed at once."""
        seq = self.admit_with(prompt, -(-len(prompt) // self.manager.block_size), True)
        if seq is not None:
            self.compute_on(seq, len(prompt) - self.computed[seq])
            self.commit_to(seq, self.computed[seq])

    def admit_with(self, prompt, num_blocks, look):
        seq, tokens = self.new_name(), ids(*prompt) if look else None
        possible = self.naive.can_admit(num_blocks, prompt if look else None)
        assert self.manager.can_admit(num_blocks, tokens) == possible
        hit = self.attempt(possible, self.manager.admit, seq, num_blocks, tokens)
        if not possible:
            return None
        assert hit == self.naive.admit(seq, num_blocks, prompt if look else None)
        self.texts[seq], self.computed[seq] = list(prompt), hit
        return seq

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=st.integers(-1, 2))
    def grow(self, data, more):
        seq = self.sequence(data)
        self.grow_to(seq, len(self.naive.tables[seq]) + more)

    def grow_to(self, seq, num_blocks):
        possible = num_blocks - len(self.naive.tables[seq]) <= self.naive.free()
        added = self.attempt(possible, self.manager.grow, seq, num_blocks)
        if possible:
            assert added == self.naive.grow(seq, num_blocks)
        return possible

    @precondition(lambda self: any(self.naive.tables.values()))
    @rule(data=st.data())
    def writable(self, data):
        seq = data.draw(st.sampled_from([seq for seq, table in self.naive.tables.items() if table]), label="seq")
        self.make_writable(seq, data.draw(st.integers(0, len(self.naive.tables[seq]) - 1), label="index"))

    def make_writable(self, seq, index):
        block = self.naive.tables[seq][index]
        if self.naive.is_registered(block):
            with pytest.raises(AssertionError, match="registered prefix"):
                self.manager.writable(seq, index)
            return False
        possible = self.naive.refs(block) == 1 or self.naive.free() > 0
        copied = self.attempt(possible, self.manager.writable, seq, index)
        if possible:
            assert copied == self.naive.writable(seq, index)
            if copied:
                source, destination = copied
                self.pages[destination] = list(self.pages[source])
        return possible

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), new=st.lists(TOKENS, min_size=1, max_size=6), commit=st.booleans())
    def compute(self, data, new, commit):
        seq = self.sequence(data)
        self.compute_on(seq, len(new), new)
        if commit:
            self.commit_to(seq, self.computed[seq])

    def compute_on(self, seq, count, sampled=()):
        """Writes the next tokens, as far as there are blocks: what is left of the text, then sampled ones."""
        size, first = self.manager.block_size, self.computed[seq]
        text = self.texts[seq]
        text += sampled[: max(first + count - len(text), 0)]
        for position in range(first, first + count):
            if not (self.grow_to(seq, position // size + 1) and self.make_writable(seq, position // size)):
                break
            self.pages[self.manager.table(seq)[position // size]][position % size] = text[position]
            self.computed[seq] += 1

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), behind=st.integers(0, 4))
    def commit(self, data, behind):
        seq = self.sequence(data)
        self.commit_to(seq, max(self.computed[seq] - behind, 0))

    def commit_to(self, seq, computed):
        self.manager.commit(seq, ids(*self.texts[seq]), computed)
        self.naive.commit(seq, self.texts[seq], computed)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 5))
    def rewind(self, data, count):
        """Drops tokens that were not committed, as speculative decoding does."""
        seq = self.sequence(data)
        final = self.naive.done.get(seq, 0) * self.manager.block_size
        self.computed[seq] = max(final, self.computed[seq] - count)
        del self.texts[seq][max(self.computed[seq], 1) :]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        parent, child = self.sequence(data), self.new_name()
        self.manager.fork(parent, child)
        self.naive.fork(parent, child)
        self.texts[child], self.computed[child] = list(self.texts[parent]), self.computed[parent]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 3))
    def release(self, data, count):
        for _ in range(min(count, len(self.texts))):
            self.end(self.sequence(data))

    def end(self, seq):
        self.manager.release(seq)
        self.naive.release(seq)
        del self.texts[seq], self.computed[seq]

    @precondition(lambda self: self.naive.registered)
    @rule(chance=st.integers(0, 7))
    def reset(self, chance):
        if chance == 7:  # seldom, or nothing is ever cached for long
            self.manager.reset_prefix_cache()
            self.naive.reset()

    @rule(prompt=PROMPTS)
    def lookup(self, prompt):
        before = snapshot(self.manager)
        found = self.manager.lookup(ids(*prompt))
        assert snapshot(self.manager) == before
        assert found == self.naive.lookup(prompt)
        tokens = [token for block in found for token in self.pages[block]]
        assert len(tokens) < len(prompt)
        assert tokens == prompt[: len(tokens)]

    @invariant()
    def agree(self):
        self.manager.check()
        for seq, table in self.naive.tables.items():
            assert list(self.manager.table(seq)) == table
        refs = [self.naive.refs(block) for block in range(self.manager.num_blocks)]
        assert [self.manager.ref_count(block) for block in range(self.manager.num_blocks)] == refs
        assert self.manager.used_blocks == sum(count > 0 for count in refs)
        assert self.manager.free_blocks == self.naive.free()
        assert self.manager.cached_blocks == len(self.naive.lru)
        assert (self.manager.prefix_query_tokens, self.manager.prefix_hit_tokens) == (self.naive.queried, self.naive.hit)

    @invariant()
    def pages_hold_what_was_written(self):
        for seq, text in self.texts.items():
            assert self.held(seq) == text[: self.computed[seq]]
        for prefix, block in self.naive.registered.items():
            assert self.pages[block] == list(prefix[-self.manager.block_size :])

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for seq in list(self.texts):
            self.end(seq)
        self.agree()
        assert (self.manager.used_blocks, self.manager.free_blocks) == (0, self.manager.num_blocks)


TRACES = settings(max_examples=60, stateful_step_count=80, deadline=None, database=None)


def test_random_traces():
    run_state_machine_as_test(Traces, settings=TRACES)


def mutant(old: str, new: str) -> type[Traces]:
    """The state machine over a copy of the module in which `old` reads `new`."""
    text = inspect.getsource(blocks)
    assert text.count(old) == 1, f"the mutation no longer fits the source: {old!r}"
    module = types.ModuleType("mutant")
    exec(compile(text.replace(old, new), "mutant", "exec"), vars(module))
    return type("MutantTraces", (Traces,), {"source": module})


MUTATIONS = {
    "release does not count down": ("            refs[block] -= 1\n            if refs[block]:", "            if refs[block] > 1:"),
    "release frees shared blocks": ("            if refs[block]:\n                continue\n", ""),
    "release frees the first block first": ("for block in reversed(table):", "for block in table:"),
    "release leaves cached blocks on the free stack": ("self._lru[block] = None", "self._stack_of[block].append(block)"),
    "digests ignore the parent": ("blake2b(parent + data[start", "blake2b(data[start"),
    "commit forgets the last digest": ("self._hashed[seq] = (full, parent)", "self._hashed[seq] = (full, ROOT)"),
    "commit takes a block that is not full": ("full = computed // self.block_size", "full = -(-computed // self.block_size)"),
    "a later duplicate takes over": ("if digest not in self._block_of:", "if True:"),
    "a shared block is written in place": ("if self._refs[block] == 1:", "if True:"),
    "the copied block keeps its reference": ("        self._refs[block] -= 1\n        table[index]", "        table[index]"),
    "the copy is not put into the table": ("table[index] = fresh", "pass"),
    "a fork shares its parent's list": ("= table.copy()", "= table"),
    "a fork takes no reference": ("        for block in table:\n            self._refs[block] += 1\n", ""),
    "a hit stays in the queue of eviction": ("del self._lru[block]", "pass"),
    "a hit is taken for fresh": ("return num_blocks - sum(1 for block in hits if self._refs[block])", "return num_blocks - len(hits)"),
    "the whole prompt may hit": ("max(len(tokens) - 1, 0)", "len(tokens)"),
    "an evicted block stays registered": ("del self._block_of[self._digest_of.pop(block)]", "pass"),
    "eviction takes the most recent": ("popitem(last=False)", "popitem(last=True)"),
    "the highest extent is taken first": ("for stack in self._stacks:", "for stack in reversed(self._stacks):"),
    "reset loses the cached blocks": ("for block in reversed(self._lru):", "for block in ():"),
    "reset lets running sequences register": ("        self._hashed.clear()\n", ""),
    "grow keeps to no limit": ("if count > self.free_blocks:", "if count > self.free_blocks + 1:"),
    "the watermark is not kept": ("self.free_blocks - self._reserve if", "self.free_blocks if"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS)
def test_random_traces_find(old, new):
    once = settings(TRACES, max_examples=1000, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, LookupError, pytest.fail.Exception)):
        run_state_machine_as_test(mutant(old, new), settings=once)


def test_a_copy_without_mutation_passes():
    run_state_machine_as_test(mutant("DIGEST_BYTES = 16", "DIGEST_BYTES = 8 + 8"), settings=settings(TRACES, max_examples=5))


def test_fresh_blocks_come_from_the_lowest_extent():
    manager = BlockManager(9, 4, extents=(2, 3, 4))
    manager.admit(0, 4)
    manager.admit(1, 3)
    assert list(manager.table(0)) == [0, 1, 2, 3]
    assert list(manager.table(1)) == [4, 5, 6]
    manager.release(0)
    assert manager.grow(1, 6) == [0, 1, 2]


def test_a_free_block_of_any_extent_is_used_before_a_cached_one():
    manager = cached(4, extents=(2, 2))
    run(manager, 0, ids(1, 2, 3, 4))
    manager.release(0)
    manager.admit(1, 3)
    assert list(manager.table(1)) == [2, 3, 1]
    assert manager.lookup(ids(1, 2, 3, 4, 5)) == [0]


def test_cached_blocks_are_reused_in_order_of_release():
    manager = cached(3)
    for seq, first in enumerate((10, 20, 30)):
        run(manager, seq, ids(first, first))
    for seq in (1, 2, 0):
        manager.release(seq)
    assert (manager.free_blocks, manager.cached_blocks) == (3, 3)
    manager.admit(3, 1)
    assert list(manager.table(3)) == [1]
    found = [manager.lookup(ids(first, first, 0)) for first in (10, 20, 30)]
    assert found == [[0], [], [2]]


def test_a_hit_makes_a_block_recent():
    manager = cached(2)
    for seq, first in enumerate((10, 20)):
        run(manager, seq, ids(first, first))
    manager.release(0)
    manager.release(1)
    assert manager.admit(2, 1, ids(10, 10, 0)) == 2
    manager.release(2)
    manager.admit(3, 1)
    assert list(manager.table(3)) == [1]


def test_the_end_of_a_prefix_is_evicted_before_its_start():
    manager = cached(3)
    prompt = ids(1, 2, 3, 4, 5, 6)
    run(manager, 0, prompt)
    manager.release(0)
    lengths = []
    for seq in (1, 2, 3):
        manager.admit(seq, 1)
        lengths.append(len(manager.lookup(ids(*prompt, 7))))
    assert lengths == [2, 1, 0]


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4), (7, 6), (9, 6)])
def test_one_token_is_left_to_compute(length, hit):
    manager = cached(16)
    prompt = ids(1, 2, 3, 4, 5, 6, 7, 8, 9)
    manager.admit(0, 5, prompt)
    manager.commit(0, prompt, 7)
    assert manager.admit(1, 5, prompt[:length]) == hit
    assert list(manager.table(1))[: hit // 2] == list(manager.table(0))[: hit // 2]


def test_a_prefix_is_told_by_all_of_its_tokens():
    manager = cached(16)
    run(manager, 0, ids(1, 2, 9, 9))
    run(manager, 1, ids(3, 4, 5, 6))
    assert manager.lookup(ids(3, 4, 9, 9, 0)) == [manager.table(1)[0]]
    assert manager.lookup(ids(9, 9, 0)) == []


def test_token_type_does_not_matter():
    manager = cached(4)
    run(manager, 0, np.array([1, 2, 3, 4], np.int64))
    assert len(manager.lookup(np.array([1, 2, 3, 4, 5], np.uint16))) == 2
    strided = np.array([[1, 0], [2, 0], [3, 0]], np.int32)[:, 0]
    assert len(manager.lookup(strided)) == 1


def test_commit_is_incremental(monkeypatch):
    manager = cached(8)
    hashed = []
    real = blocks.chain

    def counted(tokens, block_size, first, end, parent):
        hashed.extend(range(first, end))
        return real(tokens, block_size, first, end, parent)

    monkeypatch.setattr(blocks, "chain", counted)
    tokens = np.arange(12)
    manager.admit(0, 6)
    for computed in (1, 2, 3, 7, 7, 4, 12):
        manager.commit(0, tokens, computed)
    assert hashed == [0, 1, 2, 3, 4, 5]
    assert manager.lookup(np.arange(13)) == list(manager.table(0))


def test_nothing_is_cached_unless_asked_for():
    manager = BlockManager(4, 2)
    run(manager, 0, ids(1, 2, 3, 4))
    manager.release(0)
    assert (manager.cached_blocks, manager.lookup(ids(1, 2, 3, 4))) == (0, [])
    assert (manager.prefix_query_tokens, manager.prefix_hit_tokens) == (0, 0)


def test_duplicates_stay_unregistered_and_are_freed_as_others_are():
    manager = cached(6)
    prompt = ids(1, 2, 3, 4)
    manager.admit(0, 2, prompt)
    manager.admit(1, 2, prompt)  # before the first has computed anything
    manager.commit(1, prompt, 4)
    manager.commit(0, prompt, 4)
    first, second = list(manager.table(0)), list(manager.table(1))
    assert not set(first) & set(second)
    assert manager.lookup(ids(1, 2, 3, 4, 5)) == second
    manager.release(0)
    assert manager.cached_blocks == 0
    manager.release(1)
    assert manager.cached_blocks == 2
    manager.check()


def test_a_later_block_continues_the_chain_of_a_duplicate():
    manager = cached(6)
    manager.admit(0, 2, ids(1, 2))
    manager.admit(1, 2, ids(1, 2))
    manager.commit(0, ids(1, 2), 2)
    manager.commit(1, ids(1, 2, 3, 4), 4)
    assert manager.lookup(ids(1, 2, 3, 4, 5)) == [manager.table(0)[0], manager.table(1)[1]]


def test_shared_blocks_may_be_more_than_are_free():
    manager = cached(3)
    prompt = ids(1, 2, 3, 4, 5)
    run(manager, 0, prompt)
    assert not manager.can_admit(1)
    assert manager.can_admit(2, prompt)
    assert manager.admit(1, 2, prompt) == 4
    assert [manager.ref_count(block) for block in range(3)] == [2, 2, 1]
    with pytest.raises(OutOfBlocks):
        manager.grow(1, 3)


def test_cached_hits_count_as_taken():
    manager = cached(4)
    run(manager, 0, ids(1, 2, 3, 4))
    manager.release(0)
    manager.admit(1, 1)
    assert manager.free_blocks == 3
    assert not manager.can_admit(4, ids(1, 2, 3, 4, 5, 6))
    assert manager.can_admit(3, ids(1, 2, 3, 4, 5, 6))


def test_watermark_holds_for_admission_alone():
    manager = BlockManager(10, 2, watermark=0.25)
    assert manager.can_admit(10)
    manager.admit(0, 3)
    assert manager.can_admit(5)
    assert not manager.can_admit(6)
    with pytest.raises(OutOfBlocks, match="sequence 1 needs 6 blocks: 7 of 10 are free, the watermark keeps 2"):
        manager.admit(1, 6)
    manager.admit(1, 5)
    manager.fork(1, 2)
    assert manager.writable(2, 0) is not None
    manager.grow(0, 4)
    assert manager.free_blocks == 0


def test_out_of_blocks_changes_nothing():
    manager = cached(5)
    prompt = ids(1, 2, 3, 4)
    run(manager, 0, prompt)
    manager.release(0)
    manager.admit(1, 3, ids(7, 8, 9))
    manager.commit(1, ids(7, 8, 9), 3)
    before = snapshot(manager)
    for call in (lambda: manager.admit(2, 5, prompt), lambda: manager.admit(2, 4, ids(7, 8, 9)), lambda: manager.grow(1, 6)):
        with pytest.raises(OutOfBlocks):
            call()
        assert snapshot(manager) == before
    manager.grow(1, 5)
    manager.fork(1, 2)
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="sequence 2 needs 1 more blocks, 0 of 5 are free"):
        manager.writable(2, 4)
    assert snapshot(manager) == before
    assert issubclass(OutOfBlocks, KvjaxError)


def test_fork_shares_until_a_write():
    manager = cached(8, block_size=4)
    tokens = ids(1, 2, 3, 4, 5, 6)
    run(manager, 0, tokens)
    manager.fork(0, 1)
    assert list(manager.table(1)) == [0, 1]
    assert (manager.used_blocks, manager.ref_count(1)) == (2, 2)
    assert manager.writable(1, 1) == (1, 2)
    assert list(manager.table(0)) == [0, 1]
    assert list(manager.table(1)) == [0, 2]
    assert manager.writable(0, 1) is None
    assert manager.writable(1, 1) is None
    manager.commit(1, ids(*tokens, 7, 8), 8)
    assert manager.lookup(ids(*tokens, 7, 8, 9)) == [0, 2]
    manager.release(0)
    assert [manager.ref_count(block) for block in (0, 1, 2)] == [1, 0, 1]


def test_committed_blocks_are_never_written():
    manager = cached(4)
    run(manager, 0, ids(1, 2, 3))
    with pytest.raises(AssertionError, match="block 0 holds a registered prefix, sequence 0 may not write it"):
        manager.writable(0, 0)
    assert manager.writable(0, 1) is None


def test_reset_forgets_cached_and_running_prefixes():
    manager = cached(4)
    run(manager, 0, ids(1, 2))
    run(manager, 1, ids(3, 4))
    manager.grow(1, 2)
    manager.release(0)
    manager.reset_prefix_cache()
    assert (manager.cached_blocks, manager.free_blocks) == (0, 2)
    assert manager.lookup(ids(1, 2, 0)) == manager.lookup(ids(3, 4, 0)) == []
    manager.commit(1, ids(3, 4, 5, 6), 4)
    run(manager, 2, ids(3, 4))
    assert manager.lookup(ids(3, 4, 5, 6, 0)) == [manager.table(2)[0]], "what rests on the old prefix is not found under the new one"
    manager.check()


def test_hit_statistics():
    manager = cached(16)
    prompt = ids(1, 2, 3, 4, 5)
    run(manager, 0, prompt)
    assert (manager.prefix_query_tokens, manager.prefix_hit_tokens) == (5, 0)
    assert run(manager, 1, prompt) == 4
    manager.admit(2, 3)
    assert (manager.prefix_query_tokens, manager.prefix_hit_tokens) == (10, 4)
    with pytest.raises(OutOfBlocks):
        manager.admit(3, 99, prompt)
    assert (manager.prefix_query_tokens, manager.prefix_hit_tokens) == (10, 4), "a prompt that waits is not counted"
    assert manager.admit(4, 1, prompt) == 2, "a table shorter than the prefix cuts it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_blocks=0, block_size=1), "num_blocks must be at least 1"),
        (dict(num_blocks=1, block_size=0), "block_size must be at least 1"),
        (dict(num_blocks=8, block_size=1, extents=(4, 3)), r"add up to num_blocks=8; they add up to 7"),
        (dict(num_blocks=8, block_size=1, extents=(9, -1)), "must be positive"),
        (dict(num_blocks=8, block_size=1, watermark=1.0), r"watermark=1.0 must be a fraction of the blocks in \[0, 1\)"),
        (dict(num_blocks=8, block_size=1, watermark=-0.1), "must be a fraction"),
    ],
)
def test_bad_pools(arguments, message):
    with pytest.raises(InputError, match=message):
        BlockManager(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.admit(0, 1), "sequence 0 is in the pool already"),
        (lambda m: m.admit(1, -1), "must not be negative"),
        (lambda m: m.can_admit(-1), "must not be negative"),
        (lambda m: m.admit(1, 1, np.zeros((1, 4), int)), "one row of integers"),
        (lambda m: m.lookup(np.zeros(4)), "one row of integers"),
        (lambda m: m.fork(0, 0), "sequence 0 is in the pool already"),
        (lambda m: m.commit(0, ids(1, 2, 3, 4), 5), "it cannot have computed 5"),
        (lambda m: m.commit(0, np.arange(9), 9), "room for 4: it cannot have computed 9"),
        (lambda m: m.writable(0, 2), "has 2 blocks, none at 2: grow it first"),
        (lambda m: m.writable(0, -1), "none at -1"),
        (lambda m: m.ref_count(8), "ids go from 0 to 7"),
        (lambda m: m.ref_count(-1), "no block -1"),
        (lambda m: m.table(7), "no sequence 7: admit or fork it first"),
        (lambda m: m.grow(7, 1), "no sequence 7"),
        (lambda m: m.commit(7, ids(1), 1), "no sequence 7"),
        (lambda m: m.fork(7, 8), "no sequence 7"),
        (lambda m: m.writable(7, 0), "no sequence 7"),
        (lambda m: m.release(7), "no sequence 7"),
    ],
)
def test_bad_calls_change_nothing(call, message):
    manager = cached(8)
    manager.admit(0, 2)
    before = snapshot(manager)
    with pytest.raises(InputError, match=message):
        call(manager)
    assert snapshot(manager) == before


def test_a_released_sequence_is_gone():
    manager = BlockManager(4, 2)
    manager.admit(0, 2)
    manager.release(0)
    with pytest.raises(InputError, match="no sequence 0"):
        manager.release(0)
    manager.admit(0, 4)
    assert manager.free_blocks == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m._refs.__setitem__(0, 5), "block 0 has reference count 5 and is in 1 tables"),
        (lambda m: m._stacks[0].append(3), "block 3 is in 2 places instead of one"),
        (lambda m: m._stacks[0].append(0), "block 0 is on a free stack and registered"),
        (lambda m: m._stacks[0].clear(), "block 3 is in 0 places instead of one"),
        (lambda m: m._stacks[0].append(m._stacks[1].pop()), "blocks .* lie on the stack of extent 0, which is not theirs"),
        (lambda m: m._tables[1].append(m._tables[1][0]), "the table of sequence 1 holds a block twice"),
        (lambda m: m._tables[1].append(99), "ids outside the pool"),
        (lambda m: setattr(m, "_used", 9), "9 blocks are counted as used, tables hold 2"),
        (lambda m: m._digest_of.pop(2), "block 2 is among the cached ones but not registered"),
        (lambda m: m._block_of.update(other=0), "not each other's inverse"),
        (lambda m: m._hashed.update({9: (0, b"")}), "sequence 9 is gone"),
        (lambda m: m._hashed.update({1: (3, b"")}), "sequence 1 has 3 hashed blocks of 1"),
        (lambda m: setattr(m, "prefix_hit_tokens", -1), "-1 hit tokens of 6 looked up"),
    ],
)
def test_check_names_the_damage(damage, message):
    manager = cached(8, extents=(4, 4))
    for seq in (0, 1, 2):
        run(manager, seq, ids(seq, seq))
    manager.release(2)
    manager.check()
    damage(manager)
    with pytest.raises(AssertionError, match=message):
        manager.check()
