"""H2O's eviction on Hopper: a block of 128 threads for every row and kv head, everything in place.

The slots of a row are visited once, SPAN at a time. Each thread keeps the worst token it has met (score, position, slot) and the lowest
free slot, and only at the end do the threads compare.

It reads the logits once (4 G bytes a slot), positions (4) and scores (4, and 4 written back): beside attention, which reads 4 D bytes a
slot in bfloat16, that is 28 of 512 for G = 4 and D = 128.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuned
from ..dispatch import current_device
from ..paged_attention import Statistics

SPAN = 1024
"""Slots visited at a time: eight of each array a thread, which fits its registers. Where nothing else was tuned."""

LANES = 128


def supports(position, score, statistics: Statistics, length, budget, recent, active) -> str | None:
    """Why the kernel cannot run this, or None."""
    capacity = position.shape[-1]
    return f"a row has {capacity} slots, which is no multiple of {LANES}" if capacity % LANES else None


def tuning_key(group: int, capacity: int) -> str:
    """What the best span depends on."""
    return f"g{group} slots{tuned.bucket(capacity)}"


def h2o_evict(position, score, statistics: Statistics, length, budget, recent, active, span: int | None = None):
    """See api.py; `span` forces how many slots are visited at a time."""
    batch, heads, capacity = position.shape
    key = tuning_key(statistics.logits.shape[2], capacity)
    span = span or tuned.find("h2o_evict", current_device().kind, key).get("span", SPAN)
    settings = jnp.stack([length, budget, recent, active.astype(length.dtype)], -1).astype(jnp.int32)
    positions, scores = jax.new_ref(position), jax.new_ref(score)

    slot = plgpu.kernel(
        partial(_body, span=span),
        out_type=jax.ShapeDtypeStruct((batch, heads), jnp.int32),
        grid=(batch, heads),
        grid_names=("row", "head"),
        kernel_name=f"h2o_evict_c{capacity}",
    )(settings, statistics.logits, statistics.lse, positions, scores)
    return jax.freeze(positions), jax.freeze(scores), slot


def _body(settings, logits, lse, position, score, slot, *, span: int):
    row, head = lax.axis_index("row"), lax.axis_index("head")
    at = (row, head)
    length, budget, recent = settings[row, 0], settings[row, 1], settings[row, 2]

    @pl.when(settings[row, 3] > 0)
    def _():
        capacity = position.shape[-1]
        ends = (capacity // span * span, capacity)
        parts = [
            _visit(position.at[at], score, logits, lse, at, length - recent, start, end, span)
            for start, end in ((0, ends[0]), (ends[0], ends[1]))
            if end > start
        ]
        worst, held, free = parts[0]
        for other, more, later in parts[1:]:
            worst, held, free = _worse(worst, other), held + more, jnp.minimum(free, later)
        over = held > budget
        chosen = jnp.where(over, worst[2], jnp.minimum(free, capacity))
        slot[at] = chosen

        @pl.when(over)
        def _():
            position[*at, chosen] = jnp.int32(-1)


def _visit(position, score, logits, lse, at, protected_from, start: int, end: int, span: int):
    """Of slots start to end, after adding the mass: the worst token (score, position, slot), how many there are, the lowest free slot."""
    span = min(span, end - start)
    none = jnp.zeros((span,), jnp.int32)
    normalisers = [lse[*at, g] for g in range(lse.shape[-1])]

    def visit(i, carry):
        worst, held, free = carry
        first = start + i * span
        here = pl.ds(first, span)
        slots = lax.iota(jnp.int32, span) + first
        where = plgpu.load(position.at[here])
        has = where >= 0
        total = plgpu.load(score.at[*at, here])
        for g, normaliser in enumerate(normalisers):
            total += jnp.exp(plgpu.load(logits.at[*at, g, here]) - normaliser)
        plgpu.store(score.at[*at, here], jnp.where(has, total, 0))
        priority = jnp.where(has & (where < protected_from), total, jnp.inf)
        worst = _worse(worst, (priority, where, slots))
        return worst, held + jnp.where(has, 1, 0), jnp.minimum(free, jnp.where(has, jnp.int32(2**30), slots))

    carry = ((jnp.full((span,), jnp.inf, jnp.float32), none - 2, none), none, none + 2**30)
    worst, held, free = lax.fori_loop(0, (end - start) // span, visit, carry)
    return _worst(*worst), held.sum(), free.min()


def _worse(a, b):
    """The one to evict of two (score, position, slot): the lower score, between equals the higher position."""
    first = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))


def _worst(score, position, slot):
    """The one to evict of what all threads found."""
    lowest = score.min()
    highest = jnp.where(score == lowest, position, -2).max()
    return lowest, highest, jnp.where((score == lowest) & (position == highest), slot, 2**30).min()
