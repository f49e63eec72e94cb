"""H2O's eviction in plain JAX: the operation's definition, and what runs where no kernel does."""

import jax.numpy as jnp

from ..paged_attention import Statistics


def h2o_evict(position, score, statistics: Statistics, length, budget, recent, active):
    """See api.py."""
    held = position >= 0
    mass = jnp.exp(statistics.logits - statistics.lse[..., None]).sum(2)
    score = jnp.where(held & active[:, None, None], score + mass, score)
    over = held.sum(-1) > budget[:, None]
    slot = jnp.where(over, _victim(position, score, held, (length - recent)[:, None, None]), _first(~held))
    evicted = (jnp.arange(position.shape[-1]) == slot[..., None]) & (over & active[:, None])[..., None]
    return jnp.where(evicted, -1, position), score, slot


def _victim(position, score, held, protected_from):
    """The slot of lowest score that is not protected; between equals the one of highest position."""
    priority = jnp.where(held & (position < protected_from), score, jnp.inf)
    lowest = priority.min(-1, keepdims=True)
    return _first(position == jnp.where(priority == lowest, position, -1).max(-1, keepdims=True))


def _first(condition):
    """The lowest slot where it holds, C where it holds nowhere."""
    capacity = condition.shape[-1]
    return jnp.where(condition, jnp.arange(capacity, dtype=jnp.int32), capacity).min(-1)
