"""Column mass on TPU: a grid over tiles of keys and, innermost, the tiles of queries that see them.

Scores stand as [keys, queries], so that the log-sum-exp of a query is one number of a row of lanes, and the probabilities of a tile are
added where they are, element by element, in a float32 tile that stays in vector memory while the queries come by. Its rows are summed
once, at the end, by a product with ones: that leaves the sums of keys lying along the lanes, as they are stored. Tiles of queries before
the diagonal and behind the last that counts are not computed, and not fetched either: their index is that of a tile that is.

A tile of one head has to lie in one piece, so queries and keys are read heads before tokens. Where XLA makes them in the same program it
writes them in that order; where they come from outside, it copies them once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_Q, BLOCK_K = 512, 512
"""Queries and keys of a tile, at most; multiples of 128."""


def supports(q, k, lse, start, count, scale: float) -> str | None:
    """Why the kernel cannot run this, or None."""
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, these are {q.dtype} and {k.dtype}"
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is more than 256"
    return None


def column_mass(q, k, lse, start, count, scale: float):
    """See api.py."""
    batch, size, heads, dim = q.shape
    length, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_q, block_k = (min(block, pl.cdiv(n, 128) * 128) for block, n in ((BLOCK_Q, size), (BLOCK_K, length)))

    def visible(row, block, start, count):
        """First and last tile of queries that this block of keys needs; the last is before the first where it needs none."""
        return jnp.maximum(block * block_k - start[row], 0) // block_q, (count[row] + (block_q - 1)) // block_q - 1

    def query_tile(row, block, step, start, count):
        first, last = visible(row, block, start, count)
        return jnp.maximum(jnp.minimum(jnp.maximum(step // group, first), last), 0)

    def at_query(row, head, block, step, start, count):
        return row, head * group + step % group, query_tile(row, block, step, start, count), 0

    def at_lse(row, head, block, step, start, count):
        return row, head * group + step % group, 0, query_tile(row, block, step, start, count)

    mass = pl.pallas_call(
        functools.partial(_column_mass, scale=scale, group=group, visible=visible),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, 1, length), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, pl.cdiv(length, block_k), pl.cdiv(size, block_q) * group),
            in_specs=[
                pl.BlockSpec((1, 1, block_q, dim), at_query),
                pl.BlockSpec((1, 1, block_k, dim), lambda row, head, block, step, *_: (row, head, block, 0)),
                pl.BlockSpec((1, 1, 1, block_q), at_lse),
            ],
            out_specs=pl.BlockSpec((1, 1, 1, block_k), lambda row, head, block, step, *_: (row, head, 0, block)),
            scratch_shapes=[pltpu.VMEM((block_k, block_q), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name=f"column_mass_g{group}_d{dim}_k{block_k}_q{block_q}",
    )(start.astype(jnp.int32), count.astype(jnp.int32), q.swapaxes(1, 2), k.swapaxes(1, 2), lse[:, :, None])
    return mass[:, :, 0]


def _column_mass(start, count, q, k, lse, mass, sums, *, scale: float, group: int, visible):
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block_k, block_q = sums.shape
    first, last = visible(row, block, start, count)
    tile = step // group

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when((tile >= first) & (tile <= last))
    def _():
        scores = _product(k[0, 0], q[0, 0]) * scale
        index = tile * block_q + lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        at = block * block_k + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        seen = (at <= index + start[row]) & (index < count[row])
        sums[...] += jnp.where(seen, jnp.exp(scores - lse[0, 0]), 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        mass[0, 0] = _product(jnp.ones((8, block_q), jnp.float32), sums[...])[:1]


def _product(a, b):
    """a [M, K] times b [N, K] transposed; float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
