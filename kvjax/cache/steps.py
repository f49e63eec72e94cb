"""The steps a decoder can take (kvjax.models.decoder.Step): what one call does with the KV state."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import causal_attention, prompt_attention
from kvjax.cache.state import KVState
from kvjax.cache.strategy import Strategy, prefill_for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """One whole sequence without a cache: training, and the reference for everything else. The KV state is None.

    Attributes:
      token_positions: true position of every token.
      block: attend to that many queries at a time and recompute them in the backward pass, for long rows (static; None: all at once).
    """

    token_positions: Int[Array, "B S"]
    block: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    def positions(self, kv: None, num_tokens: int) -> Int[Array, "B S"]:
        return self.token_positions

    def look_ahead(self, layer: int, queries, kv: None) -> None:
        return kv

    def attend(self, layer, q, k, v, kv: None, guide=None):
        with jax.named_scope("attend"):
            block = self.block
            if block is None:
                return causal_attention(q, k, v), kv
            every = jnp.ones(q.shape[:2], bool)
            blocked = jax.checkpoint(lambda q, k, v: prompt_attention(q, k, v, every, block=block)[0])
            return blocked(q, k, v), kv

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        return x

    def finish(self, kv: None, num_tokens: int) -> None:
        return kv


class _Prompt:
    """What all ways to put a prompt in have in common. Logits come for each row's last valid token only."""

    num_valid: Int[Array, " B"]

    def positions(self, kv: KVState, num_tokens: int) -> Int[Array, "B S"]:
        return kv.length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

    def look_ahead(self, layer: int, queries, kv: KVState) -> KVState:
        return kv

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B 1 M"]:
        return jnp.take_along_axis(x, jnp.maximum(self.num_valid - 1, 0)[:, None, None], axis=1)

    def finish(self, kv: KVState, num_tokens: int) -> KVState:
        return dataclasses.replace(kv, length=kv.length + self.num_valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill(_Prompt):
    """A prompt, or the next chunk of it, right-padded. Logits come for each row's last valid token only.

    Attributes:
      num_valid: tokens of this call that are part of the row's prompt.
      strategy: what attends and keeps (static).
      first: the cache is empty (static).
      context: no row is longer than this after the call (static; None: no bound).
    """

    num_valid: Int[Array, " B"]
    strategy: Strategy = dataclasses.field(metadata=dict(static=True))
    first: bool = dataclasses.field(default=True, metadata=dict(static=True))
    context: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    def attend(self, layer, q, k, v, kv: KVState, guide=None):
        valid = jnp.arange(q.shape[1]) < self.num_valid[:, None]
        with jax.named_scope("prefill"):
            out, state = self.strategy.prefill(kv.layer(layer), q, k, v, kv, valid, self.first, self.context, guide)
        return out, kv.with_layer(layer, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage(_Prompt):
    """A whole prompt, right-padded, for several strategies at once (kvjax.cache.strategy.stage_for).

    Attributes:
      num_valid: as in Prefill.
      strategies: for which statistics are kept (static).
    """

    num_valid: Int[Array, " B"]
    strategies: tuple[Strategy, ...] = dataclasses.field(metadata=dict(static=True))

    def attend(self, layer, q, k, v, kv: KVState, guide=None):
        valid = jnp.arange(q.shape[1]) < self.num_valid[:, None]
        with jax.named_scope("prefill"):
            out, state = prefill_for(self.strategies, kv.layer(layer), q, k, v, kv, valid)
        return out, kv.with_layer(layer, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token per row.

    Attributes:
      active: rows that take part; the others, their cache included, stay as they are.
      strategy: what attends and keeps (static).
    """

    active: Bool[Array, " B"]
    strategy: Strategy = dataclasses.field(metadata=dict(static=True))

    def positions(self, kv: KVState, num_tokens: int) -> Int[Array, "B 1"]:
        return kv.length[:, None]

    def look_ahead(self, layer: int, queries, kv: KVState) -> KVState:
        with jax.named_scope("decode"):
            return self.strategy.look_ahead(layer, queries, kv, self.active)

    def attend(self, layer, q, k, v, kv: KVState, guide=None):
        with jax.named_scope("decode"):
            out, state = self.strategy.decode(kv.layer(layer), q, k, v, kv, self.active, guide)
        return out, kv.with_layer(layer, state)

    def hidden(self, x: Float[Array, "B 1 M"]) -> Float[Array, "B 1 M"]:
        return x

    def finish(self, kv: KVState, num_tokens: int) -> KVState:
        return dataclasses.replace(kv, length=kv.length + self.active)
