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
from jaxtyping import Array, Float, Int


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
      score: the policy's statistic per slot. None: the policy keeps none.
      next_slot: where the next token goes. None: slot `length`.
    """

    store: Any
    position: Int[Array, "B h C"] | None = None
    score: Float[Array, "B h C"] | None = None
    next_slot: Int[Array, "B h"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """A batch's cache.

    Attributes:
      layers: one LayerState per layer, each array a leaf of its own.
      length: tokens seen, which is the position of the next one.
      prompt_length: tokens of the whole prompt; budgets given as fractions are fractions of it.
      shared: what the store keeps once for all layers (the paged store's block table); None: nothing.
    """

    layers: tuple[LayerState, ...]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    shared: Any = None

    def with_layer(self, index: int, layer: LayerState) -> "KVState":
        return dataclasses.replace(self, layers=(*self.layers[:index], layer, *self.layers[index + 1 :]))
