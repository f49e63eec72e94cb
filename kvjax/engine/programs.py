"""The device side of serving: the programs an engine runs, over one state that all requests share.

Dims: R rows of bookkeeping (max_num_seqs), B rows of a call, T pages of a row at most, S tokens of a chunk.

A request has a row, in which its last token and its policy's metadata stand, and pages, in which its keys and values stand. Every call
names the rows it is about and brings their lengths and block tables along, packed into one small array from the host; the arrays of the
cache are donated and stay where they are. Rows beyond the last one mean "nobody": their writes are dropped.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import CacheShape, Decode, KVState, LayerState, PagedStore, Prefill, Strategy
from kvjax.cache.stores import page_table
from kvjax.generation import apply
from kvjax.models import Decoder
from kvjax.sampling import Sampling

Layers = tuple[LayerState, ...]

HEADER = 5
"""Integers before the block table in a packed row: row, length, prompt length, seed, forced token (-1: the row's own last one)."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the programs are specialised for; hashable, static under jit."""

    decoder: Decoder
    strategy: Strategy
    sampling: Sampling
    num_pages: int


class Contained(Strategy):
    """A strategy that never stores a value that is not finite, so that nothing of a request that went wrong stays where it has been.

    Attention takes other requests' leftovers in, at a weight of zero, which removes everything but infinity and NaN. Keys are masked
    instead and may be anything: a token whose value is not finite gets a key of NaN, and who does attend to it is told.
    """

    def prefill(self, layer: LayerState, q, k, v, *rest):
        return super().prefill(layer, q, *_contained(k, v), *rest)

    def decode(self, layer: LayerState, q, k, v, *rest):
        return super().decode(layer, q, *_contained(k, v), *rest)


def _contained(k, v):
    finite = jnp.isfinite(v).all(-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)


def allocate(strategy: Strategy, shape: CacheShape, num_pages: int, rows: int, capacity: int) -> Layers:
    """The cache of an engine: a pool of pages per layer, metadata for `rows` rows of `capacity` slots."""
    store = strategy.store
    assert isinstance(store, PagedStore)
    return tuple(strategy.with_metadata(store.pool(shape, num_pages), shape, rows, capacity) for _ in range(shape.num_layers))


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(
    programs: Programs, params, layers: Layers, tokens: Int[Array, " R"], packed: Int[Array, "B HEADER+T"]
) -> tuple[Layers, Int[Array, " R"], Int[Array, " B"]]:
    """One token for every row of the call. Returns the cache, every row's last token, and the new tokens (-1: logits not finite)."""
    row, length, prompt_length, seed, forced = packed[:, :HEADER].T
    kv = KVState(tuple(_rows(layer, row) for layer in layers), length, prompt_length, page_table(packed[:, HEADER:], programs.num_pages))
    last = jnp.where(forced >= 0, forced, tokens.at[row].get(mode="clip"))
    step = Decode(row < tokens.shape[0], programs.strategy)
    logits, kv = apply(programs.decoder, params, last[:, None], kv, step)
    chosen = _choose(programs.sampling, logits[:, 0], seed, kv.length)
    layers = tuple(_put_rows(layer, new, row) for layer, new in zip(layers, kv.layers, strict=True))
    return layers, tokens.at[row].set(jnp.maximum(chosen, 0), mode="drop"), chosen


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    programs: Programs, params, layers: Layers, packed: Int[Array, "1 HEADER+T"], chunk: Int[Array, "1 S"], num_valid: Int[Array, " 1"]
) -> tuple[Layers, Float[Array, "1 V"]]:
    """The next chunk of a prompt, straight into its pages: for policies that keep everything. Returns the last token's logits."""
    _, length, prompt_length, *_ = packed[:, :HEADER].T
    kv = KVState(layers, length, prompt_length, page_table(packed[:, HEADER:], programs.num_pages))
    logits, kv = apply(programs.decoder, params, chunk, kv, Prefill(num_valid, programs.strategy, first=False))
    return kv.layers, logits[:, 0]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def stage(
    programs: Programs, context: int, params, staging: Layers, packed: Int[Array, "1 HEADER+T"], chunk: Int[Array, "1 S"],
    num_valid: Int[Array, " 1"],
) -> tuple[Layers, Float[Array, "1 V"]]:  # fmt: skip
    """The next chunk of a prompt into the staging row: for policies that evict, which see the whole prompt before they choose.

    `context`: no more tokens are staged after the chunk (static).
    """
    _, length, prompt_length, *_ = packed[:, :HEADER].T
    step = Prefill(num_valid, programs.strategy, first=False, context=context)
    logits, kv = apply(programs.decoder, params, chunk, KVState(staging, length, prompt_length), step)
    return kv.layers, logits[:, 0]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def settle(programs: Programs, context: int, layers: Layers, staging: Layers, packed: Int[Array, "1 HEADER+T"]) -> Layers:
    """Compresses the staged prompt into its pages; `packed` has its full length."""
    row, length, prompt_length, *_ = packed[:, :HEADER].T
    shared = page_table(packed[:, HEADER:], programs.num_pages)
    staged = KVState(tuple(_head(layer, context) for layer in staging), length, prompt_length)
    empty = KVState(tuple(_rows(layer, row) for layer in layers), jnp.zeros_like(length), prompt_length, shared)
    kv = programs.strategy.settle(staged, empty)
    return tuple(_put_rows(layer, new, row) for layer, new in zip(layers, kv.layers, strict=True))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def begin(
    programs: Programs, tokens: Int[Array, " R"], logits: Float[Array, "1 V"], packed: Int[Array, "1 HEADER+T"]
) -> tuple[Int[Array, " R"], Int[Array, " 1"]]:
    """The token after a prompt; `packed` has the prompt's full length. Returns every row's last token, and the new one."""
    row, length, _, seed, _ = packed[:, :HEADER].T
    chosen = _choose(programs.sampling, logits, seed, length)
    return tokens.at[row].set(jnp.maximum(chosen, 0), mode="drop"), chosen


@partial(jax.jit, donate_argnums=0)
def copy(layers: Layers, pages: Int[Array, "2 W"], rows: Int[Array, " 2"]) -> Layers:
    """Copies pages (from, to), and a row's metadata (from, to); ids beyond the pool or the rows copy nothing."""

    def one(layer: LayerState) -> LayerState:
        store = PagedStore(layer.store.k[0].shape[-1]).copy_pages(layer.store, pages[0], pages[1])
        return _put_rows(dataclasses.replace(layer, store=store), _rows(layer, rows[:1], store), rows[1:])

    return tuple(one(layer) for layer in layers)


def _choose(sampling: Sampling, logits, seed, position) -> Int[Array, " B"]:
    chosen = sampling.choose(logits, seed, position)
    return jnp.where(jnp.isfinite(logits).all(-1), chosen, -1)


def _rows(layer: LayerState, row: Int[Array, " B"], store=None) -> LayerState:
    """The metadata of these rows, over the whole store."""
    position, score, next_slot = jax.tree.map(lambda x: x.at[row].get(mode="clip"), (layer.position, layer.score, layer.next_slot))
    return LayerState(layer.store if store is None else store, position, score, next_slot)


def _put_rows(layer: LayerState, new: LayerState, row: Int[Array, " B"]) -> LayerState:
    """`layer` with the store of `new` and its metadata in these rows."""
    old = (layer.position, layer.score, layer.next_slot)
    metadata = jax.tree.map(lambda old, new: old.at[row].set(new, mode="drop"), old, (new.position, new.score, new.next_slot))
    return LayerState(new.store, *metadata)


def _head(layer: LayerState, slots: int) -> LayerState:
    """The first slots of a staged layer."""
    store = dataclasses.replace(layer.store, k=layer.store.k[:, :, :slots], v=layer.store.v[:, :slots])
    return LayerState(store, score=None if layer.score is None else layer.score[..., :slots])
