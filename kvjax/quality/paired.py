"""Differences between strategies on the same examples, with intervals."""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over examples and its 95 % interval; `low` and `high` are None for a single example."""

    mean: float
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def record(self, name: str) -> dict[str, float | None]:
        """Keys of a record: `name`, `name_low`, `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def interval(values: Float[np.ndarray, " R"], within: tuple[float, float] | None = (0.0, 1.0), seed: int = 0) -> Interval:
    """The mean of independent values, with the percentile bootstrap's interval.

    Resampling values that are all alike says that nothing varies, however few they are. Of values `within` bounds the
    interval then takes in what 1 - 0.05 ** (1 / R) of them could still be 1 away without having shown (Clopper-Pearson,
    one-sided): 26 % of 10 examples, 3 % of 100.
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    if np.ptp(values) == 0:
        if within is None:
            return Interval(mean, mean, mean)
        unseen = 1 - 0.05 ** (1 / len(values))
        return Interval(mean, max(mean - unseen, within[0]), min(mean + unseen, within[1]))
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed))
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def difference(one: Float[np.ndarray, " R"], other: Float[np.ndarray, " R"], bounded: bool = True, seed: int = 0) -> Interval:
    """`one` minus `other`, example by example; `bounded`: both are scores, 0 to 1."""
    return interval(np.asarray(one, float) - np.asarray(other, float), (-1.0, 1.0) if bounded else None, seed)
