"""Prefill attention and column mass in plain JAX, a tile of scores at a time: the definition, and what runs where no kernel does.

Tiles stand in a loop over queries around a loop over keys that ends at the last key which a query of the tile may see. A last tile that
does not fit begins earlier instead; what it has in common with the one before it counts once.
"""

import jax
import jax.numpy as jnp

from .base import NEG_INF

BLOCK_Q, BLOCK_K = 256, 512
"""Queries and keys of a tile, at most."""


def prefill_attention(q, k, v, start, count, scale: float):
    """See api.py."""
    batch, size, heads, dim = q.shape
    kv_heads, block_k = k.shape[2], min(BLOCK_K, k.shape[1])
    end = start + count

    def rows(i, carry):
        out, lse = carry
        queries, index, first, _ = _queries(q, i)

        def columns(j, carry):
            highest, total, weighted = carry
            keys, at, fresh = _keys(k, j)
            seen = _seen(index, at, start, count) & fresh
            logits = jnp.where(seen, _logits(queries, keys, scale), NEG_INF)
            higher = jnp.maximum(highest, logits.max(-1))
            weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0)
            values = jnp.where((at < end[:, None])[..., None, None], _keys(v, j)[0], 0)
            part = jnp.einsum("bhgqk,bkhd->bhgqd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32, precision=_exact(v))
            fade = jnp.exp(highest - higher)
            return higher, total * fade + weights.sum(-1), weighted * fade[..., None] + part

        shape = (batch, kv_heads, heads // kv_heads, queries.shape[1])
        begin = (jnp.full(shape, NEG_INF, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, dim), jnp.float32))
        highest, total, weighted = jax.lax.fori_loop(0, _last(start, count, index, block_k), columns, begin)
        attended = weighted / jnp.where(total > 0, total, 1)[..., None]
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(q.dtype)
        sums = jnp.where(total > 0, highest + jnp.log(jnp.where(total > 0, total, 1)), jnp.inf)
        sums = sums.reshape(batch, heads, -1)
        return jax.lax.dynamic_update_slice_in_dim(out, attended, first, 1), jax.lax.dynamic_update_slice_in_dim(lse, sums, first, 2)

    begin = jnp.zeros(q.shape, q.dtype), jnp.full((batch, heads, size), jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, -(-size // min(BLOCK_Q, size)), rows, begin)


def column_mass(q, k, lse, start, count, scale: float):
    """See api.py."""
    batch, size, _, _ = q.shape
    length, kv_heads = k.shape[1:3]
    block_k = min(BLOCK_K, length)

    def rows(i, mass):
        queries, index, first, fresh_queries = _queries(q, i)
        sums = jax.lax.dynamic_slice_in_dim(lse, first, queries.shape[1], 2).reshape(batch, kv_heads, -1, queries.shape[1])

        def columns(j, mass):
            keys, at, fresh = _keys(k, j)
            seen = _seen(index, at, start, count) & fresh & fresh_queries[:, None]
            weights = jnp.where(seen, jnp.exp(_logits(queries, keys, scale) - sums[..., None]), 0).sum((2, 3))
            before = jax.lax.dynamic_slice_in_dim(mass, at[0], weights.shape[-1], 2)
            return jax.lax.dynamic_update_slice_in_dim(mass, before + weights, at[0], 2)

        return jax.lax.fori_loop(0, _last(start, count, index, block_k), columns, mass)

    return jax.lax.fori_loop(0, -(-size // min(BLOCK_Q, size)), rows, jnp.zeros((batch, kv_heads, length), jnp.float32))


def _queries(q, i):
    """Tile i: the queries [B, q, H, D], their indices [q], the first of them, and which of them no tile before had [q]."""
    block = min(BLOCK_Q, q.shape[1])
    first = jnp.minimum(i * block, q.shape[1] - block)
    index = first + jnp.arange(block)
    return jax.lax.dynamic_slice_in_dim(q, first, block, 1), index, first, index >= i * block


def _keys(k, j):
    """Tile j: the keys [B, k, Hkv, D], their indices [k], and which of them no tile before had [k]."""
    block = min(BLOCK_K, k.shape[1])
    first = jnp.minimum(j * block, k.shape[1] - block)
    at = first + jnp.arange(block)
    return jax.lax.dynamic_slice_in_dim(k, first, block, 1), at, at >= j * block


def _last(start, count, index, block_k: int):
    """Tiles of keys that a query of the tile with these indices may see, in any row."""
    return -(-jnp.minimum(start + count, start + index[-1] + 1).max() // block_k)


def _seen(index, at, start, count):
    """[B, 1, 1, q, k]"""
    position = start[:, None, None] + index[:, None]
    return ((at <= position) & (index < count[:, None])[..., None])[:, None, None]


def _logits(queries, keys, scale: float):
    grouped = queries.reshape(*queries.shape[:2], keys.shape[2], -1, queries.shape[-1])
    return jnp.einsum("bqhgd,bkhd->bhgqk", grouped, keys, preferred_element_type=jnp.float32, precision=_exact(keys)) * scale


def _exact(x):
    return "highest" if x.dtype == jnp.float32 else None
