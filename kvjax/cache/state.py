"""The KV state: a value that goes into the decoder and comes out of it.

Dims: B rows of the batch, Hkv kv heads, h = Hkv or 1 (shared by all heads), C slots of a row, D head dim.

A slot is a place in a row's storage. For each kv head it holds the key and value of one token. Where a policy keeps everything, slot i
holds position i and no books are kept. Where it evicts, each slot carries the true position of its token (-1: empty), and attention does
not care in which order slots stand, because keys are cached after RoPE.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.pool import Pool
from kvjax.cache.tiers import Ahead
from kvjax.kernels.attention import PageTable

Own = Any
"""A policy's state of a layer: a pytree of arrays [B, h, ..., C], the last axis being slots; an empty one where it keeps none."""


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The sizes of a model that its cache depends on."""

    num_layers: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """One layer's cache.

    Attributes:
      pool: keys and values.
      position: true position of the token in each slot, -1 where empty. None: slot i holds position i.
      next_slot: where the next token goes. None: slot `length`.
      budget: tokens a kv head may hold, of a policy that says so by layer or head. None: what the policy says of the prompt.
      own: the policy's state.
      queries: of the last step, for a policy that selects by them; None for others.
      traffic: so far, of a tier that fetches: tokens decoded, then rows (each of one kv head) that were held, wanted, and moved for them.
      observed: of a prompt that is staged, what attention has shown of every token, an array for each Observe that is asked for.
      row: rows of `own` that a call is about, where an engine keeps more rows than it computes; None: row b is b.
    """

    pool: Pool
    position: Int[Array, "B h C"] | None = None
    next_slot: Int[Array, "B h"] | None = None
    budget: Int[Array, "B h"] | None = None
    own: Own = ()
    queries: Float[Array, "B H D"] | None = None
    traffic: Float[Array, " 4"] | None = None
    observed: tuple[Float[Array, "B Hkv C"], ...] = ()
    row: Int[Array, " B"] | None = None

    def take(self, row: Int[Array, " B"] | None) -> "LayerState":
        """This layer with the books of these rows alone, over the whole pool; None: all rows. `own` stays whole, and is read by row."""
        if row is None:
            return self
        return dataclasses.replace(self._booked(jax.tree.map(lambda x: x.at[row].get(mode="clip"), self._books)), row=row)

    def put(self, new: "LayerState") -> "LayerState":
        """What `take` gave, changed, in its place; rows that do not exist are dropped."""
        row = new.row
        if row is None:
            return new
        books = jax.tree.map(lambda old, x: old.at[row].set(x, mode="drop"), self._books, new._books)
        return dataclasses.replace(new._booked(books), row=None)

    def rows_of_own(self) -> Own:
        """The policy's state of the rows of the call."""
        return self.own if self.row is None else jax.tree.map(lambda x: x.at[self.row].get(mode="clip"), self.own)

    def with_own(self, new: Own, before: Own) -> "LayerState":
        """The layer with its rows' state `new`; what is the very array that `rows_of_own` gave, `before`, is not written."""
        if self.row is None:
            return dataclasses.replace(self, own=new)
        own = jax.tree.map(lambda old, x, was: old if x is was else old.at[self.row].set(x, mode="drop"), self.own, new, before)
        return dataclasses.replace(self, own=own)

    def save(self, row: Int[Array, " 1"]) -> "LayerState":
        """What the device holds of a row beside the pool."""
        return dataclasses.replace(self.take(row), own=self.take(row).rows_of_own(), row=None, pool=None, traffic=None)  # type: ignore[arg-type]

    def restore(self, saved: "LayerState", row: Int[Array, " 1"]) -> "LayerState":
        """Puts what `save` gave into a row."""
        here = self.take(row)
        return self.put(here.with_own(saved.own, here.rows_of_own())._booked(saved._books))

    @property
    def _books(self) -> tuple:
        return self.position, self.next_slot, self.budget, self.queries

    def _booked(self, books: tuple) -> "LayerState":
        position, next_slot, budget, queries = books
        return dataclasses.replace(self, position=position, next_slot=next_slot, budget=budget, queries=queries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """A batch's cache.

    Attributes:
      layers: one LayerState per layer, each array a leaf of its own.
      length: tokens seen, which is the position of the next one.
      prompt_length: tokens of the whole prompt; budgets given as fractions are fractions of it.
      table: which pages are a row's, the same in all layers; None where row b is page b.
      row: rows of the layers' books that a call is about, where an engine keeps books of more rows than it computes; None: row b is b.
      ahead: what the next layer is going to read, while a step runs; None between steps.
    """

    layers: tuple[LayerState, ...]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    table: PageTable | None = None
    row: Int[Array, " B"] | None = None
    ahead: Ahead | None = None

    def layer(self, index: int) -> LayerState:
        """One layer, of the rows the call is about."""
        return self.layers[index].take(self.row)

    def with_layer(self, index: int, layer: LayerState) -> "KVState":
        """The state with `layer` (what `layer` gave, changed) in its place."""
        return self.over((*self.layers[:index], self.layers[index].put(layer), *self.layers[index + 1 :]))

    def over(self, layers: tuple[LayerState, ...]) -> "KVState":
        """The same rows over other layers: some of these, to run layer by layer, or none."""
        return dataclasses.replace(self, layers=tuple(layers))

    def handed(self, ahead: Ahead | None) -> "KVState":
        """The state with what the next layer is going to read."""
        return dataclasses.replace(self, ahead=ahead)
