"""The host store: the pool of every layer in host memory, and on the device only what a step reads (InfiniGen, OSDI'24, section 3).

More dims: R seats of the pool, K rows staged per kv head, P partial columns of a key.

A decode step fetches a layer's tokens into a staging block, `prefetch`, while the layer before is computed; `write` adds the new token to
the pool and to the staging block, `attend` reads the staging block alone. Either everything is fetched (a full offload, as FlexGen does) or
the slots a policy has chosen, per kv head (InfiniGen). How much is moved follows what is wanted, in `levels` steps: a program has static
shapes, so it holds one branch for each.

Pools are head-major and keys stand apart from values, `[R, Hkv, C, D]` each: with both in one row a product over the keys alone
would first have to copy them out.

Beside the pool, on the device, stand the partial keys of a policy that speculates, `[R, Hkv, P, C]`. They come appended to the keys
that are stored (kvjax.cache.strategy), since a store does not know how to make them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Bool, Float, Int

from kvjax import checks
from kvjax.cache.attention import NEG_INF, chunk_attention, softmax_weights
from kvjax.cache.state import CacheShape
from kvjax.errors import SpecError

Transfer = Literal["device", "jit", "driven"]
TRANSFERS = get_args(Transfer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Staged:
    """Tokens of a layer on the device; the last of the K places is for the step's own token, and some before it may be empty.

    Attributes:
      slot: where in the row each stands; C where there is none.
    """

    k: Float[Array, "B Hkv K D"]
    v: Float[Array, "B Hkv K D"]
    slot: Int[Array, "B Hkv K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostLayer:
    """One layer.

    Attributes:
      k, v: the pool; None inside a `driven` program, which never sees it.
      partial: partial keys, on the device; None without speculation.
      traffic: so far: tokens decoded, then rows (each of one kv head) that were held, that were wanted, and that were moved for them.
      staged: what `prefetch` has brought; None between steps.
      outgoing: the step's token, for the host to put into the pool (`driven`).
      slots: C, which the arrays themselves may not tell (static).
    """

    k: Float[Array, "R Hkv C D"] | None
    v: Float[Array, "R Hkv C D"] | None
    partial: Float[Array, "R Hkv P C"] | None
    traffic: Float[Array, " 4"]
    staged: Staged | None = None
    outgoing: Staged | None = None
    slots: int = dataclasses.field(default=0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seats:
    """Where the rows of a call sit: in the pool, and among the rows of what stands on the device."""

    pool: Int[Array, " B"]
    row: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class HostStore:
    """Storage in host memory.

    Attributes:
      transfer: how tokens come to the device. `jit`: the gather runs on the host inside the decode program. `driven`: the host drives the
        layers one by one and copies in between (offline only). `device`: the pool is device memory; what nothing can beat.
      levels: sizes a fetch can have; the least that holds what is wanted is moved.
    """

    transfer: Transfer = "jit"
    levels: int = 4

    name: ClassVar[str] = "host"

    def __post_init__(self):
        if self.transfer not in TRANSFERS:
            raise SpecError(f"unknown transfer {self.transfer!r}; choose from {', '.join(TRANSFERS)}")
        if checks.whole("levels", self.levels, -checks.LARGEST, 1000) < 1:
            raise SpecError(f"levels={self.levels}: a fetch has at least one size")

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> HostLayer:
        """A pool of `batch` seats; `fill` is what the keys hold before anything is written."""
        size = (batch, shape.num_kv_heads, capacity, shape.head_dim)
        k, v = jnp.full(size, fill, shape.dtype), jnp.zeros(size, shape.dtype)
        if self.transfer != "device":
            k, v = self._to_host(k), self._to_host(v)
        return HostLayer(k, v, None, jnp.zeros(4, jnp.float32), slots=capacity)

    def with_partial(self, layer: HostLayer, rows: int, columns: int, fill: float = 0.0) -> HostLayer:
        """The layer with room for partial keys of `columns` columns, for `rows` rows."""
        assert layer.k is not None
        size = (rows, layer.k.shape[1], columns, layer.slots)
        return dataclasses.replace(layer, partial=jnp.full(size, fill, layer.k.dtype))

    def share(self, batch: int, capacity: int) -> None:
        """Row b sits in seat b."""

    def rounded(self, capacity: int) -> int:
        return capacity

    def pages_of(self, slots: int) -> int:
        """A row takes one seat, however many slots it uses."""
        return 1

    def capacity(self, layer: HostLayer, shared: Seats | None) -> int:
        return layer.slots

    def token_bytes(self, layer: HostLayer, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them in the pool."""
        assert layer.k is not None
        return layer.k.shape[1], 2 * layer.k.shape[3] * layer.k.dtype.itemsize

    # ------------------------------------------------------------------------------------------------------------------ a decode step

    def prefetch(
        self, layer: HostLayer, shared: Seats | None, slot: Int[Array, "B Hkv K"] | None, count: Int[Array, " B"], held: Int[Array, " B"]
    ) -> HostLayer:
        """Brings tokens to the device: the first `count` of `slot` per kv head, or without `slot` the first `count` slots of every row.

        `held`, the tokens there are, only goes into the books.
        """
        assert layer.k is not None
        assert layer.v is not None
        batch, num_heads, most = count.shape[0], layer.k.shape[1], layer.slots if slot is None else slot.shape[2]
        sizes = self.sizes(most)
        pool = (layer.k, layer.v)

        def move(size: int) -> Callable[[], tuple[Array, Array]]:
            def moved():
                if slot is None:
                    found = [self._slice(x, shared, batch, size) for x in pool]
                else:
                    found = [self._gather(x, shared, slot[:, :, :size]) for x in pool]
                k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, self.staged_places(most) - size), (0, 0))) for x in found)
                return k, v

            return moved

        level = (count.max(initial=0) > jnp.asarray(sizes[:-1])).sum() if len(sizes) > 1 else jnp.int32(0)
        k, v = lax.switch(level, [move(size) for size in sizes])
        staged = Staged(k, v, self.places(slot, count, num_heads, layer.slots))
        moved = batch * num_heads * jnp.asarray(sizes, jnp.float32)[level]
        held_rows, wanted = (num_heads * x.sum().astype(jnp.float32) for x in (held, count))
        traffic = layer.traffic + jnp.stack([jnp.float32(0), held_rows, wanted, moved])
        return dataclasses.replace(layer, staged=staged, traffic=traffic)

    def sizes(self, most: int) -> list[int]:
        """Rows per kv head that a fetch of up to `most` of them can have, ascending."""
        return sorted({-(-most * level // self.levels) for level in range(1, self.levels + 1)})

    def staged_places(self, most: int) -> int:
        """Places of a staging block for up to `most` rows per kv head, and the step's own token."""
        return most + 1

    def partial_keys(self, layer: HostLayer, shared: Seats | None) -> Float[Array, "B Hkv P C"]:
        """Of the rows of a call."""
        assert layer.partial is not None
        return layer.partial if shared is None else layer.partial.at[shared.row].get(mode="clip")

    def places(self, slot: Int[Array, "B Hkv K"] | None, count: Int[Array, " B"], num_heads: int, slots: int) -> Int[Array, "B Hkv P"]:
        """The slot of every staged row, C for rows that are not wanted and for the places behind them, the step's own token's too."""
        batch, most = count.shape[0], slots if slot is None else slot.shape[2]
        index = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, num_heads, slots)) if slot is None else slot
        index = jnp.where(jnp.arange(most) < count[:, None, None], index, slots)
        return jnp.pad(index, ((0, 0), (0, 0), (0, self.staged_places(most) - most)), constant_values=slots)

    def write(
        self, layer: HostLayer, shared: Seats | None, slot: Int[Array, "B h"], k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"],
        active: Bool[Array, " B"],
    ) -> HostLayer:  # fmt: skip
        """One token per active row in `slot` of the pool, and in the staging block."""
        k, partial = self._parted(layer, k, v.shape[-1])
        slot = jnp.broadcast_to(slot, k.shape[:2])
        if layer.staged is not None:
            staged = layer.staged
            places = jnp.where(staged.slot == slot[..., None], layer.slots, staged.slot).at[..., -1].set(slot)
            new_k, new_v = (old.at[:, :, -1].set(new.astype(old.dtype)) for old, new in ((staged.k, k), (staged.v, v)))
            layer = dataclasses.replace(layer, staged=Staged(new_k, new_v, places))
        if layer.partial is not None:
            row = jnp.arange(k.shape[0]) if shared is None else shared.row
            where = jnp.where(active[:, None], slot, layer.slots)
            heads = jnp.arange(k.shape[1])
            target = layer.partial.at[row[:, None], heads, :, where]
            layer = dataclasses.replace(layer, partial=target.set(partial.astype(layer.partial.dtype), mode="drop", unique_indices=True))
        layer = dataclasses.replace(layer, traffic=layer.traffic.at[0].add(active.sum().astype(jnp.float32)))
        if layer.k is None:
            return layer
        held, k, v, slot = lax.optimization_barrier((layer.staged, k, v, slot))  # fetched first: or the pool would be copied
        layer = dataclasses.replace(layer, staged=held)
        return self._scatter(layer, shared, slot[:, None], k[:, None], v[:, None], active[:, None, None])

    def attend(
        self, layer: HostLayer, shared: Seats | None, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable, group_mass
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:
        """Attention of one query per row over the tokens that are staged; arguments and results as in DenseStore.attend.

        `readable` sees the logits of the staged tokens.
        """
        staged = layer.staged
        assert staged is not None, "nothing was fetched"
        batch, heads, dim = q.shape
        kv_heads, places = staged.k.shape[1:3]
        grouped = (q * dim**-0.5).astype(staged.k.dtype).reshape(batch * kv_heads, -1, dim)
        keys, values = (x.reshape(batch * kv_heads, places, dim) for x in (staged.k, staged.v))
        logits = jnp.einsum("nkd,ngd->nkg", keys, grouped, preferred_element_type=jnp.float32).swapaxes(1, 2)
        logits = logits.reshape(batch, kv_heads, -1, places)
        logits = jnp.where(self.staged_visible(layer, visible)[:, :, None], logits, NEG_INF)
        if readable is not None:
            logits = jnp.where(readable(logits), logits, NEG_INF)
        weights, scale = softmax_weights(logits)
        flat = weights.reshape(batch * kv_heads, -1, places).astype(values.dtype)
        out = jnp.einsum("ngk,nkd->ngd", flat, values, preferred_element_type=jnp.float32)
        out = out.reshape(batch, kv_heads, -1, dim) * scale[..., None]
        mass = None
        if group_mass is not None:
            mass = self._to_slots(layer, group_mass(weights[..., None, :], scale[..., None]))
        return out.reshape(batch, heads, dim).astype(q.dtype), mass

    def staged_visible(self, layer: HostLayer, visible: Bool[Array, "B h C"]) -> Bool[Array, "B Hkv K"]:
        """The places that hold a token of a visible slot."""
        assert layer.staged is not None
        slot = layer.staged.slot
        held = jnp.broadcast_to(visible, (*slot.shape[:2], visible.shape[-1]))
        return (slot < layer.slots) & jnp.take_along_axis(held, jnp.minimum(slot, layer.slots - 1), axis=-1)

    def used(self, layer: HostLayer) -> Bool[Array, "B Hkv C"]:
        """The slots that were staged, the new token's included."""
        assert layer.staged is not None
        return self._to_slots(layer, jnp.ones(layer.staged.slot.shape, jnp.float32)) > 0

    def cleared(self, layer: HostLayer) -> HostLayer:
        """The layer between steps."""
        outgoing = None
        if layer.k is None and layer.staged is not None:
            outgoing = jax.tree.map(lambda x: x[:, :, -1:], layer.staged)
        return dataclasses.replace(layer, staged=None, outgoing=outgoing)

    # --------------------------------------------------------------------------------------------------------------- rows of an engine

    def copy_seats(self, layer: HostLayer, source: Int[Array, " W"], target: Int[Array, " W"], rows: Int[Array, " 2"]) -> HostLayer:
        """Copies what sits in seats, and the partial keys of a row (from, to); a target that does not exist drops the copy."""
        taken = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0,))
        put = lax.ScatterDimensionNumbers(update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))

        def copy(x, source, target):
            seats = lax.gather(x, source, taken, (1, *x.shape[1:]), mode="clip")
            return lax.scatter(x, target, seats, put, mode=lax.GatherScatterMode.FILL_OR_DROP)

        k, v = (self._on_host(copy, pool, source[:, None], target[:, None], stays=True) for pool in (layer.k, layer.v))
        partial = layer.partial
        if partial is not None:
            partial = partial.at[rows[1]].set(partial.at[rows[0]].get(mode="clip"), mode="drop")
        return dataclasses.replace(layer, k=k, v=v, partial=partial)

    def take_row(self, layer: HostLayer, row: Int[Array, ""]) -> Float[Array, "Hkv P C"] | None:
        """The partial keys of a row, to be put back when its sequence has another one."""
        return None if layer.partial is None else layer.partial.at[row].get(mode="clip")

    def put_row(self, layer: HostLayer, row: Int[Array, ""], partial: Float[Array, "Hkv P C"] | None) -> HostLayer:
        if partial is None:
            return layer
        assert layer.partial is not None
        return dataclasses.replace(layer, partial=layer.partial.at[row].set(partial, mode="drop"))

    # ------------------------------------------------------------------------------------------------------------------------- prompts

    def fill(self, layer: HostLayer, shared: Seats | None, k, v, valid: Bool[Array, "B S"]) -> HostLayer:
        """Writes tokens 0..S-1 of every row into its slots 0..S-1, where valid."""
        return self.write_chunk(layer, shared, jnp.zeros(k.shape[0], jnp.int32), k, v, valid)

    def fill_selected(
        self, layer: HostLayer, shared: Seats | None, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"],
        index: Int[Array, "B h C"], rows: Bool[Array, " B"] | None = None,
    ) -> HostLayer:  # fmt: skip
        """Slot c holds token `index[..., c]` of (k, v), zeros where the index is S or more, in these rows (None: all)."""
        batch, _, heads, _ = v.shape
        index = jnp.broadcast_to(index, (batch, heads, index.shape[-1])).swapaxes(1, 2)[..., None]
        k, v = (jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0) for x in (k, v))
        valid = jnp.ones((batch, index.shape[1]), bool) if rows is None else jnp.broadcast_to(rows[:, None], (batch, index.shape[1]))
        return self.write_chunk(layer, shared, jnp.zeros(batch, jnp.int32), k, v, valid)

    def write_chunk(
        self, layer: HostLayer, shared: Seats | None, start: Int[Array, " B"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> HostLayer:  # fmt: skip
        """Token s of row b in slot `start[b] + s`, where valid."""
        k, partial = self._parted(layer, k, v.shape[-1])
        batch, size, heads = v.shape[:3]
        slot = jnp.broadcast_to((start[:, None] + jnp.arange(size))[..., None], (batch, size, heads))
        if layer.partial is not None:
            row = jnp.arange(batch) if shared is None else shared.row
            where = jnp.where(valid[..., None], slot, layer.slots)
            target = layer.partial.at[row[:, None, None], jnp.arange(heads), :, where]
            layer = dataclasses.replace(layer, partial=target.set(partial.astype(layer.partial.dtype), mode="drop"))
        return self._scatter(layer, shared, slot, k, v, valid[..., None])

    def attend_chunk(
        self, layer: HostLayer, shared: Seats | None, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"],
        context: int | None, group_mass,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:  # fmt: skip
        """Causal attention of a chunk that has just been written, over all that the pool holds of its row, fetched whole."""
        size = min(context or layer.slots, layer.slots)
        slots = jnp.arange(size)
        stored = jnp.where(slots < (length + valid.sum(-1))[:, None], slots, -1)[:, None]
        keys, values = self._fetched(layer, shared, q.shape[0], size)
        return chunk_attention(q, keys, values, length[:, None] + jnp.arange(q.shape[1]), stored, valid, group_mass)

    def tokens(self, layer: HostLayer, shared: Seats | None, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection."""
        return self._fetched(layer, shared, batch, layer.slots)

    def poison(self, layer: HostLayer, shared: Seats | None, empty: Bool[Array, "B Hkv C"]) -> HostLayer:
        """NaN keys in the slots marked empty, for tests; the rows must be all seats in order."""
        assert layer.k is not None
        assert shared is None
        k = jnp.where(empty[..., None], jnp.nan, jax.device_put(layer.k, jax.memory.Space.Device))
        layer = dataclasses.replace(layer, k=k if self.transfer == "device" else self._to_host(k))
        if layer.partial is None:
            return layer
        return dataclasses.replace(layer, partial=jnp.where(empty[:, :, None], jnp.nan, layer.partial))

    # -------------------------------------------------------------------------------------------------------------------------- inside

    def _parted(self, layer: HostLayer, k: Float[Array, "... D+P"], dim: int):
        """Keys and their partial columns."""
        return (k, None) if layer.partial is None else (k[..., :dim], k[..., dim:])

    def _to_slots(self, layer: HostLayer, per_place: Float[Array, "B Hkv K"]) -> Float[Array, "B Hkv C"]:
        assert layer.staged is not None
        batch, heads, _ = per_place.shape
        zeros = jnp.zeros((batch, heads, layer.slots), per_place.dtype)
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
        return zeros.at[row, head, layer.staged.slot].add(per_place, mode="drop")

    def _fetched(self, layer: HostLayer, shared: Seats | None, batch: int, size: int):
        assert layer.k is not None
        assert layer.v is not None
        return tuple(self._slice(x, shared, batch, size).swapaxes(1, 2) for x in (layer.k, layer.v))

    def _slice(self, pool: Float[Array, "R Hkv C D"], shared: Seats | None, batch: int, size: int) -> Float[Array, "B Hkv size D"]:
        """The first slots of every row, on the device."""
        _, heads, _, dim = pool.shape
        if shared is None:
            return self._on_host(lambda x: lax.slice(x, (0, 0, 0, 0), (batch, heads, size, dim)), pool)
        where = jnp.pad(shared.pool[:, None], ((0, 0), (0, 3))).astype(jnp.int32)
        numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2, 3))
        return self._on_host(lambda x, i: lax.gather(x, i, numbers, (1, heads, size, dim), mode="clip"), pool, where)

    def _gather(self, pool: Float[Array, "R Hkv C D"], shared: Seats | None, slot: Int[Array, "B Hkv K"]) -> Float[Array, "B Hkv K D"]:
        """These slots, on the device."""
        dim = pool.shape[3]
        if shared is not None:
            shared = Seats(jnp.minimum(shared.pool, pool.shape[0] - 1), shared.row)  # a row of nobody's
        where = self._flat(pool, shared, slot)[..., None]
        numbers = lax.GatherDimensionNumbers(offset_dims=(3,), collapsed_slice_dims=(0,), start_index_map=(0,))

        def take(x, i):
            return lax.gather(x.reshape(-1, dim), i, numbers, (1, dim), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

        return self._on_host(take, pool, where)

    def _scatter(self, layer: HostLayer, shared: Seats | None, slot: Int[Array, "B S Hkv"], k, v, valid) -> HostLayer:
        """The layer with these tokens in its pool, where valid."""
        assert layer.k is not None
        assert layer.v is not None
        seats, heads, _, dim = layer.k.shape
        beyond = seats * heads * layer.slots
        where = self._flat(layer.k, shared, slot.swapaxes(1, 2)).swapaxes(1, 2)
        where = jnp.where(valid & (slot < layer.slots), where, beyond).reshape(-1, 1)
        numbers = lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))

        def put(x, i, rows):
            flat = x.reshape(-1, dim)
            return lax.scatter(flat, i, rows, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP).reshape(x.shape)

        rows = (x.reshape(-1, dim).astype(layer.k.dtype) for x in (k, v))
        new_k, new_v = (self._on_host(put, pool, where, new, stays=True) for pool, new in zip((layer.k, layer.v), rows, strict=True))
        return dataclasses.replace(layer, k=new_k, v=new_v)

    def _flat(self, pool: Float[Array, "R Hkv C D"], shared: Seats | None, slot: Int[Array, "B Hkv K"]) -> Int[Array, "B Hkv K"]:
        """Indices into the pool's rows, all seats and heads one after the other."""
        batch, heads = slot.shape[:2]
        seat = jnp.arange(batch) if shared is None else shared.pool
        return ((seat[:, None] * heads + jnp.arange(heads)) * pool.shape[2])[..., None].astype(jnp.int32) + slot

    def _on_host(self, work: Callable, pool, *arrays, stays: bool = False) -> Any:
        """Runs `work` where the pool is; the result comes to the device, or `stays`."""
        if self.transfer == "device":
            return work(pool, *arrays)
        space = jax.memory.Space.Host if stays else jax.memory.Space.Device
        run = compute_on(work, compute_type="device_host", out_memory_spaces=space)
        return run(pool, *(self._to_host(x) for x in arrays))

    def _to_host(self, x):
        return jax.device_put(x, jax.memory.Space.Host)
