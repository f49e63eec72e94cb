"""Paged decode attention at the shapes of real models."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from kvjax.kernels.dispatch import Name
from kvjax.kernels.paged_attention import paged_attention, pool_dim

from tests.kernels import shapes
from tests.kernels.shapes import Case, Geometry, array

SIZES = ((1, 2048, 16), (1, 131072, 128), (32, 8192, 64), (256, 2048, 32))  # rows, context, page size
MODELS = (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B, shapes.QWEN3_8B)
OTHER_DIMS = (shapes.LLAMA_3_2_1B, shapes.OPT_2_7B, shapes.PHI_3_MINI, shapes.GEMMA_2B)


def cases() -> Iterator[Case]:
    """Every size of the large models (on TPUs, of one of them), every variant at one size, every head dim."""
    for implementation in ("mosaic_gpu", "mosaic_tpu"):
        case, on_gpu = partial(_case, implementation), implementation == "mosaic_gpu"
        for geometry in MODELS:
            for size in SIZES:
                if on_gpu or geometry is shapes.LLAMA_3_8B or size == (32, 8192, 64):
                    yield case(geometry, *size, quick=geometry is shapes.LLAMA_3_8B and size == (32, 8192, 64))
        for geometry in (shapes.OPT_6_7B, shapes.LLAMA_3_8B):
            yield case(geometry, 32, 8192, 64, statistics=True, quick=geometry is shapes.OPT_6_7B)
            yield case(geometry, 32, 2048, 16, statistics=True, positions=True, quick=geometry is shapes.LLAMA_3_8B)
        yield case(shapes.LLAMA_3_8B, 32, 8192, 32, int8=True, quick=True)
        yield case(shapes.LLAMA_3_8B, 32, 8192, 128, int8=True, statistics=True, positions=True)
        for geometry in OTHER_DIMS:
            yield case(geometry, 32, 2048, 64, quick=geometry in (shapes.OPT_2_7B, shapes.GEMMA_2B))
            if on_gpu:
                yield case(geometry, 32, 2048, 16, statistics=True, positions=True)
                yield case(geometry, 32, 2048, 64, int8=True)
        if on_gpu:
            yield case(shapes.LLAMA_3_8B, 32, 8192, 64, dtype=jnp.float16)
        yield case(shapes.LLAMA_3_8B, 32, 2048, 64, dtype=jnp.float32)
    yield _case("xla", shapes.LLAMA_3_8B, 32, 2048, 64, quick=True)


def _case(
    implementation: Name,
    geometry: Geometry,
    batch: int,
    context: int,
    page_size: int,
    *,
    statistics: bool = False,
    positions: bool = False,
    int8: bool = False,
    dtype: Any = jnp.bfloat16,
    quick: bool = False,
) -> Case:
    pages = context // page_size
    dim = pool_dim(geometry.head_dim, "tpu" if implementation == "mosaic_tpu" else "gpu")
    pool = (batch * pages, geometry.kv_heads, page_size, dim)
    stored = jnp.int8 if int8 else dtype
    arguments = dict(
        q=array((batch, geometry.heads, geometry.head_dim), dtype),
        k_pages=array(pool, stored),
        v_pages=array(pool, stored),
        block_tables=array((batch, pages), jnp.int32),
        lengths=array((batch,), jnp.int32),
    )
    if int8:
        arguments |= dict(k_scales=array(pool[:3], jnp.float32), v_scales=array(pool[:3], jnp.float32))
    if positions:
        arguments |= dict(visible=array((batch, geometry.kv_heads, context), jnp.int32))
    kind = "" if dtype == jnp.bfloat16 else f" {jnp.dtype(dtype).name}"
    name = (
        f"{geometry.name} b{batch} c{context} z{page_size}{kind}" + " int8" * int8 + " statistics" * statistics + " positions" * positions
    )
    read = 2 * math.prod(pool) * jnp.dtype(stored).itemsize

    def call(arguments):
        return paged_attention(**arguments, statistics=statistics, implementation=implementation)

    return Case(name, implementation, call, arguments, read, quick)
