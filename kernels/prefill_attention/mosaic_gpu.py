"""Column mass and prefill attention on Hopper's tensor cores.

Column mass. A block owns some keys of one kv head, holds them in shared memory, and lets the queries that see them come by: all query
heads of the group, from the first tile on or behind the diagonal to the last that counts. A warpgroup multiplies 64 of its keys at a time
with a tile of queries (wgmma, both operands in shared memory), takes exp2 of what comes out less the log-sum-exp, and adds up the rows of
the tile, which are the columns of the score matrix: a sum of its own keys that no other block has a part in, so there is nothing to
combine. While one warpgroup is at its exponentials, another has the tensor cores.
Per score that is one multiply-add, one exp2 and one addition; only tiles on the diagonal and the last one are masked. It does half the
products of flash attention and the same exponentials, reads queries once per block of keys, and writes 4 bytes a key.

Attention. Flash attention as one expects it, with one difference: probabilities go to the second product through shared memory, not from
registers. That costs a round trip of 8 KB a tile and warpgroup, and is what the interpreter can run, so it is proven without a card.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuned
from ..dispatch import current_device
from .base import LOG2E, NEG_INF, padded

SHARED_MEMORY = 232448 - 2048  # bytes of a block on Hopper, less room for barriers and reductions
SOFTMAX = plgpu.CompilerParams(approx_math=True)
ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Layouts of one number per row, and per column, of a wgmma tile."""

MASKED = 16
"""Queries of a tile of column mass that is masked: the indices they are compared by are registers too, so it is taken in parts."""

HEIGHT = 64
"""Rows of a tile: keys of a warpgroup in column mass, queries of a warpgroup in attention."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of column mass.

    Attributes:
      warpgroups: of a block, each with its own 64 keys.
      queries: of a tile.
      stages: tiles of queries under way.
    """

    warpgroups: int
    queries: int
    stages: int

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.warpgroups * HEIGHT

    def shared_memory(self, dim: int) -> int:
        """Bytes of a block's tiles."""
        return self.keys * (2 * dim + 4) + self.stages * self.queries * (2 * dim + 4)


CONFIGS = (Config(4, 128, 3), Config(2, 128, 3), Config(2, 128, 2), Config(1, 128, 2))
"""From the one that reads queries least often to the one that makes the most blocks."""


def config_for(batch: int, kv_heads: int, length: int, dim: int, cores: int, device: str = "") -> Config:
    """What was tuned for the device; else the first that fits and gives every multiprocessor a block, or the one that makes the most."""
    fitting = [config for config in CONFIGS if config.shared_memory(dim) <= SHARED_MEMORY]
    busy = [config for config in fitting if batch * kv_heads * pl.cdiv(length, config.keys) >= cores]
    rule = (busy or fitting[-1:])[0]
    return dataclasses.replace(rule, **tuned.find("prefill_attention", device, tuning_key(batch * kv_heads, length, dim)))


def tuning_key(rows: int, length: int, dim: int) -> str:
    """What the best tiles of column mass depend on; `rows` are rows times kv heads."""
    return f"column_mass rows{tuned.bucket(rows)} keys{tuned.bucket(length)} d{dim}"


def supports(q, k, lse, start, count, scale: float) -> str | None:
    """Why column mass cannot run this, or None."""
    if q.shape[-1] % 16 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is no multiple of 16 up to 256"
    return _unsupported(q, k)


def supports_attention(q, k, v, start, count, scale: float) -> str | None:
    """Why attention cannot run this, or None."""
    if q.shape[-1] not in (64, 128):
        return f"head dim {q.shape[-1]} is neither 64 nor 128"
    return _unsupported(q, k)


def _unsupported(q, k) -> str | None:
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"tensor cores take bfloat16 or float16, these are {q.dtype} and {k.dtype}"
    return None


def column_mass(q, k, lse, start, count, scale: float, config: Config | None = None):
    """See api.py."""
    batch, _, heads, dim = q.shape
    length, kv_heads = k.shape[1:3]
    device = current_device()
    config = config or config_for(batch, kv_heads, length, dim, device.cores or 132, device.kind)
    q, lse = padded(q, 1, config.queries), padded(lse * LOG2E, 2, config.queries)
    k = padded(k, 1, config.keys)
    tiles = _tiled(dim, q.dtype)

    def body(q, k, lse, settings, mass, **scratch):
        _column_mass(q, k, lse, settings, mass, config, scale * LOG2E, **scratch)

    mass = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, k.shape[1]), jnp.float32),
        scratch_types=dict(
            k_smem=plgpu.SMEM((config.warpgroups, HEIGHT, dim), k.dtype, transforms=tiles),
            q_smem=plgpu.SMEM((config.stages, config.queries, dim), q.dtype, transforms=tiles),
            lse_smem=plgpu.SMEM((config.stages, config.queries), jnp.float32),
            mass_smem=plgpu.SMEM((config.warpgroups, HEIGHT), jnp.float32),
            k_here=plgpu.Barrier(num_barriers=config.warpgroups),
            q_here=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            q_done=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        grid=(k.shape[1] // config.keys, kv_heads, batch),
        grid_names=("keys", "head", "row"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=SOFTMAX,
        kernel_name=f"column_mass_g{heads // kv_heads}_d{dim}_w{config.warpgroups}_q{config.queries}_s{config.stages}",
    )(q, k, lse, jnp.stack([start, count], -1).astype(jnp.int32))
    return mass[..., :length]


def _column_mass(
    q, k, lse, settings, mass, config: Config, scale: float, k_smem, q_smem, lse_smem, mass_smem, k_here, q_here, q_done
):  # fmt: skip
    row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    start, count, group = settings[row, 0], settings[row, 1], q.shape[2] // k.shape[2]
    queries, stages = config.queries, config.stages
    first = lax.axis_index("keys") * config.keys
    mine = first + warpgroup * HEIGHT

    # Tiles of queries: begin is the first that sees a key of this block; from full to tail (exclusive) all queries of a tile see all keys.
    begin = lax.div(jnp.maximum(first - start, 0), queries)
    end = jnp.maximum(begin, lax.div(count + (queries - 1), queries))
    full = jnp.clip(lax.div(jnp.maximum(first + config.keys - 1 - start, 0) + (queries - 1), queries), begin, end)
    tail = jnp.clip(lax.div(count, queries), full, end)
    steps = (end - begin) * group

    def fetch(step):
        slot, here, query_head = lax.rem(step, stages), _span(begin + lax.div(step, group), queries), head * group + lax.rem(step, group)
        plgpu.copy_gmem_to_smem(q.at[row, here, query_head], q_smem.at[slot], q_here.at[slot])
        plgpu.copy_gmem_to_smem(lse.at[row, query_head, here], lse_smem.at[slot], q_here.at[slot])

    @pl.when(warpgroup == 0)
    def _():
        for step in range(stages):
            pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))

    plgpu.copy_gmem_to_smem(k.at[row, pl.ds(mine, HEIGHT), head], k_smem.at[warpgroup], k_here.at[warpgroup])
    plgpu.barrier_wait(k_here.at[warpgroup])

    def visit(step, total, masked: bool):
        slot = lax.rem(step, stages)
        _refill(step, steps, stages, warpgroup, q_done, fetch)
        plgpu.barrier_wait(q_here.at[slot])
        width = MASKED if masked else queries
        for offset in range(0, queries, width):
            tile, part = (HEIGHT, width), pl.ds(offset, width)
            scores = _product(k_smem.at[warpgroup], q_smem.at[slot, part].transpose((1, 0)), tile)
            sums = plgpu.load(lse_smem.at[slot, part], layout=COLUMNS)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(sums, tile, [1]))
            if masked:
                index = (begin + lax.div(step, group)) * queries + offset + _iota(tile, 1)
                weights = jnp.where((index + start >= mine + _iota(tile, 0)) & (index < count), weights, 0.0)
            total += weights.sum(1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(q_done.at[slot])
        return total

    total = plgpu.layout_cast(jnp.zeros((HEIGHT,), jnp.float32), ROWS)
    for low, high, masked in ((begin, full, True), (full, tail, False), (tail, end, True)):
        total = lax.fori_loop((low - begin) * group, (high - begin) * group, functools.partial(visit, masked=masked), total)
    plgpu.store(mass_smem.at[warpgroup], total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mass_smem.at[warpgroup], mass.at[row, head, pl.ds(mine, HEIGHT)])
    plgpu.wait_smem_to_gmem(0)


WARPGROUPS = 2
"""Of a block, in attention."""

KEYS = 64
"""Of a tile, in attention; with 128 the tile's scores and probabilities do not fit the registers beside two [64, 128] of the output."""

STAGES = 3
"""Tiles of keys and values under way, in attention, where nothing else was tuned."""


def attention_key(dim: int) -> str:
    """What the best number of stages depends on."""
    return f"attention d{dim}"


def prefill_attention(q, k, v, start, count, scale: float, stages: int | None = None):
    """See api.py; `stages` forces how many tiles are under way."""
    batch, size, heads, dim = q.shape
    tuned_fields = tuned.find("prefill_attention", current_device().kind, attention_key(dim))
    stages = stages or tuned_fields.get("stages", STAGES)
    tiles, wide = _tiled(dim, q.dtype), _tiled(KEYS, q.dtype)
    q, k, v = padded(q, 1, WARPGROUPS * HEIGHT), padded(k, 1, KEYS), padded(v.astype(q.dtype), 1, KEYS)

    def body(q, k, v, settings, out, lse, **scratch):
        _attention(q, k, v, settings, out, lse, scale * LOG2E, **scratch)

    ring: Any = plgpu.SMEM((stages, KEYS, dim), q.dtype, transforms=tiles)
    out, lse = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, q.shape[1]), jnp.float32)),
        scratch_types=dict(
            q_smem=plgpu.SMEM((WARPGROUPS, HEIGHT, dim), q.dtype, transforms=tiles),
            k_smem=ring,
            v_smem=ring,
            p_smem=plgpu.SMEM((WARPGROUPS, HEIGHT, KEYS), q.dtype, transforms=wide),
            lse_smem=plgpu.SMEM((WARPGROUPS, HEIGHT), jnp.float32),
            q_here=plgpu.Barrier(num_barriers=WARPGROUPS),
            kv_here=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            kv_done=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            clean=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(q.shape[1] // (WARPGROUPS * HEIGHT), heads, batch),
        grid_names=("queries", "head", "row"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=SOFTMAX,
        kernel_name=f"prefill_attention_g{heads // k.shape[2]}_d{dim}",
    )(q, k, v, jnp.stack([start, count], -1).astype(jnp.int32))
    return out[:, :size], lse[..., :size]


def _attention(
    q, k, v, settings, out, lse, scale: float, q_smem, k_smem, v_smem, p_smem, lse_smem, q_here, kv_here, kv_done, clean
):  # fmt: skip
    row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    start, count, dim, stages = settings[row, 0], settings[row, 1], q.shape[3], k_smem.shape[0]
    kv_head = lax.div(head, q.shape[2] // k.shape[2])
    block = q.shape[1] // (WARPGROUPS * HEIGHT) - 1 - lax.axis_index("queries")  # the longest come first
    first = block * (WARPGROUPS * HEIGHT)
    mine = first + warpgroup * HEIGHT
    end, tile = start + count, (HEIGHT, KEYS)
    steps = jnp.where(first < count, lax.div(jnp.minimum(start + first + WARPGROUPS * HEIGHT, end) + (KEYS - 1), KEYS), 0)
    full = jnp.minimum(lax.div(start + first + 1, KEYS), steps)  # tiles that every query of the block sees all of

    def fetch(step):
        slot, here = lax.rem(step, stages), _span(step, KEYS)
        plgpu.copy_gmem_to_smem(k.at[row, here, kv_head], k_smem.at[slot], kv_here.at[slot])
        plgpu.copy_gmem_to_smem(v.at[row, here, kv_head], v_smem.at[slot], kv_here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[row, pl.ds(mine, HEIGHT), head], q_smem.at[warpgroup], q_here.at[warpgroup])

    @pl.when(warpgroup == 0)
    def _():
        for step in range(stages):
            pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))

    plgpu.barrier_wait(q_here.at[warpgroup])

    def wipe(slot, count):
        """Zeros for the values of a tile beyond the first `count`: a tensor core makes NaN of zero times what may stand there."""

        @pl.when(warpgroup == 0)
        def _():
            values = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
            plgpu.store(v_smem.at[slot], jnp.where(_iota((KEYS, dim), 0) < count, values, jnp.zeros_like(values)))
            plgpu.commit_smem()

        plgpu.barrier_arrive(clean)
        plgpu.barrier_wait(clean)

    def visit(step, carry, masked: bool):
        highest, total, weighted = carry
        slot = lax.rem(step, stages)
        _refill(step, steps, stages, warpgroup, kv_done, fetch)
        plgpu.barrier_wait(kv_here.at[slot])
        if masked:
            pl.when(end < (step + 1) * KEYS)(lambda: wipe(slot, end - step * KEYS))
        scores = _product(q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)), tile) * scale
        if masked:
            at, index = step * KEYS + _iota(tile, 1), mine + _iota(tile, 0)
            scores = jnp.where((at <= index + start) & (at < end), scores, NEG_INF)
        higher = jnp.maximum(highest, scores.max(1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, tile, [0]))
        fade = jnp.exp2(highest - higher)
        total = total * fade + weights.sum(1)
        plgpu.store(p_smem.at[warpgroup], weights.astype(q.dtype))
        plgpu.commit_smem()
        weighted *= lax.broadcast_in_dim(fade, (HEIGHT, dim), [0])
        weighted += _product(p_smem.at[warpgroup], v_smem.at[slot], (HEIGHT, dim))
        plgpu.barrier_arrive(kv_done.at[slot])
        return higher, total, weighted

    def rows(value):
        return plgpu.layout_cast(jnp.full((HEIGHT,), value, jnp.float32), ROWS)

    carry = rows(NEG_INF), rows(0), plgpu.layout_cast(jnp.zeros((HEIGHT, dim), jnp.float32), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(0, full, functools.partial(visit, masked=False), carry)
    highest, total, weighted = lax.fori_loop(full, steps, functools.partial(visit, masked=True), carry)

    index = mine + _iota((HEIGHT, dim), 0)
    share = lax.broadcast_in_dim(1 / jnp.maximum(total, 1e-30), (HEIGHT, dim), [0])
    plgpu.store(q_smem.at[warpgroup], jnp.where(index < count, weighted * share, 0.0).astype(q.dtype))
    counts = mine + plgpu.layout_cast(lax.iota(jnp.int32, HEIGHT), ROWS) < count
    plgpu.store(lse_smem.at[warpgroup], jnp.where(counts, (highest + jnp.log2(jnp.maximum(total, 1e-30))) / LOG2E, jnp.inf))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out.at[row, pl.ds(mine, HEIGHT), head])
    plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[row, head, pl.ds(mine, HEIGHT)])
    plgpu.wait_smem_to_gmem(0)


def _tiled(dim: int, dtype):
    """How a tile with `dim` numbers a row stands in shared memory: what wgmma reads without bank conflicts."""
    swizzle = plgpu.find_swizzle(dim * dtype.itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def _product(a, b, shape: tuple[int, int]):
    """a [M, K] times b [K, N], both in shared memory; float32."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _refill(step, steps, stages: int, warpgroup, done, fetch):
    """Puts the next tile where the step before this one had its own, once every warpgroup is done with that."""

    @pl.when((warpgroup == 0) & (step > 0) & (step - 1 + stages < steps))
    def _():
        plgpu.barrier_wait(done.at[lax.rem(step + (stages - 1), stages)])
        fetch(step - 1 + stages)


def _span(index, size: int):
    return pl.ds(index * size, size)


def _iota(shape: tuple[int, int], dimension: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)
