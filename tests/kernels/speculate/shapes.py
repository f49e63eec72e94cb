"""Speculation at the shapes of real models, with InfiniGen's 0.3 of the head dim and a fifth of the context as the limit."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
from kvjax.kernels.dispatch import Name
from kvjax.kernels.speculate import speculate

from tests.kernels import shapes
from tests.kernels.shapes import Case, Geometry, array

SIZES = ((1, 8192), (32, 2048), (32, 8192), (256, 2048), (1, 131072))  # rows, context


def cases() -> Iterator[Case]:
    """Every size of the large models, every head dim, another share of it, other types."""
    for geometry in (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B, shapes.QWEN3_8B):
        for batch, context in SIZES:
            quick = geometry is shapes.LLAMA_3_8B and (batch, context) == (32, 8192)
            yield _case("mosaic_gpu", geometry, batch, context, quick=quick)
    for geometry in (shapes.LLAMA_3_2_1B, shapes.OPT_2_7B, shapes.PHI_3_MINI, shapes.GEMMA_2B):
        yield _case("mosaic_gpu", geometry, 32, 2048)
    yield _case("mosaic_gpu", shapes.LLAMA_3_8B, 32, 2048, partial=0.5)
    yield _case("mosaic_gpu", shapes.LLAMA_3_8B, 32, 2048, dtype=jnp.float32)
    yield _case("mosaic_gpu", shapes.LLAMA_3_8B, 32, 2048, dtype=jnp.float16)
    yield _case("xla", shapes.LLAMA_3_8B, 32, 2048)


def _case(
    implementation: Name, geometry: Geometry, batch: int, context: int, partial: float = 0.3, dtype=jnp.bfloat16, quick: bool = False
) -> Case:
    heads, group, dim = geometry.kv_heads, geometry.heads // geometry.kv_heads, int(geometry.head_dim * partial)
    keys = array((batch, heads, dim, context), dtype)
    arguments = array((batch, heads, group, dim), dtype), keys, array((batch, 1, context), jnp.bool_), array((batch,), jnp.int32)
    kind = "" if dtype == jnp.bfloat16 else f" {jnp.dtype(dtype).name}"

    def call(arguments):
        return speculate(*arguments, alpha=4.0, limit=context // 5, implementation=implementation)

    name = f"{geometry.name} b{batch} c{context} d{dim}{kind}"
    logits = 3 * 4 * batch * heads * context  # read to count, and in and out of a sort
    return Case(name, implementation, call, arguments, math.prod(keys.shape) * jnp.dtype(dtype).itemsize + logits, quick)
