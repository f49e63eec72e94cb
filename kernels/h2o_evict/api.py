"""The public function, and which implementations it has."""

import jax

from ..dispatch import Implementation, Name, Operation
from ..paged_attention import Statistics
from . import mosaic_gpu, xla

OPERATION = Operation(
    "h2o_evict",
    (Implementation("mosaic_gpu", mosaic_gpu.h2o_evict, mosaic_gpu.supports), Implementation("xla", xla.h2o_evict)),
)


def h2o_evict(
    position: jax.Array,
    score: jax.Array,
    statistics: Statistics,
    length: jax.Array,
    budget: jax.Array,
    recent: jax.Array,
    active: jax.Array,
    *,
    implementation: Name | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accounts for a decode step's attention and evicts a token where there is one too many (H2O, arXiv:2306.14048, section 4).

    For every active row and kv head, as a loop:

        score[c] += sum over g of exp(logits[g, c] - lse[g])                          for every slot c with a token
        if more than `budget` slots have a token:
            slot = the token of lowest score among those before position length - recent; between equals, the one of highest position
            position[slot] = -1
        else:
            slot = the lowest slot without a token, C if there is none

    Dims: B rows, Hkv kv heads, G query heads a kv head, C slots of a row.

    Args:
      position: int32 [B, Hkv, C], true position of the token in each slot, -1 where there is none. Donate it, or it is copied first.
      score: float32 [B, Hkv, C], the attention probability that the token has received so far, summed over queries; what it is where there
        is no token does not matter. Likewise.
      statistics: what the step's `paged_attention` saw; its logits where a slot has no token do not matter.
      length: int [B], tokens seen.
      budget, recent: int [B], tokens a kv head of this row may hold; of them protected, because they are the last.
      active: bool [B]; the other rows stay as they are.
      implementation: forces one.

    Returns:
      Positions, scores, and `slot`, int32 [B, Hkv]: where the next token goes (for rows that are not active it is not defined).

    Raises:
      ValueError: shapes that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.
    """
    slots, logits, lse = position.shape, statistics.logits, statistics.lse
    if len(slots) != 3 or score.shape != slots:
        raise ValueError(f"h2o_evict: positions and scores are [B, Hkv, C], both; got {slots} and {score.shape}")
    if logits.ndim != 4 or logits.shape[:2] + logits.shape[3:] != slots or lse.shape != logits.shape[:3]:
        raise ValueError(f"h2o_evict: logits {logits.shape} and lse {lse.shape} are not of the {slots} slots")
    if any(x.shape != slots[:1] for x in (length, budget, recent, active)):
        raise ValueError(f"h2o_evict: length, budget, recent and active are one each for {slots[0]} rows")
    with jax.named_scope("h2o_evict"):
        return OPERATION(position, score, statistics, length, budget, recent, active, implementation=implementation)
