"""Gathering on Hopper GPUs: every row is one TMA transfer into shared memory, and a block of them leaves it as one.

Nothing passes through registers, so a block is one warpgroup whose only work is to name the rows, and ten or more share a multiprocessor:
what is in flight is limited by shared memory alone. A row number outside the pool is a transfer out of bounds, which the TMA unit fills
with zeros; the last block's rows past the end are clipped by it in the same way.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuned
from ..dispatch import current_device

BLOCK_BYTES = 16 * 1024  # where nothing else was tuned
TRANSFER_BYTES = 4096
WIDTH = 256  # elements of the innermost dimension of a transfer, at most
ROWS = 64  # transfers of a block, at most
ALIGNMENT = 16  # bytes


def supports(pool, index):
    """None, or why the kernel cannot take these arguments."""
    if pool.dtype.itemsize not in (1, 2, 4) or pool.dtype == jnp.bool_:
        return f"{pool.dtype} is not a number of 1, 2 or 4 bytes"
    if not len(index) or not pool.size:
        return "there is nothing to copy"
    if (size := math.prod(pool.shape[1:]) * pool.dtype.itemsize) % ALIGNMENT:
        return f"rows of {size} bytes are not a multiple of {ALIGNMENT}"
    return None


def transfer_shape(width: int, itemsize: int) -> tuple[int, int]:
    """The part of a row that one transfer takes, as (lines, elements): it divides the row."""
    elements = max(n for n in range(1, min(width, WIDTH) + 1) if width % n == 0 and n * itemsize % ALIGNMENT == 0)
    total = width // elements
    most = max(1, TRANSFER_BYTES // (elements * itemsize))
    return max(n for n in range(1, min(total, most) + 1) if total % n == 0), elements


def tuning_key(bytes_of_a_row: int) -> str:
    """What the best block depends on."""
    return f"row{tuned.bucket(bytes_of_a_row)}B"


def gather_rows(pool, index, block_bytes: int | None = None):
    """Arguments and results as in api.py; `block_bytes` forces how much a block copies."""
    height, width = pool.shape[0], math.prod(pool.shape[1:])
    key = tuning_key(width * pool.dtype.itemsize)
    block_bytes = block_bytes or tuned.find("gather", current_device().kind, key).get("block_bytes", BLOCK_BYTES)
    lines, elements = transfer_shape(width, pool.dtype.itemsize)
    parts = width // (lines * elements)  # transfers of a row
    rows = max(1, min(ROWS, block_bytes // (lines * elements * pool.dtype.itemsize)))
    rows = 2 ** int(math.log2(rows))
    transfers = len(index) * parts
    blocks = -(-transfers // rows)
    places = jnp.where((index < 0) | (index >= height), height, index.astype(jnp.int32))
    places = (places[:, None] * parts + jnp.arange(parts, dtype=jnp.int32)).reshape(-1)
    places = jnp.pad(places, (0, blocks * rows - transfers), constant_values=height * parts)

    def body(pool_ref, places_ref, out_ref, rows_smem, places_smem, barrier, places_barrier):
        start = lax.axis_index("block") * rows
        plgpu.copy_gmem_to_smem(places_ref.at[pl.ds(start, rows)], places_smem, places_barrier)
        plgpu.barrier_wait(places_barrier)

        def fetch(i, _):
            plgpu.copy_gmem_to_smem(pool_ref.at[pl.ds(places_smem[i], 1)], rows_smem.at[pl.ds(i, 1)], barrier)

        lax.fori_loop(0, rows, fetch, None)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(rows_smem, out_ref.at[pl.ds(start, rows)])
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((transfers, lines, elements), pool.dtype),
        scratch_types=[
            plgpu.SMEM((rows, lines, elements), pool.dtype),
            plgpu.SMEM((rows,), jnp.int32),
            plgpu.Barrier(num_arrivals=rows),
            plgpu.Barrier(),
        ],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=f"gather_w{width}_r{rows}",
    )(pool.reshape(height * parts, lines, elements), places)
    return out.reshape(len(index), *pool.shape[1:])
