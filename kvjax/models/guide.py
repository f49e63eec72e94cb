"""What a layer needs to guess the attention of the next one: InfiniGen's partial query weights and skews (arXiv:2406.19707).

Consecutive layers see nearly the same hidden state, so layer i's attention input, put through layer i + 1's query projection, is close to
the queries of layer i + 1. Their products with few columns of the keys, chosen where magnitude concentrates, tell which keys will matter:

    queries = following(attention input of layer i)     # [..., H, P]
    logits  = queries . (keys of layer i + 1) @ key     # [..., P] per query head and token; not scaled by 1 / sqrt(D)

A guide is data beside the parameters, in the Flax collection "guide": the attention module of layer i finds its own as
`self.get_variable("guide", "guide")`. kvjax.calibrate makes them.

Dims as in ModelConfig; P partial columns of a head, the same number in every layer and head; O rows of a query weight; r rank of a
correction.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryGuide:
    """How a layer's partial queries come from the attention input of the layer before, x.

    Two forms. Where nothing stands between the projection and the product with the keys (OPT), the rows of the chosen columns are cut out
    of the query weight once, and `project` is None. Where queries are normalised or rotated in between, which does not commute with
    a choice of columns, `weight`, `bias` and `norm` are the layer's own parameters (the same buffers, no copy) and `project` comes last.

    With a correction the projection is (weight + up down) x: what is lost because x is not this layer's own input is made good as far as a
    few directions of it tell. Where rows are cut out, it is in them already.

    Attributes:
      weight: [H * D, M], or [H * P, M] where `project` is None; heads in the order of the layer's own weight.
      bias: of `weight`; None where the layer has none.
      norm: scale of the RMS norm over a head (Qwen3); None where there is none.
      project: full queries, as they meet the keys, to partial queries; query head h uses entry h // G.
      down, up: the correction; None without one.
    """

    weight: Float[Array, "O M"]
    bias: Float[Array, " O"] | None
    norm: Float[Array, " D"] | None
    project: Float[Array, "Hkv D P"] | None
    down: Float[Array, "r M"] | None = None
    up: Float[Array, "O r"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guide:
    """What one layer does for speculation.

    Attributes:
      key: this layer's keys, as the cache holds them, to partial keys.
      following: the next layer's partial queries; None in the last layer.
    """

    key: Float[Array, "Hkv D P"]
    following: QueryGuide | None


def guides(params: Any, num_layers: int) -> tuple[Guide, ...]:
    """Of every layer; none where the model has no guide."""
    if "guide" not in params:
        return ()
    return tuple(params["guide"][f"layer_{i}"]["attention"]["guide"] for i in range(num_layers))
