"""The steps a decoder can take (kvjax.models.decoder.Step): what one call does with the KV state."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.state import KVState
from kvjax.cache.store import Store
from kvjax.cache.strategy import Strategy, append
from kvjax.cache.tiers import Ahead
from kvjax.kernels.attention import Mask, Observe, attention, tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """One whole sequence without a cache: training, and the reference for everything else. The KV state is None.

    Attributes:
      token_positions: true position of every token; they ascend.
      blocked: attend to a block of queries at a time and recompute it in the backward pass, for long rows (static).
    """

    token_positions: Int[Array, "B S"]
    blocked: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def positions(self, kv: None, num_tokens: int) -> Int[Array, "B S"]:
        return self.token_positions

    def look_ahead(self, layer: int, queries, kv: None) -> None:
        return None

    def attend(self, layer, q, k, v, kv: None, guide=None, ahead=None):
        with jax.named_scope("attend"):
            if not self.blocked:
                return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"), kv
            return jax.checkpoint(lambda q, k, v: attention(q, tokens(k, v), Mask()).out)(q, k, v), kv

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        return x

    def finish(self, kv: None, num_tokens: int) -> None:
        return kv


def contained(k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"]) -> tuple[Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]:
    """Keys and values without a value that is not finite, so that nothing of a request that went wrong stays where it has been.

    Attention takes other requests' leftovers in, at a weight of zero, which removes everything but infinity and NaN. Keys are masked
    instead and may be anything: a token whose value is not finite gets a key of NaN, and who does attend to it is told.
    """
    finite = jnp.isfinite(v).all(-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """What all ways to put a prompt in have in common. Logits come for each row's last valid token only.

    Attributes:
      num_valid: tokens of this call that are part of the row's prompt; the rest is padding on the right.
      first: the cache is empty (static).
      context: no row is longer than this after the call (static; None: no bound).
      shared: rows of others stand in the same pool, so that values are `contained` (static).
    """

    num_valid: Int[Array, " B"]
    first: bool = dataclasses.field(default=True, metadata=dict(static=True), kw_only=True)
    context: int | None = dataclasses.field(default=None, metadata=dict(static=True), kw_only=True)
    shared: bool = dataclasses.field(default=False, metadata=dict(static=True), kw_only=True)

    def positions(self, kv: KVState, num_tokens: int) -> Int[Array, "B S"]:
        return kv.length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

    def look_ahead(self, layer: int, queries, kv: KVState) -> None:
        return None

    def attend(self, layer: int, q, k, v, kv: KVState, guide=None, ahead=None):
        valid = jnp.arange(q.shape[1]) < self.num_valid[:, None]
        k, v = contained(k, v) if self.shared else (k, v)
        with jax.named_scope("prefill"):
            out, state = self._keep(kv.layer(layer), q, k, v, kv, valid, guide)
        return out, kv.with_layer(layer, state)

    def _keep(self, layer, q, k, v, kv: KVState, valid, guide):
        raise NotImplementedError

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B 1 M"]:
        return jnp.take_along_axis(x, jnp.maximum(self.num_valid - 1, 0)[:, None, None], axis=1)

    def finish(self, kv: KVState, num_tokens: int) -> KVState:
        return dataclasses.replace(kv, length=kv.length + self.num_valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill(_Prompt):
    """A prompt, or the next chunk of it, of which a strategy (static) keeps what it keeps."""

    strategy: Strategy = dataclasses.field(metadata=dict(static=True))

    def _keep(self, layer, q, k, v, kv: KVState, valid, guide):
        return self.strategy.prefill(layer, q, k, v, kv, valid, self.first, self.context, guide)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage(_Prompt):
    """A prompt, or the next chunk of it, that is kept whole for `Strategy.commit` (kvjax.cache.strategy.stage allocates).

    Attributes:
      store: where it stands, a Store.staging (static).
      observes: what attention is to show of every token (static).
    """

    store: Store = dataclasses.field(metadata=dict(static=True))
    observes: tuple[Observe, ...] = dataclasses.field(metadata=dict(static=True))

    def _keep(self, layer, q, k, v, kv: KVState, valid, guide):
        return append(self.store, self.observes, layer, q, k, v, kv, valid, self.first, self.context)[:2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token per row.

    Attributes:
      active: rows that take part; the others, their cache included, stay as they are.
      strategy: what attends and keeps (static).
      shared: rows of others stand in the same pool, so that values are `contained` (static).
    """

    active: Bool[Array, " B"]
    strategy: Strategy = dataclasses.field(metadata=dict(static=True))
    shared: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def positions(self, kv: KVState, num_tokens: int) -> Int[Array, "B 1"]:
        return kv.length[:, None]

    def look_ahead(self, layer: int, queries, kv: KVState) -> Ahead | None:
        with jax.named_scope("decode"):
            return self.strategy.look_ahead(layer, queries, kv, self.active)

    def attend(self, layer: int, q, k, v, kv: KVState, guide=None, ahead: Ahead | None = None):
        """Reads what `kv.ahead` says; `ahead` is for the next layer, and takes its place."""
        k, v = contained(k, v) if self.shared else (k, v)
        with jax.named_scope("decode"):
            out, state = self.strategy.decode(kv.layer(layer), q, k, v, kv, self.active, guide)
        return out, dataclasses.replace(kv.with_layer(layer, state), ahead=ahead)

    def hidden(self, x: Float[Array, "B 1 M"]) -> Float[Array, "B 1 M"]:
        return x

    def finish(self, kv: KVState, num_tokens: int) -> KVState:
        return dataclasses.replace(kv, length=kv.length + self.active)
