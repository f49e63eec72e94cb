"""H2O's evict-and-write at the shapes of real models: the slots of a tenth heavy and a tenth recent, rounded up to the kernel's 128."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from .. import shapes
from ..dispatch import Name
from ..shapes import Case, Geometry
from .api import h2o_evict
from .base import Attention, H2OCache, Token

array: Any = shapes.array  # what it makes stands for arrays

SIZES = ((1, 8192), (32, 2048), (32, 8192), (256, 2048), (1, 131072))  # rows, context


def cases() -> Iterator[Case]:
    """Every size of the large models, every head dim, every mode; dense and in pages."""
    for geometry in (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B, shapes.QWEN3_8B):
        for batch, context in SIZES:
            quick = geometry is shapes.LLAMA_3_8B and (batch, context) == (32, 8192)
            yield _case("mosaic_gpu", geometry, batch, context, quick=quick)
    for geometry in (shapes.LLAMA_3_2_1B, shapes.OPT_2_7B, shapes.PHI_3_MINI, shapes.GEMMA_2B):
        yield _case("mosaic_gpu", geometry, 32, 2048)
    for mode in ("evict", "write"):
        yield _case("mosaic_gpu", shapes.LLAMA_3_8B, 32, 8192, mode)
    yield _case("mosaic_gpu", shapes.LLAMA_3_8B, 32, 8192, page_size=64)
    yield _case("xla", shapes.LLAMA_3_8B, 32, 2048, quick=True)


def _case(
    implementation: Name, geometry: Geometry, batch: int, context: int, mode: str = "evict and write", page_size: int | None = None,
    quick: bool = False,
) -> Case:  # fmt: skip
    capacity = -(-(context // 5 + 1) // 128) * 128
    size = page_size or capacity
    heads, group, dim = geometry.kv_heads, geometry.heads // geometry.kv_heads, geometry.head_dim
    slots = (batch, heads, capacity)
    pool, row = array((batch * capacity // size, heads, size, dim), jnp.bfloat16), array((batch,), jnp.int32)
    token, logits = array((batch, heads, dim), jnp.bfloat16), array((batch, heads, group, capacity), jnp.float32)
    cache = H2OCache(pool, pool, array((batch, capacity // size), jnp.int32), array(slots, jnp.int32), array(slots, jnp.float32))
    attention = None if mode == "write" else Attention(logits, array((batch, heads, group), jnp.float32))
    new = None if mode == "evict" else Token(token, token)
    name = (
        f"{geometry.name} b{batch} c{capacity}"
        + (f" z{page_size}" if page_size else "")
        + ("" if mode == "evict and write" else f" {mode}")
    )

    def call(arguments):
        return h2o_evict(*arguments, implementation=implementation)

    return Case(name, implementation, call, (cache, attention, new, row, row, row, array((batch,), jnp.bool_)), read(slots, group), quick)


def read(slots: tuple[int, ...], group: int) -> int:
    """Bytes of logits, positions and scores."""
    return math.prod(slots) * 4 * (group + 2)
