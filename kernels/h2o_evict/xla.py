"""H2O's eviction in plain JAX: the operation's definition, and what runs where no kernel does."""

import dataclasses

import jax.numpy as jnp

from .base import Attention, H2OCache, Token


def h2o_evict(cache: H2OCache, attention: Attention | None, token: Token | None, length, budget, recent, active):
    """See api.py."""
    capacity = cache.position.shape[-1]
    slots = jnp.arange(capacity)
    held = cache.position >= 0
    score = cache.score
    if attention is not None:
        mass = jnp.exp(attention.logits - attention.lse[..., None]).sum(2)
        score = jnp.where(held & active[:, None, None], score + mass, score)
    over = held.sum(-1) > budget[:, None]
    slot = jnp.where(over, _victim(cache.position, score, held, (length - recent)[:, None, None]), _first(~held))
    here = (slots == slot[..., None]) & active[:, None, None]
    if token is None:
        return dataclasses.replace(cache, position=jnp.where(here & over[..., None], -1, cache.position), score=score), slot
    position = jnp.where(here, length[:, None, None], cache.position)
    k_pages, v_pages = (_write(cache, to, new, slot, active) for to, new in ((cache.k_pages, token.k), (cache.v_pages, token.v)))
    return H2OCache(k_pages, v_pages, cache.block_tables, position, jnp.where(here, 0, score)), slot


def _victim(position, score, held, protected_from):
    """The slot of lowest score that is not protected; between equals the one of highest position."""
    priority = jnp.where(held & (position < protected_from), score, jnp.inf)
    lowest = priority.min(-1, keepdims=True)
    return _first(position == jnp.where(priority == lowest, position, -1).max(-1, keepdims=True))


def _first(condition):
    """The lowest slot where it holds, C where it holds nowhere."""
    capacity = condition.shape[-1]
    return jnp.where(condition, jnp.arange(capacity, dtype=jnp.int32), capacity).min(-1)


def _write(cache: H2OCache, to, new, slot, active):
    num_pages, heads, size, _ = to.shape
    batch, count = cache.block_tables.shape
    row = jnp.arange(batch)[:, None]
    page = cache.block_tables[row, jnp.minimum(slot // size, count - 1)]
    page = jnp.where(active[:, None] & (slot < count * size), page, num_pages + row)  # out of range, and unique: dropped
    put = (page, jnp.arange(heads), slot % size)
    return to.at[put].set(new.astype(to.dtype), mode="drop", unique_indices=True)
