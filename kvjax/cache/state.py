"""The KV state: a value that goes into the decoder and comes out of it.

Dims: B rows of the batch, Hkv kv heads, h = Hkv or 1 (metadata shared by all heads), C slots of a row, D head dim.

A slot is a place in a row's storage. For each kv head it holds the key and value of one token. Where a policy keeps everything, slot i
holds position i and no metadata exists. Where it evicts, each slot carries the true position of its token (-1: empty), and attention does
not care in which order slots stand, because keys are cached after RoPE.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


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
      store: keys and values, in the store's own layout.
      position: true position of the token in each slot, -1 where empty. None: slot i holds position i.
      score: the policy's statistic per slot. None: the policy keeps none. A prompt staged for several strategies has a
        tuple of these.
      next_slot: where the next token goes. None: slot `length`.
    """

    store: Any
    position: Int[Array, "B h C"] | None = None
    score: Any = None
    next_slot: Int[Array, "B h"] | None = None

    def take(self, row: Int[Array, " B"] | None) -> "LayerState":
        """This layer with the metadata of these rows alone, over the whole store; None: all rows."""
        return self if row is None else self._with(jax.tree.map(lambda x: x.at[row].get(mode="clip"), self._metadata), self.store)

    def put(self, new: "LayerState", row: Int[Array, " B"] | None) -> "LayerState":
        """The store of `new`, and its metadata in these rows of this layer (None: all); rows that do not exist are dropped."""
        if row is None:
            return new
        put = jax.tree.map(lambda old, x: old.at[row].set(x, mode="drop"), self._metadata, new._metadata)
        return self._with(put, new.store)

    @property
    def _metadata(self) -> tuple:
        return self.position, self.score, self.next_slot

    def _with(self, metadata: tuple, store: Any) -> "LayerState":
        return LayerState(store, *metadata)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """A batch's cache.

    Attributes:
      layers: one LayerState per layer, each array a leaf of its own.
      length: tokens seen, which is the position of the next one.
      prompt_length: tokens of the whole prompt; budgets given as fractions are fractions of it.
      shared: what the store keeps once for all layers (the paged store's block table); None: nothing.
      row: rows of the layers' metadata that a call is about, where an engine keeps books of more rows than it computes; None: row b is b.
    """

    layers: tuple[LayerState, ...]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    shared: Any = None
    row: Int[Array, " B"] | None = None

    def layer(self, index: int) -> LayerState:
        """One layer, of the rows the call is about."""
        return self.layers[index].take(self.row)

    def with_layer(self, index: int, layer: LayerState) -> "KVState":
        """The state with `layer` (what `layer` gave, changed) in its place."""
        return self.over((*self.layers[:index], self.layers[index].put(layer, self.row), *self.layers[index + 1 :]))

    def over(self, layers: tuple[LayerState, ...]) -> "KVState":
        """The same rows over other layers: some of these, to run layer by layer, or none."""
        return dataclasses.replace(self, layers=tuple(layers))
