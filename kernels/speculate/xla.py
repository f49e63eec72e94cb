"""Speculation in plain JAX: the operation's definition, and what runs where no kernel does."""

import jax.numpy as jnp

from .base import Speculation, candidates, select


def speculate(q, partial_keys, visible, cap, always, alpha: float, limit: int) -> Speculation:
    """See api.py."""
    precision = "highest" if partial_keys.dtype == jnp.float32 else None
    products = jnp.einsum("bhgd,bhdc->bhgc", q, partial_keys, preferred_element_type=jnp.float32, precision=precision)
    logits = jnp.where(candidates(visible, always), products.max(2), -jnp.inf)
    return select(logits, logits.max(-1), visible, cap, always, alpha, limit)
