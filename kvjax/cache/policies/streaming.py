"""Attention sinks and a sliding window (StreamingLLM, arXiv:2309.17453), at true positions."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.cache.policies.base import PROTECTED, Amount, Policy, Slots, check_amount, tokens, total
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

    def kept_tokens(self, prompt_length: Any) -> Any:
        return tokens(self.sinks, prompt_length) + tokens(self.window, prompt_length)

    def with_budget(self, amount: Amount) -> "Streaming":
        """The sinks stay, the window takes the rest; sinks in tokens come on top of a budget that is a fraction."""
        if isinstance(amount, int) and isinstance(self.sinks, float):
            raise SpecError(f"streaming: a budget of {amount} tokens does not go with sinks={self.sinks}; give the sinks in tokens")
        if isinstance(amount, float) and isinstance(self.sinks, int):
            return dataclasses.replace(self, window=amount)
        if amount <= self.sinks:
            raise SpecError(f"streaming: a budget of {amount} leaves no window beside sinks={self.sinks}; give more")
        return dataclasses.replace(self, window=amount - self.sinks if isinstance(amount, int) else round(amount - self.sinks, 9))

    def total_budget(self) -> Amount | None:
        on_top = isinstance(self.window, float) and isinstance(self.sinks, int)
        return self.window if on_top else total(self.sinks, self.window)

    def priority(self, slots: Slots):
        sink = slots.position < tokens(self.sinks, slots.prompt_length)
        return jnp.where(sink, PROTECTED, slots.position.astype(jnp.float32))
