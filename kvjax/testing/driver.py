"""Drives a strategy's two entry points with random queries, keys and values, without a model around it, and a naive oracle beside it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import CacheShape, KVState, PageTable, Strategy
from kvjax.cache.attention import NEG_INF
from kvjax.cache.stores import page_table
from kvjax.models.config import Rope
from kvjax.models.decoder import rope_angles, rotate
from kvjax.models.guide import Guide

ROTATED_AT_A_TIME = 256

SHAPE = CacheShape(num_layers=1, num_kv_heads=2, group_size=2, head_dim=16, dtype=jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a layer would be handed for S tokens of B rows; q and k are rotated at the positions they will have."""

    q: Float[np.ndarray, "B S H D"]
    k: Float[np.ndarray, "B S Hkv D"]
    v: Float[np.ndarray, "B S Hkv D"]

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def rows(self, index) -> "Tokens":
        return Tokens(self.q[index], self.k[index], self.v[index])


def random_tokens(rng: np.random.Generator, batch: int, length: int, offset: int = 0, sharpness: float = 2.0) -> Tokens:
    """Fresh random tokens, rotated at `offset`, `offset + 1`, ...; `sharpness` scales the queries, so that attention picks favourites."""
    q, k, v = (
        rng.standard_normal((batch, length, heads, SHAPE.head_dim)).astype(np.float32)
        for heads in (SHAPE.num_kv_heads * SHAPE.group_size, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    )
    return Tokens(_rotated(q * sharpness, offset), _rotated(k, offset), v)


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
    return rotate(x[None, :, None], rope_angles(Rope(), SHAPE.head_dim, position[None]))[0, :, 0]


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
    final = _shuffled(_init(strategy, longest, max(steps, 1), fill, lengths))
    kv = final if whole or bounded or strategy.policy.kept_tokens(1) is None else _stage(strategy, longest, fill, lengths)
    pieces = []
    for start in range(0, longest, chunk):
        at = start + np.arange(chunk)
        q, k, v = (x[:, np.minimum(at, longest - 1)] for x in (tokens.q, tokens.k, tokens.v))
        valid = at < lengths[:, None]
        out, kv = prefill_call(strategy, start == 0, kv, q, k, v, valid)
        pieces.append(np.asarray(out))
    if kv.layers[0].position is None and final.layers[0].position is not None:
        kv = settle_call(strategy, kv, final)
    going = np.ones(tokens.batch, bool) if active is None else active
    states, outs = [kv], []
    row = np.arange(tokens.batch)
    for _ in range(steps):
        at = np.asarray(kv.length)
        if poison:
            kv = _poisoned(strategy, kv)
        q, k, v = (x[row, np.minimum(at, tokens.length - 1)][:, None] for x in (tokens.q, tokens.k, tokens.v))
        out, kv = decode_call(strategy, kv, q, k, v, going)
        states.append(kv)
        outs.append(np.asarray(out[:, 0]))
    empty = np.zeros((tokens.batch, 0, *tokens.q.shape[2:]), np.float32)
    return Trace(np.concatenate(pieces, 1)[:, :longest], np.stack(outs, 1) if outs else empty, states)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _init(strategy: Strategy, longest: int, steps: int, fill, lengths) -> KVState:
    return strategy.init(SHAPE, lengths, longest, steps, fill)


@partial(jax.jit, static_argnums=(0, 1))
def _stage(strategy: Strategy, longest: int, fill, lengths) -> KVState:
    return strategy.stage(SHAPE, lengths, longest, fill)


@partial(jax.jit, static_argnums=(0, 1))
def prefill_call(strategy: Strategy, first: bool, kv: KVState, q, k, v, valid):
    out, layer = strategy.prefill(kv.layers[0], q, k, v, kv, valid, first, guide=guide(strategy))
    return out, dataclasses.replace(kv.with_layer(0, layer), length=kv.length + valid.sum(-1))


@partial(jax.jit, static_argnums=0)
def settle_call(strategy: Strategy, staged: KVState, empty: KVState) -> KVState:
    return strategy.settle(staged, empty, (guide(strategy),))


@partial(jax.jit, static_argnums=0)
def decode_call(strategy: Strategy, kv: KVState, q, k, v, active):
    kv = strategy.look_ahead(-1, lambda: partial_queries(strategy, q), kv, active)
    out, layer = strategy.decode(kv.layers[0], q, k, v, kv, active, guide(strategy))
    return out, dataclasses.replace(kv.with_layer(0, layer), length=kv.length + active)


def guide(strategy: Strategy) -> Guide | None:
    """Random orthogonal columns for a policy that speculates. Its queries are known here, so it guesses from the true ones."""
    if not strategy.policy.speculates:
        return None
    columns = strategy.policy.partial_columns(SHAPE.head_dim)
    turns = np.random.default_rng(0).standard_normal((SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.head_dim))
    return Guide(jnp.asarray(np.linalg.qr(turns)[0][..., :columns], jnp.float32), None)


def partial_queries(strategy: Strategy, q: Float[Array, "B 1 H D"]) -> Float[Array, "B Hkv G P"] | None:
    """The partial queries of a step, scaled; None without a policy that speculates."""
    found = guide(strategy)
    if found is None:
        return None
    grouped = q.reshape(q.shape[0], SHAPE.num_kv_heads, SHAPE.group_size, SHAPE.head_dim)
    return jnp.einsum("bngd,ndp->bngp", grouped, found.key) * SHAPE.head_dim**-0.5


def kept(kv: KVState, row: int, head: int) -> dict[int, int]:
    """Position -> slot of the tokens one kv head of one row holds."""
    layer = kv.layers[0]
    if layer.position is None:
        return {i: i for i in range(int(kv.length[row]))}
    position = np.asarray(layer.position)[row, min(head, layer.position.shape[1] - 1)]
    return {int(p): slot for slot, p in enumerate(position) if p >= 0}


def masked_attention(strategy: Strategy, tokens: Tokens, row: int, at: int, held: list[set[int]], prompt_length: int) -> np.ndarray:
    """Naive oracle: full attention of query `at`, masked per kv head to the positions in `held`; [H, D], float64.

    What the policy reads within them is its own `readable`, asked with the oracle's logits, or its own `select`, asked with logits of
    partial keys.
    """
    span = at + 1
    logits = np.full((SHAPE.num_kv_heads, SHAPE.group_size, span), NEG_INF)
    for head in range(SHAPE.num_kv_heads):
        for group in range(SHAPE.group_size):
            q = tokens.q[row, at, head * SHAPE.group_size + group].astype(np.float64)
            for j in held[head]:
                logits[head, group, j] = q @ tokens.k[row, j, head].astype(np.float64) / np.sqrt(SHAPE.head_dim)
    chosen = strategy.policy.readable(jnp.asarray(logits[None], jnp.float32), jnp.asarray([prompt_length], jnp.int32))
    if chosen is not None:
        logits = np.where(np.asarray(chosen)[0], logits, NEG_INF)
    if strategy.policy.speculates:
        logits = np.where(_selected(strategy, tokens, row, at, held)[:, None], logits, NEG_INF)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    values = tokens.v[row, :span].transpose(1, 0, 2).astype(np.float64)  # [Hkv, span, D]
    return np.einsum("hgs,hsd->hgd", probs, values).reshape(-1, SHAPE.head_dim)


def _selected(strategy: Strategy, tokens: Tokens, row: int, at: int, held: list[set[int]]) -> np.ndarray:
    """The positions query `at` reads of those in `held`, its own among them; bool [Hkv, at + 1]."""
    queries, found = partial_queries(strategy, jnp.asarray(tokens.q[row, at][None, None])), guide(strategy)
    assert queries is not None
    assert found is not None
    keys = np.einsum("sad,adp->asp", tokens.k[row], np.asarray(found.key))  # of all tokens, so that every step has the same shapes
    guess = np.einsum("agp,asp->ags", np.asarray(queries)[0], keys)
    position = np.full((SHAPE.num_kv_heads, tokens.length), -1, np.int32)
    for head in range(SHAPE.num_kv_heads):
        stored = [p for p in held[head] if p < at]
        position[head, stored] = stored
    slot, count = strategy.policy.select(jnp.asarray(guess[None]), jnp.asarray(position[None]), jnp.asarray([at], jnp.int32))
    chosen = np.zeros(position.shape, bool)
    for head in range(SHAPE.num_kv_heads):
        chosen[head, np.asarray(slot)[0, head, : int(count[0])]] = True
    chosen &= position >= 0
    chosen[:, at] = True
    return chosen[:, : at + 1]


def _shuffled(kv: KVState) -> KVState:
    """The same empty state; a row's pages, if there are any, lie about the pool in no order."""
    if not isinstance(kv.shared, PageTable):
        return kv
    pages = kv.shared.pages
    order = np.random.default_rng(pages.size).permutation(pages.size).astype(np.int32)
    return dataclasses.replace(kv, shared=page_table(jnp.asarray(order.reshape(pages.shape)), pages.size))


def _poisoned(strategy: Strategy, kv: KVState) -> KVState:
    """The state with NaN keys wherever a slot holds no token."""
    layer = kv.layers[0]
    capacity = strategy.store.capacity(layer.store, kv.shared)
    if layer.position is None:
        empty = np.arange(capacity) >= np.asarray(kv.length)[:, None, None]
    else:
        empty = np.asarray(layer.position) < 0
    empty = np.broadcast_to(empty, (kv.length.shape[0], SHAPE.num_kv_heads, capacity))
    return kv.with_layer(0, dataclasses.replace(layer, store=strategy.store.poison(layer.store, kv.shared, jnp.asarray(empty))))
