"""What attention is told: where keys lie, which of them a query sees, and what is wanted besides the output.

Dims: B rows, S queries of a row, H query heads, Hkv kv heads, G = H / Hkv, D head dim, K keys of a row, h = Hkv or 1 (the same for all
heads), P pages, Z slots of a page, T pages of a row at most, C = T * Z.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

NEG_INF = -1e30
"""Finite, so that a row with nothing to see gives a uniform softmax and not NaN."""

Layout = Literal["tokens", "columns", "rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages are whose.

    Attributes:
      pages: int32 [B, T], page ids of every row in the order of its slots; P (any id beyond the pool) where it has none.
      owner: int32 [P], the row that reads a page where it lies; B for a page nobody has.
      index: int32 [P], which of its owner's pages a page is.
    """

    pages: jax.Array
    owner: jax.Array
    index: jax.Array

    @property
    def present(self) -> jax.Array:
        """[B, T]"""
        return self.pages < self.owner.shape[0]

    @property
    def owned(self) -> jax.Array:
        """[B, T]: pages a row reads where they lie; the other present ones are read by gathering."""
        inside = jnp.minimum(self.pages, self.owner.shape[0] - 1)
        return self.present & (self.owner[inside] == jnp.arange(self.pages.shape[0])[:, None])

    def to_pages(self, per_row: jax.Array) -> jax.Array:
        """[B, T, ...] -> [P, ...]: what belongs to a page by its owner; anything at all for a page nobody has."""
        owner = jnp.minimum(self.owner, self.pages.shape[0] - 1)
        return per_row.at[owner, self.index].get(mode="promise_in_bounds")


def page_table(pages: jax.Array, num_pages: int) -> PageTable:
    """The table of rows with these pages [B, T] over a pool of `num_pages`. A shared page is owned by one of its rows."""
    batch, length = pages.shape
    pair = jnp.full(num_pages, batch * length, jnp.int32)
    pair = pair.at[pages.reshape(-1)].min(jnp.arange(batch * length, dtype=jnp.int32), mode="drop")
    return PageTable(pages, pair // length, pair % length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values as they lie.

    Attributes:
      k, v: by layout. `tokens`: one array [B, K, Hkv, D] each. `columns`: pages with keys transposed, [P, Hkv, D, Z] and [P, Hkv, Z, D], in
        any number of extents (arrays one after the other). `rows`: pages [P, Hkv, Z, D], D perhaps wider than a head, zeros behind.
      table: whose pages those are; None: page b is all of row b.
      layout: static.
      most: keys behind the first so many of a row are not read (static); None: all may be.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    table: PageTable | None = None
    layout: Layout = dataclasses.field(default="tokens", metadata=dict(static=True))
    most: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def heads(self) -> int:
        """Hkv."""
        return self.k[0].shape[2 if self.layout == "tokens" else 1]

    @property
    def page_size(self) -> int:
        """Z; K of tokens."""
        return self.k[0].shape[{"tokens": 1, "columns": 3, "rows": 2}[self.layout]]

    @property
    def capacity(self) -> int:
        """Keys of a row."""
        return self.page_size * (1 if self.table is None else self.table.pages.shape[1])


def tokens(k: jax.Array, v: jax.Array) -> Keys:
    """Keys and values as they come out of a projection, [B, K, Hkv, D]."""
    return Keys((k,), (v,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those that hold a token at or before its own position, and inside the window.

    Attributes:
      query: int32 [B, S], true positions; None: query i stands at position i, and key j at position j.
      key: positions of keys, int32 [B, h, K], negative where there is none; or bool, seen by every query; None: key j is at position j.
        With one query a row (a decode step) none is behind the query.
      length: int32 [B], keys in use, where `key` is None; None: all.
      counted: bool [B, S], queries that are part of a row; others give anything and count in no statistics. None: all.
      last: int32 [B], position of the last query that a row will ever have in its prompt, for Observe.last; None: that of this call.
      window: a query sees that many positions, its own included; None: all (static).
    """

    query: jax.Array | None = None
    key: jax.Array | None = None
    length: jax.Array | None = None
    counted: jax.Array | None = None
    last: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    def seen(self, query: jax.Array, slots: jax.Array, key: jax.Array | None) -> jax.Array:
        """Bool [B, h, 1, Q, K]: queries at positions [B, Q], keys in `slots` [K], whose entries of `key` are given [B, h, K]."""
        if key is not None and key.dtype == jnp.bool_:
            return jnp.broadcast_to(key[:, :, None, None], (*key.shape[:2], 1, query.shape[1], key.shape[2]))
        at = slots[None, None] if key is None else key
        at, query = at[:, :, None, None], query[:, None, None, :, None]
        seen = at <= query
        if key is not None:
            seen &= at >= 0
        elif self.length is not None:
            seen &= at < self.length[:, None, None, None, None]
        return seen if self.window is None else seen & (at > query - self.window)


@dataclasses.dataclass(frozen=True)
class Observe:
    """Statistics of attention that a policy wants of every key, as data, so that a kernel can say whether it has them.

    Attributes:
      group: how the query heads of a kv head are joined, per query: their sum, the first one alone, or the largest.
      reduce: how the queries are: their sum or the largest.
      last: only that many queries at the end of a prompt count (SnapKV's window); None: all.
    """

    group: Literal["sum", "first", "max"] = "sum"
    reduce: Literal["sum", "max"] = "sum"
    last: int | None = None

    def of(self, weights: jax.Array, scale: jax.Array) -> jax.Array:
        """Unnormalised weights [..., G, Q, K] and the factor of each query [..., G, Q] -> the statistic [..., K], float32."""
        if self.group == "first":
            weights, scale = weights[..., :1, :, :], scale[..., :1, :]
        if self.reduce == "sum" and self.group != "max":
            return jnp.einsum("...gqk,...gq->...k", weights, scale)
        probability = weights * scale[..., None]
        joined = probability.max(-3) if self.group == "max" else probability.sum(-3)
        return joined.sum(-2) if self.reduce == "sum" else joined.max(-2)

    def add(self, before: jax.Array, fresh: jax.Array) -> jax.Array:
        """The statistic of earlier queries and of later ones, together."""
        return before + fresh if self.reduce == "sum" else jnp.maximum(before, fresh)

    def counts(self, counted: jax.Array, query: jax.Array, last: jax.Array) -> jax.Array:
        """Of the queries in `counted` [B, Q] at these positions, those that this statistic is about; `last` [B]: of the prompt."""
        return counted if self.last is None else counted & (query > last[:, None] - self.last)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
    """What attention gives.

    Attributes:
      out: [B, S, H, D], in the type of the queries.
      observed: one float32 [B, Hkv, K] for every Observe that was asked for.
      residuals: what softmax saw, where it was asked for: scaled logits [B, Hkv, G, K] (NEG_INF where nothing is seen) of the one query of
        every row, and their log-sum-exp [B, Hkv, G], float32.
    """

    out: jax.Array
    observed: tuple[jax.Array, ...] = ()
    residuals: tuple[jax.Array, jax.Array] | None = None


def softmax_weights(logits: jax.Array, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis in two parts: unnormalised weights, and the factor that makes probabilities of a row of them.

    `sinks`: logits that take their share and give nothing, of the shape of a row's factor.
    """
    highest = logits.max(-1)
    highest = highest if sinks is None else jnp.maximum(highest, sinks)
    weights = jnp.exp(logits - highest[..., None])
    total = weights.sum(-1)
    return weights, 1 / (total if sinks is None else total + jnp.exp(sinks - highest))


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits bent to at most `softcap` (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
