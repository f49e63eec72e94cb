"""The paged store: one pool of pages per layer, and a block table that says which pages are a row's (PagedAttention, arXiv:2309.06180).

More dims: P pages of the pool, T pages of a row at most, Z tokens of a page (C = T * Z slots of a row), W pages at a time.

A page holds Z slots of all kv heads, keys `[P, Hkv, D, Z]` and values `[P, Hkv, Z, D]`. The same page ids serve all layers. As in the dense
store, a slot holds any token of each kv head, so an evicting policy lives on pages too: it has few of them.

Decode attention on a CPU. Gathering a row's pages costs more than reading them: XLA copies them, at a third of the bandwidth. So decode
attention turns the matter around and visits the pool where it lies: every page is multiplied with the query of the row that owns it, has a
softmax of its own, and is multiplied with its values; then each row combines its pages by their maxima and sums, as the splits of flash
decoding are combined. A page that several rows share (a common prefix, a fork) has one owner here, and is gathered for its other readers.
The pool is cut into extents, arrays of their own; those behind the last page in use are not read. (A branch for every extent alone, instead
of one for how many, took 20 to 50 microseconds each: the few pages of an extent keep no core busy, and branches wait for one another.)

Memory nobody has written: keys of empty slots are masked. Values are multiplied by a weight of zero, so they must be finite: `init` fills
them with zeros whatever else it fills.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import checks
from kvjax.cache.attention import NEG_INF
from kvjax.cache.state import CacheShape
from kvjax.errors import SpecError

PAGES_AT_A_TIME = 8
"""Pages gathered per turn for readers who do not own them."""

SLOTS_AT_A_TIME = 128
"""Slots that a chunk of a prompt attends to per turn: few, because those behind its queries are work for nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """Keys (rotated) and values of one layer, one array per extent."""

    k: tuple[Float[Array, "P Hkv D Z"], ...]
    v: tuple[Float[Array, "P Hkv Z D"], ...]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """First page and end of every extent."""
        ends = [0]
        for part in self.k:
            ends.append(ends[-1] + part.shape[0])
        return list(itertools.pairwise(ends))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages are whose; what all layers share.

    Attributes:
      pages: page ids of every row in the order of its slots; P (any id beyond the pool) where it has none.
      owner: the row that reads a page where it lies; B for a page nobody has.
      index: which of its owner's pages a page is.
    """

    pages: Int[Array, "B T"]
    owner: Int[Array, " P"]
    index: Int[Array, " P"]

    @property
    def present(self) -> Bool[Array, "B T"]:
        return self.pages < self.owner.shape[0]

    @property
    def owned(self) -> Bool[Array, "B T"]:
        """Pages a row reads where they lie; the other present ones are read by gathering."""
        return self.present & (self.owner[self._inside] == jnp.arange(self.pages.shape[0])[:, None])

    @property
    def _inside(self) -> Int[Array, "B T"]:
        return jnp.minimum(self.pages, self.owner.shape[0] - 1)

    def to_pages(self, per_row: Float[Array, "B T ..."]) -> Float[Array, "P ..."]:
        """What belongs to a page by its owner; anything at all for a page nobody has."""
        owner = jnp.minimum(self.owner, self.pages.shape[0] - 1)
        return per_row.at[owner, self.index].get(mode="promise_in_bounds")


def page_table(pages: Int[Array, "B T"], num_pages: int) -> PageTable:
    """The table of these rows over a pool of `num_pages` pages. A shared page is owned by one of its rows."""
    batch, length = pages.shape
    flat = pages.reshape(-1)
    pair = jnp.full(num_pages, batch * length, jnp.int32).at[flat].min(jnp.arange(batch * length, dtype=jnp.int32), mode="drop")
    return PageTable(pages, pair // length, pair % length)


def extent_sizes(num_pages: int, extents: int) -> tuple[int, ...]:
    """Sizes of at most `extents` extents, each as large as all before it together, so that few of them skip much."""
    ends = [num_pages >> i for i in reversed(range(extents))]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]) if end > start)


LARGEST_PAGE = 2**20
"""Slots: no model has a context so long."""


@dataclasses.dataclass(frozen=True)
class PagedStore:
    """Storage in pages of `page_size` slots.

    Attributes:
      page_size: slots of a page.
      extents: arrays the pool is cut into; decode attention skips those behind the last page in use.
    """

    page_size: int = 64
    extents: int = 1

    name: ClassVar[str] = "paged"

    def __post_init__(self):
        checks.whole("extents", self.extents, 1)
        if checks.whole("page_size", self.page_size, -checks.LARGEST, LARGEST_PAGE) < 1:
            raise SpecError(f"page_size={self.page_size}: a page holds at least one slot; 8 to 128 are usual")

    def pages_of(self, slots: int) -> int:
        """Pages that hold `slots` slots."""
        return -(-slots // self.page_size)

    def pool(self, shape: CacheShape, num_pages: int, fill: float = 0.0) -> PagedLayer:
        """An empty pool; `fill` is what the keys hold before anything is written."""
        sizes = extent_sizes(num_pages, self.extents)
        heads, dim = shape.num_kv_heads, shape.head_dim
        return PagedLayer(
            k=tuple(jnp.full((size, heads, dim, self.page_size), fill, shape.dtype) for size in sizes),
            v=tuple(jnp.zeros((size, heads, self.page_size, dim), shape.dtype) for size in sizes),
        )

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> PagedLayer:
        """A pool with room for `capacity` slots of every row."""
        return self.pool(shape, batch * self.pages_of(capacity), fill)

    def rounded(self, capacity: int) -> int:
        """The slots a row gets that asks for `capacity`."""
        return self.pages_of(capacity) * self.page_size

    def share(self, batch: int, capacity: int) -> PageTable:
        """A table that gives every row its `capacity` slots."""
        length = self.pages_of(capacity)
        return page_table(jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length), batch * length)

    def capacity(self, layer: PagedLayer, shared: PageTable) -> int:
        return shared.pages.shape[1] * self.page_size

    def token_bytes(self, layer: PagedLayer, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them."""
        part = layer.k[0]
        return part.shape[1], 2 * part.shape[2] * part.dtype.itemsize

    def fill(self, layer: PagedLayer, shared: PageTable, k, v, valid: Bool[Array, "B S"]) -> PagedLayer:
        """Writes tokens 0..S-1 of every row into its slots 0..S-1, where valid."""
        return self.write_chunk(layer, shared, jnp.zeros(k.shape[0], jnp.int32), k, v, valid)

    def fill_selected(
        self, layer: PagedLayer, shared: PageTable, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"],
        rows: Bool[Array, " B"] | None = None,
    ) -> PagedLayer:  # fmt: skip
        """Rewrites the pages of these rows (None: all): slot c holds token `index[..., c]`, zeros where the index is S or more."""
        batch, _, heads, dim = k.shape
        index = jnp.broadcast_to(index, (batch, heads, index.shape[-1])).swapaxes(1, 2)[..., None]  # [B, C, Hkv, 1]
        k, v = (jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0) for x in (k, v))
        k, v = (x.reshape(batch, -1, self.page_size, heads, dim) for x in (k, v))  # [B, T, Z, Hkv, D]
        pages = shared.pages if rows is None else jnp.where(rows[:, None], shared.pages, shared.owner.shape[0])
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k.transpose(0, 1, 3, 4, 2), v.transpose(0, 1, 3, 2, 4)))
        return self._put_pages(layer, k, v, pages.reshape(-1))

    def write_chunk(
        self,
        layer: PagedLayer,
        shared: PageTable,
        start: Int[Array, " B"],
        k: Float[Array, "B S Hkv D"],
        v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> PagedLayer:
        """Writes token s of row b into slot `start[b] + s`, where valid."""
        slot = jnp.broadcast_to((start[:, None] + jnp.arange(k.shape[1]))[..., None], k.shape[:3])
        return self._scatter(layer, shared, slot, k, v, valid[..., None])

    def write(
        self, layer: PagedLayer, shared: PageTable, slot: Int[Array, "B h"], k: Float[Array, "B Hkv D"], v, active: Bool[Array, " B"]
    ) -> PagedLayer:
        """Writes one token per active row into `slot`; the other rows stay as they are."""
        slot = jnp.broadcast_to(slot, k.shape[:2])[:, None]
        return self._scatter(layer, shared, slot, k[:, None], v[:, None], active[:, None, None])

    def _scatter(self, layer: PagedLayer, shared: PageTable, slot: Int[Array, "B S Hkv"], k, v, valid) -> PagedLayer:
        length = shared.pages.shape[1]
        which = jnp.minimum(slot // self.page_size, length - 1)
        page = shared.pages[jnp.arange(slot.shape[0])[:, None, None], which]
        page = jnp.where(valid & (slot < length * self.page_size), page, shared.owner.shape[0])
        offset, head = slot % self.page_size, jnp.arange(slot.shape[2])
        new_k, new_v = list(layer.k), list(layer.v)
        for i, (start, end) in enumerate(layer.extents):
            where = _within(page, start, end)
            new_k[i] = new_k[i].at[where, head, :, offset].set(k.astype(new_k[i].dtype), mode="drop")
            new_v[i] = new_v[i].at[where, head, offset].set(v.astype(new_v[i].dtype), mode="drop")
        return PagedLayer(tuple(new_k), tuple(new_v))

    def attend(
        self, layer: PagedLayer, shared: PageTable, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable, group_mass
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:
        """Attention of one query per row over its slots; arguments and results as in DenseStore.attend."""
        batch, heads, dim = q.shape
        kv_heads = layer.k[0].shape[1]
        grouped = (q * dim**-0.5).astype(layer.k[0].dtype).reshape(batch, kv_heads, -1, dim)
        if readable is not None:
            visible = visible & readable(self._row_logits(layer, shared, grouped, visible))[:, :, 0]
        by_page = visible.reshape(batch, visible.shape[1], -1, self.page_size).swapaxes(1, 2)  # [B, T, h, Z]
        grouped, by_page = jax.lax.optimization_barrier((grouped, by_page))  # or XLA rotates a row's query anew for each of its pages
        ends = jnp.array([end for _, end in layer.extents])
        last = (jnp.where(shared.owner < batch, jnp.arange(len(shared.owner)), 0).max() >= ends).sum()
        visits = [partial(self._visit, layer, shared, group_mass, extents) for extents in range(1, len(layer.k) + 1)]
        highest, denominator, numerator, mass = jax.lax.switch(last, visits, grouped, by_page)
        if group_mass is None:
            highest, denominator, numerator = self._shared_pages(layer, shared, grouped, by_page, highest, denominator, numerator)
        denominator = jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)
        return (numerator / denominator[..., None]).reshape(batch, heads, dim).astype(q.dtype), mass

    def _visit(self, layer: PagedLayer, shared: PageTable, group_mass, extents: int, grouped, by_page):
        """Attends to the pages of the first `extents` extents where they lie; there are no others in use.

        Returns maximum, sum and weighted values of every row's softmax over the pages it owns, and the mass of its slots (or None).
        """
        batch, end = grouped.shape[0], layer.extents[extents - 1][1]
        owner, index = jnp.minimum(shared.owner[:end], batch - 1), shared.index[:end]
        seen = by_page.at[owner, index].get(mode="promise_in_bounds") & (shared.owner[:end] < batch)[:, None, None]
        query = grouped.at[owner].get(mode="promise_in_bounds")
        parts = [
            _attend_pages(query[start:stop], layer.k[i], layer.v[i], seen[start:stop], group_mass is not None)
            for i, (start, stop) in enumerate(layer.extents[:extents])
        ]
        top, total, out, *weights = (jnp.concatenate(part) for part in zip(*parts, strict=True))

        inside, owned = jnp.minimum(shared.pages, end - 1), shared.owned[..., None, None]

        def to_rows(per_page):
            return per_page.at[inside].get(mode="promise_in_bounds")

        tops = jnp.where(owned, to_rows(top), NEG_INF)  # [B, T, Hkv, G]
        highest = tops.max(1)
        share = jnp.where(owned, jnp.exp(tops - highest[:, None]), 0)
        denominator = jnp.where(owned, share * to_rows(total), 0).sum(1)
        numerator = jnp.where(owned[..., None], share[..., None] * to_rows(out), 0).sum(1)
        if group_mass is None:
            return highest, denominator, numerator, None
        scale = jnp.exp(jnp.minimum(top - highest[owner], 0)) / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)[owner]
        mass = group_mass(weights[0][:, :, :, None], scale[..., None])  # [P, Hkv, Z]
        mass = jnp.where(owned, to_rows(mass), 0).swapaxes(1, 2)
        return highest, denominator, numerator, mass.reshape(batch, mass.shape[1], -1)

    def _shared_pages(self, layer: PagedLayer, shared: PageTable, grouped, by_page, highest, denominator, numerator):
        """Adds the pages that a row reads but another owns, a few at a time."""
        batch, length = shared.pages.shape
        borrowed = (shared.present & ~shared.owned).reshape(-1)

        def add(carry):
            pairs = jnp.nonzero(borrowed, size=batch * length + PAGES_AT_A_TIME, fill_value=batch * length)[0]

            def turn(i, carry):
                highest, denominator, numerator = carry
                pair = jax.lax.dynamic_slice(pairs, (i * PAGES_AT_A_TIME,), (PAGES_AT_A_TIME,))
                row = jnp.minimum(pair // length, batch - 1)
                seen = by_page[row, pair % length] & (pair < batch * length)[:, None, None]
                page = shared.pages[row, pair % length]
                top, total, out = _attend_pages(grouped[row], *self._take(layer, page), seen)
                higher = highest.at[row].max(top)
                fade, share = jnp.exp(highest - higher), jnp.where(seen.any((-1, -2))[:, None, None], jnp.exp(top - higher[row]), 0)
                denominator = (denominator * fade).at[row].add(share * total)
                return higher, denominator, (numerator * fade[..., None]).at[row].add(share[..., None] * out)

            turns = -(-borrowed.sum() // PAGES_AT_A_TIME)
            return jax.lax.fori_loop(0, turns, turn, carry)

        return jax.lax.cond(borrowed.any(), add, lambda carry: carry, (highest, denominator, numerator))

    def _row_logits(self, layer: PagedLayer, shared: PageTable, grouped, visible) -> Float[Array, "B Hkv G C"]:
        """Every row's logits in the order of its slots, for policies that choose by them."""
        length = shared.pages.shape[1]

        def turn(i, logits):
            keys, _ = self._take(layer, jax.lax.dynamic_index_in_dim(shared.pages, i, 1, keepdims=False))
            part = jnp.einsum("bhgd,bhdz->bhgz", grouped, keys, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(logits, part, i * self.page_size, 3)

        empty = jnp.zeros((*grouped.shape[:3], length * self.page_size), jnp.float32)
        return jnp.where(visible[:, :, None], jax.lax.fori_loop(0, length, turn, empty), NEG_INF)

    def attend_chunk(
        self, layer: PagedLayer, shared: PageTable, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"],
        context: int | None, group_mass,
    ) -> tuple[Float[Array, "B S H D"], None]:  # fmt: skip
        """Attention of a chunk that has just been written, over the pages up to it; as DenseStore.attend_chunk.

        The softmax runs along with the pages, a few at a time; how many depends on the rows, not on the program. `context` is not needed.
        """
        assert group_mass is None, "a policy that observes keeps its prompt in a dense store until it is compressed"
        batch, size, _, dim = q.shape
        kv_heads = layer.k[0].shape[1]
        grouped = (q * dim**-0.5).astype(layer.k[0].dtype).reshape(batch, size, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
        position = length[:, None] + jnp.arange(size, dtype=jnp.int32)
        span = min(SLOTS_AT_A_TIME, self.capacity(layer, shared))

        def turn(carry):
            first, highest, denominator, numerator = carry
            keys, values, slots = self._window(layer, shared, first, span)
            seen = (slots >= first) & (slots <= position[..., None])  # [B, S, K]
            logits = jnp.einsum("bhgqd,bhdk->bhgqk", grouped, keys, preferred_element_type=jnp.float32)
            logits = jnp.where(seen[:, None, None], logits, NEG_INF)
            higher = jnp.maximum(highest, logits.max(-1))
            weights, fade = jnp.exp(logits - higher[..., None]), jnp.exp(highest - higher)
            part = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return slots[-1] + 1, higher, denominator * fade + weights.sum(-1), numerator * fade[..., None] + part

        empty = jnp.zeros(grouped.shape, jnp.float32)
        start = (jnp.int32(0), jnp.full(grouped.shape[:-1], NEG_INF, jnp.float32), empty[..., 0], empty)
        end = jnp.minimum((length + valid.sum(-1)).max(), self.capacity(layer, shared))
        *_, denominator, numerator = jax.lax.while_loop(lambda carry: carry[0] < end, turn, start)
        out = numerator / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)[..., None]
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype), None

    def _window(self, layer: PagedLayer, shared: PageTable, start, size: int):
        """Copies of about `size` slots of every row from slot `start` on: keys [B, Hkv, D, K], values [B, Hkv, K, D], and their slots [K].

        They may begin earlier than asked for, never later, and end earlier too, where a page ends.
        """
        batch, length = shared.pages.shape
        if size < self.page_size:
            page, first = start // self.page_size, jnp.minimum(start % self.page_size, self.page_size - size)
            keys, values = self._take(layer, jax.lax.dynamic_index_in_dim(shared.pages, page, 1, keepdims=False), first, size)
            return keys, values, page * self.page_size + first + jnp.arange(size, dtype=jnp.int32)
        count = min(size // self.page_size, length)
        first = jnp.minimum(start // self.page_size, length - count)
        keys, values = self._take(layer, jax.lax.dynamic_slice_in_dim(shared.pages, first, count, 1).reshape(-1))
        keys = keys.reshape(batch, count, *keys.shape[1:]).transpose(0, 2, 3, 1, 4)
        values = values.reshape(batch, count, *values.shape[1:]).swapaxes(1, 2)
        slots = first * self.page_size + jnp.arange(count * self.page_size, dtype=jnp.int32)
        return keys.reshape(*keys.shape[:3], -1), values.reshape(*values.shape[:2], -1, values.shape[-1]), slots

    def copy_pages(self, layer: PagedLayer, source: Int[Array, " W"], target: Int[Array, " W"]) -> PagedLayer:
        """Writes what stands in pages `source` into pages `target`; targets beyond the pool are dropped."""
        return self._put_pages(layer, *self._take(layer, source), target)

    def _put_pages(self, layer: PagedLayer, k: Float[Array, "W Hkv D Z"], v: Float[Array, "W Hkv Z D"], page) -> PagedLayer:
        def put(parts, new):
            where = [_within(page, start, end) for start, end in layer.extents]
            return tuple(part.at[at].set(new.astype(part.dtype), mode="drop") for part, at in zip(parts, where, strict=True))

        return PagedLayer(put(layer.k, k), put(layer.v, v))

    def poison(self, layer: PagedLayer, shared: PageTable, empty: Bool[Array, "B Hkv C"]) -> PagedLayer:
        """NaN keys in the slots marked empty and NaN in pages nobody has, for tests: whatever stands there must not matter."""
        batch, heads, _ = empty.shape
        empty = shared.to_pages(empty.reshape(batch, heads, -1, self.page_size).swapaxes(1, 2))
        nobodys = shared.owner >= batch
        empty |= nobodys[:, None, None]
        k, v = [], []
        for i, (start, end) in enumerate(layer.extents):
            k.append(jnp.where(empty[start:end, :, None], jnp.nan, layer.k[i]))
            v.append(jnp.where(nobodys[start:end, None, None, None], jnp.nan, layer.v[i]))
        return PagedLayer(tuple(k), tuple(v))

    def tokens(self, layer: PagedLayer, shared: PageTable, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection; zeros where a row has no page."""
        k, v = self._take(layer, shared.pages.reshape(-1))
        k, v = k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)  # [B*T, Z, Hkv, D]
        return tuple(x.reshape(batch, -1, *x.shape[2:]) for x in (k, v))  # type: ignore[return-value]

    def _take(
        self, layer: PagedLayer, page: Int[Array, " W"], first=0, size: int | None = None
    ) -> tuple[Float[Array, "W Hkv D Z"], Float[Array, "W Hkv Z D"]]:
        """Copies of these pages, or of `size` slots of them from slot `first` on; zeros for an id beyond the pool."""
        k: Any = jnp.zeros((), layer.k[0].dtype)
        v: Any = jnp.zeros((), layer.v[0].dtype)
        for i, (start, end) in enumerate(layer.extents):
            here = ((page >= start) & (page < end))[:, None, None, None]
            inside = jnp.clip(page - start, 0, end - start - 1)
            if size is None:
                keys, values = (part.at[inside].get(mode="promise_in_bounds") for part in (layer.k[i], layer.v[i]))
            else:
                keys, values = _slices(layer.k[i], inside, 3, first, size), _slices(layer.v[i], inside, 2, first, size)
            k, v = jnp.where(here, keys, k), jnp.where(here, values, v)
        return k, v


def _slices(part: Float[Array, "P ..."], page: Int[Array, " W"], axis: int, first, size: int) -> Float[Array, "W ..."]:
    """Part of an axis of these pages, one slice a page: for pages that are large and few."""
    pieces = []
    for w in range(page.shape[0]):
        start: list[Any] = [page[w], *[jnp.int32(0)] * 3]
        sizes = [1, *part.shape[1:]]
        start[axis], sizes[axis] = jnp.asarray(first, jnp.int32), size
        pieces.append(jax.lax.dynamic_slice(part, start, sizes))
    return jnp.concatenate(pieces)


def _within(page: Int[Array, "..."], start: int, end: int) -> Int[Array, "..."]:
    """Page ids relative to an extent; out of range, so that a scatter drops them, for pages outside."""
    return jnp.where((page >= start) & (page < end), page - start, end - start)


def _attend_pages(
    query: Float[Array, "W Hkv G D"], k: Float[Array, "W Hkv D Z"], v: Float[Array, "W Hkv Z D"], seen, weights: bool = False
):
    """Each page on its own: maximum, sum and weighted values of its softmax (float32), with `weights` the weights too."""
    logits = jnp.einsum("phgd,phdz->phgz", query, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, :, None], logits, NEG_INF)
    top = logits.max(-1)
    exponentials = jnp.exp(logits - top[..., None])
    out = jnp.einsum("phgz,phzd->phgd", exponentials.astype(v.dtype), v, preferred_element_type=jnp.float32)
    result = (top, exponentials.sum(-1), out)
    return (*result, exponentials) if weights else result
