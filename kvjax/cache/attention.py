"""Attention in plain JAX: what the stores compute with on a CPU, and the definition every kernel is tested against."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GroupMass = Callable[[Float[Array, "... G Q K"], Float[Array, "... G Q"]], Float[Array, "... K"]]
"""Policy.group_mass: unnormalised weights and the factor of each query -> attention mass per key."""


def summed_mass(weights: Float[Array, "... G Q K"], scale: Float[Array, "... G Q"]) -> Float[Array, "... K"]:
    """The attention mass of every key, summed over queries and the query heads of its kv head: a GroupMass, the one that kernels know."""
    return jnp.einsum("...gqc,...gq->...c", weights, scale)


BLOCK = 64
"""Queries at a time: their logits over a few thousand keys stay in a core's cache."""

SHORT, SEGMENTS = 1024, (4, 8)
"""Parts of a prompt with a loop each, of one up to SHORT tokens and of a longer one: more of them compute less that nobody sees, and take
longer to compile."""

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
    block: int = BLOCK,
) -> tuple[Float[Array, "B S H D"], tuple[Float[Array, "B Hkv S"], ...]]:
    """Causal attention over a prompt, one block of queries at a time.

    Args:
      query_valid: queries that count in the statistics (padding does not).
      rules: ways in which the weights [B, Hkv, G, Q, K] of a block become attention mass per key [B, Hkv, K].

    Returns:
      The output, and by every rule the attention mass of every key summed over the valid queries (H2O's score of a prompt,
      arXiv:2306.14048 section 4).

    Memory is O(S * block). While a block is at hand its rows are complete, so its probabilities are final and their column sums cost one
    more pass over a block that is still in cache, not a second computation of all scores. The blocks are a loop, so that a program does not
    grow with the prompt: SEGMENTS of them, each of which leaves out the keys behind its last query.
    """

    def seen(at: Int[Array, " Q"], end: int) -> Bool[Array, "Q K"]:
        return at[:, None] >= jnp.arange(end)

    return _attend_blocks(q, k, v, query_valid, seen, rules, block, SEGMENTS[q.shape[1] > SHORT])


def chunk_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K Hkv D"],
    v: Float[Array, "B K Hkv D"],
    query_position: Int[Array, "B S"],
    key_position: Int[Array, "B h K"],
    query_valid: Bool[Array, "B S"],
    group_mass: GroupMass | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:
    """Attention of a later chunk of a prompt over what the cache holds and the chunk itself.

    Args:
      key_position: true position of every key, -1 where there is none; a query sees the keys at or before its own position.
      query_valid, block: as in `prompt_attention`.
      group_mass: its one rule; None: no statistics.
    """
    where = key_position[:, :, None, None]

    def seen(at: Int[Array, " Q"], end: int) -> Bool[Array, "B h 1 Q K"]:
        return (where >= 0) & (where <= query_position[:, at][:, None, None, :, None])

    out, mass = _attend_blocks(q, k, v, query_valid, seen, () if group_mass is None else (group_mass,), block, 1)
    return out, mass[0] if mass else None


def _attend_blocks(
    q: Float[Array, "B S H D"], k: Float[Array, "B K Hkv D"], v: Float[Array, "B K Hkv D"], query_valid: Bool[Array, "B S"],
    seen: Callable[[Int[Array, " Q"], int], Bool[Array, "... Q K"]], rules: tuple[GroupMass, ...], block: int, segments: int,
) -> tuple[Float[Array, "B S H D"], tuple[Float[Array, "B Hkv K"], ...]]:  # fmt: skip
    """Attention in blocks of queries, in a loop for each of `segments` parts of them.

    `seen` says which of the first K keys the queries of a block see, given their indices and K: with one segment all keys there are, with
    more the keys up to the last query of the part.
    """
    batch, length, heads, dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    q = (q * dim**-0.5).reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)  # [B, Hkv, G, S, D]
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B, Hkv, D, K] and [B, Hkv, K, D]
    block = min(block, length)
    blocks = -(-length // block)

    def turn(end: int, i, carry):
        out, mass = carry
        first = jnp.minimum(i * block, length - block)  # a last block that does not fit begins earlier, and counts once what it repeats
        at = first + jnp.arange(block)
        queries = jax.lax.dynamic_slice_in_dim(q, first, block, 3)
        part, weights, scale = _attend_block(queries, k[..., :end], v[:, :, :end], seen(at, end))
        counted = jax.lax.dynamic_slice_in_dim(query_valid, first, block, 1) & (at >= i * block)
        scale = jnp.where(counted[:, None, None], scale, 0)
        mass = tuple(x.at[..., :end].add(rule(weights, scale)) for x, rule in zip(mass, rules, strict=True))
        return jax.lax.dynamic_update_slice_in_dim(out, part, first, 3), mass

    carry = jnp.zeros(q.shape, v.dtype), (jnp.zeros((batch, kv_heads, keys), jnp.float32),) * len(rules)
    each = -(-blocks // segments)
    for begin in range(0, blocks, each):
        stop = min(begin + each, blocks)
        end = keys if segments == 1 else min(stop * block, keys)
        carry = turn(end, begin, carry) if stop == begin + 1 else jax.lax.fori_loop(begin, stop, partial(turn, end), carry)
    out, mass = carry
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim), mass


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
