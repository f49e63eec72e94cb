"""Paged decode attention in plain JAX: gathers each row's pages and attends to the copy. Runs everywhere, takes everything."""

import jax
import jax.numpy as jnp

from .base import NEG_INF, seen_slots


def paged_attention(q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False):
    """Arguments and results as in api.py, tables `[B, h, T]`. Memory: a copy of the pages that the tables name."""
    batch, _, dim = q.shape
    page_heads, page_size = k_pages.shape[1:3]
    kv_heads, capacity = block_tables.shape[1] * page_heads, block_tables.shape[2] * page_size
    seen = seen_slots(lengths, visible, capacity)[:, :, None]  # [B, h, 1, C]

    def rows(pages):  # [P, J, Z, ...] -> [B, Hkv, C, ...]
        taken = pages.at[block_tables].get(mode="clip").swapaxes(2, 3)  # [B, h, J, T, Z, ...]
        return taken.reshape(batch, kv_heads, capacity, *pages.shape[3:])

    compute = q.dtype if k_scales is not None else k_pages.dtype
    keys, values = rows(k_pages).astype(compute), rows(v_pages).astype(compute)
    values = jnp.where(seen.swapaxes(2, 3), values, 0)  # a weight of zero times NaN is NaN
    exact = jax.lax.Precision.HIGHEST if compute == jnp.float32 else None
    grouped = q.astype(compute).reshape(batch, kv_heads, -1, dim)
    logits = jnp.einsum("bhgd,bhcd->bhgc", grouped, keys, preferred_element_type=jnp.float32, precision=exact) * scale
    if k_scales is not None:
        logits *= rows(k_scales)[:, :, None]
    logits = jnp.where(seen, logits, NEG_INF)
    highest = logits.max(-1)
    weights = jnp.where(seen, jnp.exp(logits - highest[..., None]), 0)
    total = weights.sum(-1)
    if v_scales is not None:
        weights = jnp.where(seen, weights * rows(v_scales)[:, :, None], 0)
    out = jnp.einsum("bhgc,bhcd->bhgd", weights.astype(compute), values, preferred_element_type=jnp.float32, precision=exact)
    out = (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).reshape(q.shape).astype(q.dtype)
    if not statistics:
        return out, None, None
    return out, logits, jnp.where(total > 0, highest + jnp.log(total), NEG_INF)
