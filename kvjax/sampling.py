"""From logits to the next token.

`Sampling` is what a user asks for. Programs take it as data, `SamplingArrays`, one entry for each of their rows: one program serves every
setting, and requests that want different ones share a batch. Where no row samples, they take None and have no draw in them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import checks
from kvjax.errors import InputError, SpecError
from kvjax.kernels.attention import NEG_INF

NOT_FINITE = -2
"""What is chosen from logits that are not finite, in place of a token."""

COLDEST, HOTTEST = 1e-5, 1e5
"""Temperatures that float32 can divide logits by."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. The default is greedy.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: only the k most likely tokens; 0: no limit.
      top_p: only the most likely tokens that together reach this probability (Holtzman et al., arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not checks.number("temperature", self.temperature, -math.inf) >= 0:
            raise SpecError(f"temperature={self.temperature} is not a number >= 0; 0 is greedy, 1 samples from the model")
        if self.temperature and not COLDEST <= self.temperature <= HOTTEST:
            raise SpecError(f"temperature={self.temperature:g} is beyond reason; give 0 (greedy), or {COLDEST:g} to {HOTTEST:g}")
        if checks.whole("top_k", self.top_k, -checks.LARGEST) < 0:
            raise SpecError(f"top_k={self.top_k} is negative; 0 means no limit")
        if not 0 < checks.number("top_p", self.top_p, -math.inf) <= 1:
            raise SpecError(f"top_p={self.top_p} is not in (0, 1]; 1 means no limit")
        for name, kind in (("temperature", float), ("top_k", int), ("top_p", float)):  # Python's own: NumPy's would set a dtype
            object.__setattr__(self, name, kind(getattr(self, name)))

    def choose(self, logits: Float[Array, "B V"], seeds: Int[Array, " B"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
        """The next token of every row; a row's draw depends on its seed and position alone, not on its neighbours.

        NOT_FINITE where the logits of a row are not all finite.
        """
        arrays = as_arrays([self] * len(logits), np.zeros(len(logits), np.int32))
        return choose(logits, positions, None if arrays is None else dataclasses.replace(arrays, seed=seeds))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """How every row of a call chooses, and with which seed it draws: NumPy's on the host, JAX's inside a program.

    A further setting is a further array: its value in `of`, and what it does to logits in `draw`. Zeros are a greedy row.
    """

    temperature: Float[Array | np.ndarray, " B"]
    top_k: Int[Array | np.ndarray, " B"]
    top_p: Float[Array | np.ndarray, " B"]
    seed: Int[Array | np.ndarray, " B"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], seeds: Int[np.ndarray, " B"]) -> Self:
        """Those of rows with these settings and seeds."""
        temperature, top_k, top_p = (np.array([getattr(s, name) for s in samplings]) for name in ("temperature", "top_k", "top_p"))
        least = np.finfo(np.float32).tiny  # of a top_p: less would be 0, which no token is inside of
        return cls(
            temperature.astype(np.float32), top_k.astype(np.int32), np.maximum(top_p, least).astype(np.float32), np.array(seeds, np.int32)
        )

    def put(self, row: int, sampling: Sampling, seed: int) -> None:
        """Writes one row, on the host."""
        for array, value in zip(jax.tree.leaves(self), jax.tree.leaves(self.of([sampling], np.array([seed]))), strict=True):
            array[row] = value[0]

    def rows(self, rows: list[int], batch: int) -> Self | None:
        """A copy of these rows, filled up to `batch` with greedy ones; None if all are greedy. On the host."""
        if not np.any(self.temperature[np.asarray(rows, int)]):
            return None
        return jax.tree.map(lambda array: np.pad(array[rows], (0, batch - len(rows))), self)

    def draw(self, logits: Float[Array, "B V"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
        """A token for every row; of greedy rows it means nothing. Sorts only where a row has top_k or top_p."""
        hot = self.temperature > 0
        inverse = 1 / jnp.where(hot, self.temperature, 1)
        logits = (logits - logits.max(-1, keepdims=True)) * inverse[:, None]
        limited = hot & ((self.top_k > 0) | (self.top_p < 1))
        logits = jax.lax.cond(limited.any(), self._limit, lambda logits: logits, logits)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(self.seed, positions)
        return jax.vmap(jax.random.categorical)(keys, logits)

    def _limit(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """NEG_INF for tokens beyond the k most likely ones of a row, and then for those beyond its top_p."""
        size = logits.shape[-1]
        ordered = jnp.sort(logits, axis=-1, descending=True)
        last = jnp.where(self.top_k > 0, jnp.minimum(self.top_k, size), size) - 1
        kth = jnp.take_along_axis(ordered, last[:, None], axis=-1)
        ordered = jnp.where(ordered < kth, NEG_INF, ordered)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < self.top_p[:, None]  # tokens before which top_p is not reached yet
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        least = jnp.where(self.top_p[:, None] < 1, jnp.maximum(least, kth), kth)
        return jnp.where(logits < least, NEG_INF, logits)


def choose(logits: Float[Array, "B V"], positions: Int[Array, " B"], sampling: SamplingArrays | None = None) -> Int[Array, " B"]:
    """The next token of every row, greedy without `sampling`; NOT_FINITE where the logits of a row are not all finite.

    What a row draws depends on its own settings, seed and position alone, not on its neighbours.
    """
    chosen = logits.argmax(-1).astype(jnp.int32)
    if sampling is not None:
        chosen = jnp.where(sampling.temperature > 0, sampling.draw(logits, positions).astype(jnp.int32), chosen)
    return jnp.where(jnp.isfinite(logits).all(-1), chosen, NOT_FINITE)


def as_arrays(samplings: Sequence[Sampling], seeds: Int[np.ndarray, " B"]) -> SamplingArrays | None:
    """What a program takes for rows with these settings and seeds: None if all are greedy."""
    return SamplingArrays.of(samplings, seeds) if any(s.temperature for s in samplings) else None


def per_row(sampling: Any, count: int, what: str, where: str = "") -> list[Sampling]:
    """The settings of `count` rows (`what` they are, and `where`, for messages), of one for all or one each. Raises InputError."""
    several = isinstance(sampling, list | tuple)
    samplings = list(sampling) if several else [sampling] * count
    for one in samplings:
        if not isinstance(one, Sampling):
            raise InputError(f"{where}sampling is {type(one).__name__}; write for example kvjax.Sampling(temperature=0.8)")
    if len(samplings) != count:
        raise InputError(f"{where}{len(samplings)} samplings for {count} {what}; give one each, or a single one")
    return samplings
