"""TOVA (arXiv:2401.06104): keep the tokens that the newest query attends to."""

import dataclasses
from typing import Any

from kvjax.cache.policies.base import Amount, Own, Policy, Seen, Slots, check_amount, tokens
from kvjax.errors import SpecError
from kvjax.kernels.attention import Observe


@dataclasses.dataclass(frozen=True)
class TOVA(Policy):
    """Keeps the `budget` tokens with the largest attention of the newest query, averaged over all heads: one set for the whole layer.

    Nothing is protected: the sinks and the newest token stand the same test as all others (section 3.2 of the paper). Of a prompt, its last
    query decides.

    Attributes:
      budget: tokens, or a fraction of the prompt.
    """

    budget: Amount = 0.2

    per_head = False

    def __post_init__(self):
        check_amount("tova", "budget", self.budget)
        if not self.budget:
            raise SpecError("tova: budget=0 keeps nothing; give at least 1 token, for example tova(budget=0.2)")

    @property
    def observes(self) -> Observe:
        return Observe(last=1)

    def kept_tokens(self, prompt_length: Any) -> Any:
        return tokens(self.budget, prompt_length)

    def with_budget(self, amount: Amount) -> "TOVA":
        return dataclasses.replace(self, budget=amount)

    def total_budget(self) -> Amount:
        return self.budget

    def observe(self, own: Own, seen: Seen) -> Own:
        """The attention of the newest query in place of that of the one before."""
        return own if seen.mass is None else seen.mass.sum(1, keepdims=True)

    def priority(self, slots: Slots):
        return slots.own
