"""What speculation returns, and the part of it that follows the pass over the partial keys. Dims: B rows, Hkv kv heads, G query heads a kv
head, d' partial dims of a head, C slots of a row, K the static limit of tokens to fetch."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

GroupJoin = Literal["max", "mass"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
    """The tokens to fetch for every row and kv head.

    Attributes:
      index: int32 [B, Hkv, K], the slots that are always fetched, then the others in the order of their guessed logits, highest first;
        the lower slot first between equals; C from rank `count[b]` on.
      count: int32 [B], tokens to fetch, one number for all kv heads of a row; 0 only where no slot is visible.
      above: int32 [B, Hkv], how many slots have a joined logit over the threshold, those that are always fetched left out.
      maximum: float32 [B, Hkv], the highest joined logit of the slots that are not always fetched, -inf where there is none.
    """

    index: jax.Array
    count: jax.Array
    above: jax.Array
    maximum: jax.Array


def candidates(visible: jax.Array, always: jax.Array | None) -> jax.Array:
    """The slots that the guess chooses from."""
    return visible if always is None else visible & ~always


def log_mass(logits: jax.Array) -> jax.Array:
    """Log of the attention probability that the query heads of a group give a slot on average.

    Args:
      logits: [..., G, C] float32, -inf where there is nothing to see.

    Returns:
      [..., C] float32, -inf likewise.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probability = jnp.where(logits > -jnp.inf, logits - total, -jnp.inf)
    return jax.nn.logsumexp(probability, axis=-2) - jnp.log(logits.shape[-2])


def select_by_mass(
    logits: jax.Array, visible: jax.Array, cap: jax.Array, always: jax.Array | None, alpha: float, limit: int
) -> Speculation:
    """Counts and chooses by the guessed logits of every query head [B, Hkv, G, C], -inf where a slot is not visible."""
    mass = jnp.where(candidates(visible, always), log_mass(logits), -jnp.inf)
    maximum = mass.max(-1)
    return select(mass, maximum, jnp.zeros_like(maximum), visible, cap, always, alpha, limit)


def select(
    logits: jax.Array, maximum: jax.Array, reference: jax.Array, visible: jax.Array, cap: jax.Array, always: jax.Array | None,
    alpha: float, limit: int,
) -> Speculation:  # fmt: skip
    """Counts and chooses by the joined logits [B, Hkv, C], -inf where a slot is no candidate; the threshold is alpha below `reference`.

    It reads 4 bytes a slot, where the guess read 2 d'.
    """
    capacity = logits.shape[-1]
    above = (logits > reference[..., None] - alpha).sum(-1, dtype=jnp.int32)
    some = (maximum > -jnp.inf).any(-1)
    total = above
    if always is not None:
        always &= visible
        total = above + always.sum(-1, dtype=jnp.int32)
        some |= always.any((1, 2))
        logits = jnp.where(always, jnp.inf, logits)
    count = jnp.clip(total.sum(-1) // total.shape[-1], 1, jnp.minimum(cap, limit))
    highest, index = jax.lax.top_k(logits, limit)
    wanted = (jnp.arange(limit) < count[:, None, None]) & (highest > -jnp.inf)
    return Speculation(jnp.where(wanted, index, capacity), jnp.where(some, count, 0), above, maximum)


def check(
    q: jax.Array, partial_keys: jax.Array, visible: jax.Array, cap: jax.Array, always: jax.Array | None, limit: int, group: str
) -> None:
    """Raises ValueError where shapes do not fit together."""
    if group not in get_args(GroupJoin):
        raise ValueError(f"speculate: group={group!r} does not exist; choose from {', '.join(get_args(GroupJoin))}")
    batch, heads, dim, capacity = partial_keys.shape
    if q.ndim != 4 or (*q.shape[:2], q.shape[3]) != (batch, heads, dim):
        raise ValueError(f"speculate: q {q.shape} does not fit partial keys {partial_keys.shape}")
    if visible.shape not in {(batch, heads, capacity), (batch, 1, capacity)}:
        raise ValueError(f"speculate: visible {visible.shape} does not fit partial keys {partial_keys.shape}")
    if always is not None and always.shape not in {(batch, heads, capacity), (batch, 1, capacity)}:
        raise ValueError(f"speculate: always {always.shape} does not fit partial keys {partial_keys.shape}")
    if cap.shape != (batch,):
        raise ValueError(f"speculate: cap {cap.shape} is not one number for each of {batch} rows")
    if not 1 <= limit <= capacity:
        raise ValueError(f"speculate: limit={limit} is not between 1 and the {capacity} slots of a row")
