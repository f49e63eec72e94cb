"""The dense store: one pair of arrays per layer, a fixed number of slots for every row.

Keys are stored `[B*Hkv, D, C]` and values `[B*Hkv, C, D]`. Rows and kv heads share one axis and keys stand transposed because with this
layout XLA's CPU backend neither copies the cache around the update nor reads it once per query head: both products are plain batched
matrix products over arrays as they lie (BUILD_NOTES.md has the measurements).

What `init` returns is memory nobody has written. The first prefill of a row writes every slot, zeros where it stores nothing, so decode
steps may multiply an unused value by a probability of zero.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import NEG_INF, chunk_attention, softmax_weights
from kvjax.cache.state import CacheShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """Keys (rotated) and values of one layer; N = B * Hkv."""

    k: Float[Array, "N D C"]
    v: Float[Array, "N C D"]


@dataclasses.dataclass(frozen=True)
class DenseStore:
    """Storage for `C` slots a row, allocated once."""

    name: ClassVar[str] = "dense"

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> DenseLayer:
        rows = batch * shape.num_kv_heads
        return DenseLayer(
            k=jnp.full((rows, shape.head_dim, capacity), fill, shape.dtype),
            v=jnp.full((rows, capacity, shape.head_dim), fill, shape.dtype),
        )

    def rounded(self, capacity: int) -> int:
        """The slots a row gets that asks for `capacity`."""
        return capacity

    def share(self, batch: int, capacity: int) -> None:
        """What all layers share: nothing."""

    def capacity(self, layer: DenseLayer, shared: None) -> int:
        return layer.k.shape[-1]

    def token_bytes(self, layer: DenseLayer, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them."""
        return layer.k.shape[0] // batch, 2 * layer.k.shape[1] * layer.k.dtype.itemsize

    def fill(
        self, layer: DenseLayer, shared: None, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], valid: Bool[Array, "B S"]
    ) -> DenseLayer:
        """A layer that holds tokens 0..S-1 in slots 0..S-1 and zeros behind them; tokens that are not valid count as empty."""
        spare = layer.k.shape[-1] - k.shape[1]
        k, v = (_rows(jnp.where(valid[..., None, None], x, 0).astype(layer.k.dtype)) for x in (k, v))
        return DenseLayer(
            k=jnp.pad(k.swapaxes(1, 2), ((0, 0), (0, 0), (0, spare))),
            v=jnp.pad(v, ((0, 0), (0, spare), (0, 0))),
        )

    def fill_selected(
        self, layer: DenseLayer, shared: None, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"],
        rows: Bool[Array, " B"] | None = None,
    ) -> DenseLayer:  # fmt: skip
        """A layer whose slot c holds token `index[..., c]` of (k, v), zeros where the index is S or more, in these rows (None: all)."""
        batch, _, heads, _ = k.shape
        flat = jnp.broadcast_to(index, (batch, heads, index.shape[-1])).reshape(batch * heads, -1, 1)
        k, v = (jnp.take_along_axis(_rows(x), flat, axis=1, mode="fill", fill_value=0).astype(layer.k.dtype) for x in (k, v))
        new = DenseLayer(k=k.swapaxes(1, 2), v=v)
        return new if rows is None else jax.tree.map(lambda new, old: select_rows(rows, new, old), new, layer)

    def write_chunk(
        self,
        layer: DenseLayer,
        shared: None,
        start: Int[Array, " B"],
        k: Float[Array, "B S Hkv D"],
        v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> DenseLayer:
        """Writes token s of row b into slot `start[b] + s`, where valid."""
        batch, size, heads, _ = k.shape
        slot = start[:, None] + jnp.arange(size)
        slot = jnp.where(valid, slot, layer.k.shape[-1] + slot)  # out of range, and unique: dropped
        slot = jnp.repeat(slot, heads, axis=0)
        row = jnp.arange(batch * heads)[:, None]
        k, v = _rows(k).astype(layer.k.dtype), _rows(v).astype(layer.v.dtype)
        return DenseLayer(
            k=layer.k.at[row, :, slot].set(k, mode="drop", unique_indices=True),
            v=layer.v.at[row, slot].set(v, mode="drop", unique_indices=True),
        )

    def write(
        self,
        layer: DenseLayer,
        shared: None,
        slot: Int[Array, "B h"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        active: Bool[Array, " B"],
    ) -> DenseLayer:
        """Writes one token per active row into `slot`; the other rows stay as they are."""
        batch, heads, dim = k.shape
        slot = jnp.where(active[:, None], slot, layer.k.shape[-1])  # out of range: dropped
        slot = jnp.broadcast_to(slot, (batch, heads)).reshape(-1)
        row = jnp.arange(batch * heads)
        return DenseLayer(
            k=layer.k.at[row, :, slot].set(k.reshape(-1, dim).astype(layer.k.dtype), mode="drop", unique_indices=True),
            v=layer.v.at[row, slot].set(v.reshape(-1, dim).astype(layer.v.dtype), mode="drop", unique_indices=True),
        )

    def attend(
        self, layer: DenseLayer, shared: None, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable, group_mass
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:
        """Attention of one query per row over its slots.

        Args:
          visible: slots that hold a token.
          readable: narrows it down given the logits [B, Hkv, G, C] (Policy.readable); None: all are read.
          group_mass: how weights become attention mass per slot (Policy.group_mass); None: not wanted.

        Returns:
          The output, and the mass every slot received (float32).
        """
        batch, heads, dim = q.shape
        kv_heads = layer.k.shape[0] // batch
        grouped = (q * dim**-0.5).astype(layer.k.dtype).reshape(batch * kv_heads, -1, dim)
        logits = jnp.einsum("ngd,nds->ngs", grouped, layer.k, preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, kv_heads, *logits.shape[1:])
        logits = jnp.where(visible[:, :, None], logits, NEG_INF)
        if readable is not None:
            logits = jnp.where(readable(logits), logits, NEG_INF)
        weights, scale = softmax_weights(logits)
        flat = weights.reshape(batch * kv_heads, *weights.shape[2:]).astype(layer.v.dtype)
        out = jnp.einsum("ngs,nsd->ngd", flat, layer.v, preferred_element_type=jnp.float32)
        out = out.reshape(batch, kv_heads, -1, dim) * scale[..., None]
        mass = None if group_mass is None else group_mass(weights[..., None, :], scale[..., None])
        return out.reshape(batch, heads, dim).astype(q.dtype), mass

    def attend_chunk(
        self, layer: DenseLayer, shared: None, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"],
        context: int | None, group_mass,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:  # fmt: skip
        """Attention of a chunk of the prompt that has just been written behind `length` tokens.

        Args:
          context: no row is longer than this after the chunk (static); slots beyond are not read. None: no bound but the capacity.

        Returns:
          The output, and the attention mass of the first K slots, K being the slots that were read.
        """
        size = min(context or layer.k.shape[-1], layer.k.shape[-1])
        slots = jnp.arange(size)
        stored = jnp.where(slots < (length + valid.sum(-1))[:, None], slots, -1)[:, None]
        keys, values = (x[:, :size] for x in self.tokens(layer, shared, q.shape[0]))
        return chunk_attention(q, keys, values, length[:, None] + jnp.arange(q.shape[1]), stored, valid, group_mass)

    def head(self, layer: DenseLayer, slots: int) -> DenseLayer:
        """The first slots of every row, as a layer."""
        return DenseLayer(layer.k[:, :, :slots], layer.v[:, :slots])

    def poison(self, layer: DenseLayer, shared: None, empty: Bool[Array, "B Hkv C"]) -> DenseLayer:
        """NaN keys in the slots marked empty, for tests: whatever stands there must not matter."""
        return dataclasses.replace(layer, k=jnp.where(empty.reshape(-1, 1, empty.shape[-1]), jnp.nan, layer.k))

    def tokens(self, layer: DenseLayer, shared: None, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection: what a later chunk of the prompt attends to, and what tests look at."""
        k, v = layer.k.swapaxes(1, 2), layer.v
        return tuple(x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2) for x in (k, v))  # type: ignore[return-value]


def _rows(x: Float[Array, "B S Hkv D"]) -> Float[Array, "N S D"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def select_rows(rows: Bool[Array, " B"], new: Any, old: Any):
    """`new` in these rows, `old` in the others; a store's arrays have B * Hkv rows."""
    repeated = jnp.repeat(rows, new.shape[0] // rows.shape[0])
    return jnp.where(repeated.reshape(-1, *[1] * (new.ndim - 1)), new, old)
