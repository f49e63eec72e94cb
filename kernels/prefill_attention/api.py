"""The public functions, and which implementations they have."""

import jax

from ..dispatch import Implementation, Name, Operation
from . import mosaic_gpu, mosaic_tpu, xla
from .base import check, check_lse, scale_of

ATTENTION = Operation(
    "prefill_attention",
    (
        Implementation("mosaic_gpu", mosaic_gpu.prefill_attention, mosaic_gpu.supports_attention),
        Implementation("xla", xla.prefill_attention),
    ),
)
COLUMN_MASS = Operation(
    "column_mass",
    (
        Implementation("mosaic_gpu", mosaic_gpu.column_mass, mosaic_gpu.supports),
        Implementation("mosaic_tpu", mosaic_tpu.column_mass, mosaic_tpu.supports),
        Implementation("xla", xla.column_mass),
    ),
)


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    scale: float | None = None,
    implementation: Name | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of a prompt, or of a chunk of one over what came before it (FlashAttention-2, arXiv:2307.08691).

    Query s of row b stands at position start[b] + s and sees keys 0 to start[b] + s. Scores exist a tile at a time, never all of them.

    Args:
      q: [B, S, H, D], unscaled; query head h reads kv head h // G.
      k, v: [B, K, Hkv, D]; key j stands at position j; what there is beyond start + count does not matter.
      start: int [B], tokens before the chunk.
      count: int [B], queries of a row, which come first; what the others hold does not matter.
      scale: of the logits; None: 1/sqrt(D).
      implementation: forces one.

    Returns:
      The output [B, S, H, D] in the type of q, zero for queries that do not count, and the log-sum-exp of every query's scaled logits,
      float32 [B, H, S], +inf for those, so that exp(logits - lse) is a probability, or zero.

    Raises:
      ValueError: shapes that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.

    `jax.nn.dot_product_attention(implementation="cudnn", return_residual=True)` is not among the implementations: it hands the
    log-sum-exp out in the dtype of q, and bfloat16 rounds what lies between 8 and 16 to sixteenths, which is up to 3 % of a probability.
    Where no statistics are wanted it is what to call.
    """
    check("prefill_attention", q, k, start, count)
    if v.shape != k.shape:
        raise ValueError(f"prefill_attention: keys {k.shape} and values {v.shape} differ in shape")
    with jax.named_scope("prefill_attention"):
        return ATTENTION(q, k, v, start, count, scale_of(q, scale), implementation=implementation)


def column_mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    scale: float | None = None,
    implementation: Name | None = None,
) -> jax.Array:
    """The attention every key receives: the probabilities of all queries and of a kv head's query heads, summed.

        mass[h, j] = sum over g, and over queries s that see key j, of exp(scale * q[s, h, g] . k[j, h] - lse[h, g, s])

    H2O's scores of a prompt (arXiv:2306.14048, section 4), which fused attention does not give away: with the log-sum-exp that it does
    give, one more product of queries and keys, tile by tile, rebuilds the probabilities. A prompt in chunks adds up over them.

    Args:
      lse: float32 [B, H, S], of `prefill_attention` with the same arguments; the rest is as there.

    Returns:
      float32 [B, Hkv, K]; zero for keys beyond start + count.

    Raises:
      ValueError: shapes that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.
    """
    check("column_mass", q, k, start, count)
    check_lse("column_mass", q, lse)
    with jax.named_scope("column_mass"):
        return COLUMN_MASS(q, k, lse, start, count, scale_of(q, scale), implementation=implementation)
