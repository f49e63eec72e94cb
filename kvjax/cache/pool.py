"""The pool of a layer: keys and values in pages, and where tokens go in it and come from.

Dims: B rows, S tokens of a call, Hkv kv heads, h = Hkv or 1, D head dim, P pages, Z slots of a page, T pages of a row at most, C = T * Z
slots of a row, W pages at a time.

A slot is a place for the key and value of one token in each kv head, any token: a policy that evicts lives on pages like any other. The
same page ids serve all layers. A dense cache is one page a row: there is no table, and page b is row b.

Two layouts. `columns` is what XLA's CPU backend computes with best: keys transposed, [P, Hkv, D, Z], so that both products of attention
are plain matrix products over arrays as they lie, and the pool in extents, arrays one after the other, of which those behind the last page
in use are not read. `rows` is what kernels and host memory want: [P, Hkv, Z, D] for both, what a kv head holds in a page being one piece of
memory. On a TPU D is padded to whole lanes.

Values of slots that hold nothing are finite: memory starts as zeros, and attention multiplies them by zero.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.kernels.attention import Keys, PageTable, page_table
from kvjax.kernels.attention.xla import gathered, taken

Platform = Literal["cpu", "gpu", "tpu"]

__all__ = ["PageTable", "Platform", "Pool", "extent_sizes", "page_table"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys (rotated) and values of one layer.

    Attributes:
      k, v: one array per extent; none where the pool is elsewhere (kvjax.host_driven).
      layout: static, as are page_size, Z, and head_dim, D.
    """

    k: tuple[Float[Array, "P Hkv ..."], ...]
    v: tuple[Float[Array, "P Hkv Z D"], ...]
    layout: Literal["columns", "rows"] = dataclasses.field(metadata=dict(static=True))
    page_size: int = dataclasses.field(metadata=dict(static=True))
    head_dim: int = dataclasses.field(metadata=dict(static=True))

    @property
    def num_pages(self) -> int:
        return sum(part.shape[0] for part in self.v)

    @property
    def num_heads(self) -> int:
        return self.v[0].shape[1]

    @property
    def token_bytes(self) -> int:
        """What one token takes in one kv head."""
        return sum(x.size * x.dtype.itemsize for x in (*self.k, *self.v)) // (self.num_pages * self.num_heads * self.page_size)

    def capacity(self, table: PageTable | None) -> int:
        """Slots of a row."""
        return self.page_size * (1 if table is None else table.pages.shape[1])

    def keys(self, table: PageTable | None, most: int | None = None) -> Keys:
        """What attention takes; `most`: it reads no more slots of a row."""
        return Keys(self.k, self.v, table, self.layout, most)

    # ------------------------------------------------------------------------------------------------------------------------- tokens

    def put(
        self, table: PageTable | None, slot: Int[Array, "B S h"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S 1"],
    ) -> "Pool":  # fmt: skip
        """Token s of row b in `slot` of every kv head, where valid."""
        page, offset, head = self.places(table, jnp.broadcast_to(slot, k.shape[:3]), valid)

        def at(part: Array, x: Float[Array, "B S Hkv D"], start: int, columns: bool) -> Array:
            inside = (page >= start) & (page < start + len(part))
            where = jnp.where(inside, page - start, len(part))  # beyond the end, and so dropped
            target = part.at[where, head, :, offset] if columns else part.at[where, head, offset]
            return target.set(self._wide(x, part, columns), mode="drop")

        return self._each(lambda part, new, start, columns: at(part, new, start, columns), k, v)

    def places(
        self, table: PageTable | None, slot: Int[Array, "B S Hkv"], valid: Bool[Array, "B S 1"]
    ) -> tuple[Int[Array, "B S Hkv"], Int[Array, "B S Hkv"], Int[Array, " Hkv"]]:
        """Page and offset of every slot, and the heads; the page is P, or more, for slots that a row has not or that are not valid."""
        batch, _, heads = slot.shape
        row = jnp.arange(batch)[:, None, None]
        which = slot // self.page_size
        length = 1 if table is None else table.pages.shape[1]
        page = jnp.broadcast_to(row, slot.shape) if table is None else table.pages[row, jnp.minimum(which, length - 1)]
        page = jnp.where(valid & (which < length), page, self.num_pages)
        return page, slot % self.page_size, jnp.arange(heads)

    def filled(
        self, table: PageTable | None, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], valid: Bool[Array, "B S"]
    ) -> "Pool":
        """Tokens 0..S-1 of every row in its slots 0..S-1. Without a table the rest is zeros, tokens that are not valid too."""
        if table is not None:
            slot = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32)[None, :, None], (*k.shape[:2], 1))
            return self.put(table, slot, k, v, valid[..., None])
        k, v = (jnp.where(valid[..., None, None], x, 0).swapaxes(1, 2) for x in (k, v))  # [B, Hkv, S, D]
        spare = ((0, 0), (0, 0), (0, self.page_size - k.shape[2]), (0, 0))
        return self._paged(jnp.pad(k, spare), jnp.pad(v, spare), None)

    def chosen(
        self, table: PageTable | None, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"],
        rows: Bool[Array, " B"] | None = None,
    ) -> "Pool":  # fmt: skip
        """Slot c of these rows (None: all) holds token `index[..., c]`, zeros where the index is S or more."""
        index = jnp.broadcast_to(index, (k.shape[0], k.shape[2], index.shape[-1]))[..., None]
        k, v = (jnp.take_along_axis(x.swapaxes(1, 2), index, axis=2, mode="fill", fill_value=0) for x in (k, v))  # [B, Hkv, C, D]
        if table is None:
            new = self._paged(k, v, None)
            return new if rows is None else jax.tree.map(lambda new, old: select_rows(rows, new, old), new, self)
        pages = table.pages if rows is None else jnp.where(rows[:, None], table.pages, self.num_pages)

        def cut(x):
            batch, heads, _, dim = x.shape
            return x.reshape(batch, heads, -1, self.page_size, dim).swapaxes(1, 2).reshape(-1, heads, self.page_size, dim)

        return self._paged(cut(k), cut(v), pages.reshape(-1))

    def copied(self, source: Int[Array, " W"], target: Int[Array, " W"]) -> "Pool":
        """What stands in pages `source` in pages `target`, too; targets beyond the pool are dropped."""
        gather: Callable[..., Array] = gathered if self.layout == "rows" else taken
        return self._put_pages(gather(self.k, source), gather(self.v, source), target)

    def poisoned(self, table: PageTable | None, empty: Bool[Array, "B Hkv C"]) -> "Pool":
        """NaN keys in the slots marked empty, NaN in pages nobody has, for tests: whatever stands there must not matter."""
        batch, heads, _ = empty.shape
        nobodys = jnp.zeros(batch, bool)
        if table is not None:
            empty = table.to_pages(empty.reshape(batch, heads, -1, self.page_size).swapaxes(1, 2))
            nobodys = table.owner >= batch
        k, v = [], []
        for start, key, value in zip(self._starts, self.k, self.v, strict=True):
            here = slice(start, start + len(key))
            lost = nobodys[here][:, None, None]
            slots = empty[here] | lost
            k.append(jnp.where(slots[:, :, None] if self.layout == "columns" else slots[..., None], jnp.nan, key))
            v.append(jnp.where(lost[..., None], jnp.nan, value))
        return dataclasses.replace(self, k=tuple(k), v=tuple(v))

    # ------------------------------------------------------------------------------------------------------------------------- inside

    @property
    def _starts(self) -> Iterator[int]:
        return itertools.accumulate((len(part) for part in self.v[:-1]), initial=0)

    def _each(self, change: Callable[[Array, Any, int, bool], Array], k: Any, v: Any) -> "Pool":
        """The pool with `change(part, new, its first page, whether its slots are columns)` for every extent."""
        columns, starts = self.layout == "columns", list(self._starts)
        new_k = tuple(change(part, k, start, columns) for part, start in zip(self.k, starts, strict=True))
        new_v = tuple(change(part, v, start, False) for part, start in zip(self.v, starts, strict=True))
        return dataclasses.replace(self, k=new_k, v=new_v)

    def _wide(self, x: Float[Array, "... D"], part: Array, columns: bool) -> Array:
        """In the pool's type, with zeros behind where its vectors are wider."""
        more = 0 if columns else part.shape[-1] - x.shape[-1]
        x = x.astype(part.dtype)
        return x if not more else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])

    def _paged(self, k: Float[Array, "W Hkv Z D"], v: Float[Array, "W Hkv Z D"], pages: Int[Array, " W"] | None) -> "Pool":
        """Whole pages, `pages` of them or all there are."""
        k, v = (self._wide(x, self.v[0], False) for x in (k, v))
        if self.layout == "columns":
            k = k.swapaxes(2, 3)
        if pages is None:
            return dataclasses.replace(self, k=(k,), v=(v,))
        return self._put_pages(k, v, pages)

    def _put_pages(self, k: Array, v: Array, pages: Int[Array, " W"]) -> "Pool":
        def put(part: Array, new: Array, start: int, columns: bool) -> Array:
            inside = (pages >= start) & (pages < start + len(part))
            return part.at[jnp.where(inside, pages - start, len(part))].set(new.astype(part.dtype), mode="drop")

        return self._each(put, k, v)


def extent_sizes(num_pages: int, extents: int) -> tuple[int, ...]:
    """Sizes of at most `extents` extents, each as large as all before it together, so that few of them skip much."""
    ends = [num_pages >> i for i in reversed(range(extents))]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]) if end > start)


def select_rows(rows: Bool[Array, " B"], new: Any, old: Any):
    """`new` in these rows, `old` in the others, along the first axis."""
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
