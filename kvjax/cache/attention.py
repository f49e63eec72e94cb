"""Attention in plain JAX: what the stores compute with on a CPU, and the definition every kernel is tested against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GroupMass = Callable[[Float[Array, "... G Q K"], Float[Array, "... G Q"]], Float[Array, "... K"]]
"""Policy.group_mass: unnormalised weights and the factor of each query -> attention mass per key."""


def summed_mass(weights: Float[Array, "... G Q K"], scale: Float[Array, "... G Q"]) -> Float[Array, "... K"]:
    """The attention mass of every key, summed over queries and the query heads of its kv head: a GroupMass, the one that kernels know."""
    return jnp.einsum("...gqc,...gq->...c", weights, scale)


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


def prompt_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    query_valid: Bool[Array, "B S"],
    rules: tuple[GroupMass, ...] = (),
    block: int = 256,
) -> tuple[Float[Array, "B S H D"], tuple[Float[Array, "B Hkv S"], ...]]:
    """Causal attention over a prompt, one block of queries at a time; keys after a block are not touched.

    Args:
      query_valid: queries that count in the statistics (padding does not).
      rules: ways in which the weights [B, Hkv, G, Q, K] of a block become attention mass per key [B, Hkv, K].

    Returns:
      The output, and by every rule the attention mass of every key summed over the valid queries (H2O's score of a prompt,
      arXiv:2306.14048 section 4).

    Memory is O(S * block). While a block is at hand its rows are complete, so its probabilities are final and their column sums cost one
    more pass over a block that is still in cache, not a second computation of all scores.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = (q * dim**-0.5).reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)  # [B, Hkv, G, S, D]
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B, Hkv, D, S] and [B, Hkv, S, D]
    outs, mass = [], (jnp.zeros((batch, kv_heads, length), jnp.float32),) * len(rules)
    for start in range(0, length, block):
        end = min(start + block, length)
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        out, weights, scale = _attend_block(q[..., start:end, :], k[..., :end], v[..., :end, :], visible)
        counted = jnp.where(query_valid[:, None, None, start:end], scale, 0)
        mass = tuple(x.at[..., :end].add(rule(weights, counted)) for x, rule in zip(mass, rules, strict=True))
        q, out, mass = jax.lax.optimization_barrier((q, out, mass))  # one block after the other, so that they share memory
        outs.append(out)
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim), mass


def chunk_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K Hkv D"],
    v: Float[Array, "B K Hkv D"],
    query_position: Int[Array, "B S"],
    key_position: Int[Array, "B h K"],
    query_valid: Bool[Array, "B S"],
    group_mass: GroupMass | None = None,
    block: int = 256,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:
    """Attention of a later chunk of a prompt over what the cache holds and the chunk itself.

    Args:
      key_position: true position of every key, -1 where there is none; a query sees the keys at or before its own position.
      query_valid, block: as in `prompt_attention`.
      group_mass: its one rule; None: no statistics.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = (q * dim**-0.5).reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    seen = key_position[:, :, None, None]
    outs, mass = [], jnp.zeros((batch, kv_heads, k.shape[-1]), jnp.float32)
    for start in range(0, length, block):
        end = min(start + block, length)
        visible = (seen >= 0) & (seen <= query_position[:, None, None, start:end, None])
        out, weights, scale = _attend_block(q[..., start:end, :], k, v, visible)
        if group_mass is not None:
            mass += group_mass(weights, jnp.where(query_valid[:, None, None, start:end], scale, 0))
        q, out, mass = jax.lax.optimization_barrier((q, out, mass))  # one block after the other, so that they share memory
        outs.append(out)
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim), None if group_mass is None else mass


def softmax_weights(logits: Float[Array, "... K"]) -> tuple[Float[Array, "... K"], Float[Array, "..."]]:
    """Softmax in two parts: unnormalised weights, and the factor that makes probabilities of a row of them."""
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights, 1 / weights.sum(-1)


def _attend_block(q, k, v, visible):
    """One block of queries: output, unnormalised weights and their factors, float32."""
    logits = jnp.einsum("bngqd,bndk->bngqk", q, k, preferred_element_type=jnp.float32)
    weights, scale = softmax_weights(jnp.where(visible, logits, NEG_INF))
    out = jnp.einsum("bngqk,bnkd->bngqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out * scale[..., None]).astype(v.dtype), weights, scale
