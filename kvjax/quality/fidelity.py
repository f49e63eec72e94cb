"""How far a strategy's predictions are from the full cache's, on the same tokens (the measures of llama.cpp's KL-divergence tool)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

RESAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its standard error over rows (sequences are independent, the steps of one are not); None for a single row."""

    value: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Per step of R rows, T steps each, teacher-forced.

    Attributes:
      kld: KL(full || strategy) in nats.
      same_top: the two agree on the most likely token, as logits can that are finite.
      nll_delta: negative log-likelihood of the true token, strategy minus full, in nats.
    """

    kld: Float[np.ndarray, "R T"]
    same_top: np.ndarray
    nll_delta: Float[np.ndarray, "R T"]

    def summary(self, seed: int = 0) -> dict[str, Estimate]:
        """Estimates by record key (without the `fidelity_` prefix)."""
        steps = self.kld.shape[1]
        parted = ~self.same_top
        first = np.where(parted.any(1), parted.argmax(1), steps)[:, None].astype(float)
        return {
            "kld_mean": _estimate(self.kld, np.mean, seed),
            "kld_median": _estimate(self.kld, np.median, seed),
            "kld_p99.9": _estimate(self.kld, lambda x: np.percentile(x, 99.9), seed),
            "same_top1": _estimate(self.same_top.astype(float), np.mean, seed),
            "nll_delta": _estimate(self.nll_delta, np.mean, seed),
            "first_divergence_step": _estimate(first, np.mean, seed),
        }


@jax.jit
def compare(
    full: Float[Array, "R T V"], other: Float[Array, "R T V"], targets: Int[Array, "R T"]
) -> tuple[Float[Array, "R T"], Array, Float[Array, "R T"]]:
    """KL divergence, agreement of the top token, and NLL difference per step, from logits."""
    p, q = jax.nn.log_softmax(full), jax.nn.log_softmax(other)
    kld = (jnp.exp(p) * (p - q)).sum(-1)
    nll_delta = jnp.take_along_axis(p - q, targets[..., None], axis=-1)[..., 0]
    finite = jnp.isfinite(full).all(-1) & jnp.isfinite(other).all(-1)
    return kld, finite & (full.argmax(-1) == other.argmax(-1)), nll_delta


def _estimate(values: np.ndarray, statistic: Callable[[np.ndarray], np.floating], seed: int) -> Estimate:
    """The statistic over all values; its standard error by resampling rows."""
    rng = np.random.default_rng(seed)
    rows = len(values)
    resampled = [statistic(values[rng.integers(0, rows, rows)]) for _ in range(RESAMPLES)]
    return Estimate(float(statistic(values)), float(np.std(resampled)) if rows > 1 else None)
