"""How one memory limit is spent: pages, rows of metadata, the staging row."""

import dataclasses
import math
import os
import re
from fractions import Fraction

import jax
import jax.numpy as jnp

from kvjax import checks
from kvjax.cache import CacheShape, Strategy, stage
from kvjax.cache.ledger import nbytes
from kvjax.engine.programs import allocate
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
      row: what a row has on the device besides, all layers: positions, next slots, the policy's state, and in front of a pool in host
        memory the staging blocks of two layers.
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
    """The strategy over the pool of an engine, and whether requests are contiguous: one page, reserved whole, for each.

    A dense store becomes a pool whose pages are as long as the longest request.
    """
    store = strategy.store
    if store.tier.driven:
        raise SpecError("the host drives the layers of a whole batch (--transfer=driven) offline only; under load use jit or device")
    if store.tier.fetches:
        return strategy, True
    contiguous, extents = store.page_size is None, extents if store.platform == "cpu" else 1
    longest = store.rounded(Need(strategy, max_model_len, True).capacity)
    return Strategy(
        strategy.policy, dataclasses.replace(store, page_size=longest if contiguous else store.page_size, extents=extents)
    ), contiguous


def staged_slots(max_model_len: int) -> int:
    """Slots of the staging row: the longest prompt, which leaves one token to generate, rounded up."""
    return -(-max(max_model_len - 1, 1) // 128) * 128


def spend(need: Need, shape: CacheShape, memory: int, max_num_seqs: int, host_memory: int | None = None) -> Budget:
    """Rows and pages for `memory` bytes. Raises MemoryLimitError when not even one request of the greatest length fits.

    Args:
      host_memory: bytes for a pool in host memory; None: twice the pages that there are rows.
    """
    tier = need.strategy.store.tier
    page, row, staging = _sizes(need, shape)
    if not tier.fetches:
        return _spend_on_pages(need, memory, max_num_seqs, page, row, staging)
    seat, row = (page, row) if tier.in_host else (0, row + page)
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


def _sizes(need: Need, shape: CacheShape) -> tuple[int, int, int]:
    """Bytes of a page, of a row beside its pages, and for staging prompts: those of the arrays that an engine allocates."""
    strategy, capacity = need.strategy, need.capacity

    def allocated(pages: int, rows: int) -> int:
        return nbytes(jax.eval_shape(lambda: allocate(strategy, shape, pages, rows, capacity)))

    page, row = allocated(2, 1) - allocated(1, 1), allocated(1, 2) - allocated(1, 1)
    token = 2 * shape.head_dim * jnp.dtype(shape.dtype).itemsize
    row += strategy.store.tier.staging_bytes(token, shape.num_kv_heads, strategy.store.page(capacity))
    if not need.stages:
        return page, row, 0
    kv = jax.eval_shape(lambda: stage(strategy.store, strategy.observes, shape, [0], staged_slots(need.max_model_len)))
    return page, row, nbytes(kv.layers)


def _spend_on_pages(need: Need, memory: int, max_num_seqs: int, page: int, row: int, staging: int) -> Budget:
    """`spend` where pages are device memory: each row needs one at least, and one request must have room to grow to the greatest length."""
    widest = need.pages(need.capacity)
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
