"""The public function, and which implementations it has."""

import jax

from ..dispatch import Implementation, Name, Operation
from . import mosaic_gpu, xla
from .base import Attention, H2OCache, Token, check

OPERATION = Operation(
    "h2o_evict",
    (Implementation("mosaic_gpu", mosaic_gpu.h2o_evict, mosaic_gpu.supports), Implementation("xla", xla.h2o_evict)),
)


def h2o_evict(
    cache: H2OCache,
    attention: Attention | None,
    token: Token | None,
    length: jax.Array,
    budget: jax.Array,
    recent: jax.Array,
    active: jax.Array,
    *,
    implementation: Name | None = None,
) -> tuple[H2OCache, jax.Array]:
    """Accounts for a decode step's attention, evicts down to the budget and writes the next token (H2O, arXiv:2306.14048, section 4).

    For every active row and kv head, as a loop:

        score[c] += sum over g of exp(logits[g, c] - lse[g])                          for every slot c with a token
        if more than `budget` slots have a token:
            slot = the token of lowest score among those before position length - recent; between equals, the one of highest position
        else:
            slot = the lowest slot without a token, C if there is none
        key[slot], value[slot], position[slot], score[slot] = k, v, length, 0       not for slot C

    With `token=None` the last line is `position[slot] = -1` if the row was over its budget: the slot is free, and the next to be written.
    With `attention=None` the first line is left out. So a decode step is either `write, attend, evict` in three launches, or `evict and
    write, attend` in two, where the evict is that of the step before and its logits live until then; both keep the same tokens.

    Args:
      cache: donate it, or it is copied first.
      attention, token: see above; at least one of them.
      length: int [B], tokens seen, which is the position of the token to write.
      budget, recent: int [B], tokens a kv head of this row may hold; of them protected, because they are the last.
      active: bool [B]; the other rows stay as they are.
      implementation: forces one.

    Returns:
      The cache, and `slot`, int32 [B, Hkv] (what it is for rows that are not active is not defined).

    Raises:
      ValueError: shapes that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.
    """
    check(cache, attention, token)
    with jax.named_scope("h2o_evict"):
        return OPERATION(cache, attention, token, length, budget, recent, active, implementation=implementation)
