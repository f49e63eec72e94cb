"""Attention in plain JAX: what the stores compute with on a CPU, and the definition every kernel is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEG_INF = -1e30  # finite, so that a row with nothing to see gives a uniform softmax and not NaN


def causal_attention(
    q: Float[Array, "B S H D"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], positions: Int[Array, "B S"] | None = None
) -> Float[Array, "B S H D"]:
    """Plain causal attention over one sequence, every score at once (O(S^2) memory): the oracle, and the training path.

    Args:
      q, k, v: queries unscaled; query head h reads kv head h // G.
      positions: true positions when they are not 0, 1, 2, ... (only their order matters here).
    """
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, dim) * dim**-0.5
    logits = jnp.einsum("bqngd,bknd->bngqk", grouped, k, preferred_element_type=jnp.float32)
    order = jnp.broadcast_to(jnp.arange(length), (batch, length)) if positions is None else positions
    visible = order[:, None, None, :, None] >= order[:, None, None, None, :]
    probs = jax.nn.softmax(jnp.where(visible, logits, NEG_INF), axis=-1)
    out = jnp.einsum("bngqk,bknd->bqngd", probs.astype(v.dtype), v)
    return out.reshape(batch, length, heads, dim)
