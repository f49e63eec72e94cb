"""What the implementations share."""

import jax.numpy as jnp

NEG_INF = -1e30  # logit of a slot that is not read, and log-sum-exp of a query that reads nothing; finite, so that differences stay numbers


def seen_slots(lengths, visible, capacity: int):
    """Which slots a row reads: bool [B, h, C], h being 1 or Hkv."""
    seen = jnp.arange(capacity) < lengths[:, None, None]
    if visible is None:
        return seen
    return seen & (visible if visible.dtype == jnp.bool_ else visible >= 0)
