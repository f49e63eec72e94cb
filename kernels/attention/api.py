"""Attention, in one operation: prompts and chunks of them, decode steps, pages and staged blocks, with what policies want to know of it."""

from collections.abc import Sequence
from typing import Any

import jax

from ..dispatch import Implementation, Name, Operation
from . import mosaic, xla, xla_cpu
from .base import Attended, Keys, Mask, Observe

OPERATION = Operation(
    "attention",
    (
        Implementation("mosaic_gpu", mosaic.attention, mosaic.supports),
        Implementation("mosaic_tpu", mosaic.attention, mosaic.supports),
        Implementation("xla_cpu", xla_cpu.attention, xla_cpu.supports),
        Implementation("xla", xla.attention),
    ),
)


CAUSAL = Mask()
"""Over the tokens of the call itself, each one at its place."""


def attention(
    q: jax.Array,
    keys: Keys,
    mask: Mask = CAUSAL,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    observe: Sequence[Observe] = (),
    residuals: bool = False,
    implementation: Name | None = None,
) -> Attended:
    """softmax(scale q k^T) v over the keys that a query sees, softmax and sums in float32.

    Args:
      q: [B, S, H, D], unscaled; query head h reads kv head h // G. One query per row is a decode step.
      keys: where keys and values lie. What stands in slots that nobody sees does not matter as a key; a value there must be finite in
        layout `columns`.
      mask: which keys a query sees; the default is causal over q's own tokens.
      scale: of the logits; None: D ** -0.5.
      softcap: logits are bent to at most that; None: not.
      sinks: float32 [H], one logit a head that takes its share of every softmax and gives nothing (gpt-oss); None: none.
      observe: statistics of attention per key, at the cost of one more pass over probabilities.
      residuals: give the logits of a decode step, too.
      implementation: forces one of "mosaic_gpu", "mosaic_tpu", "xla_cpu", "xla".

    Raises:
      ValueError: shapes that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.
    """
    if q.ndim != 4 or q.shape[2] % keys.heads:
        raise ValueError(f"attention: queries [B, S, H, D] with H a multiple of {keys.heads} kv heads; got {q.shape}")
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    options: dict[str, Any] = dict(residuals=True) if residuals else {}
    return OPERATION(q, keys, mask, factor, softcap, sinks, tuple(observe), implementation=implementation, **options)


def scores(q: jax.Array, keys: Keys, *, scale: float | None = None) -> jax.Array:
    """Scaled logits of one query per row [B, 1, H, D] against every slot of its row, seen or not: float32 [B, Hkv, G, C]."""
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    columns = keys.layout == "columns" or (keys.layout == "rows" and keys.table is None)
    return (xla_cpu if columns else xla).scores(q, keys, factor)


__all__ = ["OPERATION", "attention", "scores"]
