"""Attention sinks and a sliding window (StreamingLLM, arXiv:2309.17453), at true positions."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.cache.policies.base import PROTECTED, Amount, Policy, Slots, check_amount, tokens
from kvjax.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Streaming(Policy):
    """Keeps the first `sinks` tokens and the last `window` tokens.

    The paper re-numbers positions inside the cache; kvjax keeps the true ones, so that strategies differ in what they keep and in nothing
    else.
    """

    sinks: Amount = 4
    window: Amount = 0.2

    per_head = False

    def __post_init__(self):
        check_amount("streaming", "sinks", self.sinks)
        check_amount("streaming", "window", self.window)
        if not self.window:
            raise SpecError("streaming: window=0 would drop every new token; give a window of at least 1 token")

    def budget(self, prompt_length: Any) -> Any:
        return tokens(self.sinks, prompt_length) + tokens(self.window, prompt_length)

    def with_budget(self, amount: Amount) -> "Streaming":
        if isinstance(amount, int):
            if amount <= self.sinks:
                raise SpecError(f"streaming: a budget of {amount} leaves no window beside sinks={self.sinks}; give more")
            return dataclasses.replace(self, window=amount - self.sinks)
        return dataclasses.replace(self, window=amount)

    def priority(self, slots: Slots):
        sink = slots.position < tokens(self.sinks, slots.prompt_length)
        return jnp.where(sink, PROTECTED, slots.position.astype(jnp.float32))
