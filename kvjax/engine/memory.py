"""How one memory limit is spent: pages, rows of metadata, the staging row."""

import dataclasses
import math
import os
import re
from fractions import Fraction

import jax
import jax.numpy as jnp

from kvjax import checks
from kvjax.cache import CacheShape, DenseStore, HostStore, PagedStore, Strategy
from kvjax.cache.stores import KernelPagedStore, KernelStore, stored_dim
from kvjax.engine.scheduler import Need
from kvjax.errors import MemoryLimitError, SpecError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


LARGEST_MEMORY = 2**50
"""Bytes; a number beyond it is a slip."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What fits into a memory limit; sizes in bytes.

    Attributes:
      page: one page, all layers; 0 where pages are seats in host memory.
      row: what a row has on the device besides, all layers: metadata (positions, scores, next slots), partial keys, and in front of a host
        store the staging blocks of two layers.
      staging: where a prompt stands that is compressed once it is complete; 0 for policies that keep everything.
      seat: one seat of the host pool, all layers, in host memory; 0 without one.
    """

    num_pages: int
    rows: int
    page: int
    row: int
    staging: int
    seat: int = 0

    @property
    def total(self) -> int:
        """Device memory."""
        return self.num_pages * self.page + self.rows * self.row + self.staging


def parse_memory(text: str | int) -> int:
    """Bytes: 67108864, "64MiB", "1.5GB". Raises SpecError."""
    found: int | Fraction
    if not isinstance(text, str):
        found, unit = checks.whole("memory", text, -LARGEST_MEMORY, LARGEST_MEMORY), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2] not in UNITS:
            raise SpecError(
                f"cannot read {text!r} as an amount of memory; write bytes, or a number and one of {', '.join(filter(None, UNITS))}"
            )
        found, unit = Fraction(match[1]), match[2]
    size = int(found * UNITS[unit])
    if size > LARGEST_MEMORY:
        raise SpecError(f"{text!r} is more memory than there is; give up to {LARGEST_MEMORY} bytes")
    if size <= 0:
        raise SpecError(f"{text!r} of memory holds nothing; give more, for example 64MiB")
    return size


def machine_memory() -> float:
    """Bytes that this machine has, where arrays stand in them; inf for a device of its own, which says itself what it has no room for."""
    if jax.default_backend() != "cpu":
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def serving_strategy(strategy: Strategy, max_model_len: int, extents: int) -> tuple[Strategy, bool]:
    """The strategy over the pool of an engine, and whether requests are contiguous.

    A dense store becomes a pool whose pages are as long as the longest request: one page, reserved whole, for each.
    """
    if isinstance(strategy.store, HostStore):
        if strategy.store.transfer == "driven":
            raise SpecError("the host drives the layers of a whole batch (--transfer=driven) offline only; under load use jit or device")
        return strategy, True
    kernels = isinstance(strategy.store, KernelStore)
    if isinstance(strategy.store, PagedStore):
        return Strategy(strategy.policy, dataclasses.replace(strategy.store, extents=1 if kernels else extents)), False
    if not isinstance(strategy.store, DenseStore):
        raise SpecError(f"{strategy.describe()}: the engine serves the dense, the paged and the host store")
    capacity = Need(Strategy(strategy.policy, PagedStore(1)), max_model_len, True).capacity
    if isinstance(strategy.store, KernelStore):
        return Strategy(strategy.policy, KernelPagedStore(strategy.store.rounded(capacity), platform=strategy.store.platform)), True
    return Strategy(strategy.policy, PagedStore(capacity, extents)), True


def staged_slots(max_model_len: int) -> int:
    """Slots of the staging row: the longest prompt, which leaves one token to generate, rounded up."""
    return -(-max(max_model_len - 1, 1) // 128) * 128


def spend(need: Need, shape: CacheShape, memory: int, max_num_seqs: int, host_memory: int | None = None) -> Budget:
    """Rows and pages for `memory` bytes. Raises MemoryLimitError when not even one request of the greatest length fits.

    Args:
      host_memory: bytes for the pool of a host store; None: twice the seats that there are rows.
    """
    policy, store = need.strategy.policy, need.strategy.store
    item = jnp.dtype(shape.dtype).itemsize
    slot = 2 * shape.num_layers * shape.num_kv_heads * stored_dim(store, shape.head_dim) * item
    if isinstance(store, HostStore):
        return _spend_on_host_rows(need, shape, memory, max_num_seqs, host_memory)
    assert isinstance(store, PagedStore)
    page = slot * store.page_size
    heads = shape.num_kv_heads if policy.per_head else 1
    widest = need.pages(need.capacity)
    row = staging = 0
    if need.stages:
        per_slot = 4 + (4 if policy.keeps_score else 0)
        row = shape.num_layers * heads * (store.rounded(need.capacity) * per_slot + 4)
        staging = staged_slots(need.max_model_len) * (slot + shape.num_layers * shape.num_kv_heads * 4 * policy.keeps_score)
    least = staging + row + widest * page
    if memory < least:
        raise MemoryLimitError(
            f"kv_memory of {memory} bytes is too small for {need.strategy.policy.describe()}: one request of "
            f"max_model_len={need.max_model_len} takes {least} bytes ({widest} pages of {page}, {row} of metadata, {staging} to stage "
            "prompts); give more memory or a smaller max_model_len"
        )
    rest = memory - staging  # with r rows it has to hold r * row, and r or `widest` pages
    rows = min(max_num_seqs, rest // (row + page))
    rows = max(1, min(rows, (rest - widest * page) // row) if row else rows)
    return Budget((memory - staging - rows * row) // page, rows, page, row, staging)


def _spend_on_host_rows(need: Need, shape: CacheShape, memory: int, max_num_seqs: int, host_memory: int | None) -> Budget:
    """`spend` for a host store: rows by what they have on the device, seats by host memory."""
    policy, store = need.strategy.policy, need.strategy.store
    assert isinstance(store, HostStore)
    item, slots = jnp.dtype(shape.dtype).itemsize, store.rounded(need.capacity)
    seat = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item * slots
    partial = policy.partial_columns(shape.head_dim) if policy.speculates else 0
    row = max(shape.num_layers - policy.full_layers, 0) * shape.num_kv_heads * partial * slots * item
    row += 2 * 2 * shape.num_kv_heads * shape.head_dim * store.staged_places(slots) * item  # keys and values of two layers, staged
    staging = 0
    if need.stages:
        row += shape.num_layers * shape.num_kv_heads * (slots * (4 + 4 * policy.keeps_score) + 4)
        staging = staged_slots(need.max_model_len) * (seat // slots + shape.num_layers * shape.num_kv_heads * 4 * policy.keeps_score)
    if store.transfer == "device":  # its pool is device memory too
        row, seat = row + seat, 0
    rows = min(max_num_seqs, (memory - staging) // row)
    if rows < 1:
        raise MemoryLimitError(
            f"kv_memory of {memory} bytes is too small for {need.strategy.describe()}: a request of max_model_len={need.max_model_len} has "
            f"{row} bytes on the device, and {staging} stage prompts; give more memory or a smaller max_model_len"
        )
    seats = rows if not seat else 2 * rows if host_memory is None else host_memory // seat
    if seats < 1:
        raise MemoryLimitError(
            f"host_memory of {host_memory} bytes is too small: one request of max_model_len={need.max_model_len} takes {seat}"
        )
    return Budget(seats, min(rows, seats), 0, row, staging, seat)
