"""Prefill attention and column mass at the shapes of real models: whole prompts, and a chunk of one."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from kvjax.kernels.dispatch import Name
from kvjax.kernels.prefill_attention import column_mass, prefill_attention

from tests.kernels import shapes
from tests.kernels.shapes import Case, Geometry, array

SIZES = ((1, 2048, 2048), (1, 8192, 8192), (32, 2048, 2048), (1, 32768, 32768), (1, 131072, 131072), (8, 512, 32768))
"""Rows, queries, keys."""


def cases() -> Iterator[Case]:
    """Every size of the large models, every head dim a kernel takes."""
    kernels: tuple[tuple[Name, tuple[Any, ...]], ...] = (("mosaic_gpu", (prefill_attention, column_mass)), ("mosaic_tpu", (column_mass,)))
    for implementation, functions in kernels:
        for function in functions:
            for geometry in (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B, shapes.QWEN3_8B):
                for size in SIZES:
                    yield _case(function, implementation, geometry, *size, quick=geometry is shapes.LLAMA_3_8B and size == SIZES[1])
            for geometry in (shapes.LLAMA_3_2_1B, shapes.OPT_2_7B, shapes.PHI_3_MINI, shapes.GEMMA_2B):
                if function is column_mass or geometry.head_dim == 64:
                    yield _case(function, implementation, geometry, *SIZES[0])
        if implementation == "mosaic_gpu":
            yield _case(column_mass, implementation, shapes.LLAMA_3_8B, *SIZES[1], dtype=jnp.float16)
    for function in (prefill_attention, column_mass):
        yield _case(function, "xla", shapes.LLAMA_3_8B, *SIZES[1])


def _case(
    function: Any, implementation: Name, geometry: Geometry, batch: int, queries: int, keys: int, *, dtype: Any = jnp.bfloat16,
    quick: bool = False,
) -> Case:  # fmt: skip
    q = array((batch, queries, geometry.heads, geometry.head_dim), dtype)
    k, row = array((batch, keys, geometry.kv_heads, geometry.head_dim), dtype), array((batch,), jnp.int32)
    arguments: Any = (q, k, k if function is prefill_attention else array((batch, geometry.heads, queries), jnp.float32), row, row)
    kind = "" if dtype == jnp.bfloat16 else f" {jnp.dtype(dtype).name}"

    heads_first = implementation == "mosaic_tpu"  # how its kernel reads them, and how XLA writes them where a model makes them for it
    if heads_first:
        arguments = (*(array((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype) for x in arguments[:2]), *arguments[2:])

    def call(arguments):
        q, k, *rest = arguments
        q, k = (x.swapaxes(1, 2) if heads_first else x for x in (q, k))
        return function(q, k, *rest, implementation=implementation)

    name = f"{function.__name__} {geometry.name} b{batch} {queries}x{keys}{kind}"
    return Case(name, implementation, call, arguments, 2 * math.prod(q.shape) + 4 * math.prod(k.shape), quick)
