"""The steps a decoder can take (kvjax.models.decoder.Step): what one call does with the KV state."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import causal_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """One whole sequence without a cache: training, and the reference for everything else. The KV state is None.

    Attributes:
      token_positions: true position of every token.
    """

    token_positions: Int[Array, "B S"]

    def positions(self, kv: None, num_tokens: int) -> Int[Array, "B S"]:
        return self.token_positions

    def attend(self, layer, q, k, v, kv: None):
        with jax.named_scope("attend"):
            # Keeping the scores for the backward pass is faster until they outgrow the caches.
            attention = causal_attention if q.shape[1] <= 512 else jax.checkpoint(causal_attention)
            return attention(q, k, v), kv

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        return x

    def finish(self, kv: None, num_tokens: int) -> None:
        return kv
