"""H2O's eviction on Hopper: a block of 128 threads for every row and kv head, everything in place.

The slots of a row are visited once, SPAN at a time. Each thread keeps the worst token it has met (score, position, slot) and the lowest
free slot, and only at the end do the threads compare. Meanwhile the new key and value are under way from global to shared memory, and go
from there to their slot: two bulk copies, so that a head dim need not be a multiple of anything but 16 bytes.

It reads the logits once (4 G bytes a slot), positions (4) and scores (4, and 4 written back): beside attention, which reads 4 D bytes a
slot in bfloat16, that is 28 of 512 for G = 4 and D = 128.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuned
from ..dispatch import current_device
from .base import Attention, H2OCache, Token

SPAN = 1024
"""Slots visited at a time: eight of each array a thread, which fits its registers. Where nothing else was tuned."""

LANES = 128


def supports(cache: H2OCache, attention: Attention | None, token: Token | None, length, budget, recent, active) -> str | None:
    """Why the kernel cannot run this, or None."""
    capacity, bytes_of_a_row = cache.position.shape[-1], cache.k_pages.shape[-1] * cache.k_pages.dtype.itemsize
    if capacity % LANES:
        return f"a row has {capacity} slots, which is no multiple of {LANES}"
    if bytes_of_a_row % 16:
        return f"a key has {bytes_of_a_row} bytes, which is no multiple of 16"
    if cache.k_pages.shape[-1] > 256:
        return f"head dim {cache.k_pages.shape[-1]} is more than 256"
    return None


def tuning_key(group: int, capacity: int) -> str:
    """What the best span depends on; the group is 0 where no attention is accounted for."""
    return f"g{group} slots{tuned.bucket(capacity)}"


def h2o_evict(
    cache: H2OCache, attention: Attention | None, token: Token | None, length, budget, recent, active, span: int | None = None
):  # fmt: skip
    """See api.py; `span` forces how many slots are visited at a time."""
    batch, heads, capacity = cache.position.shape
    key = tuning_key(0 if attention is None else attention.logits.shape[2], capacity)
    span = span or tuned.find("h2o_evict", current_device().kind, key).get("span", SPAN)
    settings = jnp.stack([length, budget, recent, active.astype(length.dtype)], -1).astype(jnp.int32)
    inputs: dict[str, Any] = dict(settings=settings)
    refs: dict[str, Any] = dict(position=jax.new_ref(cache.position), score=jax.new_ref(cache.score))
    scratch: dict[str, Any] = {}
    if attention is not None:
        inputs |= dict(logits=attention.logits, lse=attention.lse)
    if token is not None:
        inputs |= dict(block_tables=cache.block_tables, k=token.k.astype(cache.k_pages.dtype), v=token.v.astype(cache.v_pages.dtype))
        refs |= dict(k_pages=jax.new_ref(cache.k_pages), v_pages=jax.new_ref(cache.v_pages))
        row = plgpu.SMEM(cache.k_pages.shape[-1:], cache.k_pages.dtype)
        scratch = dict(k_smem=row, v_smem=row, arrived=plgpu.Barrier(num_arrivals=2))
    names = [*inputs, *refs, "slot"]

    def body(*arrays, **scratch):
        _body(**dict(zip(names, arrays, strict=True)), **scratch, span=span)

    slot = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads), jnp.int32),
        scratch_types=scratch,
        grid=(batch, heads),
        grid_names=("row", "head"),
        kernel_name=f"h2o_evict_{'score_' if attention else ''}{'write_' if token else ''}c{cache.position.shape[-1]}",
    )(*inputs.values(), *refs.values())
    return dataclasses.replace(cache, **{name: jax.freeze(ref) for name, ref in refs.items()}), slot


def _body(
    settings, position, score, slot, logits=None, lse=None, block_tables=None, k=None, v=None, k_pages=None, v_pages=None, k_smem=None,
    v_smem=None, arrived=None, span=SPAN,
):  # fmt: skip
    row, head = lax.axis_index("row"), lax.axis_index("head")
    at = (row, head)
    length, budget, recent = settings[row, 0], settings[row, 1], settings[row, 2]

    @pl.when(settings[row, 3] > 0)
    def _():
        if k is not None:
            plgpu.copy_gmem_to_smem(k.at[at], k_smem, arrived)
            plgpu.copy_gmem_to_smem(v.at[at], v_smem, arrived)
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
        if k is None:

            @pl.when(over)
            def _():
                position[*at, chosen] = jnp.int32(-1)

            return
        plgpu.barrier_wait(arrived)

        @pl.when(chosen < capacity)
        def _():
            size = k_pages.shape[2]
            place = (block_tables[row, lax.div(chosen, size)], head, lax.rem(chosen, size))
            plgpu.copy_smem_to_gmem(k_smem, k_pages.at[place])
            plgpu.copy_smem_to_gmem(v_smem, v_pages.at[place])
            position[*at, chosen] = length
            score[*at, chosen] = jnp.float32(0)

        plgpu.wait_smem_to_gmem(0)


def _visit(position, score, logits, lse, at, protected_from, start: int, end: int, span: int):
    """Of slots start to end, after adding the mass: the worst token (score, position, slot), how many there are, the lowest free slot."""
    span = min(span, end - start)
    none = jnp.zeros((span,), jnp.int32)
    normalisers = [] if lse is None else [lse[*at, g] for g in range(lse.shape[-1])]

    def visit(i, carry):
        worst, held, free = carry
        first = start + i * span
        here = pl.ds(first, span)
        slots = lax.iota(jnp.int32, span) + first
        where = plgpu.load(position.at[here])
        has = where >= 0
        total = plgpu.load(score.at[*at, here])
        if logits is not None:
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
