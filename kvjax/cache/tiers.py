"""Where a pool's memory is, and how what a step reads comes to the device.

Dims as in kvjax.cache.pool; K tokens staged per kv head.

Device memory is read where it lies. From host memory (InfiniGen, OSDI'24, section 3; FlexGen) a layer's tokens are fetched into a staging
block while the layer before is computed: all of them, or those that a policy has chosen per kv head. How much is moved follows what is
wanted, in `levels` steps: a program has static shapes, so it holds one branch for each.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Float, Int

from kvjax import checks
from kvjax.cache.pool import Platform, Pool
from kvjax.errors import SpecError
from kvjax.kernels.attention import Keys, PageTable
from kvjax.kernels.gather import gather_rows

Transfer = Literal["device", "jit", "driven"]
TRANSFERS = get_args(Transfer)

Rows = tuple[np.ndarray, np.ndarray]
"""Keys and values of a layer, [B, Hkv, C, D] each, where the host can write them."""

TILE = 64
"""Places of a staging block on a card come in multiples of it: slots that attention takes at a time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """What the next layer is going to read, between the layer that looked ahead and that one.

    Attributes:
      slot: where in the row each token stands, [B, Hkv, K]; C or more where there is none. On a device tier, all a step is going to read;
        staged, the last place is for the step's own token.
      k, v: the tokens, staged; None on a device tier, and where the host has not brought them yet.
      traffic: rows of one kv head that were held, wanted, and moved for them.
    """

    slot: Int[Array, "B Hkv K"]
    k: Float[Array, "B Hkv K D"] | None
    v: Float[Array, "B Hkv K D"] | None
    traffic: Float[Array, " 3"]


class Tier(Protocol):
    """Frozen and hashable."""

    name: ClassVar[str]

    @property
    def fetches(self) -> bool:
        """Whether a step reads a staging block, and not the pool."""
        ...

    @property
    def in_host(self) -> bool:
        """Whether the pool is host memory."""
        ...

    @property
    def driven(self) -> bool:
        """Whether the host drives the layers one by one and copies in between."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """What a spec string can say about it."""
        ...

    def on_device(self) -> "Tier":
        """This tier with its pool in device memory: what is read is the same."""
        ...

    def fetch_by_host(self, pool: Rows, selection, length: np.ndarray) -> tuple[Ahead, np.int32]:
        """`fetch` by the host, which waits for the selection (None: the first `length` slots of every row) and starts a copy to the device.

        Returns how many rows a kv head got, too; the books are the caller's.
        """
        ...

    def moved(self, most: int, wanted: int) -> int:
        """Rows that are moved per kv head where `wanted` of up to `most` are asked for."""
        ...

    def staging_bytes(self, token: int, heads: int, slots: int) -> int:
        """Device memory that a row of `slots` slots needs while a step runs, a token taking `token` bytes in one of `heads` heads."""
        ...

    def on(self, platform: Platform) -> "Tier":
        """This tier beside a platform."""
        ...

    def place(self, pool: Pool) -> Pool:
        """The pool where it belongs."""
        ...

    def brought(self, pool: Pool) -> Pool:
        """The pool in device memory, whole; for tests."""
        ...

    def put(self, pool: Pool, table: PageTable | None, slot, k, v, valid) -> Pool:
        """As Pool.put."""
        ...

    def filled(self, pool: Pool, table: PageTable | None, k, v, valid) -> Pool:
        """As Pool.filled."""
        ...

    def chosen(self, pool: Pool, table: PageTable | None, k, v, index, rows=None) -> Pool:
        """As Pool.chosen."""
        ...

    def copied(self, pool: Pool, source: Int[Array, " W"], target: Int[Array, " W"]) -> Pool:
        """As Pool.copied."""
        ...

    def keys(self, pool: Pool, table: PageTable | None, batch: int, most: int | None = None) -> Keys:
        """All that the rows hold, or the first `most` slots of it, as attention takes it."""
        ...

    def fetch(
        self, pool: Pool, table: PageTable | None, slot: Int[Array, "B Hkv K"] | None, count: Int[Array, " B"], held: Int[Array, " B"]
    ) -> Ahead:
        """Brings the first `count` of `slot` per kv head to the device; without `slot` the first `count` slots of every row."""
        ...


@dataclasses.dataclass(frozen=True)
class Device:
    """The pool is device memory, and read where it lies."""

    name: ClassVar[str] = "device"
    fetches: ClassVar[bool] = False
    in_host: ClassVar[bool] = False
    driven: ClassVar[bool] = False

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def on(self, platform: Platform) -> "Device":
        return self

    def on_device(self) -> "Device":
        return self

    def fetch_by_host(self, pool: Rows, selection, length: np.ndarray) -> tuple[Ahead, np.int32]:
        raise SpecError("a pool in device memory is read where it lies; no host fetches from it")

    def moved(self, most: int, wanted: int) -> int:
        return 0

    def staging_bytes(self, token: int, heads: int, slots: int) -> int:
        return 0

    def place(self, pool: Pool) -> Pool:
        return pool

    def brought(self, pool: Pool) -> Pool:
        return pool

    def put(self, pool: Pool, table: PageTable | None, slot, k, v, valid) -> Pool:
        return pool.put(table, slot, k, v, valid)

    def filled(self, pool: Pool, table: PageTable | None, k, v, valid) -> Pool:
        return pool.filled(table, k, v, valid)

    def chosen(self, pool: Pool, table: PageTable | None, k, v, index, rows=None) -> Pool:
        return pool.chosen(table, k, v, index, rows)

    def copied(self, pool: Pool, source: Int[Array, " W"], target: Int[Array, " W"]) -> Pool:
        return pool.copied(source, target)

    def keys(self, pool: Pool, table: PageTable | None, batch: int, most: int | None = None) -> Keys:
        return pool.keys(table, most)

    def fetch(self, pool: Pool, table: PageTable | None, slot, count: Int[Array, " B"], held: Int[Array, " B"]) -> Ahead:
        """Moves nothing: what was chosen is read where it lies."""
        capacity = pool.capacity(table)
        return Ahead(jnp.where(jnp.arange(slot.shape[-1]) < count[:, None, None], slot, capacity), None, None, jnp.zeros(3, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Host:
    """The pool is host memory.

    Attributes:
      transfer: how tokens come to the device. `jit`: the gather runs on the host inside the decode program. `driven`: the host drives the
        layers one by one and copies in between (offline only). `device`: the pool is device memory; what nothing can beat.
      levels: sizes a fetch can have; the least that holds what is wanted is moved.
      platform: that computes; a card's staging blocks have whole tiles.
    """

    transfer: Transfer = "jit"
    levels: int = 4
    platform: Platform = dataclasses.field(default="cpu", repr=False)

    name: ClassVar[str] = "host"
    fetches: ClassVar[bool] = True

    def __post_init__(self):
        if self.transfer not in TRANSFERS:
            raise SpecError(f"unknown transfer {self.transfer!r}; choose from {', '.join(TRANSFERS)}")
        if checks.whole("levels", self.levels, -checks.LARGEST, 1000) < 1:
            raise SpecError(f"levels={self.levels}: a fetch has at least one size")

    @property
    def in_host(self) -> bool:
        return self.transfer != "device"

    @property
    def driven(self) -> bool:
        return self.transfer == "driven"

    @property
    def options(self) -> dict[str, Any]:
        return {"transfer": self.transfer, "levels": self.levels}

    def on(self, platform: Platform) -> "Host":
        return dataclasses.replace(self, platform=platform)

    def on_device(self) -> "Host":
        return dataclasses.replace(self, transfer="device")

    def staging_bytes(self, token: int, heads: int, slots: int) -> int:
        """Blocks of two layers: the one that is computed, and the next."""
        return 2 * token * heads * self.staged_places(slots)

    def place(self, pool: Pool) -> Pool:
        return jax.tree.map(self._to_host, pool) if self.in_host else pool

    def brought(self, pool: Pool) -> Pool:
        return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), pool)

    # ------------------------------------------------------------------------------------------------------------------------ fetching

    def fetch(
        self, pool: Pool, table: PageTable | None, slot: Int[Array, "B Hkv K"] | None, count: Int[Array, " B"], held: Int[Array, " B"]
    ) -> Ahead:
        batch, heads = count.shape[0], pool.num_heads
        most = pool.page_size if slot is None else slot.shape[2]
        sizes = self.sizes(most)

        def move(size: int) -> Callable[[], tuple[Array, Array]]:
            def moved():
                if slot is None:
                    found = [self._slice(x, table, batch, size) for x in (pool.k[0], pool.v[0])]
                else:
                    found = [self._gather(x, table, slot[:, :, :size]) for x in (pool.k[0], pool.v[0])]
                k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, self.staged_places(most) - size), (0, 0))) for x in found)
                return k, v

            return moved

        level = (count.max(initial=0) > jnp.asarray(sizes[:-1])).sum() if len(sizes) > 1 else jnp.int32(0)
        k, v = lax.switch(level, [move(size) for size in sizes])
        moved = batch * heads * jnp.asarray(sizes, jnp.float32)[level]
        held_rows, wanted = (heads * x.sum().astype(jnp.float32) for x in (held, count))
        return Ahead(self.places(slot, count, heads, pool.page_size), k, v, jnp.stack([held_rows, wanted, moved]))

    def sizes(self, most: int) -> list[int]:
        """Rows per kv head that a fetch of up to `most` of them can have, ascending."""
        return sorted({-(-most * level // self.levels) for level in range(1, self.levels + 1)})

    def fetch_by_host(self, pool: Rows, selection, length: np.ndarray) -> tuple[Ahead, np.int32]:
        batch, heads, slots, _ = pool[0].shape
        chosen = None if selection is None else [np.asarray(x) for x in selection]  # waits for the guess, which is not fetching
        with jax.profiler.TraceAnnotation("fetch"):
            if chosen is None:
                most, count = slots, length
                size = self.moved(most, count.max(initial=0))
                rows = [x[:, :, :size].copy() for x in pool]
                slot = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, heads, slots))
            else:
                slot, count = chosen
                most = slot.shape[2]
                size = self.moved(most, count.max(initial=0))
                flat = (np.arange(batch * heads, dtype=np.int64).reshape(batch, heads, 1) * slots + slot[:, :, :size]).reshape(-1)
                rows = [x.reshape(-1, x.shape[3]).take(flat, axis=0).reshape(batch, heads, size, -1) for x in pool]
            places = np.where(np.arange(most) < count[:, None, None], slot, slots).astype(np.int32)
            room = self.staged_places(most)
            places = np.pad(places, ((0, 0), (0, 0), (0, room - most)), constant_values=slots)
            k, v = (_roomy(jax.device_put(x), room) for x in rows)
            return Ahead(jax.device_put(places), k, v, jnp.zeros(3, jnp.float32)), np.int32(size)

    def moved(self, most: int, wanted: int) -> int:
        return next(size for size in self.sizes(most) if size >= min(wanted, most))

    def staged_places(self, most: int) -> int:
        """Places of a staging block for up to `most` rows per kv head, and the step's own token."""
        return most + 1 if self.platform == "cpu" else -(-(most + 1) // TILE) * TILE

    def places(self, slot: Int[Array, "B Hkv K"] | None, count: Int[Array, " B"], heads: int, slots: int) -> Int[Array, "B Hkv K"]:
        """The slot of every staged row; `slots` for rows that are not wanted and for the places behind them, the step's own token's too."""
        batch, most = count.shape[0], slots if slot is None else slot.shape[2]
        index = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, heads, slots)) if slot is None else slot
        index = jnp.where(jnp.arange(most) < count[:, None, None], index, slots)
        return jnp.pad(index, ((0, 0), (0, 0), (0, self.staged_places(most) - most)), constant_values=slots)

    # -------------------------------------------------------------------------------------------------------------------------- tokens

    def put(self, pool: Pool, table: PageTable | None, slot, k, v, valid) -> Pool:
        page, offset, head = pool.places(table, jnp.broadcast_to(slot, k.shape[:3]), valid)
        beyond = pool.num_pages * pool.num_heads * pool.page_size
        where = jnp.where(page < pool.num_pages, (page * pool.num_heads + head) * pool.page_size + offset, beyond).reshape(-1, 1)
        numbers = lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))

        def scatter(x, i, rows):
            flat = x.reshape(-1, x.shape[-1])
            return lax.scatter(flat, i, rows, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP).reshape(x.shape)

        def stored(part: Array, new: Array) -> Array:
            return self._on_host(scatter, part, where, new.reshape(-1, new.shape[-1]).astype(part.dtype), stays=True)

        return dataclasses.replace(pool, k=(stored(pool.k[0], k),), v=(stored(pool.v[0], v),))

    def filled(self, pool: Pool, table: PageTable | None, k, v, valid) -> Pool:
        slot = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32)[None, :, None], (*k.shape[:2], 1))
        return self.put(pool, table, slot, k, v, valid[..., None])

    def chosen(self, pool: Pool, table: PageTable | None, k, v, index, rows=None) -> Pool:
        index = jnp.broadcast_to(index, (k.shape[0], k.shape[2], index.shape[-1])).swapaxes(1, 2)[..., None]
        k, v = (jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0) for x in (k, v))
        valid = jnp.ones(k.shape[:2], bool) if rows is None else jnp.broadcast_to(rows[:, None], k.shape[:2])
        return self.filled(pool, table, k, v, valid)

    def copied(self, pool: Pool, source: Int[Array, " W"], target: Int[Array, " W"]) -> Pool:
        taken = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0,))
        put = lax.ScatterDimensionNumbers(update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))

        def copy(x, source, target):
            pages = lax.gather(x, source, taken, (1, *x.shape[1:]), mode="clip")
            return lax.scatter(x, target, pages, put, mode=lax.GatherScatterMode.FILL_OR_DROP)

        return jax.tree.map(lambda part: self._on_host(copy, part, source[:, None], target[:, None], stays=True), pool)

    def keys(self, pool: Pool, table: PageTable | None, batch: int, most: int | None = None) -> Keys:
        size = min(most or pool.page_size, pool.page_size)
        k, v = (self._slice(x, table, batch, size) for x in (pool.k[0], pool.v[0]))
        return Keys((k,), (v,), None, "rows")

    # -------------------------------------------------------------------------------------------------------------------------- inside

    def _slice(self, part: Float[Array, "P Hkv Z D"], table: PageTable | None, batch: int, size: int) -> Float[Array, "B Hkv size D"]:
        """The first slots of every row, on the device."""
        _, heads, _, dim = part.shape
        if table is None:
            return self._on_host(lambda x: lax.slice(x, (0, 0, 0, 0), (batch, heads, size, dim)), part)
        where = jnp.pad(table.pages, ((0, 0), (0, 3))).astype(jnp.int32)
        numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2, 3))
        return self._on_host(lambda x, i: lax.gather(x, i, numbers, (1, heads, size, dim), mode="clip"), part, where)

    def _gather(self, part: Float[Array, "P Hkv Z D"], table: PageTable | None, slot: Int[Array, "B Hkv K"]) -> Float[Array, "B Hkv K D"]:
        """These slots, on the device."""
        pages, heads, size, dim = part.shape
        page = jnp.arange(slot.shape[0]) if table is None else jnp.minimum(table.pages[:, 0], pages - 1)  # a row of nobody's
        where = ((page[:, None] * heads + jnp.arange(heads)) * size)[..., None].astype(jnp.int32) + slot
        if not self.in_host and self.platform != "cpu":
            return gather_rows(part.reshape(-1, dim), where.reshape(-1)).reshape(*slot.shape, dim)
        numbers = lax.GatherDimensionNumbers(offset_dims=(3,), collapsed_slice_dims=(0,), start_index_map=(0,))

        def take(x, i):
            return lax.gather(x.reshape(-1, dim), i, numbers, (1, dim), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

        return self._on_host(take, part, where[..., None])

    def _on_host(self, work: Callable, part, *arrays, stays: bool = False) -> Any:
        """Runs `work` where the pool is; the result comes to the device, or `stays`."""
        if not self.in_host:
            return work(part, *arrays)
        space = jax.memory.Space.Host if stays else jax.memory.Space.Device
        run = compute_on(work, compute_type="device_host", out_memory_spaces=space)
        return run(part, *(self._to_host(x) for x in arrays))

    def _to_host(self, x):
        return jax.device_put(x, jax.memory.Space.Host)


@partial(jax.jit, static_argnums=1)
def _roomy(rows: Float[Array, "B Hkv size D"], places: int) -> Float[Array, "B Hkv K D"]:
    """Fetched rows with room behind them, so that a layer is one program whatever was fetched: how much that is changes all the time."""
    return jnp.pad(rows, ((0, 0), (0, 0), (0, places - rows.shape[2]), (0, 0)))
