"""The device side of serving: the programs an engine runs, over one state that all requests share.

Dims: R rows of bookkeeping (max_num_seqs), B rows of a call, T pages of a row at most, S tokens of a chunk.

A request has a row, in which its last token and the books of its policy stand, and pages, in which its keys and values stand (in host
memory one page, its seat in the pool). Every call names the rows it is about and brings their lengths and block tables along, packed into
one small array from the host; the arrays of the cache are donated and stay where they are. Rows beyond the last one mean "nobody": their
writes are dropped.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import CacheShape, Decode, KVState, LayerState, Prefill, Stage, Strategy
from kvjax.cache.pool import PageTable, page_table
from kvjax.models import Decoder
from kvjax.models.guide import Guide, guides
from kvjax.runtime.forward import forward
from kvjax.sampling import SamplingArrays, choose

Layers = tuple[LayerState, ...]
Ints = Array | np.ndarray

HEADER = 4
"""Integers before the block table in a packed row: row, length, prompt length, forced token (-1: the row's own last one)."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the programs are specialised for; hashable, static under jit."""

    decoder: Decoder
    strategy: Strategy
    num_pages: int


def allocate(strategy: Strategy, shape: CacheShape, num_pages: int, rows: int, capacity: int) -> Layers:
    """The cache of an engine: a pool of pages per layer, and the books of `rows` rows of `capacity` slots."""
    store, nothing = strategy.store, jnp.zeros(rows, jnp.int32)
    pools = (store.pool(shape, num_pages, store.page(capacity)) for _ in range(shape.num_layers))
    return tuple(strategy.layer(pool, shape, index, nothing, capacity) for index, pool in enumerate(pools))


def _table(programs: Programs, packed: Int[Array, "B HEADER+T"]) -> PageTable:
    """Where the rows of a call find their tokens."""
    return page_table(packed[:, HEADER:], programs.num_pages)


def decode(
    programs: Programs, params, layers: Layers, tokens: Int[Array, " R"], packed: Int[Ints, "B HEADER+T"],
    sampling: SamplingArrays | None = None,
) -> tuple[Layers, Int[Array, " R"], Int[Array, " B"]]:  # fmt: skip
    """One token for every row of the call. Returns the cache, every row's last token, and the new tokens (negative: logits not finite).

    All rows choose greedily in the program of the step. Where one of them samples, which the host knows and says by giving `sampling`, a
    program of its own, which has nothing of the model in it, chooses once more: greedy calls are spared it, and no step is compiled twice.
    """
    if programs.decoder.stringing == "unroll":
        layers, tokens, chosen, logits, length = _unrolled_decode(programs, params, layers, tokens, packed)
    else:
        frame, last, step = _before_decode(programs, tokens, packed)
        logits, kv = forward(programs.decoder, params, last, frame.over(layers), step)
        layers, length = kv.layers, kv.length
        tokens, chosen = _chosen(tokens, packed, logits, length, None)
    if sampling is not None:
        tokens, chosen = _chosen(tokens, packed, logits, length, sampling)
    return layers, tokens, chosen


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _unrolled_decode(programs: Programs, params, layers: Layers, tokens, packed):
    frame, last, step = _before_decode(programs, tokens, packed)
    logits, kv = forward(programs.decoder, params, last, frame.over(layers), step)
    return kv.layers, *_chosen(tokens, packed, logits, kv.length, None), logits, kv.length


@partial(jax.jit, static_argnums=0)
def _before_decode(programs: Programs, tokens: Int[Array, " R"], packed: Int[Array, "B HEADER+T"]) -> tuple[KVState, Array, Decode]:
    """The state of a call's rows without its layers, their last tokens [B, 1], and the step."""
    row, length, prompt_length, forced = packed[:, :HEADER].T
    last = jnp.where(forced >= 0, forced, tokens.at[row].get(mode="clip"))
    frame = KVState((), length, prompt_length, _table(programs, packed), row)
    return frame, last[:, None], Decode(row < tokens.shape[0], programs.strategy, shared=True)


@partial(jax.jit, donate_argnums=0)
def _chosen(
    tokens: Int[Array, " R"], packed: Int[Array, "B HEADER+T"], logits: Float[Array, "B ... V"], length: Int[Array, " B"],
    sampling: SamplingArrays | None,
) -> tuple[Int[Array, " R"], Int[Array, " B"]]:  # fmt: skip
    """Every row's last token, and the new tokens, of rows that have `length` tokens."""
    chosen = choose(logits.reshape(len(logits), -1), length, sampling)
    return tokens.at[packed[:, 0]].set(jnp.maximum(chosen, 0), mode="drop"), chosen


def prefill(
    programs: Programs, context: int | None, params, layers: Layers, packed: Int[Ints, "1 HEADER+T"], chunk: Int[Ints, "1 S"],
    num_valid: Int[Ints, " 1"],
) -> tuple[Layers, Float[Array, "1 V"]]:  # fmt: skip
    """The next chunk of a prompt, straight into its pages: for policies that keep everything. Returns the last token's logits.

    `context`: no more tokens are there after the chunk (static; None: no bound).
    """
    return _chunk(programs, context, False, params, layers, packed, chunk, num_valid)


def stage(
    programs: Programs, context: int, params, staging: Layers, packed: Int[Ints, "1 HEADER+T"], chunk: Int[Ints, "1 S"],
    num_valid: Int[Ints, " 1"],
) -> tuple[Layers, Float[Array, "1 V"]]:  # fmt: skip
    """The next chunk of a prompt into the staging row: for policies that evict, which see the whole prompt before they choose.

    `context`: no more tokens are staged after the chunk (static).
    """
    return _chunk(programs, context, True, params, staging, packed, chunk, num_valid)


def _chunk(programs: Programs, context: int | None, stages: bool, params, layers: Layers, packed, chunk, num_valid):
    if programs.decoder.stringing == "unroll":
        return _unrolled_chunk(programs, context, stages, params, layers, packed, chunk, num_valid)
    frame, step = _before_chunk(programs, context, stages, packed, num_valid)
    logits, kv = forward(programs.decoder, params, chunk, frame.over(layers), step)
    return kv.layers, logits[:, 0]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _unrolled_chunk(programs: Programs, context: int | None, stages: bool, params, layers: Layers, packed, chunk, num_valid):
    frame, step = _before_chunk(programs, context, stages, packed, num_valid)
    logits, kv = forward(programs.decoder, params, chunk, frame.over(layers), step)
    return kv.layers, logits[:, 0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _before_chunk(
    programs: Programs, context: int | None, stages: bool, packed: Int[Array, "1 HEADER+T"], num_valid: Int[Array, " 1"]
) -> tuple[KVState, Prefill | Stage]:
    row, length, prompt_length, *_ = packed[:, :HEADER].T
    how: Any = dict(first=False, context=context, shared=True)
    if stages:
        store, observes = programs.strategy.store.staging, programs.strategy.observes
        return KVState((), length, prompt_length), Stage(num_valid, store, observes, **how)
    return KVState((), length, prompt_length, _table(programs, packed), row), Prefill(num_valid, programs.strategy, **how)


def commit(programs: Programs, context: int, params, layers: Layers, staging: Layers, packed: Int[Ints, "1 HEADER+T"]) -> Layers:
    """Compresses the staged prompt into its pages; `packed` has its full length. `context`: no more tokens are staged (static)."""
    guide = guides(params, len(layers)) or (None,) * len(layers)
    parts = zip(layers, staging, guide, strict=True)
    return tuple(commit_layer(programs, context, len(layers), *one, packed, np.int32(i)) for i, one in enumerate(parts))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def commit_layer(
    programs: Programs, context: int, num_layers: int, layer: LayerState, staged: LayerState, guide: Guide | None,
    packed: Int[Array, "1 HEADER+T"], index: Int[Array, ""],
) -> LayerState:  # fmt: skip
    """`commit` of one layer."""
    row, length, prompt_length, *_ = packed[:, :HEADER].T
    empty = KVState((layer,), jnp.zeros_like(length), prompt_length, _table(programs, packed), row)
    target = empty.layer(0)
    return layer.put(programs.strategy.commit(staged, target, length, empty, guide, context, index, num_layers))


def begin(
    tokens: Int[Array, " R"], logits: Float[Array, "1 V"], packed: Int[np.ndarray, "1 HEADER+T"], sampling: SamplingArrays | None = None
) -> tuple[Int[Array, " R"], Int[Array, " 1"]]:
    """The token after a prompt; `packed` has the prompt's full length. Returns every row's last token, and the new one."""
    return _chosen(tokens, packed, logits, packed[:, 1], sampling)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy(programs: Programs, layers: Layers, pages: Int[Array, "2 W"], rows: Int[Array, " 2"]) -> Layers:
    """Copies pages (from, to), and a row's books (from, to); ids beyond the pool or the rows copy nothing."""
    tier = programs.strategy.store.tier

    def one(layer: LayerState) -> LayerState:
        copied = dataclasses.replace(layer, pool=tier.copied(layer.pool, pages[0], pages[1]))
        return copied.restore(layer.save(rows[:1]), rows[1:])

    return tuple(one(layer) for layer in layers)


@jax.jit
def swap_out(layers: Layers, row: Int[Array, " 1"]) -> Layers:
    """What the device holds of a row beside the pool, which is host memory."""
    return tuple(layer.save(row) for layer in layers)


@partial(jax.jit, donate_argnums=0)
def swap_in(layers: Layers, saved: Layers, row: Int[Array, " 1"]) -> Layers:
    """Puts what `swap_out` gave into a row."""
    return tuple(layer.restore(old, row) for layer, old in zip(layers, saved, strict=True))
