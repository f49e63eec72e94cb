"""Exact top-k attention: keeps everything, reads the tokens that matter most right now. The upper bound for any selection."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.policies.base import Amount, Policy, Selection, check_amount, tokens
from kvjax.errors import SpecError
from kvjax.kernels.attention import NEG_INF


@dataclasses.dataclass(frozen=True)
class OracleTopK(Policy):
    """Every decode step reads, per kv head, the `k` tokens with the largest true attention probability (summed over the query heads).

    It saves no memory and, since it must look at every key to choose, little traffic: it tells what a budget of k could do at best.
    """

    k: Amount = 0.2

    name = "oracle_topk"
    selects = "keys"

    def __post_init__(self):
        check_amount("oracle_topk", "k", self.k)
        if not self.k:
            raise SpecError("oracle_topk: k=0 reads nothing; give at least 1 token")

    def with_budget(self, amount: Amount) -> "OracleTopK":
        return dataclasses.replace(self, k=amount)

    def total_budget(self) -> Amount:
        return self.k

    def most_read(self, prompt_length: int, held: int) -> int:
        return min(tokens(self.k, prompt_length), held)

    def before_reading(self) -> "OracleTopK":
        return OracleTopK()

    def choose(
        self, logits: Float[Array, "B Hkv G C"], position: Int[Array, "B h C"], length: Int[Array, " B"], prompt_length: Int[Array, " B"]
    ) -> Selection:
        mass = jax.nn.softmax(jnp.where((position >= 0)[:, :, None], logits, NEG_INF), axis=-1).sum(-2)
        capacity = mass.shape[-1]
        _, slot = jax.lax.top_k(mass, min(tokens(self.k, capacity), capacity))
        return Selection(slot.astype(jnp.int32), tokens(self.k, prompt_length))
