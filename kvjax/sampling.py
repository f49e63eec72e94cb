"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import checks
from kvjax.cache.attention import NEG_INF
from kvjax.errors import SpecError

NOT_FINITE = -2
"""What is chosen from logits that are not finite, in place of a token."""

COLDEST, HOTTEST = 1e-5, 1e5
"""Temperatures that float32 can divide logits by."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. The default is greedy.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: only the k most likely tokens; 0: no limit.
      top_p: only the most likely tokens that together reach this probability (Holtzman et al., arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not checks.number("temperature", self.temperature, -math.inf) >= 0:
            raise SpecError(f"temperature={self.temperature} is not a number >= 0; 0 is greedy, 1 samples from the model")
        if self.temperature and not COLDEST <= self.temperature <= HOTTEST:
            raise SpecError(f"temperature={self.temperature:g} is beyond reason; give 0 (greedy), or {COLDEST:g} to {HOTTEST:g}")
        if checks.whole("top_k", self.top_k, -checks.LARGEST) < 0:
            raise SpecError(f"top_k={self.top_k} is negative; 0 means no limit")
        if not 0 < checks.number("top_p", self.top_p, -math.inf) <= 1:
            raise SpecError(f"top_p={self.top_p} is not in (0, 1]; 1 means no limit")
        for name, kind in (("temperature", float), ("top_k", int), ("top_p", float)):  # Python's own: NumPy's would set a dtype
            object.__setattr__(self, name, kind(getattr(self, name)))

    def choose(self, logits: Float[Array, "B V"], seeds: Int[Array, " B"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
        """The next token of every row; a row's draw depends on its seed and position alone, not on its neighbours.

        NOT_FINITE where the logits of a row are not all finite.
        """
        return jnp.where(jnp.isfinite(logits).all(-1), self._chosen(logits, seeds, positions), NOT_FINITE).astype(jnp.int32)

    def _chosen(self, logits: Float[Array, "B V"], seeds: Int[Array, " B"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        if self.top_k:
            kth = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, NEG_INF, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probs = jax.nn.softmax(ordered, axis=-1)
            inside = jnp.cumsum(probs, axis=-1) - probs < self.top_p  # tokens before which top_p is not reached yet
            least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, NEG_INF, logits)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)
        return jax.vmap(jax.random.categorical)(keys, logits)
