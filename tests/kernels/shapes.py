"""Real shapes to compile kernels at (experiments/aot.py): every operation's folder here lists its own in `shapes.py`, `cases()`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from kvjax.kernels.dispatch import Name


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The attention of a model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


OPT_6_7B = Geometry("opt-6.7b", 32, 32, 128)
OPT_13B = Geometry("opt-13b", 40, 40, 128)
LLAMA_3_8B = Geometry("llama-3-8b", 32, 8, 128)
QWEN3_8B = Geometry("qwen3-8b", 32, 8, 128)
OPT_2_7B = Geometry("opt-2.7b", 32, 32, 80)
LLAMA_3_2_1B = Geometry("llama-3.2-1b", 32, 8, 64)
PHI_3_MINI = Geometry("phi-3-mini", 32, 32, 96)
GEMMA_2B = Geometry("gemma-2b", 8, 1, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to compile.

    Attributes:
      name: what is particular about it, such as "llama-3-8b b32 c8192 z64 statistics".
      implementation: which one; "mosaic_gpu" is compiled for GPUs, "mosaic_tpu" for TPUs, "xla" for both.
      call: a function of one pytree of arrays.
      arguments: that pytree, of ShapeDtypeStructs.
      read: bytes of keys and values the call has to read; what it may at most copy is far less.
      quick: part of the short list.
    """

    name: str
    implementation: Name
    call: Callable[[Any], Any]
    arguments: Any
    read: int
    quick: bool = False


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
