"""Which sequence holds which page of a paged KV pool: allocation, prefix sharing, copy-on-write.

Nothing here touches the device: a block is an id, and the arrays with the keys and values are somebody else's. One thread owns a manager.
The scheme is vLLM's (reference counts, hashes of full blocks, eviction of the least recently used: https://docs.vllm.ai, "Automatic Prefix
Caching"), with copy-on-write as in its paper (Kwon et al. 2023, arXiv:2309.06180, section 4.4). Differences: fresh blocks come from the
lowest extent of ids first, and a reset also bars the sequences that are running from adding to the cache.
"""

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from kvjax.errors import InputError, KvjaxError

DIGEST_BYTES = 16
ROOT = bytes(DIGEST_BYTES)  # the parent of every first block


class OutOfBlocks(KvjaxError):
    """The pool has too few free blocks for a request. Nothing was changed: free some blocks and ask again."""


def chain(tokens: np.ndarray, block_size: int, first: int, end: int, parent: bytes) -> Iterator[bytes]:
    """Digests of the full blocks `first` to `end` - 1 of a sequence, each of its parent's digest and its own tokens.

    A digest thus names the whole prefix up to the end of its block. Two prefixes with the same 128-bit digest are taken for the same one:
    blake2b makes that too rare to guard against, so tokens are not compared.

    Args:
      tokens: (T,) token ids below 2**31, T >= end * block_size.
      parent: digest of block `first` - 1, or ROOT.
    """
    data = np.ascontiguousarray(tokens[first * block_size : end * block_size], np.int32).tobytes()
    width = block_size * np.dtype(np.int32).itemsize
    for start in range(0, len(data), width):
        parent = hashlib.blake2b(parent + data[start : start + width], digest_size=DIGEST_BYTES).digest()
        yield parent


class BlockManager:
    """Hands out the blocks of a pool to sequences, and keeps full blocks of ended sequences for prompts that begin alike.

    A block is in one of three places: in the tables of `ref_count` sequences; free on the stack of its extent; or free but cached, in the
    order of release, when it is full and registered under the digest of its prefix. Cached blocks are reused only when no other is free.
    The caller owns the tokens: it says what it has computed (`commit`) and asks before it writes (`writable`).

    Attributes:
      num_blocks: size of the pool.
      block_size: tokens of a block.
      prefix_query_tokens: tokens of the prompts that were looked up by `admit`; those admitted twice (preemption) count twice.
      prefix_hit_tokens: how many of them were found.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, extents: Sequence[int] = (), prefix_caching: bool = False, watermark: float = 0.0
    ):
        """An idle pool.

        Args:
          extents: sizes of consecutive ranges of block ids that add up to `num_blocks`; () is one range. A fresh block comes from the
            lowest extent that has one, so that attention over a pool with few blocks in use may skip the extents that hold nothing.
          prefix_caching: whether `admit` looks for cached blocks and `commit` registers them.
          watermark: fraction of the blocks (rounded down to whole ones) that `admit` leaves free, for the sequences that run to grow into.

        Raises:
          InputError: sizes below 1, extents that do not add up, a watermark outside [0, 1).
        """
        extents = tuple(extents) or (num_blocks,)
        if num_blocks < 1:
            raise InputError(f"a pool of {num_blocks} blocks holds nothing: num_blocks must be at least 1")
        if block_size < 1:
            raise InputError(f"a block of {block_size} tokens holds nothing: block_size must be at least 1")
        if min(extents) < 1 or sum(extents) != num_blocks:
            raise InputError(f"extents {extents} must be positive and add up to num_blocks={num_blocks}; they add up to {sum(extents)}")
        if not 0.0 <= watermark < 1.0:
            raise InputError(f"watermark={watermark} must be a fraction of the blocks in [0, 1)")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._caching = prefix_caching
        self._reserve = int(watermark * num_blocks)
        self._used = 0
        self._refs = [0] * num_blocks
        starts = itertools.accumulate(extents, initial=0)
        self._stacks = [list(range(start, start + size))[::-1] for start, size in zip(starts, extents, strict=False)]
        self._stack_of = [stack for stack, size in zip(self._stacks, extents, strict=True) for _ in range(size)]
        self._lru: OrderedDict[int, None] = OrderedDict()  # cached and unreferenced, least recently released first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._tables: dict[int, list[int]] = {}
        self._hashed: dict[int, tuple[int, bytes]] = {}  # blocks hashed so far and the last digest, for sequences that may register

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds, cached or not."""
        return self.num_blocks - self._used

    @property
    def used_blocks(self) -> int:
        """Blocks that some sequence holds; shared ones count once."""
        return self._used

    @property
    def cached_blocks(self) -> int:
        """Free blocks that still hold a prefix that can be hit."""
        return len(self._lru)

    def table(self, seq: int) -> Sequence[int]:
        """Block ids of a sequence, in order. This is the manager's own list: it follows later changes and must not be written."""
        return self._table(seq)

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""
        if not 0 <= block < self.num_blocks:
            raise InputError(f"no block {block}: ids go from 0 to {self.num_blocks - 1}")
        return self._refs[block]

    def lookup(self, tokens: np.ndarray) -> list[int]:
        """The longest chain of cached blocks that begins `tokens` and leaves at least one token to compute. Takes no reference.

        Args:
          tokens: (T,) integer ids of a prompt.

        Returns:
          Block ids, at most (T - 1) // block_size of them: a prompt whose last block is full and cached computes that block again.
        """
        hits: list[int] = []
        if not self._caching:
            return hits
        _check_tokens(tokens)
        for digest in chain(tokens, self.block_size, 0, max(len(tokens) - 1, 0) // self.block_size, ROOT):
            block = self._block_of.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def can_admit(self, num_blocks: int, tokens: np.ndarray | None = None) -> bool:
        """Whether `admit` with the same arguments would find its blocks now."""
        hits = self._hits(num_blocks, tokens)
        return self._needed(num_blocks, hits) <= self._admissible()

    def admit(self, seq: int, num_blocks: int, tokens: np.ndarray | None = None) -> int:
        """Gives a new sequence its blocks, the first of them shared with a cached prefix where one is found.

        Args:
          seq: an id that no sequence in the pool has.
          num_blocks: length of the table, shared blocks among them; a longer prefix is cut to it.
          tokens: (T,) integer ids of the prompt, to look for cached blocks; None: look for none.

        Returns:
          How many tokens the shared blocks hold; the sequence computes from there on.

        Raises:
          OutOfBlocks: the fresh blocks, with the shared ones that were free, leave fewer free than the watermark. It is not kept when no
            sequence holds anything: then nobody needs the room.
          InputError: `seq` is in the pool already, `num_blocks` is negative, or `tokens` are not a row of integers.
        """
        if seq in self._tables:
            raise InputError(f"sequence {seq} is in the pool already: release it or take another id")
        hits = self._hits(num_blocks, tokens)
        needed = self._needed(num_blocks, hits)
        if needed > self._admissible():
            kept = self.free_blocks - self._admissible()
            raise OutOfBlocks(
                f"sequence {seq} needs {needed} blocks: {self.free_blocks} of {self.num_blocks} are free, the watermark keeps {kept}"
            )
        for block in hits:  # before any fresh block is taken, lest it be one of these
            if not self._refs[block]:
                del self._lru[block]
                self._used += 1
            self._refs[block] += 1
        self._tables[seq] = hits + self._take(num_blocks - len(hits))
        hit_tokens = len(hits) * self.block_size
        if self._caching:
            self._hashed[seq] = (len(hits), self._digest_of[hits[-1]]) if hits else (0, ROOT)
            if tokens is not None:
                self.prefix_query_tokens += len(tokens)
                self.prefix_hit_tokens += hit_tokens
        return hit_tokens

    def grow(self, seq: int, num_blocks: int) -> list[int]:
        """Extends a table to `num_blocks` blocks; a table that has them stays as it is.

        Returns:
          The ids that were added.

        Raises:
          OutOfBlocks: too few are free; the watermark is not kept.
        """
        table = self._table(seq)
        missing = num_blocks - len(table)
        if missing <= 0:
            return []
        self._require(seq, missing)
        added = self._take(missing)
        table += added
        return added

    def commit(self, seq: int, tokens: np.ndarray, computed: int) -> None:
        """Registers the blocks of a sequence that have become full, for later prompts to share.

        The tokens are final: a block that was committed is never written again. Only blocks that are full since the last call are hashed.
        Where another block is registered for the same prefix, this one stays unregistered; the two are not merged. Does nothing without
        prefix caching, nor for a sequence that ran through `reset_prefix_cache`.

        Args:
          tokens: (T,) integer ids of the sequence from its beginning, T >= computed.
          computed: how many of them have their keys and values in the blocks, shared ones included.

        Raises:
          InputError: more computed than there are tokens or room in the table, or `tokens` are not a row of integers.
        """
        table = self._table(seq)
        state = self._hashed.get(seq)
        if state is None:
            return
        room = len(table) * self.block_size
        if computed > min(len(tokens), room):
            raise InputError(f"sequence {seq} has {len(tokens)} tokens and room for {room}: it cannot have computed {computed}")
        done, parent = state
        full = computed // self.block_size
        if full <= done:
            return
        _check_tokens(tokens)
        for index, digest in enumerate(chain(tokens, self.block_size, done, full, parent), start=done):
            parent = digest
            if digest not in self._block_of:
                block = table[index]
                assert block not in self._digest_of, f"block {block} of sequence {seq} is registered for other tokens"
                self._block_of[digest] = block
                self._digest_of[block] = digest
        self._hashed[seq] = (full, parent)

    def fork(self, parent: int, child: int) -> None:
        """Adds a sequence that shares every block of another (parallel sampling, beams). Takes no block.

        Raises:
          InputError: `child` is in the pool already.
        """
        table = self._table(parent)
        if child in self._tables:
            raise InputError(f"sequence {child} is in the pool already: release it or take another id")
        for block in table:
            self._refs[block] += 1
        self._tables[child] = table.copy()
        if parent in self._hashed:
            self._hashed[child] = self._hashed[parent]

    def writable(self, seq: int, index: int) -> tuple[int, int] | None:
        """Makes block `index` of a sequence its own, to be called before tokens are written into it.

        Returns:
          None when no other sequence holds the block. Else the table has a fresh one in its place, and the result is (source, destination):
          the page to copy on the device, ahead of any write that is dispatched later.

        Raises:
          OutOfBlocks: no block is free for the copy; the watermark is not kept.
          InputError: the table has no such block.
          AssertionError: the block was committed: it is full, others may rely on what it holds, and it is never written.
        """
        table = self._table(seq)
        if not 0 <= index < len(table):
            raise InputError(f"sequence {seq} has {len(table)} blocks, none at {index}: grow it first")
        block = table[index]
        assert block not in self._digest_of, f"block {block} holds a registered prefix, sequence {seq} may not write it"
        if self._refs[block] == 1:
            return None
        self._require(seq, 1)
        (fresh,) = self._take(1)
        self._refs[block] -= 1
        table[index] = fresh
        return block, fresh

    def release(self, seq: int) -> None:
        """Ends a sequence. Blocks that no other holds become free, the last one first: the end of a prefix is evicted before its start."""
        table = self._table(seq)
        refs = self._refs
        for block in reversed(table):
            refs[block] -= 1
            if refs[block]:
                continue
            self._used -= 1
            if block in self._digest_of:
                self._lru[block] = None
            else:
                self._stack_of[block].append(block)
        del self._tables[seq]
        self._hashed.pop(seq, None)

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix, for instance because the weights changed.

        Sequences that run keep their blocks but register nothing from here on: what they compute still rests on what they had.
        """
        for block in reversed(self._lru):
            self._stack_of[block].append(block)
        self._lru.clear()
        self._block_of.clear()
        self._digest_of.clear()
        self._hashed.clear()

    def check(self) -> None:
        """Verifies the bookkeeping in time O(num_blocks + table entries).

        Raises:
          AssertionError: with what is wrong.
        """
        places: Counter[int] = Counter()
        for number, stack in enumerate(self._stacks):
            places.update(stack)
            strays = [block for block in stack if self._stack_of[block] is not stack]
            _expect(not strays, f"blocks {strays} lie on the stack of extent {number}, which is not theirs")
        for block in places:
            _expect(block not in self._digest_of, f"block {block} is on a free stack and registered")
        places.update(self._lru.keys())
        holders: Counter[int] = Counter()
        for seq, table in self._tables.items():
            _expect(len(set(table)) == len(table), f"the table of sequence {seq} holds a block twice: {table}")
            holders.update(table)
        places.update(set(holders))
        for block, refs in enumerate(self._refs):
            _expect(places[block] == 1, f"block {block} is in {places[block]} places instead of one")
            _expect(refs == holders[block], f"block {block} has reference count {refs} and is in {holders[block]} tables")
        _expect(len(places) == self.num_blocks, f"ids outside the pool: {sorted(places.keys() - range(self.num_blocks))}")
        _expect(self._used == len(holders), f"{self._used} blocks are counted as used, tables hold {len(holders)}")
        for block in self._lru:
            _expect(block in self._digest_of, f"block {block} is among the cached ones but not registered")
        inverse = {block: digest for digest, block in self._block_of.items()}
        _expect(inverse == self._digest_of and len(inverse) == len(self._block_of), "digest and block maps are not each other's inverse")
        for seq, (done, _) in self._hashed.items():
            _expect(seq in self._tables, f"sequence {seq} is gone but still has a digest")
            _expect(0 <= done <= len(self._tables[seq]), f"sequence {seq} has {done} hashed blocks of {len(self._tables[seq])}")
        _expect(
            0 <= self.prefix_hit_tokens <= self.prefix_query_tokens,
            f"{self.prefix_hit_tokens} hit tokens of {self.prefix_query_tokens} looked up",
        )

    def _table(self, seq: int) -> list[int]:
        try:
            return self._tables[seq]
        except KeyError:
            raise InputError(f"no sequence {seq}: admit or fork it first") from None

    def _hits(self, num_blocks: int, tokens: np.ndarray | None) -> list[int]:
        """The cached blocks a new sequence with a table of `num_blocks` would share."""
        if num_blocks < 0:
            raise InputError(f"a table of {num_blocks} blocks: the number must not be negative")
        return [] if tokens is None else self.lookup(tokens)[:num_blocks]

    def _needed(self, num_blocks: int, hits: Sequence[int]) -> int:
        """Free blocks that admission takes: fresh ones, and the hits that nobody holds."""
        return num_blocks - sum(1 for block in hits if self._refs[block])

    def _admissible(self) -> int:
        """Blocks that `admit` may take now."""
        return self.free_blocks - self._reserve if self._used else self.num_blocks

    def _require(self, seq: int, count: int) -> None:
        if count > self.free_blocks:
            raise OutOfBlocks(f"sequence {seq} needs {count} more blocks, {self.free_blocks} of {self.num_blocks} are free")

    def _take(self, count: int) -> list[int]:
        """References `count` free blocks, which the caller knows to exist; cached ones only when there is no other."""
        taken: list[int] = []
        for stack in self._stacks:
            while stack and len(taken) < count:
                taken.append(stack.pop())
        while len(taken) < count:
            block, _ = self._lru.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
            taken.append(block)
        for block in taken:
            self._refs[block] = 1
        self._used += count
        return taken


def _check_tokens(tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: a sequence is one row of integers")


def _expect(condition: bool, wrong: str) -> None:
    if not condition:
        raise AssertionError(wrong)
