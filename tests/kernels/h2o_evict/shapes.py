"""H2O's eviction at the shapes of real models: the slots of a tenth heavy and a tenth recent, rounded up to the kernel's 128."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from kvjax.kernels.dispatch import Name
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.paged_attention import Statistics

from tests.kernels import shapes
from tests.kernels.shapes import Case, Geometry

array: Any = shapes.array  # what it makes stands for arrays

SIZES = ((1, 8192), (32, 2048), (32, 8192), (256, 2048), (1, 131072))  # rows, context


def cases() -> Iterator[Case]:
    """Every size of models that differ in heads or groups; the head dim does not matter here."""
    for geometry in (shapes.OPT_6_7B, shapes.OPT_13B, shapes.LLAMA_3_8B):
        for batch, context in SIZES:
            quick = geometry is shapes.LLAMA_3_8B and (batch, context) == (32, 8192)
            yield _case("mosaic_gpu", geometry, batch, context, quick=quick)
    yield _case("mosaic_gpu", shapes.GEMMA_2B, 32, 2048)
    yield _case("xla", shapes.LLAMA_3_8B, 32, 2048, quick=True)


def _case(implementation: Name, geometry: Geometry, batch: int, context: int, quick: bool = False) -> Case:
    capacity = -(-(context // 5 + 1) // 128) * 128
    heads, group = geometry.kv_heads, geometry.heads // geometry.kv_heads
    slots = (batch, heads, capacity)
    logits, lse = array((batch, heads, group, capacity), jnp.float32), array((batch, heads, group), jnp.float32)
    row, active = array((batch,), jnp.int32), array((batch,), jnp.bool_)
    arguments = array(slots, jnp.int32), array(slots, jnp.float32), Statistics(logits, lse), row, row, row, active
    read = math.prod(slots) * 4 * (group + 2)  # logits, positions and scores

    def call(arguments):
        return h2o_evict(*arguments, implementation=implementation)

    return Case(f"{geometry.name} b{batch} c{capacity}", implementation, call, arguments, read, quick)
