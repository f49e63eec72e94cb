"""The stores of a card that kvjax.kernels is written for: the same names, slots and tables, another layout, and kernels that compute.

More dims: R blocks of Z slots, which are the rows of a dense store and the pages of a paged one; T blocks of a row (C = T * Z slots).

Keys and values are `[R, Hkv, Z, D]`, D contiguous in both: what a kv head holds in a block is one piece of memory, which a TMA unit or a
DMA engine fetches at once (kvjax.kernels.paged_attention). A row of a dense store is a block as long as the row. A slot that is not read
is masked by the kernels, its value too, so what stands there never matters.

Whether a strategy stands in these stores is decided once, from outside: `Strategy.native`. Here on a CPU they compute with the operations'
XLA forms, which is slow, and how they are tested.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import NEG_INF, GroupMass, chunk_attention, prompt_attention, softmax_weights, summed_mass
from kvjax.cache.state import CacheShape
from kvjax.cache.stores.base import Readable, Store
from kvjax.cache.stores.dense import DenseStore, select_rows
from kvjax.cache.stores.host import HostLayer, HostStore, Seats
from kvjax.cache.stores.paged import PagedStore, PageTable, page_table
from kvjax.kernels.dispatch import Device, unavailable
from kvjax.kernels.gather import gather_pages, gather_rows
from kvjax.kernels.paged_attention import Statistics, dense_attention, paged_attention, pool_dim
from kvjax.kernels.prefill_attention import column_mass, prefill_attention

Platform = Literal["gpu", "tpu"]

LANES = 128
"""Slots of a row come in multiples of it: threads of a warpgroup, lanes of a TPU's vector."""

TILE = 64
"""Places of a staging block come in multiples of it: slots that attention takes at a time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelLayer:
    """Keys (rotated) and values of one layer.

    Attributes:
      head_dim: of the model (static); a TPU's pool is wider, with zeros behind.
    """

    k: Float[Array, "R Hkv Z D"]
    v: Float[Array, "R Hkv Z D"]
    head_dim: int = dataclasses.field(metadata=dict(static=True))


class KernelStore:
    """What the dense and the paged store have in common; they say where a row's blocks are."""

    platform: Platform

    def blocks(self, layer: Any, shared: Any, batch: int) -> Int[Array, "B T"]:
        """The blocks of every row in the order of its slots; R or more where it has none."""
        raise NotImplementedError

    def rounded(self, capacity: int) -> int:
        """The slots a row gets that asks for `capacity`."""
        raise NotImplementedError

    def empty(self, shape: CacheShape, blocks: int, slots: int, fill: float = 0.0) -> KernelLayer:
        """`blocks` blocks of `slots` slots, that hold `fill`."""
        size = (blocks, shape.num_kv_heads, slots, pool_dim(shape.head_dim, self.platform))
        return KernelLayer(jnp.full(size, fill, shape.dtype), jnp.full(size, fill, shape.dtype), shape.head_dim)

    def token_bytes(self, layer: Any, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them."""
        return layer.k.shape[1], 2 * layer.k.shape[3] * layer.k.dtype.itemsize

    def write_chunk(
        self, layer: Any, shared: Any, start: Int[Array, " B"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> Any:  # fmt: skip
        """Writes token s of row b into slot `start[b] + s`, where valid."""
        slot = jnp.broadcast_to((start[:, None] + jnp.arange(k.shape[1]))[..., None], k.shape[:3])
        return self._put(layer, shared, slot, k, v, valid[..., None])

    def write(
        self, layer: Any, shared: Any, slot: Int[Array, "B h"], k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"],
        active: Bool[Array, " B"],
    ) -> Any:  # fmt: skip
        """Writes one token per active row into `slot`; the other rows stay as they are."""
        slot = jnp.broadcast_to(slot, k.shape[:2])[:, None]
        return self._put(layer, shared, slot, k[:, None], v[:, None], active[:, None, None])

    def _put(self, layer: KernelLayer, shared: Any, slot: Int[Array, "B S Hkv"], k, v, valid) -> KernelLayer:
        count, heads, size, _ = layer.k.shape
        batch, tokens = slot.shape[:2]
        blocks = self.blocks(layer, shared, batch)
        which = jnp.where(valid, slot // size, blocks.shape[1])
        block = blocks[jnp.arange(batch)[:, None, None], jnp.minimum(which, blocks.shape[1] - 1)]
        nowhere = count + jnp.arange(batch * tokens).reshape(batch, tokens, 1)  # beyond the end, so dropped, and all different
        block = jnp.where((which < blocks.shape[1]) & (block < count), block, nowhere)
        at = (block, jnp.arange(heads), slot % size)
        new_k, new_v = (
            old.at[at].set(_widened(new, old).astype(old.dtype), mode="drop", unique_indices=True)
            for old, new in ((layer.k, k), (layer.v, v))
        )
        return dataclasses.replace(layer, k=new_k, v=new_v)

    def attend(
        self, layer: Any, shared: Any, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable: Readable | None,
        group_mass: GroupMass | None,
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:  # fmt: skip
        """Attention of one query per row over its slots; arguments and results as in DenseStore.attend."""
        lengths = jnp.where(visible, jnp.arange(1, visible.shape[-1] + 1), 0).max((1, 2))
        return self.attend_first(layer, shared, q, lengths, visible, readable, group_mass)

    def attend_first(
        self, layer: Any, shared: Any, q: Float[Array, "B H D"], lengths: Int[Array, " B"], visible: Array | None,
        readable: Readable | None, group_mass: GroupMass | None,
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:  # fmt: skip
        """`attend` over the first `lengths` slots of every row.

        Args:
          visible: narrows them down: bool, or positions, negative in empty slots [B, h, C]; None: all of them hold a token.
        """
        if readable is not None:
            return self._attend_read(layer, shared, q, lengths, visible, readable, group_mass)
        if group_mass is None:
            return self._attention(layer, shared, q, lengths, visible=visible), None
        out, statistics = self.attend_with_statistics(layer, shared, q, lengths, visible)
        return out, mass_of(statistics, group_mass)

    def attend_with_statistics(
        self, layer: Any, shared: Any, q: Float[Array, "B H D"], lengths: Int[Array, " B"], visible: Array | None
    ) -> tuple[Float[Array, "B H D"], Statistics]:
        """`attend_first`, with what softmax saw."""
        return self._attention(layer, shared, q, lengths, visible=visible, statistics=True)

    def _attention(self, layer: KernelLayer, shared: Any, q: Float[Array, "B H D"], lengths, **options: Any) -> Any:
        count, heads, size, _ = layer.k.shape
        blocks = jnp.minimum(self.blocks(layer, shared, q.shape[0]), count - 1)  # of slots that are not read, but a number that exists
        if size <= LANES or size % LANES:
            return paged_attention(q, layer.k, layer.v, blocks, lengths, **options)
        parts = size // LANES  # a long block is as many pages of one head
        first = (blocks[:, None] * heads + jnp.arange(heads)[:, None]) * parts
        tables = (first[..., None] + jnp.arange(parts)).reshape(q.shape[0], heads, -1)
        k, v = (x.reshape(-1, 1, LANES, x.shape[3]) for x in (layer.k, layer.v))
        return paged_attention(q, k, v, tables, lengths, **options)

    def _attend_read(self, layer: KernelLayer, shared: Any, q, lengths, visible, readable: Readable, group_mass: GroupMass | None):
        """Attention over the slots that a policy chooses by all their logits, in plain JAX."""
        batch, heads, dim = q.shape
        keys, values = self._rows(layer, shared, batch)
        grouped = (q * dim**-0.5).astype(keys.dtype).reshape(batch, keys.shape[1], -1, dim)
        logits = jnp.einsum("bhgd,bhcd->bhgc", grouped, keys, preferred_element_type=jnp.float32)
        seen = jnp.arange(keys.shape[2]) < lengths[:, None, None]
        if visible is not None:
            seen &= visible if visible.dtype == jnp.bool_ else visible >= 0
        logits = jnp.where(seen[:, :, None], logits, NEG_INF)
        weights, scale = softmax_weights(jnp.where(readable(logits), logits, NEG_INF))
        values = jnp.where(seen[..., None], values, 0)
        out = jnp.einsum("bhgc,bhcd->bhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        mass = None if group_mass is None else group_mass(weights[..., None, :], scale[..., None])
        return (out * scale[..., None]).reshape(batch, heads, dim).astype(q.dtype), mass

    def attend_chunk(
        self, layer: Any, shared: Any, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"],
        context: int | None, group_mass: GroupMass | None,
    ) -> tuple[Float[Array, "B S H D"], Any]:  # fmt: skip
        """Attention of a chunk that has just been written behind `length` tokens; as DenseStore.attend_chunk."""
        keys, values = self._tokens(layer, shared, q.shape[0], context)
        return attend_behind(q, keys, values, length, valid, group_mass)

    def tokens(self, layer: Any, shared: Any, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection; zeros where a row has no block."""
        return self._tokens(layer, shared, batch)

    def _tokens(self, layer: KernelLayer, shared: Any, batch: int, most: int | None = None):
        """The first `most` slots of every row (None: all), as they would come out of a projection."""
        return tuple(x[:, :, :most].swapaxes(1, 2) for x in self._rows(layer, shared, batch, most))

    def _rows(self, layer: KernelLayer, shared: Any, batch: int, most: int | None = None):
        """At least the first `most` slots of every row (None: all), head-major and as wide as a head: [B, Hkv, C, D] twice."""
        raise NotImplementedError

    def _selected(self, layer: KernelLayer, x: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"]) -> Float[Array, "B Hkv C D"]:
        """Token `index[..., c]` at place c, zeros where the index is S or more; as wide as the pool."""
        index = jnp.broadcast_to(index, (x.shape[0], x.shape[2], index.shape[-1]))[..., None]
        taken = jnp.take_along_axis(x.swapaxes(1, 2), index, axis=2, mode="fill", fill_value=0)
        return _widened(taken, layer.k).astype(layer.k.dtype)


@dataclasses.dataclass(frozen=True)
class KernelDenseStore(KernelStore, DenseStore):
    """The dense store of a card: rows of a multiple of 128 slots, each a block of its own.

    Attributes:
      platform: "tpu" pads heads to whole lanes.
    """

    platform: Platform = "gpu"

    name: ClassVar[str] = "dense"

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> Any:
        return self.empty(shape, batch, self.rounded(capacity), fill)

    def rounded(self, capacity: int) -> int:
        return _up(capacity, LANES)

    def capacity(self, layer: Any, shared: None) -> int:
        return layer.k.shape[2]

    def blocks(self, layer: Any, shared: Any, batch: int) -> Int[Array, "B 1"]:
        return jnp.arange(batch, dtype=jnp.int32)[:, None]

    def fill(self, layer: Any, shared: None, k, v, valid: Bool[Array, "B S"]) -> Any:
        """A layer that holds tokens 0..S-1 in slots 0..S-1 and zeros behind them; tokens that are not valid count as empty."""
        spare = ((0, 0), (0, 0), (0, layer.k.shape[2] - k.shape[1]), (0, 0))
        k, v = (_widened(jnp.where(valid[..., None, None], x, 0), layer.k).astype(layer.k.dtype) for x in (k, v))
        return dataclasses.replace(layer, k=jnp.pad(k.swapaxes(1, 2), spare), v=jnp.pad(v.swapaxes(1, 2), spare))

    def fill_selected(self, layer: Any, shared: None, k, v, index: Int[Array, "B h C"], rows: Bool[Array, " B"] | None = None) -> Any:
        """A layer whose slot c holds token `index[..., c]` of (k, v), zeros where the index is S or more, in these rows (None: all)."""
        new = dataclasses.replace(layer, k=self._selected(layer, k, index), v=self._selected(layer, v, index))
        return new if rows is None else jax.tree.map(lambda new, old: select_rows(rows, new, old), new, layer)

    def head(self, layer: Any, slots: int) -> Any:
        return dataclasses.replace(layer, k=layer.k[:, :, :slots], v=layer.v[:, :, :slots])

    def poison(self, layer: Any, shared: None, empty: Bool[Array, "B Hkv C"]) -> Any:
        """NaN keys in the slots marked empty, for tests: whatever stands there must not matter."""
        return dataclasses.replace(layer, k=jnp.where(empty[..., None], jnp.nan, layer.k))

    def _rows(self, layer: KernelLayer, shared: Any, batch: int, most: int | None = None):
        return tuple(x[..., : layer.head_dim] for x in (layer.k, layer.v))


@dataclasses.dataclass(frozen=True)
class KernelPagedStore(KernelStore, PagedStore):
    """The paged store of a card: one pool whatever `extents` says, and as many slots a row as are a multiple of 128.

    Attributes:
      platform: "tpu" pads heads to whole lanes.
    """

    platform: Platform = "gpu"

    name: ClassVar[str] = "paged"

    def pool(self, shape: CacheShape, num_pages: int, fill: float = 0.0) -> Any:
        """An empty pool; `fill` is what the keys hold before anything is written."""
        layer = self.empty(shape, num_pages, self.page_size, fill)
        return dataclasses.replace(layer, v=jnp.zeros_like(layer.v))

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> Any:
        return self.pool(shape, batch * self._table(capacity), fill)

    def rounded(self, capacity: int) -> int:
        return _up(capacity, math.lcm(self.page_size, LANES))

    def share(self, batch: int, capacity: int) -> PageTable:
        """A table that gives every row its `capacity` slots."""
        length = self._table(capacity)
        return page_table(jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length), batch * length)

    def _table(self, capacity: int) -> int:
        return self.rounded(capacity) // self.page_size

    def blocks(self, layer: Any, shared: PageTable, batch: int) -> Int[Array, "B T"]:
        return shared.pages

    def fill(self, layer: Any, shared: PageTable, k, v, valid: Bool[Array, "B S"]) -> Any:
        """Writes tokens 0..S-1 of every row into its slots 0..S-1, where valid."""
        return self.write_chunk(layer, shared, jnp.zeros(k.shape[0], jnp.int32), k, v, valid)

    def fill_selected(
        self, layer: Any, shared: PageTable, k, v, index: Int[Array, "B h C"], rows: Bool[Array, " B"] | None = None
    ) -> Any:  # fmt: skip
        """Rewrites the pages of these rows (None: all): slot c holds token `index[..., c]`, zeros where the index is S or more."""
        pages = shared.pages if rows is None else jnp.where(rows[:, None], shared.pages, layer.k.shape[0])

        def paged(x):
            selected = self._selected(layer, x, index)
            batch, heads, _, dim = selected.shape
            return selected.reshape(batch, heads, -1, self.page_size, dim).swapaxes(1, 2).reshape(-1, heads, self.page_size, dim)

        return self._put_blocks(layer, paged(k), paged(v), pages.reshape(-1))

    def copy_pages(self, layer: Any, source: Int[Array, " W"], target: Int[Array, " W"]) -> Any:
        """Writes what stands in pages `source` into pages `target`; targets beyond the pool are dropped."""
        k, v = (x.at[source].get(mode="clip") for x in (layer.k, layer.v))
        return self._put_blocks(layer, k, v, target)

    def _put_blocks(self, layer: KernelLayer, k, v, block: Int[Array, " W"]) -> KernelLayer:
        return dataclasses.replace(layer, k=layer.k.at[block].set(k, mode="drop"), v=layer.v.at[block].set(v, mode="drop"))

    def poison(self, layer: Any, shared: PageTable, empty: Bool[Array, "B Hkv C"]) -> Any:
        """NaN keys in the slots marked empty and NaN in pages nobody has, for tests: whatever stands there must not matter."""
        batch, heads, _ = empty.shape
        empty = shared.to_pages(empty.reshape(batch, heads, -1, self.page_size).swapaxes(1, 2))
        nobodys = (shared.owner >= batch)[:, None, None]
        k = jnp.where((empty | nobodys)[..., None], jnp.nan, layer.k)
        return dataclasses.replace(layer, k=k, v=jnp.where(nobodys[..., None], jnp.nan, layer.v))

    def _rows(self, layer: KernelLayer, shared: PageTable, batch: int, most: int | None = None):
        pages = shared.pages if most is None else shared.pages[:, : -(-most // self.page_size)]

        def gathered(pool):
            taken = gather_pages(pool, pages).swapaxes(1, 2)  # [B, Hkv, T, Z, D]
            return taken.reshape(*taken.shape[:2], -1, taken.shape[4])[..., : layer.head_dim]

        return gathered(layer.k), gathered(layer.v)


@dataclasses.dataclass(frozen=True)
class KernelHostStore(HostStore):
    """The host store of a card. Its pool is laid out as everywhere; rows of a multiple of 128 slots, staging blocks of whole tiles."""

    platform: Platform = "gpu"

    name: ClassVar[str] = "host"

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> HostLayer:
        return super().init(shape, batch, self.rounded(capacity), fill)

    def rounded(self, capacity: int) -> int:
        return _up(capacity, LANES)

    def staged_places(self, most: int) -> int:
        return _up(most + 1, TILE)

    def attend(
        self, layer: HostLayer, shared: Seats | None, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable, group_mass
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:
        if readable is not None:
            return super().attend(layer, shared, q, visible, readable, group_mass)
        staged = layer.staged
        assert staged is not None, "nothing was fetched"
        seen = self.staged_visible(layer, visible)
        lengths = jnp.full(q.shape[:1], seen.shape[-1], jnp.int32)
        found: Any = dense_attention(q, staged.k, staged.v, lengths, visible=seen, statistics=group_mass is not None)
        if group_mass is None:
            return found, None
        out, statistics = found
        return out, self._to_slots(layer, mass_of(statistics, group_mass))

    def attend_chunk(
        self, layer: HostLayer, shared: Seats | None, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"],
        context: int | None, group_mass,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:  # fmt: skip
        keys, values = self._fetched(layer, shared, q.shape[0], min(context or layer.slots, layer.slots))
        return attend_behind(q, keys, values, length, valid, group_mass)

    def _gather(self, pool: Float[Array, "R Hkv C D"], shared: Seats | None, slot: Int[Array, "B Hkv K"]) -> Float[Array, "B Hkv K D"]:
        if self.transfer != "device":
            return super()._gather(pool, shared, slot)
        where = self._flat(pool, shared, slot).reshape(-1)
        return gather_rows(pool.reshape(-1, pool.shape[3]), where).reshape(*slot.shape, pool.shape[3])


def native_store(store: Store, device: Device) -> Store:
    """What a store is on a device: another one where there are kernels for it, itself everywhere else, as a store of a user's own is."""
    platform: Platform
    if unavailable("mosaic_gpu", device) is None:
        platform = "gpu"
    elif unavailable("mosaic_tpu", device) is None:
        platform = "tpu"
    else:
        return store
    if type(store) is DenseStore:
        return KernelDenseStore(platform)
    if type(store) is PagedStore:
        return KernelPagedStore(store.page_size, platform=platform)
    if type(store) is HostStore:
        return KernelHostStore(store.transfer, store.levels, platform)
    return store


def stored_dim(store: Store, head_dim: int) -> int:
    """Elements that a key of `head_dim` takes in a dense or paged store."""
    return pool_dim(head_dim, store.platform) if isinstance(store, KernelStore) else head_dim


def attend_prompt(
    q: Float[Array, "B S H D"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], valid: Bool[Array, "B S"],
    rules: tuple[GroupMass, ...] = (),
) -> tuple[Float[Array, "B S H D"], tuple[Float[Array, "B Hkv S"], ...]]:  # fmt: skip
    """`prompt_attention` by kernels, its output zero for queries that are not valid; in plain JAX where they cannot join the mass."""
    if any(rule is not summed_mass for rule in rules):
        return prompt_attention(q, k, v, valid, rules)
    out, mass = attend_behind(q, k, v, jnp.zeros(q.shape[0], jnp.int32), valid, rules[0] if rules else None)
    return out, () if mass is None else (mass,) * len(rules)


def attend_behind(
    q: Float[Array, "B S H D"], k: Float[Array, "B K Hkv D"], v: Float[Array, "B K Hkv D"], length: Int[Array, " B"],
    valid: Bool[Array, "B S"], group_mass: GroupMass | None,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:  # fmt: skip
    """Attention of a prompt's chunk, whose keys stand with those of the `length` tokens before it, and the mass the keys received."""
    if group_mass is not None and group_mass is not summed_mass:
        slots = jnp.arange(k.shape[1])
        stored = jnp.where(slots < (length + valid.sum(-1))[:, None], slots, -1)[:, None]
        return chunk_attention(q, k, v, length[:, None] + jnp.arange(q.shape[1]), stored, valid, group_mass)
    count = valid.sum(-1)
    out, lse = prefill_attention(q, k.astype(q.dtype), v.astype(q.dtype), length, count)
    return out, None if group_mass is None else column_mass(q, k.astype(q.dtype), lse, length, count)


def mass_of(statistics: Statistics, group_mass: GroupMass) -> Float[Array, "B Hkv C"]:
    """The attention mass of every slot, joined as a policy joins it."""
    probability = jnp.where(statistics.logits > NEG_INF / 2, jnp.exp(statistics.logits - statistics.lse[..., None]), 0)
    return group_mass(probability[..., None, :], jnp.ones((*statistics.lse.shape, 1), jnp.float32))


def _widened(x: Float[Array, "... D"], pool: Float[Array, "R Hkv Z W"]) -> Float[Array, "... W"]:
    """With zeros behind, as wide as the pool."""
    more = pool.shape[3] - x.shape[-1]
    return x if not more else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
