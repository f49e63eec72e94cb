"""Attention in plain JAX, a block of queries at a time: the definition, and what runs where nothing better does."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from ..gather import gather_pages
from .base import NEG_INF, Attended, Keys, Mask, Observe, capped, softmax_weights

BLOCK = 64
"""Queries at a time: their logits over some thousand keys stay in a core's cache."""

SHORT, SEGMENTS = 1024, (4, 8)
"""Parts of a prompt with a loop each, of one up to SHORT tokens and of a longer one; a part sees no keys behind its last query. More of
them compute less that nobody sees, and take longer to compile."""


def attention(
    q: jax.Array, keys: Keys, mask: Mask, scale: float, softcap: float | None, sinks: jax.Array | None, observe: Sequence[Observe],
    residuals: bool = False,
) -> Attended:  # fmt: skip
    """See api.py. Memory: a copy of the rows' keys where they lie in pages, and BLOCK queries' logits."""
    k, v = rows(keys, q.shape[0])
    aligned = mask.query is None
    batch, length, heads, dim = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    query = jnp.arange(length, dtype=jnp.int32)[None] if mask.query is None else mask.query
    counted = jnp.ones((batch, length), bool) if mask.counted is None else mask.counted
    last = jnp.where(counted, query, -1).max(-1) if mask.last is None else mask.last
    grouped = (q * scale).reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)  # [B, Hkv, G, S, D]
    k = k[..., :dim].swapaxes(2, 3)  # [B, Hkv, D, K]
    v = v[..., :dim]
    extra = None if sinks is None else jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1), (batch, kv_heads, heads // kv_heads, 1))
    block = min(BLOCK, length)
    blocks = -(-length // block)

    def turn(end: int, i: jax.Array, carry):
        out, observed = carry
        first = jnp.minimum(i * block, length - block)  # a last block that does not fit begins earlier; what it repeats counts once

        def part(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, first, block, axis)

        at = part(query, 1)
        fresh = part(counted, 1) & (first + jnp.arange(block) >= i * block)
        logits = jnp.einsum("bngqd,bndk->bngqk", part(grouped, 3), k[..., :end], preferred_element_type=jnp.float32)
        seen = mask.seen(at, jnp.arange(end), None if mask.key is None else mask.key[..., :end])
        weights, factor = softmax_weights(jnp.where(seen, capped(logits, softcap), NEG_INF), extra)
        attended = jnp.einsum("bngqk,bnkd->bngqd", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        out = jax.lax.dynamic_update_slice_in_dim(out, (attended * factor[..., None]).astype(out.dtype), first, 3)
        after = []
        for what, before in zip(observe, observed, strict=True):
            counts = what.counts(fresh, at, last)[:, None, None]
            statistic = what.of(weights, jnp.where(counts, factor, 0))
            after.append(before.at[..., :end].set(what.add(before[..., :end], statistic)))
        return out, tuple(after)

    carry = jnp.zeros(grouped.shape, q.dtype), (jnp.zeros((batch, kv_heads, total), jnp.float32),) * len(observe)
    each = -(-blocks // SEGMENTS[length > SHORT]) if aligned else blocks
    for begin in range(0, blocks, each):
        stop = min(begin + each, blocks)
        end = min(stop * block, total) if aligned else total
        if stop - begin == 1:
            carry = turn(end, jnp.int32(begin), carry)
        else:
            carry = jax.lax.fori_loop(begin, stop, partial(turn, end), carry)
    out, observed = carry
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    if not residuals:
        return Attended(out, observed)
    logits = jnp.einsum("bngd,bndk->bngk", grouped[..., 0, :], k, preferred_element_type=jnp.float32)
    seen = mask.seen(query, jnp.arange(total), mask.key)[:, :, :, 0]
    logits = jnp.where(seen, capped(logits, softcap), NEG_INF)
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return Attended(out, observed, (logits, jnp.where(seen.any(-1), lse, NEG_INF)))


def rows(keys: Keys, batch: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of every row, [B, Hkv, K, D] each, K being `keys.most` or all of them; zeros where a row has no page."""
    most = keys.most
    if keys.layout == "tokens":
        return keys.k[0].swapaxes(1, 2)[:, :, :most], keys.v[0].swapaxes(1, 2)[:, :, :most]
    pages = None if keys.table is None else keys.table.pages
    if pages is not None and most is not None:
        pages = pages[:, : -(-most // keys.page_size)]
    gather = gathered if keys.layout == "rows" else taken
    k, v = (gather(x, pages) for x in (keys.k, keys.v))
    if keys.layout == "columns":
        k = k.swapaxes(-1, -2)
    if pages is None:
        return k[:, :, :most], v[:, :, :most]
    per_row = (x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2) for x in (k, v))  # [B, Hkv, T, Z, D]
    return tuple(x.reshape(batch, x.shape[1], -1, x.shape[4])[:, :, :most] for x in per_row)  # type: ignore[return-value]


def taken(parts: tuple[jax.Array, ...], pages: jax.Array | None) -> jax.Array:
    """Copies of these pages, [W, ...] in their order, from a pool in extents; zeros for an id beyond the pool. None: all."""
    if pages is None:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    pages, found, start = pages.reshape(-1), jnp.zeros((), parts[0].dtype), 0
    for part in parts:
        here = (pages >= start) & (pages < start + len(part))
        inside = jnp.clip(pages - start, 0, len(part) - 1)
        found = jnp.where(here.reshape(-1, *[1] * (part.ndim - 1)), part.at[inside].get(mode="promise_in_bounds"), found)
        start += len(part)
    return found


def gathered(parts: tuple[jax.Array, ...], pages: jax.Array | None) -> jax.Array:
    """`taken` of one extent, by a kernel where there is one."""
    (part,) = parts
    return part if pages is None else gather_pages(part, pages.reshape(-1))


def scores(q: jax.Array, keys: Keys, scale: float) -> jax.Array:
    """Scaled logits of one query per row against all its keys: [B, 1, H, D] -> float32 [B, Hkv, G, K]."""
    k, _ = rows(keys, q.shape[0])
    dim = q.shape[3]
    grouped = (q[:, 0] * scale).astype(k.dtype).reshape(q.shape[0], k.shape[1], -1, dim)
    return jnp.einsum("bngd,bnkd->bngk", grouped, k[..., :dim], preferred_element_type=jnp.float32)
