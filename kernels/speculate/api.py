"""The public function, and which implementations it has."""

import jax

from ..dispatch import Implementation, Name, Operation
from . import mosaic_gpu, xla
from .base import GroupJoin, Speculation, check

OPERATION = Operation(
    "speculate",
    (Implementation("mosaic_gpu", mosaic_gpu.speculate, mosaic_gpu.supports), Implementation("xla", xla.speculate)),
)


def speculate(
    q: jax.Array,
    partial_keys: jax.Array,
    visible: jax.Array,
    cap: jax.Array,
    always: jax.Array | None = None,
    *,
    alpha: float,
    limit: int,
    group: GroupJoin = "max",
    implementation: Name | None = None,
) -> Speculation:
    """Guesses which tokens matter from a part of the dims of skewed queries and keys (InfiniGen, OSDI'24, arXiv:2406.19707).

    For every row, as a loop over its kv heads h:

        a[h, c] = max over g of q[h, g] . partial_keys[h, :, c]       for every visible slot c that is not in always[h], in float32
        above[h] = how many a[h, c] > max over c of a[h, c] - alpha
        count = min(floor(mean over h of (above[h] + how many visible slots are in always[h])), cap), at least 1
        index[h] = the first `count` of: the visible slots in always[h], ascending, then the slots of highest a[h]

    The mean over the heads is the paper's: heads fetch different tokens, and equally many. With grouped-query attention, which the paper
    does not have, a token is as important as the query head of its group finds it that wants it most.

    With group="mass", the softmax of each query head over all visible slots is taken first, and

        a[h, c] = log of the mean over g of softmax(q[h, g] . partial_keys[h])[c]
        above[h] = how many a[h, c] > -alpha

    so that heads are joined by the attention they give, and a layer whose attention is spread out reads more than one whose is not.

    Args:
      q: [B, Hkv, G, d'], guessed queries in the partial dims, scaled by 1/sqrt(head dim) as attention's logits are; cast to the type of
        the partial keys.
      partial_keys: [B, Hkv, d', C]; a slot is a column, so that threads that stand side by side on slots read side by side, and a dot
        product needs no sum across threads. Appending a token writes d' numbers C apart: d' sectors of memory a head, where a step reads
        d' * C numbers.
      visible: bool [B, Hkv, C], slots to choose from, or [B, 1, C] for all heads. What the partial keys of the others hold does not
        matter, nor with group="max" what those hold that are always fetched.
      cap: int [B], most tokens to fetch for a kv head of this row; above `limit` it counts as `limit`.
      always: bool, shaped as `visible`, slots that are fetched whatever the guess: attention sinks, whose logits would otherwise set the
        threshold, and the last tokens; None: no slot. The paper has none.
      alpha: how far below the highest logit still matters: 4 keeps what has at least e^-4 of the highest weight. With group="mass" how far
        below all attention: 8 keeps what receives at least e^-8 of it.
      limit: K; static.
      group: how the query heads of a kv head are joined.
      implementation: forces one.

    Raises:
      ValueError: shapes that do not fit together, or a limit that is not between 1 and C.
      UnsupportedError: the implementation asked for cannot run this.
    """
    check(q, partial_keys, visible, cap, always, limit, group)
    with jax.named_scope("speculate"):
        return OPERATION(
            q.astype(partial_keys.dtype), partial_keys, visible, cap, always, alpha, limit, group, implementation=implementation
        )
