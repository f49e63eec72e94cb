"""Drives a strategy's two entry points with random queries, keys and values, without a model around it, and a naive oracle beside it."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import CacheShape, KVState, Strategy, stage
from kvjax.cache.policies import View
from kvjax.cache.pool import page_table
from kvjax.cache.strategy import append
from kvjax.kernels.attention import NEG_INF
from kvjax.models.config import Rope
from kvjax.models.decoder import rope_angles, rotate
from kvjax.models.guide import Guide

ROTATED_AT_A_TIME = 256

SHAPE = CacheShape(num_layers=1, num_kv_heads=2, group_size=2, head_dim=16, dtype=jnp.dtype(jnp.float32))
"""Of the layer that is driven, unless someone says otherwise."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a layer of one `shape` would be handed for S tokens of B rows; q and k are rotated at the positions they will have."""

    q: Float[np.ndarray, "B S H D"]
    k: Float[np.ndarray, "B S Hkv D"]
    v: Float[np.ndarray, "B S Hkv D"]
    shape: CacheShape = SHAPE

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def rows(self, index) -> "Tokens":
        return Tokens(self.q[index], self.k[index], self.v[index], self.shape)


def random_tokens(
    rng: np.random.Generator, batch: int, length: int, offset: int = 0, sharpness: float = 2.0, shape: CacheShape = SHAPE
) -> Tokens:
    """Fresh random tokens, rotated at `offset`, `offset + 1`, ...; `sharpness` scales the queries, so that attention picks favourites.

    They are float32, rounded to what `shape.dtype` can hold.
    """
    q, k, v = (
        rng.standard_normal((batch, length, heads, shape.head_dim)).astype(np.float32)
        for heads in (shape.num_kv_heads * shape.group_size, shape.num_kv_heads, shape.num_kv_heads)
    )

    def held(x: np.ndarray) -> Float[np.ndarray, "B S h D"]:
        return np.asarray(x, shape.dtype).astype(np.float32)

    return Tokens(held(_rotated(q * sharpness, offset)), held(_rotated(k, offset)), held(v), shape)


def _rotated(x: Float[np.ndarray, "B S h D"], offset: int) -> Float[np.ndarray, "B S h D"]:
    """Every vector on its own, so that all shapes share one program."""
    batch, length, heads, dim = x.shape
    position = np.broadcast_to(offset + np.arange(length)[:, None], (batch, length, heads)).reshape(-1)
    flat, out = x.reshape(-1, dim), []
    for start in range(0, len(flat), ROTATED_AT_A_TIME):
        part, where = flat[start : start + ROTATED_AT_A_TIME], position[start : start + ROTATED_AT_A_TIME]
        spare = ROTATED_AT_A_TIME - len(part)
        out.append(np.asarray(_rotate_all(np.pad(part, ((0, spare), (0, 0))), np.pad(where, (0, spare))))[: len(part)])
    return np.concatenate(out).reshape(x.shape)


@jax.jit
def _rotate_all(x: Float[Array, "n D"], position: Int[Array, " n"]) -> Float[Array, "n D"]:
    return rotate(x[None, :, None], rope_angles(Rope(), x.shape[1], position[None]))[0, :, 0]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A run: the state after the prompt and after every decode step, and each step's output.

    Attributes:
      prompt_out: attention output over the prompt.
      outs: per decode step.
      states: `states[0]` after the prompt, `states[t + 1]` after step t.
    """

    prompt_out: Float[np.ndarray, "B N H D"]
    outs: Float[np.ndarray, "B T H D"]
    states: list[KVState]


def run(
    strategy: Strategy,
    tokens: Tokens,
    lengths: Int[np.ndarray, " B"],
    steps: int,
    *,
    width: int | None = None,
    chunk: int | None = None,
    bounded: bool = False,
    active: np.ndarray | None = None,
    fill: float = 0.0,
    poison: bool = False,
) -> Trace:
    """Prefills `lengths[b]` tokens of every row, then decodes `steps` more.

    Args:
      width: prompts are padded to this length; None: to the longest of them.
      chunk: tokens per prefill call; None: all at once.
      bounded: with chunks, cut back after each.
      active: rows that decode.
      fill: what unwritten memory holds.
      poison: overwrite the keys of empty slots with NaN before every decode step.
    """
    lengths = np.asarray(lengths, np.int32)
    longest = width or int(lengths.max())
    chunk = chunk or longest
    whole = chunk >= longest
    shape = tokens.shape
    final = _shuffled(_init(strategy, shape, longest, max(steps, 1), fill, lengths))
    staged = not (whole or bounded) and strategy.policy.evicts
    kv = _stage(strategy, shape, longest, fill, lengths) if staged else final
    pieces = []
    for start in range(0, longest, chunk):
        at = start + np.arange(chunk)
        q, k, v = (np.asarray(x[:, np.minimum(at, longest - 1)], shape.dtype) for x in (tokens.q, tokens.k, tokens.v))
        valid = at < lengths[:, None]
        out, kv = (stage_call if staged else prefill_call)(strategy, start == 0, kv, q, k, v, valid)
        pieces.append(np.asarray(out, np.float32))
    if staged:
        kv = commit_call(strategy, kv, final)
    going = np.ones(tokens.batch, bool) if active is None else active
    states, outs = [kv], []
    row = np.arange(tokens.batch)
    for _ in range(steps):
        at = np.asarray(kv.length)
        if poison:
            kv = _poisoned(strategy, kv)
        q, k, v = (np.asarray(x[row, np.minimum(at, tokens.length - 1)][:, None], shape.dtype) for x in (tokens.q, tokens.k, tokens.v))
        out, kv = decode_call(strategy, kv, q, k, v, going)
        states.append(kv)
        outs.append(np.asarray(out[:, 0], np.float32))
    empty = np.zeros((tokens.batch, 0, *tokens.q.shape[2:]), np.float32)
    return Trace(np.concatenate(pieces, 1)[:, :longest], np.stack(outs, 1) if outs else empty, states)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init(strategy: Strategy, shape: CacheShape, longest: int, steps: int, fill, lengths) -> KVState:
    return strategy.init(shape, lengths, longest, steps, fill)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _stage(strategy: Strategy, shape: CacheShape, longest: int, fill, lengths) -> KVState:
    return stage(strategy.store, strategy.observes, shape, lengths, longest, fill)


@partial(jax.jit, static_argnums=(0, 1))
def prefill_call(strategy: Strategy, first: bool, kv: KVState, q, k, v, valid):
    out, layer = strategy.prefill(kv.layers[0], q, k, v, kv, valid, first, guide=guide(strategy, *k.shape[2:]))
    return out, dataclasses.replace(kv.with_layer(0, layer), length=kv.length + valid.sum(-1))


@partial(jax.jit, static_argnums=(0, 1))
def stage_call(strategy: Strategy, first: bool, kv: KVState, q, k, v, valid):
    out, layer, _ = append(strategy.store.staging, strategy.observes, kv.layers[0], q, k, v, kv, valid, first)
    return out, dataclasses.replace(kv.with_layer(0, layer), length=kv.length + valid.sum(-1))


@partial(jax.jit, static_argnums=0)
def commit_call(strategy: Strategy, staged: KVState, empty: KVState) -> KVState:
    pool = staged.layers[0].pool
    made = guide(strategy, pool.num_heads, pool.head_dim)
    layer = strategy.commit(staged.layers[0], empty.layers[0], staged.length, empty, made, num_layers=len(empty.layers))
    return dataclasses.replace(empty.with_layer(0, layer), length=staged.length)


@partial(jax.jit, static_argnums=0)
def decode_call(strategy: Strategy, kv: KVState, q, k, v, active):
    made = guide(strategy, *k.shape[2:])
    ahead = strategy.look_ahead(-1, lambda: partial_queries(made, q), kv, active)
    out, layer = strategy.decode(kv.layers[0], q, k, v, kv.handed(ahead), active, made)
    return out, dataclasses.replace(kv.with_layer(0, layer), length=kv.length + active)


def guide(strategy: Strategy, heads: int = SHAPE.num_kv_heads, dim: int = SHAPE.head_dim) -> Guide | None:
    """Random orthogonal columns for a policy that guesses. Its queries are known here, so it guesses from the true ones."""
    if not strategy.policy.guesses:
        return None
    turns = np.random.default_rng(0).standard_normal((heads, dim, dim))
    return Guide(jnp.asarray(np.linalg.qr(turns)[0][..., : strategy.policy.partial_columns(dim)], jnp.float32), None)


def partial_queries(made: Guide | None, q: Float[Array, "B 1 H D"]) -> Float[Array, "B Hkv G P"] | None:
    """The partial queries of a step, scaled; None without a guide."""
    if made is None:
        return None
    heads, dim, _ = made.key.shape
    return jnp.einsum("bngd,ndp->bngp", q.reshape(q.shape[0], heads, -1, dim), made.key) * dim**-0.5


def kept(kv: KVState, row: int, head: int) -> dict[int, int]:
    """Position -> slot of the tokens one kv head of one row holds."""
    layer = kv.layers[0]
    if layer.position is None:
        return {i: i for i in range(int(kv.length[row]))}
    position = np.asarray(layer.position)[row, min(head, layer.position.shape[1] - 1)]
    return {int(p): slot for slot, p in enumerate(position) if p >= 0}


def masked_attention(strategy: Strategy, tokens: Tokens, row: int, at: int, held: list[set[int]], prompt_length: int) -> np.ndarray:
    """Naive oracle: full attention of query `at`, masked per kv head to the positions in `held`; [H, D], float64.

    What the policy reads within them is what it chooses, asked with the oracle's logits where it looks at keys, else with a state of its
    own made of all tokens.
    """
    span, policy, shape = at + 1, strategy.policy, tokens.shape
    logits = np.full((shape.num_kv_heads, shape.group_size, span), NEG_INF)
    for head in range(shape.num_kv_heads):
        for group in range(shape.group_size):
            q = tokens.q[row, at, head * shape.group_size + group].astype(np.float64)
            for j in held[head]:
                logits[head, group, j] = q @ tokens.k[row, j, head].astype(np.float64) / np.sqrt(shape.head_dim)
    if policy.selects == "keys":
        position = np.where(logits[:, 0] > NEG_INF / 2, np.arange(span), -1)
        lengths = (jnp.asarray([x], jnp.int32) for x in (at, prompt_length))
        chosen = _marked(policy.choose(jnp.asarray(logits[None], jnp.float32), jnp.asarray(position[None]), *lengths), span)
        logits = np.where(chosen[:, None], logits, NEG_INF)
    elif policy.selects is not None and policy.selects_by(policy.init_own(shape, 1, 1, 0)):
        logits = np.where(_selected(strategy, tokens, row, at, held, prompt_length)[:, None], logits, NEG_INF)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    values = tokens.v[row, :span].transpose(1, 0, 2).astype(np.float64)  # [Hkv, span, D]
    return np.einsum("hgs,hsd->hgd", probs, values).reshape(-1, shape.head_dim)


def _selected(strategy: Strategy, tokens: Tokens, row: int, at: int, held: list[set[int]], prompt_length: int) -> np.ndarray:
    """The positions query `at` reads of those in `held`, its own among them; bool [Hkv, at + 1]."""
    policy, shape = strategy.policy, tokens.shape
    made = guide(strategy, shape.num_kv_heads, shape.head_dim)
    step, last = (jnp.asarray(tokens.q[row, i][None]) for i in (at, max(at - 1, 0)))
    queries: dict[Any, Any] = {"ahead": partial_queries(made, step[:, None]), "step": step, "last": jnp.where(at > prompt_length, last, 0)}
    position = np.full((shape.num_kv_heads, tokens.length), -1, np.int32)
    for head in range(shape.num_kv_heads):
        stored = [p for p in held[head] if p < at]
        position[head, stored] = stored
    own = policy.initial(jnp.asarray(tokens.k[row][None]), jnp.asarray(tokens.v[row][None]), made)  # of all: one shape a test
    length, prompt = (jnp.asarray([x], jnp.int32) for x in (at, prompt_length))
    view = View(own, jnp.asarray(position[None]), length, prompt, queries[policy.selects])
    chosen = _marked(policy.select(view), tokens.length)
    chosen &= position >= 0
    chosen[:, at] = True
    return chosen[:, : at + 1]


def _marked(selection, capacity: int) -> np.ndarray:
    """The slots that are meant, of one row; bool [Hkv, C]."""
    slot, count = (np.asarray(x)[0] for x in selection)
    chosen = np.zeros((len(slot), capacity), bool)
    for head in range(len(slot)):
        chosen[head, slot[head, : int(count)]] = True
    return chosen


def _shuffled(kv: KVState) -> KVState:
    """The same empty state; a row's pages, if there are any, lie about the pool in no order."""
    if kv.table is None:
        return kv
    pages = kv.table.pages
    order = np.random.default_rng(pages.size).permutation(pages.size).astype(np.int32)
    return dataclasses.replace(kv, table=page_table(jnp.asarray(order.reshape(pages.shape)), pages.size))


def _poisoned(strategy: Strategy, kv: KVState) -> KVState:
    """The state with NaN keys wherever a slot holds no token."""
    layer = kv.layers[0]
    capacity = layer.pool.capacity(kv.table)
    if layer.position is None:
        nothing = np.arange(capacity) >= np.asarray(kv.length)[:, None, None]
    else:
        nothing = np.asarray(layer.position) < 0
    empty = jnp.asarray(np.broadcast_to(nothing, (kv.length.shape[0], layer.pool.num_heads, capacity)))

    def poisoned(x):
        """Of the policy's state, what it says of empty slots."""
        where = empty[:, : x.shape[1]].reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 3), capacity)
        return jnp.where(where, jnp.nan, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    pool = strategy.store.poisoned(layer.pool, kv.table, empty)
    return kv.with_layer(0, dataclasses.replace(layer, pool=pool, own=jax.tree.map(poisoned, layer.own)))
