"""Attention by this package's kernels: paged decode attention, and flash attention of prompts with column mass beside it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..paged_attention import paged_attention
from ..prefill_attention import column_mass, prefill_attention
from .base import NEG_INF, Attended, Keys, Mask, Observe
from .xla import rows

LANES = 128
"""Slots that a kernel takes at a time: a longer page is taken as several."""


def supports(q, keys: Keys, mask: Mask, scale, softcap, sinks, observe: Sequence[Observe], residuals: bool = False) -> str | None:
    """Why it cannot take a call, or None."""
    if softcap is not None or sinks is not None or mask.window is not None:
        return "no kernel has windows, soft caps or sinks"
    if q.shape[1] == 1 and keys.layout != "tokens":
        return None if keys.layout == "rows" else "it reads pages [P, Hkv, Z, D]"
    if mask.key is not None:
        return "a prompt's keys stand in the order of their positions"
    if any(what != Observe() for what in observe):
        return "of a prompt it sums attention over all queries and heads, and nothing else"
    return None


def attention(
    q: jax.Array, keys: Keys, mask: Mask, scale: float, softcap, sinks, observe: Sequence[Observe], residuals: bool = False
) -> Attended:
    """See api.py."""
    if q.shape[1] == 1 and keys.layout == "rows":
        return _decode(q, keys, mask, scale, observe, residuals)
    batch, length, _, dim = q.shape
    k, v = (x.swapaxes(1, 2)[..., :dim].astype(q.dtype) for x in rows(keys, batch))
    start = jnp.zeros(batch, jnp.int32) if mask.query is None else mask.query[:, 0]
    count = jnp.full(batch, length, jnp.int32) if mask.counted is None else mask.counted.sum(-1, dtype=jnp.int32)
    out, lse = prefill_attention(q, k, v, start, count, scale=scale)
    mass = (column_mass(q, k, lse, start, count, scale=scale),) * len(observe) if observe else ()
    return Attended(out, mass)


def _decode(q: jax.Array, keys: Keys, mask: Mask, scale: float, observe: Sequence[Observe], residuals: bool) -> Attended:
    batch = q.shape[0]
    (k,), (v,) = keys.k, keys.v
    count, heads, size, width = k.shape
    visible: Any = mask.key
    lengths = mask.length
    if lengths is None:
        lengths = jnp.full(batch, keys.capacity, jnp.int32)
    pages = jnp.arange(batch, dtype=jnp.int32)[:, None] if keys.table is None else keys.table.pages
    pages = jnp.minimum(pages, count - 1)  # of slots that are not read, but a number that exists
    if size > LANES and size % LANES == 0:  # a long page is as many pages of one head
        parts = size // LANES
        first = (pages[:, None] * heads + jnp.arange(heads)[:, None]) * parts
        pages = (first[..., None] + jnp.arange(parts)).reshape(batch, heads, -1)
        k, v = (x.reshape(-1, 1, LANES, width) for x in (k, v))
    statistics = bool(observe) or residuals
    found: Any = paged_attention(q[:, 0], k, v, pages, lengths, visible=visible, scale=scale, statistics=statistics)
    if not statistics:
        return Attended(found[:, None])
    out, seen = found
    probability = jnp.where(seen.logits > NEG_INF / 2, jnp.exp(seen.logits - seen.lse[..., None]), 0)
    one = jnp.ones((*seen.lse.shape, 1), jnp.float32)
    observed = tuple(what.of(probability[..., None, :], one) for what in observe)
    return Attended(out[:, None], observed, (seen.logits, seen.lse) if residuals else None)
