"""The dense store: one pair of arrays per layer, a fixed number of slots for every row.

Keys are stored `[B*Hkv, D, C]` and values `[B*Hkv, C, D]`. Rows and kv heads share one axis and keys stand transposed because with this
layout XLA's CPU backend neither copies the cache around the update nor reads it once per query head: both products are plain batched
matrix products over arrays as they lie (BUILD_NOTES.md has the measurements).

What `init` returns is memory nobody has written. The first prefill of a row writes every slot, zeros where it stores nothing, so decode
steps may multiply an unused value by a probability of zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import NEG_INF, softmax_weights
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

    name = "dense"

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> DenseLayer:
        rows = batch * shape.num_kv_heads
        return DenseLayer(
            k=jnp.full((rows, shape.head_dim, capacity), fill, shape.dtype),
            v=jnp.full((rows, capacity, shape.head_dim), fill, shape.dtype),
        )

    def capacity(self, layer: DenseLayer) -> int:
        return layer.k.shape[-1]

    def token_bytes(self, layer: DenseLayer, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them."""
        return layer.k.shape[0] // batch, 2 * layer.k.shape[1] * layer.k.dtype.itemsize

    def fill(self, layer: DenseLayer, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], valid: Bool[Array, "B S"]) -> DenseLayer:
        """A layer that holds tokens 0..S-1 in slots 0..S-1 and zeros behind them; tokens that are not valid count as empty."""
        spare = self.capacity(layer) - k.shape[1]
        k, v = (_rows(jnp.where(valid[..., None, None], x, 0).astype(layer.k.dtype)) for x in (k, v))
        return DenseLayer(
            k=jnp.pad(k.swapaxes(1, 2), ((0, 0), (0, 0), (0, spare))),
            v=jnp.pad(v, ((0, 0), (0, spare), (0, 0))),
        )

    def fill_selected(
        self, layer: DenseLayer, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"]
    ) -> DenseLayer:
        """A layer whose slot c holds token `index[..., c]` of (k, v), zeros where the index is S or more."""
        batch, _, heads, _ = k.shape
        flat = jnp.broadcast_to(index, (batch, heads, index.shape[-1])).reshape(batch * heads, -1, 1)
        k, v = (jnp.take_along_axis(_rows(x), flat, axis=1, mode="fill", fill_value=0).astype(layer.k.dtype) for x in (k, v))
        return DenseLayer(k=k.swapaxes(1, 2), v=v)

    def write_chunk(
        self,
        layer: DenseLayer,
        start: Int[Array, " B"],
        k: Float[Array, "B S Hkv D"],
        v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> DenseLayer:
        """Writes token s of row b into slot `start[b] + s`, where valid."""
        batch, size, heads, _ = k.shape
        slot = start[:, None] + jnp.arange(size)
        slot = jnp.where(valid, slot, self.capacity(layer) + slot)  # out of range, and unique: dropped
        slot = jnp.repeat(slot, heads, axis=0)
        row = jnp.arange(batch * heads)[:, None]
        k, v = _rows(k).astype(layer.k.dtype), _rows(v).astype(layer.v.dtype)
        return DenseLayer(
            k=layer.k.at[row, :, slot].set(k, mode="drop", unique_indices=True),
            v=layer.v.at[row, slot].set(v, mode="drop", unique_indices=True),
        )

    def write(
        self, layer: DenseLayer, slot: Int[Array, "B h"], k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"], active: Bool[Array, " B"]
    ) -> DenseLayer:
        """Writes one token per active row into `slot`; the other rows stay as they are."""
        batch, heads, dim = k.shape
        slot = jnp.where(active[:, None], slot, self.capacity(layer))  # out of range: dropped
        slot = jnp.broadcast_to(slot, (batch, heads)).reshape(-1)
        row = jnp.arange(batch * heads)
        return DenseLayer(
            k=layer.k.at[row, :, slot].set(k.reshape(-1, dim).astype(layer.k.dtype), mode="drop", unique_indices=True),
            v=layer.v.at[row, slot].set(v.reshape(-1, dim).astype(layer.v.dtype), mode="drop", unique_indices=True),
        )

    def attend(
        self, layer: DenseLayer, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv G C"], Float[Array, "B Hkv G"]]:
        """Attention of one query per row over its slots.

        Args:
          visible: slots that hold a token.
          readable: narrows it down given the logits (Policy.readable), or returns None.

        Returns:
          The output, the unnormalised weights of the slots, and the factor that makes probabilities of a query head's weights (float32).
        """
        batch, heads, dim = q.shape
        kv_heads = layer.k.shape[0] // batch
        grouped = (q * dim**-0.5).astype(layer.k.dtype).reshape(batch * kv_heads, -1, dim)
        logits = jnp.einsum("ngd,nds->ngs", grouped, layer.k, preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, kv_heads, *logits.shape[1:])
        logits = jnp.where(visible[:, :, None], logits, NEG_INF)
        if (chosen := readable(logits)) is not None:
            logits = jnp.where(chosen, logits, NEG_INF)
        weights, scale = softmax_weights(logits)
        flat = weights.reshape(batch * kv_heads, *weights.shape[2:]).astype(layer.v.dtype)
        out = jnp.einsum("ngs,nsd->ngd", flat, layer.v, preferred_element_type=jnp.float32)
        out = out.reshape(batch, kv_heads, -1, dim) * scale[..., None]
        return out.reshape(batch, heads, dim).astype(q.dtype), weights, scale

    def poison(self, layer: DenseLayer, empty: Bool[Array, "B Hkv C"]) -> DenseLayer:
        """NaN keys in the slots marked empty, for tests: whatever stands there must not matter."""
        return dataclasses.replace(layer, k=jnp.where(empty.reshape(-1, 1, empty.shape[-1]), jnp.nan, layer.k))

    def tokens(self, layer: DenseLayer, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection: what a later chunk of the prompt attends to, and what tests look at."""
        k, v = layer.k.swapaxes(1, 2), layer.v
        return tuple(x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2) for x in (k, v))  # type: ignore[return-value]


def _rows(x: Float[Array, "B S Hkv D"]) -> Float[Array, "N S D"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])
