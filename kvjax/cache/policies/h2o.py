"""Heavy-hitter oracle (H2O, arXiv:2306.14048): keep the recent tokens and those that attention has dwelt on."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from kvjax.cache.policies.base import PROTECTED, Amount, Policy, Slots, TopMass, check_amount, halves, tokens, total
from kvjax.errors import SpecError
from kvjax.kernels.attention import Observe

GroupReduction = Literal["sum", "first", "max"]


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Keeps the last `recent` tokens and, of the older ones, the `heavy` with the largest accumulated attention.

    A token's score is the sum, in float32, of the attention probability it received from every query since it was stored (section 4 of
    the paper; a sum and not a mean, which the paper tried and found worse). The score of an evicted token is gone with it.

    Attributes:
      heavy, recent: tokens, or fractions of the prompt; the paper's setting is 0.1 and 0.1.
      decode: evict during decoding too (the paper). False compresses the prompt once and then keeps every generated token, which is what
        many reimplementations measure.
      group: how the query heads of one kv head are joined, which the paper, being about multi-head attention, leaves open: their sum, the
        first one alone, or per query the largest.
    """

    heavy: Amount = 0.1
    recent: Amount = 0.1
    decode: bool = True
    group: GroupReduction = "sum"

    def __post_init__(self):
        check_amount("h2o", "heavy", self.heavy)
        check_amount("h2o", "recent", self.recent)
        if not self.heavy and not self.recent:
            raise SpecError("h2o: heavy=0 and recent=0 keep nothing; give at least one of them, for example h2o(heavy=0.1,recent=0.1)")
        if not isinstance(self.decode, bool):
            raise SpecError(f"h2o: decode={self.decode!r} is not True or False")
        if self.group not in get_args(GroupReduction):
            raise SpecError(f"h2o: group={self.group!r} does not exist; choose from {', '.join(get_args(GroupReduction))}")

    @property
    def evicts_in_decode(self) -> bool:
        return self.decode

    def kept_tokens(self, prompt_length: Any) -> Any:
        return tokens(self.heavy, prompt_length) + tokens(self.recent, prompt_length)

    def with_budget(self, amount: Amount) -> "H2O":
        """Half of it heavy, half recent, as in the paper."""
        heavy, recent = halves(amount)
        return dataclasses.replace(self, heavy=heavy, recent=recent)

    def total_budget(self) -> Amount | None:
        return total(self.heavy, self.recent)

    @property
    def observes(self) -> Observe:
        return Observe(group=self.group)

    @property
    def rule(self) -> TopMass | None:
        return TopMass(self.recent) if self.decode and self.group == "sum" else None

    def priority(self, slots: Slots):
        is_recent = slots.position >= slots.length - tokens(self.recent, slots.prompt_length)
        return jnp.where(is_recent, PROTECTED, slots.own)
