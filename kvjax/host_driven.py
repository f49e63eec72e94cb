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

from kvjax.cache import Decode, HostStore, KVState, LayerState, Strategy
from kvjax.cache.stores.host import HostLayer, Staged
from kvjax.models import Decoder, Model
from kvjax.models.decoder import Block, Normalise, guess_queries
from kvjax.runtime.forward import embed, head, layer_variables


def is_driven(strategy: Strategy) -> bool:
    """Whether the host drives this strategy's decode steps."""
    return isinstance(strategy.store, HostStore) and strategy.store.transfer == "driven"


def decode(model: Model, strategy: Strategy, kv: KVState, token: Int[Array, " B"], active: Bool[Array, " B"]):
    """One decode step. Takes `kv` over, as a donated argument would be. Returns logits [B, 1, V] and the new state."""
    store, decoder = strategy.store, model.decoder
    assert isinstance(store, HostStore)
    step, frame = Decode(active, strategy), kv.over(())
    x, rotation = embed(decoder, model.params, token[:, None], frame, step)
    pools = [_pool(layer.store) for layer in kv.layers]
    length = np.where(np.asarray(active), np.minimum(np.asarray(kv.length), pools[0][0].shape[2]), 0)
    ahead = _fetch(store, pools[0], None, length)
    layers: list[LayerState] = []
    chosen: Any = None
    for i, layer in enumerate(kv.layers):
        fetched, speculated, following, chosen = ahead, chosen is not None, i + 1, None
        weights = layer_variables(model.params, i)
        if following < len(kv.layers) and strategy.policy.speculates and following >= strategy.policy.full_layers:
            chosen = _look_ahead(decoder, strategy, weights, x, rotation, _without_pool(kv.layers[following]), kv.length, active)
        own = _without_pool(layer)
        x, new = _layer(decoder, strategy, speculated, weights, x, rotation, own, fetched, kv.length, kv.prompt_length, active)
        if following < len(kv.layers):
            ahead = _fetch(store, pools[following], chosen, length)
        layers.append(new)
    logits, after = head(decoder, model.params, x, frame, step, 1)
    for pool, new in zip(pools, layers, strict=True):
        _append(pool, new.store.outgoing, active)
    kept = tuple(
        dataclasses.replace(new, store=dataclasses.replace(new.store, k=k, v=v, outgoing=None))
        for (k, v), new in zip(pools, layers, strict=True)
    )
    return logits, after.over(kept)


def _pool(layer: HostLayer) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as arrays the host can write."""
    return tuple(x if isinstance(x, np.ndarray) else np.array(x) for x in (layer.k, layer.v))  # type: ignore[return-value]


def _without_pool(layer: LayerState) -> LayerState:
    return dataclasses.replace(layer, store=dataclasses.replace(layer.store, k=None, v=None))


def _fetch(store: HostStore, pool, chosen, length: np.ndarray) -> tuple[Staged, np.int32]:
    """Gathers rows on the host and starts their copy to the device; what `HostStore.prefetch` stages, and how many rows a kv head got."""
    batch, heads, slots, _ = pool[0].shape
    if chosen is not None:
        chosen = [np.asarray(x) for x in chosen]  # waits for the guess, which is not fetching
    with jax.profiler.TraceAnnotation("fetch"):
        if chosen is None:
            most, count = slots, length
            size = _size(store, most, count)
            rows = [x[:, :, :size].copy() for x in pool]
            slot = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, heads, slots))
        else:
            slot, count = chosen
            most = slot.shape[2]
            size = _size(store, most, count)
            flat = (np.arange(batch * heads, dtype=np.int64).reshape(batch, heads, 1) * slots + slot[:, :, :size]).reshape(-1)
            rows = [x.reshape(-1, x.shape[3]).take(flat, axis=0).reshape(batch, heads, size, -1) for x in pool]
        places = np.where(np.arange(most) < count[:, None, None], slot, slots).astype(np.int32)
        room = store.staged_places(most)
        places = np.pad(places, ((0, 0), (0, 0), (0, room - most)), constant_values=slots)
        k, v = (_roomy(jax.device_put(x), room) for x in rows)
        return Staged(k, v, jax.device_put(places)), np.int32(size)


def _size(store: HostStore, most: int, count: np.ndarray) -> int:
    return next(size for size in store.sizes(most) if size >= count.max(initial=0))


def _append(pool, outgoing: Staged, active: Bool[Array, " B"]) -> None:
    """Puts the step's tokens into the pool."""
    k, v, slot = (np.asarray(x)[:, :, 0] for x in (outgoing.k, outgoing.v, outgoing.slot))
    rows = np.flatnonzero(np.asarray(active))
    heads = np.arange(slot.shape[1])
    inside = np.minimum(slot, pool[0].shape[2] - 1)
    for target, new in zip(pool, (k, v), strict=True):
        target[rows[:, None], heads, inside[rows]] = new[rows]


@partial(jax.jit, static_argnums=(0, 1))
def _look_ahead(decoder: Decoder, strategy: Strategy, weights, x, rotation, following: LayerState, length, active):
    """What the next layer wants: slots, and how many of them."""
    config = decoder.config
    with jax.named_scope("speculate"):
        if config.norm_first:
            x = Normalise(config, decoder.dtype).apply({"params": weights["params"]["attention_norm"]}, x)
        queries = guess_queries(config, weights["guide"]["attention"]["guide"].following, x, rotation)
        return strategy.choose(following, queries, KVState((), length, length), active)


@partial(jax.jit, static_argnums=1)
def _roomy(rows: Float[Array, "B Hkv size D"], places: int) -> Float[Array, "B Hkv K D"]:
    """Fetched rows with room behind them, so that a layer is one program whatever was fetched: how much that is changes all the time."""
    return jnp.pad(rows, ((0, 0), (0, 0), (0, places - rows.shape[2]), (0, 0)))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _layer(
    decoder: Decoder, strategy: Strategy, chosen: bool, weights, x, rotation, layer: LayerState, fetched, length, prompt_length, active
) -> tuple[Float[Array, "B 1 M"], LayerState]:
    """One layer over what was fetched for it, which was `chosen` or all there is."""
    staged, size = fetched
    batch, heads = staged.k.shape[:2]
    held, in_use = strategy.held(layer, KVState((layer,), length, prompt_length), active)
    wanted = (staged.slot < layer.store.slots).sum() if chosen else heads * in_use.sum()
    books = jnp.stack([jnp.zeros((), jnp.int32), heads * held.sum(), wanted, batch * heads * size])
    traffic = layer.store.traffic + books.astype(jnp.float32)
    store = dataclasses.replace(layer.store, staged=staged, traffic=traffic)
    kv = KVState((dataclasses.replace(layer, store=store),), length, prompt_length)
    block: Any = Block(decoder.config, 0, decoder.dtype)
    x, kv = block.apply(weights, x, rotation, kv, Decode(active, strategy))
    return x, kv.layers[0]
