"""Decoding with the host at the wheel: layer by layer, with the gather from the host pool in between (`--transfer=driven`).

What InfiniGen's and FlexGen's code do. For every layer two programs are dispatched: a small one that guesses what the next layer wants, and
the layer itself. While the layer runs, the host waits for the guess alone, gathers the rows from a NumPy pool and starts their copy to the
device; that copy is done, or nearly, when the next layer is dispatched. At the end of a step the new tokens go into the pools.

The prompt goes in as with `jit`; the pools become NumPy arrays at the first step.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import Ahead, Decode, KVState, LayerState, Selection, Strategy
from kvjax.cache.pool import Pool
from kvjax.cache.tiers import Rows
from kvjax.models import Decoder, Model
from kvjax.models.decoder import Block, Normalise, guess_queries
from kvjax.runtime.forward import embed, head, layer_variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Driven(Decode):
    """A decode step of one layer: nothing looks ahead in it, and its own token is handed out for the host to store."""

    def look_ahead(self, layer: int, queries, kv: KVState) -> None:
        return None

    def attend(self, layer: int, q, k, v, kv: KVState, guide=None, ahead=None):
        next_slot = kv.layer(layer).next_slot
        slot = kv.length[:, None] if next_slot is None else next_slot
        out, kv = super().attend(layer, q, k, v, kv, guide, None)
        slot = jnp.broadcast_to(slot, (k.shape[0], k.shape[2]))[..., None]
        return out, kv.handed(Ahead(slot, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.zeros(3, jnp.float32)))


def decode(model: Model, strategy: Strategy, kv: KVState, token: Int[Array, " B"], active: Bool[Array, " B"]):
    """One decode step. Takes `kv` over, as a donated argument would be. Returns logits [B, 1, V] and the new state."""
    tier, decoder, policy = strategy.store.tier, model.decoder, strategy.policy
    step, frame = Driven(active, strategy), kv.over(())
    x, rotation = embed(decoder, model.params, token[:, None], frame, step)
    pools = [_writable(layer.pool) for layer in kv.layers]
    layers = [dataclasses.replace(layer, pool=dataclasses.replace(layer.pool, k=(), v=())) for layer in kv.layers]
    length = np.where(np.asarray(active), np.minimum(np.asarray(kv.length), pools[0][0].shape[2]), 0)
    ahead, newest, chosen = tier.fetch_by_host(pools[0], None, length), [], None
    for i in range(len(layers)):
        fetched, by_choice, chosen, following = ahead, chosen is not None, None, i + 1
        weights = layer_variables(model.params, i)
        if following < len(layers) and policy.guesses and policy.selects_by(layers[following].own):
            chosen = _look_ahead(decoder, strategy, weights, x, rotation, layers[following], frame, active)
        x, layers[i], outgoing = _layer(decoder, by_choice, weights, x, rotation, layers[i], fetched, frame, step)
        newest.append(outgoing)
        if following < len(layers):
            ahead = tier.fetch_by_host(pools[following], chosen, length)
    logits, after = head(decoder, model.params, x, frame, step, 1)
    for pool, outgoing in zip(pools, newest, strict=True):
        _append(pool, outgoing, active)
    kept = (
        dataclasses.replace(layer, pool=dataclasses.replace(layer.pool, k=(k,), v=(v,)))  # type: ignore[arg-type]
        for (k, v), layer in zip(pools, layers, strict=True)
    )
    return logits, after.over(tuple(kept))


def _writable(pool: Pool) -> Rows:
    """Keys and values as arrays the host can write."""
    return tuple(x if isinstance(x, np.ndarray) else np.array(x) for x in (pool.k[0], pool.v[0]))  # type: ignore[return-value]


def _append(pool: Rows, newest: Ahead, active: Bool[Array, " B"]) -> None:
    """Puts the step's tokens into the pool."""
    k, v, slot = (np.asarray(x)[:, :, 0] for x in (newest.k, newest.v, newest.slot))
    rows = np.flatnonzero(np.asarray(active))
    heads = np.arange(slot.shape[1])
    inside = np.minimum(slot, pool[0].shape[2] - 1)
    for target, new in zip(pool, (k, v), strict=True):
        target[rows[:, None], heads, inside[rows]] = new[rows]


@partial(jax.jit, static_argnums=(0, 1))
def _look_ahead(decoder: Decoder, strategy: Strategy, weights, x, rotation, following: LayerState, frame: KVState, active) -> Selection:
    """What the next layer wants."""
    config = decoder.config
    with jax.named_scope("select"):
        if config.norm_first:
            x = Normalise(config, decoder.dtype).apply({"params": weights["params"]["attention_norm"]}, x)
        queries = guess_queries(config, weights["guide"]["attention"]["guide"].following, x, rotation)
        return strategy.select(following, queries, frame, active)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _layer(
    decoder: Decoder, by_choice: bool, weights, x, rotation, layer: LayerState, fetched: tuple[Ahead, Any], frame: KVState, step: Driven
) -> tuple[Float[Array, "B 1 M"], LayerState, Ahead]:
    """One layer over what was fetched for it, by choice or all there is. Returns its own token, too."""
    ahead, size = fetched
    batch, heads, _ = ahead.slot.shape
    held, in_use = step.strategy.held(layer, frame, step.active)
    wanted = (ahead.slot < layer.pool.page_size).sum() if by_choice else heads * in_use.sum()
    traffic = jnp.stack([heads * held.sum(), wanted, batch * heads * size]).astype(jnp.float32)
    kv = frame.over((layer,)).handed(dataclasses.replace(ahead, traffic=traffic))
    block: Any = Block(decoder.config, 0, decoder.dtype)
    x, kv = block.apply(weights, x, rotation, kv, step)
    return x, kv.layers[0], kv.ahead
