"""Attention over pages as XLA's CPU backend likes it: keys transposed, pages read where they lie.

Gathering a row's pages costs more than reading them: XLA copies them, at a third of the bandwidth. So decode attention turns the matter
around and visits the pool: every page is multiplied with the query of the row that owns it, has a softmax of its own, and is multiplied
with its values; then each row combines its pages by their maxima and sums, as the splits of flash decoding are combined. A page that
several rows share (a common prefix, a fork) has one owner here, and is gathered for its other readers. Extents behind the last page in use
are not read. Where a page is all of a row there is nothing to combine, and both products are plain batched matrix products.

A later chunk of a prompt takes a row's pages a few at a time, as many as the rows have; the softmax runs along.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .base import NEG_INF, Attended, Keys, Mask, Observe, PageTable, capped, softmax_weights
from .xla import taken

PAGES_AT_A_TIME = 8
"""Pages gathered per turn for readers who do not own them."""

SLOTS_AT_A_TIME = 128
"""Slots that a chunk of a prompt attends to per turn: few, because those behind its queries are work for nothing."""


def supports(q, keys: Keys, mask: Mask, scale, softcap, sinks, observe: Sequence[Observe], residuals: bool = False) -> str | None:
    """Why it cannot take a call, or None."""
    if residuals or (keys.most is not None and q.shape[1] == 1):
        return "it gives no residuals, and reads whole rows"
    if keys.layout == "rows" and keys.table is None and q.shape[1] == 1:
        return None
    if keys.layout != "columns":
        return "it reads pages whose keys stand transposed"
    if q.shape[1] == 1:
        return None
    if keys.table is None or observe or mask.key is not None or mask.query is None or mask.window is not None or sinks is not None:
        return "a chunk is attended to over pages that keep everything, without statistics, windows or sinks"
    return None


def attention(
    q: jax.Array, keys: Keys, mask: Mask, scale: float, softcap: float | None, sinks: jax.Array | None, observe: Sequence[Observe]
) -> Attended:
    """See api.py."""
    if q.shape[1] > 1:
        assert mask.query is not None
        assert keys.table is not None
        return Attended(_chunk(q, keys, keys.table, mask, scale, softcap))
    batch, _, heads, dim = q.shape
    grouped = (q[:, 0] * scale).astype(keys.k[0].dtype).reshape(batch, keys.heads, -1, dim)
    visible = _visible(mask, keys.capacity)
    extra = None if sinks is None else jnp.broadcast_to(sinks.reshape(keys.heads, -1), grouped.shape[:3])
    if keys.table is None:
        out, observed = _direct(grouped, keys, visible, softcap, extra, observe)
    else:
        out, observed = _paged(grouped, keys, keys.table, visible, softcap, extra, observe)
    return Attended(out.reshape(batch, 1, heads, dim).astype(q.dtype), observed)


def _visible(mask: Mask, capacity: int) -> jax.Array:
    """The slots that the one query of every row sees, bool [B, h, C]."""
    slots = jnp.arange(capacity)
    if mask.key is None:
        assert mask.length is not None
        visible = slots < mask.length[:, None, None]
        at = slots[None, None]
    else:
        visible = mask.key if mask.key.dtype == jnp.bool_ else mask.key >= 0
        at = mask.key
    if mask.window is None:
        return visible
    assert mask.query is not None
    return visible & (at > mask.query[:, :1, None] - mask.window)


def _direct(grouped, keys: Keys, visible, softcap, extra, observe: Sequence[Observe]):
    """Rows that are a page each; [B, Hkv, G, D] -> the same in float32, and statistics."""
    batch, heads, _, dim = grouped.shape
    (v,) = keys.v
    logits = capped(_logits(grouped, keys), softcap)
    weights, factor = softmax_weights(jnp.where(visible[:, :, None], logits, NEG_INF), extra)
    flat = weights.reshape(batch * heads, *weights.shape[2:]).astype(v.dtype)
    out = jnp.einsum("ngs,nsd->ngd", flat, v.reshape(-1, *v.shape[2:])[..., :dim], preferred_element_type=jnp.float32)
    observed = tuple(what.of(weights[..., None, :], factor[..., None]) for what in observe)
    return out.reshape(grouped.shape) * factor[..., None], observed


def _paged(grouped, keys: Keys, table: PageTable, visible, softcap, extra, observe: Sequence[Observe]):
    """`_direct` over pages."""
    batch = grouped.shape[0]
    by_page = visible.reshape(batch, visible.shape[1], -1, keys.page_size).swapaxes(1, 2)  # [B, T, h, Z]
    grouped, by_page = jax.lax.optimization_barrier((grouped, by_page))  # or XLA rotates a row's query anew for each of its pages
    ends = [end for _, end in _extents(keys)]
    last = (jnp.where(table.owner < batch, jnp.arange(len(table.owner)), 0).max() >= jnp.array(ends)).sum()
    visits = [partial(_visit, keys, table, softcap, extra, tuple(observe), extents) for extents in range(1, len(keys.k) + 1)]
    highest, total, numerator, observed = jax.lax.switch(last, visits, grouped, by_page)
    if not observe:
        highest, total, numerator = _shared_pages(keys, table, softcap, grouped, by_page, highest, total, numerator)
    return numerator / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None], observed


def scores(q, keys: Keys, scale: float) -> jax.Array:
    """See xla.scores; over columns without a copy of all keys."""
    batch, _, _, dim = q.shape
    grouped = (q[:, 0] * scale).astype(keys.k[0].dtype).reshape(batch, keys.heads, -1, dim)
    if keys.table is None:
        return _logits(grouped, keys)
    pages, size = keys.table.pages, keys.page_size

    def turn(i, logits):
        part = taken(keys.k, jax.lax.dynamic_index_in_dim(pages, i, 1, keepdims=False))
        part = jnp.einsum("bhgd,bhdz->bhgz", grouped, part, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(logits, part, i * size, 3)

    empty = jnp.zeros((*grouped.shape[:3], keys.capacity), jnp.float32)
    return jax.lax.fori_loop(0, pages.shape[1], turn, empty)


def _logits(grouped, keys: Keys) -> jax.Array:
    """Of rows that are a page each: [B, Hkv, G, D] -> [B, Hkv, G, C], float32."""
    batch, heads, _, dim = grouped.shape
    (k,) = keys.k
    flat, k = grouped.reshape(batch * heads, -1, dim), k.reshape(-1, *k.shape[2:])
    if keys.layout == "columns":
        logits = jnp.einsum("ngd,nds->ngs", flat, k, preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("nsd,ngd->nsg", k[..., :dim], flat, preferred_element_type=jnp.float32).swapaxes(1, 2)
    return logits.reshape(batch, heads, -1, logits.shape[-1])


def _extents(keys: Keys) -> list[tuple[int, int]]:
    """First page and end of every extent."""
    ends = [0]
    for part in keys.k:
        ends.append(ends[-1] + len(part))
    return list(itertools.pairwise(ends))


def _visit(keys: Keys, table: PageTable, softcap, extra, observe: tuple[Observe, ...], extents: int, grouped, by_page):
    """Attends to the pages of the first `extents` extents where they lie; there are no others in use.

    Returns maximum, sum and weighted values of every row's softmax over the pages it owns, and the statistics of its slots.
    """
    batch, spans = grouped.shape[0], _extents(keys)[:extents]
    end = spans[-1][1]
    owner, index = jnp.minimum(table.owner[:end], batch - 1), table.index[:end]
    seen = by_page.at[owner, index].get(mode="promise_in_bounds") & (table.owner[:end] < batch)[:, None, None]
    query = grouped.at[owner].get(mode="promise_in_bounds")
    parts = [
        _attend_pages(query[start:stop], k, v, seen[start:stop], softcap)
        for (start, stop), k, v in zip(spans, keys.k[:extents], keys.v[:extents], strict=True)
    ]
    top, total, out, weights = (jnp.concatenate(part) for part in zip(*parts, strict=True))

    inside, owned = jnp.minimum(table.pages, end - 1), table.owned[..., None, None]

    def to_rows(per_page):
        return per_page.at[inside].get(mode="promise_in_bounds")

    tops = jnp.where(owned, to_rows(top), NEG_INF)  # [B, T, Hkv, G]
    highest = tops.max(1) if extra is None else jnp.maximum(tops.max(1), extra)
    share = jnp.where(owned, jnp.exp(tops - highest[:, None]), 0)
    denominator = jnp.where(owned, share * to_rows(total), 0).sum(1)
    denominator = denominator if extra is None else denominator + jnp.exp(extra - highest)
    numerator = jnp.where(owned[..., None], share[..., None] * to_rows(out), 0).sum(1)
    observed = []
    for what in observe:
        factor = jnp.exp(jnp.minimum(top - highest[owner], 0)) / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)[owner]
        statistic = to_rows(what.of(weights[:, :, :, None], factor[..., None]))  # of [P, Hkv, Z]
        statistic = jnp.where(owned, statistic, 0).swapaxes(1, 2)
        observed.append(statistic.reshape(batch, statistic.shape[1], -1))
    return highest, denominator, numerator, tuple(observed)


def _shared_pages(keys: Keys, table: PageTable, softcap, grouped, by_page, highest, denominator, numerator):
    """Adds the pages that a row reads but another owns, a few at a time."""
    batch, length = table.pages.shape
    borrowed = (table.present & ~table.owned).reshape(-1)

    def add(carry):
        pairs = jnp.nonzero(borrowed, size=batch * length + PAGES_AT_A_TIME, fill_value=batch * length)[0]

        def turn(i, carry):
            highest, denominator, numerator = carry
            pair = jax.lax.dynamic_slice(pairs, (i * PAGES_AT_A_TIME,), (PAGES_AT_A_TIME,))
            row = jnp.minimum(pair // length, batch - 1)
            seen = by_page[row, pair % length] & (pair < batch * length)[:, None, None]
            page = table.pages[row, pair % length]
            top, total, out, _ = _attend_pages(grouped[row], taken(keys.k, page), taken(keys.v, page), seen, softcap)
            higher = highest.at[row].max(top)
            fade, share = jnp.exp(highest - higher), jnp.where(seen.any((-1, -2))[:, None, None], jnp.exp(top - higher[row]), 0)
            denominator = (denominator * fade).at[row].add(share * total)
            return higher, denominator, (numerator * fade[..., None]).at[row].add(share[..., None] * out)

        return jax.lax.fori_loop(0, -(-borrowed.sum() // PAGES_AT_A_TIME), turn, carry)

    return jax.lax.cond(borrowed.any(), add, lambda carry: carry, (highest, denominator, numerator))


def _attend_pages(query, k, v, seen, softcap):
    """Pages on their own, [W, Hkv, ...]: maximum, sum and weighted values of each one's softmax (float32), and the weights."""
    logits = jnp.einsum("phgd,phdz->phgz", query, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, :, None], capped(logits, softcap), NEG_INF)
    top = logits.max(-1)
    weights = jnp.exp(logits - top[..., None])
    out = jnp.einsum("phgz,phzd->phgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return top, weights.sum(-1), out, weights


def _chunk(q, keys: Keys, table: PageTable, mask: Mask, scale: float, softcap):
    """Attention of a chunk that has been written, over the slots up to it."""
    query: Any = mask.query
    batch, size, _, dim = q.shape
    grouped = (q * scale).astype(keys.k[0].dtype).reshape(batch, size, keys.heads, -1, dim).transpose(0, 2, 3, 1, 4)
    span = min(SLOTS_AT_A_TIME, keys.capacity)

    def turn(carry):
        first, highest, denominator, numerator = carry
        k, v, slots = _window(keys, table, first, span)
        seen = (slots >= first) & (slots <= query[..., None])  # [B, S, K]
        logits = jnp.einsum("bhgqd,bhdk->bhgqk", grouped, k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None, None], capped(logits, softcap), NEG_INF)
        higher = jnp.maximum(highest, logits.max(-1))
        weights, fade = jnp.exp(logits - higher[..., None]), jnp.exp(highest - higher)
        part = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return slots[-1] + 1, higher, denominator * fade + weights.sum(-1), numerator * fade[..., None] + part

    empty = jnp.zeros(grouped.shape, jnp.float32)
    start = (jnp.int32(0), jnp.full(grouped.shape[:-1], NEG_INF, jnp.float32), empty[..., 0], empty)
    end = jnp.minimum((query + 1 if mask.length is None else mask.length).max(), keys.capacity)
    *_, denominator, numerator = jax.lax.while_loop(lambda carry: carry[0] < end, turn, start)
    out = numerator / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _window(keys: Keys, table: PageTable, start, size: int):
    """Copies of about `size` slots of every row from slot `start` on: keys [B, Hkv, D, K], values [B, Hkv, K, D], and their slots [K].

    They may begin earlier than asked for, never later, and end earlier too, where a page ends.
    """
    batch, length = table.pages.shape
    if size < keys.page_size:
        page, first = start // keys.page_size, jnp.minimum(start % keys.page_size, keys.page_size - size)
        pages = jax.lax.dynamic_index_in_dim(table.pages, page, 1, keepdims=False)
        k, v = _slices(keys.k, pages, 3, first, size), _slices(keys.v, pages, 2, first, size)
        return k, v, page * keys.page_size + first + jnp.arange(size, dtype=jnp.int32)
    count = min(size // keys.page_size, length)
    first = jnp.minimum(start // keys.page_size, length - count)
    pages = jax.lax.dynamic_slice_in_dim(table.pages, first, count, 1)
    k, v = taken(keys.k, pages), taken(keys.v, pages)
    k = k.reshape(batch, count, *k.shape[1:]).transpose(0, 2, 3, 1, 4)
    v = v.reshape(batch, count, *v.shape[1:]).swapaxes(1, 2)
    slots = first * keys.page_size + jnp.arange(count * keys.page_size, dtype=jnp.int32)
    return k.reshape(*k.shape[:3], -1), v.reshape(*v.shape[:2], -1, v.shape[-1]), slots


def _slices(parts: tuple[jax.Array, ...], pages: jax.Array, axis: int, first, size: int) -> jax.Array:
    """Part of an axis of these pages, one slice a page: for pages that are large and few; zeros for an id beyond the pool."""
    found, start = jnp.zeros((), parts[0].dtype), 0
    for part in parts:
        pieces = []
        for w in range(pages.shape[0]):
            begin = [jnp.clip(pages[w] - start, 0, len(part) - 1), *[jnp.int32(0)] * 3]
            sizes = [1, *part.shape[1:]]
            begin[axis], sizes[axis] = jnp.asarray(first, jnp.int32), size
            pieces.append(jax.lax.dynamic_slice(part, begin, sizes))
        here = (pages >= start) & (pages < start + len(part))
        found = jnp.where(here.reshape(-1, 1, 1, 1), jnp.concatenate(pieces), found)
        start += len(part)
    return found
