"""Speculation in plain JAX: the operation's definition, and what runs where no kernel does."""

import jax.numpy as jnp

from .base import GroupJoin, Speculation, candidates, select, select_by_mass


def speculate(q, partial_keys, visible, cap, always, alpha: float, limit: int, group: GroupJoin) -> Speculation:
    """See api.py."""
    precision = "highest" if partial_keys.dtype == jnp.float32 else None
    products = jnp.einsum("bhgd,bhdc->bhgc", q, partial_keys, preferred_element_type=jnp.float32, precision=precision)
    if group == "mass":
        return select_by_mass(jnp.where(visible[:, :, None], products, -jnp.inf), visible, cap, always, alpha, limit)
    logits = jnp.where(candidates(visible, always), products.max(2), -jnp.inf)
    maximum = logits.max(-1)
    return select(logits, maximum, maximum, visible, cap, always, alpha, limit)
