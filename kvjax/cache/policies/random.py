"""Eviction at random: what any other rule has to beat."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from kvjax.cache.policies.base import Amount, Policy, Slots, check_amount, tokens
from kvjax.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """Keeps `budget` tokens of the prompt, drawn at random by every kv head; each new token then takes the place of one drawn likewise.

    The newest token stays until the next one comes. What is drawn depends on the seed, the kv head and the positions alone, so that a row
    keeps the same tokens whatever it is served with.

    Attributes:
      budget: tokens, or a fraction of the prompt.
      seed: of what is drawn.
    """

    budget: Amount = 0.2
    seed: int = dataclasses.field(default=0, metadata=dict(switch=True))

    def __post_init__(self):
        check_amount("random", "budget", self.budget)
        if not self.budget:
            raise SpecError("random: budget=0 keeps nothing; give at least 1 token, for example random(budget=0.2)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise SpecError(f"random: seed={self.seed!r} is not a whole number from 0 that fits 32 bits")

    def kept_tokens(self, prompt_length: Any) -> Any:
        return tokens(self.budget, prompt_length)

    def with_budget(self, amount: Amount) -> "Random":
        return dataclasses.replace(self, budget=amount)

    def total_budget(self) -> Amount:
        return self.budget

    def priority(self, slots: Slots) -> Float[Array, "B h C"]:
        head = jnp.arange(slots.position.shape[1], dtype=jnp.uint32)[:, None]
        drawn = _mixed(jnp.uint32(self.seed) ^ jnp.uint32(0x9E3779B9))  # first, so that no seed is another one's head
        for what in (head, slots.length.astype(jnp.uint32), slots.position.astype(jnp.uint32)):
            drawn = _mixed(drawn ^ what)
        newest = slots.position == slots.length - 1
        return jnp.where(newest, jnp.inf, (drawn >> 8).astype(jnp.float32))


def _mixed(x: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """A permutation of the 32-bit numbers that looks like chance (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
