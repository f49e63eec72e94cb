"""Exact top-k attention: keeps everything, reads the tokens that matter most right now. The upper bound for any selection."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.policies.base import Amount, Policy, check_amount, tokens
from kvjax.errors import SpecError


@dataclasses.dataclass(frozen=True)
class OracleTopK(Policy):
    """Every decode step reads, per kv head, the `k` tokens with the largest true attention probability (summed over the query heads).

    It saves no memory and, since it must look at every key to choose, little traffic: it tells what a budget of k could do at best.
    """

    k: Amount = 0.2

    name = "oracle_topk"

    def __post_init__(self):
        check_amount("oracle_topk", "k", self.k)
        if not self.k:
            raise SpecError("oracle_topk: k=0 reads nothing; give at least 1 token")

    def with_budget(self, amount: Amount) -> "OracleTopK":
        return dataclasses.replace(self, k=amount)

    def total_budget(self) -> Amount:
        return self.k

    def readable(self, logits: Float[Array, "B Hkv G C"], prompt_length: Int[Array, " B"]) -> Bool[Array, "B Hkv 1 C"]:
        mass = jax.nn.softmax(logits, axis=-1).sum(-2)
        slots = jnp.broadcast_to(jnp.arange(mass.shape[-1]), mass.shape)
        _, by_rank = jax.lax.sort((-mass, slots), num_keys=1, is_stable=True)
        rank = jnp.argsort(by_rank, axis=-1)
        return (rank < tokens(self.k, prompt_length)[:, None, None])[:, :, None]
