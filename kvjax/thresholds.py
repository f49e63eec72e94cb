"""InfiniGen's threshold for a stated loss: what every alpha reads and misses on a sample, and the alpha that misses no more than it may.

    calibration = with_curves(model, calibrate(model), policy)              # kvjax.calibrate
    strategy = for_loss(parse_strategy("infinigen(loss=0.02)"), calibration)    # infinigen(alpha=...), one alpha for all layers

The loss is the true attention on tokens that are not read: the mean over query heads, queries and the layers that guess, when no layer
below has lost anything. kvjax.quality.speculation measures the same while decoding (1 - mass_covered). It is a loss on the sample: text
that spreads its attention wider, or a longer context, misses more with the same alpha.

One alpha for all layers is the rule and no shortcut: with group="mass" alpha is a share of attention, so the last token read is worth the
same in every layer, and that makes the sum of what is read least for a sum of what is missed. `alpha_by_layer` tells what an alpha for
each layer would save; BUILD_NOTES.md has how little that is.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.policies import InfiniGen
from kvjax.errors import SpecError
from kvjax.kernels.attention import NEG_INF
from kvjax.models import ModelConfig
from kvjax.models.decoder import guess_queries, rope_angles
from kvjax.models.guide import QueryGuide

ALPHAS = tuple(x / 4 for x in range(1, 65))
"""The grid of the curves; between two of its points they are taken as straight."""

QUERIES = 64
"""Of every row of the sample, spread over its second half."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a policy reads and misses in the L layers that it guesses for, under each of A alphas.

    Attributes:
      layers: which they are.
      alphas: ascending.
      held: tokens that a query has before it, the mean.
      read: tokens read of those, of a kv head, the mean over queries; without the one being decoded.
      missed: share of the true attention on tokens that are not read, the mean over queries and query heads.
    """

    layers: tuple[int, ...]
    alphas: tuple[float, ...]
    held: float
    read: Float[np.ndarray, "L A"]
    missed: Float[np.ndarray, "L A"]

    def at(self, alphas: Float[Array | np.ndarray, " L"] | float) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
        """Read and missed in every layer, with an alpha each or one for all."""
        wanted = np.broadcast_to(alphas, len(self.layers))
        found = (
            np.array([np.interp(alpha, self.alphas, row) for alpha, row in zip(wanted, rows, strict=True)])
            for rows in (self.read, self.missed)
        )
        return next(found), next(found)

    def plain(self) -> dict[str, Any]:
        """As lists and numbers, for JSON."""
        return dataclasses.asdict(self) | {"read": self.read.tolist(), "missed": self.missed.tolist()}

    @staticmethod
    def from_plain(found: dict[str, Any]) -> "Curves":
        """What `plain` gave."""
        pairs = {name: np.array(found[name], np.float64) for name in ("read", "missed")}
        return Curves(tuple(found["layers"]), tuple(found["alphas"]), found["held"], **pairs)


def measured_like(policy: InfiniGen) -> str:
    """The name of the curves of a policy: all that its reading depends on but alpha."""
    return dataclasses.replace(policy, alpha=math.inf, loss=None, pool=None, victim="counter").describe()


def late(length: int) -> Int[np.ndarray, " T"]:
    """Positions of the queries that are measured, of rows of `length` tokens."""
    first = max(length // 2, 1)
    return np.linspace(first, length - 1, min(QUERIES, length - first)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def read_and_missed(
    config: ModelConfig, policy: InfiniGen, following: QueryGuide, key: Float[Array, "Hkv D P"], before: Float[Array, "R T M"],
    q: Float[Array, "R T H D"], k: Float[Array, "R S Hkv D"], at: Int[Array, " T"],
) -> tuple[Float[Array, " A"], Float[Array, " A"]]:  # fmt: skip
    """Of one layer, under each of ALPHAS: tokens read per kv head, and share of the attention missed; means.

    Every query is a row of a batch of its own length for `policy.choose`, so what is counted, set aside and capped is what a decode step
    would count, set aside and cap. Which tokens come first does not depend on alpha, only how many of them are meant.

    Args:
      following, key: the guide of the layer: its partial queries, its keys to partial keys.
      before: attention inputs of the layer before, of the queries at positions `at`.
      q, k: the layer's own, as they meet in the product; `q` at those positions.
    """
    rows, capacity, heads, dim = k.shape
    length = jnp.tile(at, rows)
    rotation = None if config.rope is None else rope_angles(config.rope, dim, length[:, None])
    guessed = guess_queries(config, following, before.reshape(len(length), 1, -1), rotation)  # [R T, Hkv, G, P]
    partial_keys = jnp.einsum("rsnd,ndp->rsnp", k, key).astype(k.dtype)

    def products(queries: Float[Array, "N Hkv G P"], keys: Float[Array, "R S Hkv P"]) -> Float[Array, "N Hkv G S"]:
        by_row = queries.astype(keys.dtype).reshape(rows, len(at), *queries.shape[1:])
        found = jnp.einsum("rtngp,rsnp->rtngs", by_row, keys, preferred_element_type=jnp.float32)
        return found.reshape(len(length), *found.shape[2:])

    true = products(q.reshape(len(length), heads, -1, dim) * dim**-0.5, k)
    slots, own = jnp.arange(capacity), length[:, None, None]
    attention = jax.nn.softmax(jnp.where(slots <= own[..., None], true, NEG_INF)).mean(2)  # [R T, Hkv, S]
    guess, position = products(guessed, partial_keys), jnp.where(slots < own, slots, -1)
    choices = [dataclasses.replace(policy, alpha=alpha, loss=None).choose(guess, position, length, length) for alpha in ALPHAS]
    slot, count = choices[0][0], jnp.stack([count for _, count in choices])
    reached = jnp.take_along_axis(attention, slot, axis=-1).cumsum(-1)
    covered = jnp.take_along_axis(reached[None], count[:, :, None, None] - 1, axis=-1) + jnp.take_along_axis(attention, own, axis=-1)
    return count.mean(1), 1 - covered.mean((1, 2, 3))


def alpha_for(curves: Curves, loss: float) -> float:
    """The least alpha that, in all layers, misses no more than `loss` in the mean; rounded up to 1 / 1000.

    Raises:
      SpecError: no alpha misses as little.
    """
    missed = curves.missed.mean(0)
    _reachable(float(missed[-1]), loss)
    alpha = float(np.interp(-loss, -missed, curves.alphas))
    return min(math.ceil(1000 * alpha - 1e-6) / 1000, curves.alphas[-1])


def alpha_by_layer(curves: Curves, loss: float) -> Float[np.ndarray, " L"]:
    """The alpha of each layer with which the fewest tokens are read in the mean, while `loss` is missed.

    Lagrangian: on the lower convex hull of what a layer misses against what it reads, a step is taken before another where a token read
    saves more attention, and the last one in part. For convex curves nothing reads less.

    Raises:
      SpecError: no alphas miss as little.
    """
    hulls = [_hull(read, missed) for read, missed in zip(curves.read, curves.missed, strict=True)]
    _reachable(float(np.mean([row[hull[-1]] for row, hull in zip(curves.missed, hulls, strict=True)])), loss)
    alphas = np.array([curves.alphas[hull[0]] for hull in hulls])
    left = sum(row[hull[0]] for row, hull in zip(curves.missed, hulls, strict=True)) - loss * len(hulls)

    def saved(layer: int, a: int, b: int) -> float:
        return float(curves.missed[layer, a] - curves.missed[layer, b])

    steps = [(layer, a, b) for layer, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)]
    for layer, a, b in sorted(steps, key=lambda step: -saved(*step) / (curves.read[step[0], step[2]] - curves.read[step[0], step[1]])):
        if left <= 0:
            break
        share = min(1.0, left / saved(layer, a, b))
        alphas[layer] = curves.alphas[a] + share * (curves.alphas[b] - curves.alphas[a])
        left -= share * saved(layer, a, b)
    return alphas


def _hull(read: Float[np.ndarray, " A"], missed: Float[np.ndarray, " A"]) -> list[int]:
    """Points of the lower convex hull, from the fewest tokens read to the least missed."""
    hull: list[int] = []
    for point in np.lexsort((missed, read)):
        if hull and missed[point] >= missed[hull[-1]]:
            continue
        while len(hull) > 1:
            first, middle = hull[-2:]
            over = (missed[middle] - missed[first]) * (read[point] - read[first])
            if over < (missed[point] - missed[first]) * (read[middle] - read[first]):
                break
            hull.pop()
        hull.append(int(point))
    return hull


def _reachable(least: float, loss: float) -> None:
    if loss < least * (1 - 1e-9):  # but for a rounding error
        raise SpecError(
            f"loss={loss:g} is out of reach: {least:.3g} is missed even with all read that the budget allows; give a larger budget"
        )
