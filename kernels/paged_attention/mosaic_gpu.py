"""Paged decode attention on Hopper GPUs.

One block (a warpgroup) attends with the G query heads of one kv head to one split of a row. It walks over tiles of 64 slots: TMA fetches
the pages of the tiles ahead into shared memory, while both products of the tile at hand run on the tensor cores, in transposed form:

    S^T [64, G] = K [64, D] . Q^T [D, G]            O^T [D, G] += V^T [D, 64] . P^T [64, G]

The slots, and then the head dim, stand where a tensor core wants multiples of 64, so the few queries of a group are padded to 8 and not to
64, and an accumulator takes D * 8 / 128 registers a thread. A NaN in a key stays in its row of S^T and is masked there; values of slots
that are not read are zeroed in shared memory, which only a tile with such slots pays for.

Types: bfloat16 and float16 go to the tensor cores as they lie. int8 is first converted to q's type, which is exact, and the scales multiply
S^T and P^T. float32 is cut into three bfloat16 terms whose six significant products add up to float32 accuracy.

A row's tiles are dealt out evenly to its splits, at least MIN_TILES each; partial outputs are float32, normalised, and joined by their
log-sum-exps in XLA. A split without tiles reports NEG_INF and weighs nothing.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dispatch, tuned
from .base import NEG_INF, seen_slots

TILE = 64  # slots of a tile: the M of a wgmma
MIN_TILES = 4  # of a split, where the row has them
LONGEST_SPLIT = 4096  # slots; so that one long row among short ones is spread over the card
DEFAULT_CORES = 132
SHARED_MEMORY = 227 * 1024  # bytes a block may have
HALF = 104 * 1024  # bytes that leave room for a second block on the multiprocessor

ROWS = plgpu.Layout.WGMMA.reduce(1)  # a value a slot
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a value a query


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a block does.

    Attributes:
      splits: blocks that share one kv head of a row.
      stages: tiles in shared memory, one of them at hand.
    """

    splits: int
    stages: int


def supports(q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False):
    """None, or why the kernel cannot take these arguments."""
    dim, page_size = k_pages.shape[-1], k_pages.shape[-2]
    kv_heads = block_tables.shape[1] * k_pages.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"queries are {q.dtype}, not bfloat16, float16 or float32"
    if k_pages.dtype == jnp.int8 and q.dtype == jnp.float32:
        return "int8 pages need bfloat16 or float16 queries"
    if q.dtype == jnp.float32 and dim > 128:
        return f"float32 at head_dim={dim} takes more registers than there are"
    if dim % 16 or not 64 <= dim <= 256 or (dim > 128 and dim % 64):
        return f"head_dim={dim} is not a multiple of 16 from 64 to 128, 192 or 256"
    if page_size % 16 or (TILE % page_size and page_size % TILE):
        return f"page_size={page_size} is not 16, 32 or a multiple of 64"
    if q.shape[1] // kv_heads > 64:
        return f"{q.shape[1] // kv_heads} query heads a kv head are more than 64"
    return None


def tiling(batch: int, kv_heads: int, capacity: int, dim: int, itemsize: int, cores: int, device: str = "") -> Tiling:
    """What was tuned for the device; else enough splits to fill the card with full rows, or for rows much longer than the others."""
    stage = 2 * TILE * dim * itemsize
    stages = max(1, min(4, HALF // stage if 2 * stage <= HALF else (SHARED_MEMORY - 48 * 1024) // stage))
    wanted = max(2 * cores // (batch * kv_heads), math.ceil(capacity / LONGEST_SPLIT))
    rule = Tiling(splits=max(1, min(wanted, math.ceil(capacity / (MIN_TILES * TILE)))), stages=stages)
    return dataclasses.replace(rule, **tuned.find("paged_attention", device, tuning_key(batch * kv_heads, capacity, dim, itemsize)))


def tuning_key(rows: int, capacity: int, dim: int, itemsize: int) -> str:
    """What the best tiling depends on; `rows` are rows times kv heads."""
    return f"rows{tuned.bucket(rows)} slots{tuned.bucket(capacity)} d{dim} {itemsize}B"


def paged_attention(
    q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False,
    config: Tiling | None = None,
):  # fmt: skip
    """Arguments and results as in api.py, tables `[B, h, T]`; `config` forces a tiling."""
    batch, heads, dim = q.shape
    page_heads, page_size = k_pages.shape[1:3]
    table_heads, capacity = block_tables.shape[1], block_tables.shape[2] * page_size
    kv_heads = table_heads * page_heads
    group = heads // kv_heads
    padded_group, padded = _up(group, 8), _up(capacity, TILE)
    device = dispatch.current_device()
    sizes = (batch, kv_heads, capacity, dim, k_pages.dtype.itemsize)
    chosen = config or tiling(*sizes, device.cores or DEFAULT_CORES, device.kind)
    splits, stages = chosen.splits, chosen.stages
    quantized, exact = k_scales is not None, q.dtype == jnp.float32
    compute = jnp.dtype(jnp.bfloat16) if exact else q.dtype
    terms = 3 if exact else 1
    staged = quantized or exact
    chunk = dim if not exact or dim % 64 else 64  # of the head dim, converted at a time
    blocks = _blocks(dim, chunk)
    out_rows = group if dim % 64 == 0 else padded_group  # blocks that overlap are only stored in a layout of whole groups of 8
    pages_a_tile = max(1, TILE // page_size)

    def body(*refs):
        given: Any = iter(refs)  # inputs, outputs and scratch, in the order they are listed in below
        tables_ref, lengths_ref, q_ref, k_ref, v_ref = (next(given) for _ in range(5))
        k_scales_ref, v_scales_ref = (next(given) if quantized else None for _ in range(2))
        visible_ref: Any = next(given) if visible is not None else None
        out_ref, lse_ref = next(given), next(given)
        logits_ref: Any = next(given) if statistics else None
        q_smem, k_smem, v_smem, p_smem, out_smem, q_barrier, barriers = (next(given) for _ in range(7))
        staging: Any = next(given) if staged else None
        scales_smem: list[Any] = [next(given) for _ in range(2 if quantized else 0)]
        visible_smem: Any = next(given) if visible is not None else None
        logits_smem: Any = next(given) if statistics else None

        row, head, split = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("split")
        length = jnp.minimum(lengths_ref[row], capacity)
        tiles = lax.div(length + (TILE - 1), TILE)
        share = jnp.maximum(lax.div(tiles + (splits - 1), splits), MIN_TILES)
        first = split * share
        count = jnp.maximum(jnp.minimum(first + share, tiles) - first, 0)
        last_page = jnp.maximum(lax.div(length + (page_size - 1), page_size) - 1, 0)

        def page(index):
            number = tables_ref[row, lax.div(head, page_heads), jnp.minimum(index, last_page)]
            return number * page_heads + lax.rem(head, page_heads)

        def fetch(i):
            """Starts the transfers of tile i of this split."""
            slot, tile = lax.rem(i, stages), first + i
            pairs = [(k_ref, k_smem), (v_ref, v_smem)]
            if quantized:
                pairs += [(k_scales_ref, scales_smem[0]), (v_scales_ref, scales_smem[1])]
            for part in range(pages_a_tile):
                if page_size <= TILE:
                    where, inside = page(tile * pages_a_tile + part), pl.ds(0, page_size)
                else:
                    tiles_a_page = page_size // TILE
                    where, inside = page(lax.div(tile, tiles_a_page)), pl.ds(lax.rem(tile, tiles_a_page) * TILE, TILE)
                into = pl.ds(part * min(page_size, TILE), min(page_size, TILE))
                for source, target in pairs:
                    plgpu.copy_gmem_to_smem(source.at[where, inside], target.at[slot, into], barriers.at[slot])
            if visible is not None:
                where = head if visible.shape[1] > 1 else 0
                plgpu.copy_gmem_to_smem(visible_ref.at[row, where, pl.ds(tile * TILE, TILE)], visible_smem.at[slot], barriers.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem, q_barrier)
        for i in range(stages - 1):
            pl.when(i < count)(partial(fetch, jnp.int32(i)))
        plgpu.barrier_wait(q_barrier)

        def stage(ref, slot, columns, seen_rows=None):
            """Converts some columns of a tile into tensor-core operands; zeroes in rows that are not seen."""
            x = plgpu.load(ref.at[slot, :, columns], layout=plgpu.Layout.WGMMA, optimized=dim % 64 == 0)
            if seen_rows is not None:
                x = jnp.where(_over_queries(seen_rows, x.shape), x, jnp.zeros_like(x))
            for term, part in enumerate(_split(x, terms, compute)):
                staging[term] = part
            plgpu.commit_smem()

        def scores(slot):
            """S^T of a tile, unscaled."""

            def multiply(acc):
                for start in range(0, dim, chunk):
                    columns = pl.ds(start, chunk)
                    if staged:
                        if start:
                            plgpu.wgmma_wait(0)
                        stage(k_smem, slot, columns)
                    for a, b in _products(terms):
                        keys = staging.at[a] if staged else k_smem.at[slot]
                        plgpu.wgmma(acc, keys, q_smem.at[b, :, columns].T)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((TILE, padded_group), jnp.float32))

        def weighted(slot, seen_rows):
            """O^T of a tile, one block of the head dim after the other."""
            out = []
            for start, size in blocks:

                def multiply(acc, start=start, size=size):
                    inside = pl.ds(start % chunk, size)
                    if staged and start % chunk == 0:
                        stage(v_smem, slot, pl.ds(start, chunk), seen_rows if exact else None)
                    for a, b in _products(terms):
                        values = staging.at[a, :, inside] if staged else v_smem.at[slot, :, pl.ds(start, size)]
                        plgpu.wgmma(acc, values.T, p_smem.at[b].T)
                    return acc[...]

                out.append(pl.run_scoped(multiply, plgpu.ACC((size, padded_group), jnp.float32)))
            return out

        def step(i, carry):
            highest, total, out = carry
            slot = lax.rem(i, stages)
            pl.when(i + (stages - 1) < count)(lambda: fetch(i + (stages - 1)))
            plgpu.barrier_wait(barriers.at[slot])
            start = (first + i) * TILE
            logits = scores(slot) * scale
            if quantized:
                logits *= _over_queries(plgpu.load(scales_smem[0].at[slot], layout=ROWS), logits.shape)
            seen_rows = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS) + start < length
            if visible is not None:
                seen_rows &= plgpu.load(visible_smem.at[slot], layout=ROWS) >= 0
            seen = _over_queries(seen_rows, logits.shape)
            logits = jnp.where(seen, logits, NEG_INF)
            if statistics:
                buffer = lax.rem(i, 2)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                plgpu.store(logits_smem.at[buffer].T, plgpu.layout_cast(logits, plgpu.Layout.WGMMA_TRANSPOSED), optimized=False)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(logits_smem.at[buffer, pl.ds(0, group)], logits_ref.at[row, head, slice(None), pl.ds(start, TILE)])
            higher = jnp.maximum(highest, logits.max(0))
            fade = jnp.exp(highest - higher)
            weights = jnp.where(seen, jnp.exp(logits - _over_rows(higher, logits.shape)), 0)
            total = total * _over_rows(fade, total.shape) + weights
            if quantized:
                weights *= _over_queries(plgpu.load(scales_smem[1].at[slot], layout=ROWS), weights.shape)
                weights = jnp.where(seen, weights, 0)
            for term, part in enumerate(_split(weights, terms, compute)):
                plgpu.store(p_smem.at[term].T, plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED))
            if not staged:
                hidden = start + TILE > length if visible is None else seen_rows.astype(jnp.int32).min() < 1
                pl.when(hidden)(lambda: _clear(v_smem.at[slot], seen_rows))
            plgpu.commit_smem()
            parts = weighted(slot, seen_rows)
            out = [old * _over_rows(fade, old.shape) + new for old, new in zip(out, parts, strict=True)]
            return higher, total, out

        zeros = [_constant(0, (size, padded_group), plgpu.Layout.WGMMA) for _, size in blocks]
        none = _constant(NEG_INF, (padded_group,), COLUMNS)
        carry = (none, _constant(0, (TILE, padded_group), plgpu.Layout.WGMMA), zeros)
        highest, total, out = lax.fori_loop(0, count, step, carry)
        total = total.sum(0)
        lse = jnp.where(total > 0, highest + jnp.log(total), NEG_INF)
        plgpu.store(lse_ref.at[row, head, split], lse, optimized=False)
        inverse = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        for (start, size), part in zip(blocks, out, strict=True):
            part *= _over_rows(inverse, part.shape)
            part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.store(out_smem.at[:, pl.ds(start, size)].T, part, optimized=dim % 64 != 0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, out_rows)], out_ref.at[row, head, split])
        plgpu.wait_smem_to_gmem(0)

    smem = plgpu.SMEM
    arrivals = pages_a_tile * (4 if quantized else 2) + (visible is not None)
    scratch: list[Any] = [
        smem((terms, padded_group, dim), compute),
        smem((stages, TILE, dim), k_pages.dtype),
        smem((stages, TILE, dim), k_pages.dtype),
        smem((terms, padded_group, TILE), compute),
        smem((padded_group, dim), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
    ]
    grouped = q.reshape(batch, kv_heads, group, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padded_group - group), (0, 0)))
    queries = jnp.stack(_split(grouped, terms, compute), 2)
    inputs = [block_tables, lengths, queries, *(x.reshape(-1, page_size, dim) for x in (k_pages, v_pages))]
    out_type = [
        jax.ShapeDtypeStruct((batch, kv_heads, splits, out_rows, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, padded_group), jnp.float32),
    ]
    if staged:
        scratch.append(smem((terms, TILE, chunk), compute))
    if quantized:
        inputs += [x.reshape(-1, page_size) for x in (k_scales, v_scales)]
        scratch += [smem((stages, TILE), jnp.float32)] * 2
    if visible is not None:
        positions = jnp.where(visible, 0, -1) if visible.dtype == jnp.bool_ else visible
        inputs.append(jnp.pad(positions.astype(jnp.int32), ((0, 0), (0, 0), (0, padded - capacity))))
        scratch.append(smem((stages, TILE), jnp.int32))
    if statistics:
        out_type.append(jax.ShapeDtypeStruct((batch, kv_heads, group, padded), jnp.float32))
        scratch.append(smem((2, padded_group, TILE), jnp.float32))

    parts, lse, *logits = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch, kv_heads, splits),
        grid_names=("row", "head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"paged_attention_d{dim}_g{group}_z{page_size}_s{splits}",
    )(*inputs)
    out, lse = join_splits(parts[..., :group, :], lse[..., :group])
    out = out.reshape(batch, heads, dim).astype(q.dtype)
    if not statistics:
        return out, None, None
    seen = seen_slots(lengths, visible, capacity)[:, :, None]
    return out, jnp.where(seen, logits[0][..., :capacity], NEG_INF), lse  # tiles that no block visited hold anything


def join_splits(parts, lse):
    """Joins the attention of splits, axis 2: normalised outputs [B, Hkv, N, G, D] and their log-sum-exps [B, Hkv, N, G], float32."""
    if parts.shape[2] == 1:
        return parts[:, :, 0], lse[:, :, 0]
    highest = lse.max(2)
    share = jnp.exp(lse - highest[:, :, None])
    total = share.sum(2)
    out = (share[..., None] * parts).sum(2) / total[..., None]
    return out, jnp.where(highest > NEG_INF / 2, highest + jnp.log(total), NEG_INF)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _blocks(dim: int, width: int) -> list[tuple[int, int]]:
    """The head dim as (start, size) with sizes a multiple of 64; blocks overlap where it is none, and agree there."""
    if width % 64 == 0:
        return [(start, width) for start in range(0, dim, width)]
    return [(0, 64), (dim - 64, 64)]


def _products(terms: int) -> list[tuple[int, int]]:
    """Which terms of two split numbers to multiply; the products left out are below float32's last bit. Small ones first."""
    return sorted(((a, b) for a in range(terms) for b in range(terms) if a + b < terms), key=sum, reverse=True)


def _split(x, terms: int, dtype):
    """x as a sum of `terms` numbers of a narrower type; float32 is cut off and not rounded, so that no compiler takes it for a no-op."""
    if terms == 1:
        return [x.astype(dtype)]
    parts = []
    for _ in range(terms):
        head = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32)
        parts.append(head.astype(dtype))
        x = x - head
    return parts


def _clear(ref, seen_rows) -> None:
    """Zeroes the rows of a tile that are not seen."""
    values = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    ref[...] = jnp.where(_over_queries(seen_rows, values.shape), values, jnp.zeros_like(values))


def _constant(value: float, shape: tuple[int, ...], layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_queries(x, shape):
    return lax.broadcast_in_dim(x, shape, (0,))


def _over_rows(x, shape):
    return lax.broadcast_in_dim(x, shape, (1,))
