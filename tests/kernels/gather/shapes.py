"""Gathering at the shapes of real models: the tokens InfiniGen selects, keys and values in one row, and pages moved between rows."""

import math
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
from kvjax.kernels.gather import gather_pages, gather_tokens

from tests.kernels import shapes
from tests.kernels.shapes import Case, array

SIZES = ((1, 131072, 2048), (32, 8192, 512), (256, 2048, 256))  # rows, context, tokens selected


def cases() -> Iterator[Case]:
    for implementation in ("mosaic_gpu", "xla"):
        on_gpu = implementation == "mosaic_gpu"
        for geometry in (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B, shapes.QWEN3_8B) if on_gpu else (shapes.LLAMA_3_8B,):
            for batch, context, selected in SIZES:
                pool = array((batch, geometry.kv_heads, context, 2 * geometry.head_dim), jnp.bfloat16)
                slots = array((batch, geometry.kv_heads, selected), jnp.int32)
                quick = geometry is shapes.LLAMA_3_8B and batch == 32
                name = f"{geometry.name} b{batch} c{context} {selected} tokens"
                call = partial(_call, gather_tokens, implementation)
                yield Case(name, implementation, call, (pool, slots), math.prod(slots.shape) * pool.shape[-1] * 2, quick)
        for page_size in (16, 128):
            pages = array((4096, shapes.LLAMA_3_8B.kv_heads, page_size, shapes.LLAMA_3_8B.head_dim), jnp.bfloat16)
            numbers = array((32, 64), jnp.int32)
            name = f"{shapes.LLAMA_3_8B.name} 2048 pages z{page_size}"
            read = math.prod(numbers.shape) * math.prod(pages.shape[1:]) * 2
            yield Case(name, implementation, partial(_call, gather_pages, implementation), (pages, numbers), read, page_size == 16)


def _call(function, implementation, arguments):
    return function(*arguments, implementation=implementation)
