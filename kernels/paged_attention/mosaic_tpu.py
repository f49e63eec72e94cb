"""Paged decode attention on TPUs.

The grid walks over rows and, for each, over tiles of slots. A tile is a few pages, each an input of its own whose place in the pool comes
from the prefetched block table, so that Pallas' pipeline fetches the pages of the next tile during the products of this one. One core reads
one row after the other at the bandwidth of the memory: there is nothing to split. Softmax runs along with the tiles in float32 scratch.

Past a row's length the index maps name its last page again, which Pallas then does not fetch again, and the tiles are skipped.

Types: bfloat16 as it lies, float32 at full precision, int8 converted (which is exact) with the scales on logits and weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .base import NEG_INF, seen_slots

LANES = 128
PAGES_A_TILE = 8  # at most: each is an input with buffers and a copy of its own
TILE_BYTES = 2 * 2**20  # of keys at a time; keys and values are double-buffered
TABLE_BYTES = 512 * 2**10  # of scalar memory
VMEM = 64 * 2**20


def supports(q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False):
    """None, or why the kernel cannot take these arguments."""
    page_size, dim = k_pages.shape[-2:]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}, not bfloat16 or float32"
    if page_size % 16 or (LANES % page_size and page_size % LANES):
        return f"page_size={page_size} is not 16, 32, 64 or a multiple of 128"
    if dim % LANES or dim > 256:
        return f"a pool of head_dim={dim} would be copied by XLA; allocate it with {LANES} or 256 and zeros behind (pool_dim)"
    if 4 * block_tables.size > TABLE_BYTES:
        return f"block tables of {4 * block_tables.size} bytes do not fit scalar memory ({TABLE_BYTES}); larger pages make them smaller"
    return None


def pages_a_tile(page_size: int, page_heads: int, dim: int, itemsize: int, pages: int) -> int:
    """Pages fetched at a time: whole lanes of slots, and as many as fit the budget."""
    least = max(1, LANES // page_size)
    page = page_heads * page_size * dim * itemsize
    wanted = min(PAGES_A_TILE, TILE_BYTES // page, -(-pages // least) * least)
    return max(least, wanted // least * least)


def paged_attention(q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False):
    """Arguments and results as in api.py, tables `[B, h, T]`."""
    batch, heads, dim = q.shape
    _, page_heads, page_size, _ = k_pages.shape
    table_heads, pages = block_tables.shape[1:]
    kv_heads, capacity = table_heads * page_heads, pages * page_size
    group = heads // kv_heads
    padded_group = -(-group // 8) * 8
    count = pages_a_tile(page_size, page_heads, dim, k_pages.dtype.itemsize, pages)
    tile = count * page_size
    steps = -(-capacity // tile)
    quantized = k_scales is not None

    def where_pages(part, row, table_head, step, tables, lengths):
        last = jnp.maximum((lengths[row] + page_size - 1) // page_size - 1, 0)
        index = jnp.minimum(step * count + part, jnp.minimum(last, pages - 1))
        return jnp.where(lengths[row] > 0, tables[(row * table_heads + table_head) * pages + index], 0)

    def page_spec(shape, part):
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec(shape, lambda *at: (where_pages(part, *at), *zeros))

    def tile_spec(shape, shared=False):
        """Blocks of arrays [B, heads, ..., C]: this row, these heads, this tile."""
        middle = (0,) * (len(shape) - 3)
        return pl.BlockSpec(shape, lambda row, head, step, *_: (row, 0 if shared else head, *middle, step))

    def row_spec(shape):
        """Blocks of arrays [B, heads, ...] that stay for all tiles of a row."""
        zeros = (0,) * (len(shape) - 2)
        return pl.BlockSpec(shape, lambda row, head, step, *_: (row, head, *zeros))

    k_specs = [page_spec((1, page_heads, page_size, dim), part) for part in range(count)]
    scale_specs = [page_spec((1, page_heads, page_size), part) for part in range(count)]
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, dim), ((0, 0), (0, 0), (0, padded_group - group), (0, 0)))
    inputs = [grouped, *[k_pages] * count, *[v_pages] * count]
    in_specs = [row_spec((1, page_heads, padded_group, dim)), *k_specs, *k_specs]
    if quantized:
        inputs += [*[k_scales] * count, *[v_scales] * count]
        in_specs += [*scale_specs, *scale_specs]
    if visible is not None:
        shown = visible if visible.dtype == jnp.bool_ else visible >= 0
        inputs.append(jnp.pad(shown.astype(jnp.int32), ((0, 0), (0, 0), (0, steps * tile - capacity))))
        shared = visible.shape[1] == 1
        in_specs.append(tile_spec((1, 1 if shared else page_heads, tile), shared))
    out_shape = [
        jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        jax.ShapeDtypeStruct((*grouped.shape[:3], LANES), jnp.float32),
    ]
    out_specs = [row_spec((1, page_heads, padded_group, dim)), row_spec((1, page_heads, padded_group, LANES))]
    if statistics:
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, steps * tile), jnp.float32))
        out_specs.append(tile_spec((1, page_heads * group, tile)))

    out, lse, *logits = pl.pallas_call(
        functools.partial(
            _body,
            count=count,
            tile=tile,
            capacity=capacity,
            scale=scale,
            quantized=quantized,
            has_visible=visible is not None,
            statistics=statistics,
        ),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, table_heads, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((page_heads, padded_group, LANES), jnp.float32),
                pltpu.VMEM((page_heads, padded_group, LANES), jnp.float32),
                pltpu.VMEM((page_heads, padded_group, dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        name=f"paged_attention_d{dim}_g{group}_z{page_size}_n{count}",
    )(block_tables.reshape(-1), lengths, *inputs)
    out = out[:, :, :group].reshape(batch, heads, dim)
    if not statistics:
        return out, None, None
    seen = seen_slots(lengths, visible, capacity)[:, :, None]
    logits = logits[0].reshape(batch, kv_heads, group, -1)[..., :capacity]
    logits = jnp.where(seen, logits, NEG_INF)  # skipped tiles hold anything
    return out, logits, lse[:, :, :group, 0]


def _body(tables_ref, lengths_ref, q_ref, *refs, count, tile, capacity, scale, quantized, has_visible, statistics):
    """One tile of one row: q [1, J, G, D], pages [1, J, Z, D]; J kv heads at a time."""
    given: Any = iter(refs)  # inputs, outputs and scratch, in the order of the call
    k_refs, v_refs = ([next(given) for _ in range(count)] for _ in range(2))
    k_scale_refs, v_scale_refs = ([next(given) for _ in range(count if quantized else 0)] for _ in range(2))
    visible_ref: Any = next(given) if has_visible else None
    out_ref, lse_ref = next(given), next(given)
    logits_ref: Any = next(given) if statistics else None
    highest_ref, total_ref, sum_ref = given
    row, step = pl.program_id(0), pl.program_id(2)
    length, start = jnp.minimum(lengths_ref[row], capacity), step * tile

    @pl.when(step == 0)
    def first():
        highest_ref[...] = jnp.full_like(highest_ref, NEG_INF)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(start < length)
    def attend():
        q = q_ref[0]
        exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        keys, values = (jnp.concatenate([ref[0].astype(q.dtype) for ref in refs], 1) for refs in (k_refs, v_refs))
        logits = lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))), precision=exact, preferred_element_type=jnp.float32) * scale
        slots = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        seen = slots < length - start
        if has_visible:
            seen &= jnp.broadcast_to(visible_ref[0][:, None, :], logits.shape) > 0
        if quantized:
            logits *= jnp.concatenate([ref[0] for ref in k_scale_refs], 1)[:, None, :]
        else:
            kept = lax.broadcasted_iota(jnp.int32, values.shape, 1) < length - start
            if has_visible:
                kept &= jnp.broadcast_to(visible_ref[0][:, :, None], values.shape) > 0
            values = jnp.where(kept, values, jnp.zeros_like(values))  # a weight of zero times NaN is NaN
        logits = jnp.where(seen, logits, NEG_INF)
        if statistics:
            group = logits_ref.shape[1] // logits.shape[0]
            logits_ref[0] = logits[:, :group].reshape(logits_ref.shape[1:])  # without the padding of the queries
        highest = highest_ref[:, :, :1]
        higher = jnp.maximum(highest, logits.max(-1, keepdims=True))
        fade = jnp.exp(highest - higher)
        weights = jnp.where(seen, jnp.exp(logits - higher), 0.0)
        total_ref[...] = total_ref[...] * fade + weights.sum(-1, keepdims=True)
        if quantized:
            scales = jnp.concatenate([ref[0] for ref in v_scale_refs], 1)[:, None, :]
            weights = jnp.where(seen, weights * scales, 0.0)
        part = lax.dot_general(
            weights.astype(values.dtype), values, (((2,), (1,)), ((0,), (0,))), precision=exact, preferred_element_type=jnp.float32
        )
        sum_ref[...] = sum_ref[...] * fade + part
        highest_ref[...] = jnp.broadcast_to(higher, highest_ref.shape)

    @pl.when(step == pl.num_programs(2) - 1)
    def last():
        total = total_ref[...]
        out_ref[0] = (sum_ref[...] / jnp.maximum(total[:, :, :1], jnp.finfo(jnp.float32).tiny)).astype(out_ref.dtype)
        lse_ref[0] = jnp.where(total > 0, highest_ref[...] + jnp.log(total), NEG_INF)
