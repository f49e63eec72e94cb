"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import NEG_INF
from kvjax.errors import SpecError


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
        if not self.temperature >= 0:
            raise SpecError(f"temperature={self.temperature} is not a number >= 0; 0 is greedy, 1 samples from the model")
        if self.top_k < 0:
            raise SpecError(f"top_k={self.top_k} is negative; 0 means no limit")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p={self.top_p} is not in (0, 1]; 1 means no limit")

    def choose(self, logits: Float[Array, "B V"], seeds: Int[Array, " B"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
        """The next token of every row; a row's draw depends on its seed and position alone, not on its neighbours."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        logits = logits / self.temperature
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
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
