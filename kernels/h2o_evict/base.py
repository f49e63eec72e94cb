"""What H2O's eviction works on. Dims: B rows, Hkv kv heads, G query heads a kv head, C slots of a row, P pages of Z slots, T pages of a
row (C = T * Z), D head dim."""

import dataclasses
from typing import NamedTuple

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class H2OCache:
    """One layer's slots. A slot holds, for each kv head, any one token.

    Attributes:
      k_pages, v_pages: [P, Hkv, Z, D], of one type; keys rotated. Dense storage [B, Hkv, C, D] has one page a row.
      block_tables: int32 [B, T], which pages are a row's, in the order of its slots. Entries of slots that are not used may be any number.
      position: int32 [B, Hkv, C], true position of the token in each slot, -1 where there is none.
      score: float32 [B, Hkv, C], the attention probability that the token has received so far, summed over queries. What it is where there
        is no token does not matter.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    block_tables: jax.Array
    position: jax.Array
    score: jax.Array


class Attention(NamedTuple):
    """What a decode step's attention leaves behind for the scores, as `paged_attention.Statistics` does.

    Attributes:
      logits: float32 [B, Hkv, G, C], scaled; what they are where a slot has no token does not matter.
      lse: float32 [B, Hkv, G], their log-sum-exp over the slots with a token; +inf: this row has no attention to account for.
    """

    logits: jax.Array
    lse: jax.Array


class Token(NamedTuple):
    """The token to write: a key (rotated) and a value for every row and kv head, [B, Hkv, D]; cast to the type of the pages."""

    k: jax.Array
    v: jax.Array


def check(cache: H2OCache, attention: Attention | None, token: Token | None) -> None:
    """Raises ValueError where shapes do not fit together."""
    _, heads, size, dim = cache.k_pages.shape
    batch, count = cache.block_tables.shape
    slots = (batch, heads, count * size)
    if cache.v_pages.shape != cache.k_pages.shape or cache.v_pages.dtype != cache.k_pages.dtype:
        raise ValueError(f"h2o_evict: keys {cache.k_pages.shape} {cache.k_pages.dtype} and values {cache.v_pages.shape} differ")
    if cache.position.shape != slots or cache.score.shape != slots:
        raise ValueError(f"h2o_evict: position {cache.position.shape} and score {cache.score.shape} are not of the {slots} slots")
    if attention is not None and (
        attention.logits.shape[:2] + attention.logits.shape[3:] != slots or attention.lse.shape != attention.logits.shape[:3]
    ):
        raise ValueError(f"h2o_evict: logits {attention.logits.shape} and lse {attention.lse.shape} are not of the {slots} slots")
    if token is not None and not token.k.shape == token.v.shape == (batch, heads, dim):
        raise ValueError(f"h2o_evict: k {token.k.shape} and v {token.v.shape} are not {(batch, heads, dim)}")
    if attention is None and token is None:
        raise ValueError("h2o_evict: neither attention to account for nor a token to write: nothing to do")
