"""A store: how much a page holds, in which memory, laid out for which device. `dense()`, `paged()` and `host()` are the usual ones."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax import checks
from kvjax.cache.pool import PageTable, Platform, Pool, extent_sizes, page_table
from kvjax.cache.state import CacheShape
from kvjax.cache.tiers import Device, Host, Tier, Transfer
from kvjax.errors import SpecError
from kvjax.kernels.attention import rows
from kvjax.kernels.dispatch import Device as Hardware
from kvjax.kernels.dispatch import unavailable
from kvjax.kernels.paged_attention import pool_dim

LANES = 128
"""Slots of a row on a card come in multiples of it: threads of a warpgroup, lanes of a TPU's vector."""

LARGEST_PAGE = 2**20
"""Slots: no model has a context so long."""

PAGE_SIZE = 64
"""Slots of a page unless someone says otherwise."""


DEVICE = Device()


@dataclasses.dataclass(frozen=True)
class Store:
    """Where the keys and values of a strategy stand.

    Attributes:
      page_size: slots of a page; None: a page is a row.
      tier: which memory.
      extents: arrays a pool of pages is cut into on a CPU; decode attention skips those behind the last page in use.
      platform: what computes; set by `native`, and no part of what a user says.
    """

    page_size: int | None = None
    tier: Tier = DEVICE
    extents: int = 1
    platform: Platform = dataclasses.field(default="cpu", repr=False)

    def __post_init__(self):
        checks.whole("extents", self.extents, 1)
        if self.page_size is None:
            return
        if checks.whole("page_size", self.page_size, -checks.LARGEST, LARGEST_PAGE) < 1:
            raise SpecError(f"page_size={self.page_size}: a page holds at least one slot; 8 to 128 are usual")
        if self.tier.fetches:
            raise SpecError(
                f"pages of {self.page_size} slots in {self.tier.name} memory: a row is fetched from one piece; leave the pages out"
            )

    @property
    def name(self) -> str:
        """What spec strings call it."""
        return "host" if self.tier.fetches else "dense" if self.page_size is None else "paged"

    @property
    def options(self) -> dict[str, Any]:
        """What a spec string can say about it, with its values."""
        if self.tier.fetches:
            return self.tier.options
        return {} if self.page_size is None else {"page_size": self.page_size, "extents": self.extents}

    @property
    def staging(self) -> "Store":
        """Where a prompt stands that comes in chunks and is compressed once it is complete."""
        return Store(platform=self.platform)

    def on_device(self) -> "Store":
        """This store with its pool in device memory: what is read is the same."""
        return dataclasses.replace(self, tier=self.tier.on_device())

    def native(self, device: Hardware) -> "Store":
        """This store as a device computes with it."""
        if unavailable("mosaic_gpu", device) is None:
            return self.on("gpu")
        return self.on("tpu") if unavailable("mosaic_tpu", device) is None else self

    def on(self, platform: Platform) -> "Store":
        """This store laid out for a platform."""
        return dataclasses.replace(self, platform=platform, tier=self.tier.on(platform))

    @property
    def transposed(self) -> bool:
        """Whether keys stand in columns (kvjax.cache.pool)."""
        return self.platform == "cpu" and not self.tier.fetches

    def pool(self, shape: CacheShape, num_pages: int, page_size: int, fill: float = 0.0) -> Pool:
        """An empty pool; `fill` is what the keys hold before anything is written."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        if self.transposed:
            sizes = extent_sizes(num_pages, self.extents)
            k = tuple(jnp.full((size, heads, dim, page_size), fill, shape.dtype) for size in sizes)
            v = tuple(jnp.zeros((size, heads, page_size, dim), shape.dtype) for size in sizes)
            return Pool(k, v, "columns", page_size, dim)
        size = (num_pages, heads, page_size, self.stored_dim(dim))
        return self.tier.place(Pool((jnp.full(size, fill, shape.dtype),), (jnp.zeros(size, shape.dtype),), "rows", page_size, dim))

    def stored_dim(self, head_dim: int) -> int:
        """Elements that a key of `head_dim` takes."""
        return head_dim if self.tier.fetches else pool_dim(head_dim, self.platform)

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> Pool:
        """A pool with room for `capacity` slots of every row."""
        size = self.page(capacity)
        return self.pool(shape, batch * (self.rounded(capacity) // size), size, fill)

    def page(self, capacity: int) -> int:
        """Slots of a page where a row has `capacity`."""
        return self.rounded(capacity) if self.page_size is None else self.page_size

    def rounded(self, capacity: int) -> int:
        """The slots a row gets that asks for `capacity`."""
        multiple = math.lcm(self.page_size or 1, 1 if self.platform == "cpu" else LANES)
        return -(-capacity // multiple) * multiple

    def pages_of(self, slots: int) -> int:
        """Pages that hold `slots` slots of a row."""
        return 1 if self.page_size is None else -(-slots // self.page_size)

    def table(self, batch: int, capacity: int) -> PageTable | None:
        """A table that gives every row its `capacity` slots; None where row b is page b."""
        if self.page_size is None:
            return None
        length = self.rounded(capacity) // self.page_size
        return page_table(jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length), batch * length)

    def tokens(
        self, pool: Pool, table: PageTable | None, batch: int, most: int | None = None
    ) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots, or the first `most`, as they would come out of a projection; zeros where a row has no page."""
        k, v = rows(self.tier.keys(pool, table, batch, most), batch)
        return k[..., : pool.head_dim].swapaxes(1, 2), v[..., : pool.head_dim].swapaxes(1, 2)

    def poisoned(self, pool: Pool, table: PageTable | None, empty: Bool[Array, "B Hkv C"]) -> Pool:
        """As Pool.poisoned; for tests."""
        return self.tier.place(self.tier.brought(pool).poisoned(table, empty))


def dense() -> Store:
    """A fixed number of slots for every row, allocated once."""
    return Store()


def paged(page_size: int = PAGE_SIZE, extents: int = 1) -> Store:
    """One pool of pages and a block table (PagedAttention, arXiv:2309.06180)."""
    return Store(page_size, extents=extents)


def host(transfer: Transfer = "jit", levels: int = 4) -> Store:
    """The pool in host memory, and on the device what a step reads."""
    return Store(tier=Host(transfer, levels))


STORES: dict[str, Callable[..., Store]] = {"dense": dense, "paged": paged, "host": host}
"""By the name that spec strings and --store use."""
