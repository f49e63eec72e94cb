"""Paired statistics of records: what differs, by how much, and whether the data can tell.

    paired(h2o, full)                     differences of the same prompts under two strategies, with a 95 % interval
    ratio(h2o, full)                      the same as a factor, on the log scale
    paired(h2o, full, groups=runs)        whole runs are resampled: the requests of one share its queue and its machine
    regret(records, "recall")             what each strategy loses to the exact top k of the same budget
    explain(record, full, weight_bytes)   how much of a speedup the bytes account for (computed)

Intervals are percentiles of a bootstrap over independent units: samples, or clusters of them. With few units the plain percentiles are too
narrow; the level is widened as Hesterberg does (doi:10.1080/00031305.2015.1089789, section 3.3), so that a normal sample is covered as by
Student's t. Below `LEAST_UNITS` resampling cannot reach beyond the few values there are, and Student's t is used itself. tests/report
checks the coverage.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kvjax.errors import InputError
from kvjax.models.config import OPT_POSITION_OFFSET, ModelConfig
from kvjax.report.cells import Record, points

LEAST_UNITS = 10
"""Fewer independent units than these are not resampled."""

Better = Literal["less", "more"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences a - b, with an interval.

    Attributes:
      mean, low, high: of the differences, in the unit of the samples.
      first, second: the means of a and of b.
      relative, relative_low, relative_high: mean(a) / mean(b) - 1; None where the mean of b is not safely above 0.
      samples: pairs.
      units: what counts as independent: pairs, or clusters of them.
    """

    mean: float
    low: float
    high: float
    first: float
    second: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    samples: int
    units: int
    confidence: float = 0.95

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def verdict(self, labels: tuple[str, str] = ("a", "b"), better: Better | None = None) -> str:
        """In words: `h2o is lower than full by 1.2 (0.9 to 1.5)`, with `better` also which of the two that favours."""
        first, second = labels
        if not self.distinguishable:
            return f"{first} and {second} are not distinguishable ({self.mean:+.4g}, {self.low:+.4g} to {self.high:+.4g})"
        low, high = sorted((abs(self.low), abs(self.high)))
        word = "higher" if self.mean > 0 else "lower"
        if better is not None:
            word = "better" if (self.mean > 0) == (better == "more") else "worse"
        return f"{first} is {word} than {second} by {abs(self.mean):.4g} ({low:.4g} to {high:.4g})"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios a / b, with an interval made on the log scale."""

    value: float
    low: float
    high: float
    samples: int
    units: int
    confidence: float = 0.95

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1

    def verdict(self, labels: tuple[str, str] = ("a", "b")) -> str:
        """In words: `h2o takes 0.73 (0.70 to 0.77) of full`."""
        first, second = labels
        if not self.distinguishable:
            return f"{first} and {second} are not distinguishable (ratio {self.value:.3g}, {self.low:.3g} to {self.high:.3g})"
        return f"{first} is {self.value:.3g} ({self.low:.3g} to {self.high:.3g}) times {second}"


def paired(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = 4000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """The mean of a - b over pairs, with its interval.

    Args:
      a, b: samples, [n] each; element i of both is the same prompt or request.
      groups: the cluster of each pair, such as the run it belongs to; clusters are then resampled whole. None: pairs are independent.
      confidence: of the (two-sided) interval.

    Raises InputError for unequal lengths, values that are not finite, or fewer than two independent units.
    """
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise InputError(f"paired samples of unequal lengths, {len(first)} and {len(second)}; element i of both must be the same prompt")
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g} is not between 0 and 1; 0.95 is usual")
    if resamples < 1:
        raise InputError(f"resamples={resamples} makes no interval; 4000 is usual")
    sums, sizes = _clustered(np.stack([first - second, second], axis=1), groups)
    units = len(sizes)
    if units < 2:
        what = "cluster" if groups is not None else "pair"
        raise InputError(f"an interval needs at least 2 independent {what}s, there is {units}")
    difference, base = float((first - second).mean()), float(second.mean())
    drawn = _drawn(units, resamples, seed)
    weights = drawn @ sizes
    means, bases = drawn @ sums[:, 0] / weights, drawn @ sums[:, 1] / weights
    low, high = _interval(means, difference, sums[:, 0], sizes, confidence)
    relative = relative_low = relative_high = None
    if base > 0 and bases.min() > 0:
        relative = difference / base
        residual = sums[:, 0] - relative * sums[:, 1]  # linear part of the ratio's error
        relative_low, relative_high = _interval(means / bases, relative, relative * sizes + residual / base, sizes, confidence)
    return Difference(
        difference, low, high, float(first.mean()), base, relative, relative_low, relative_high, len(first), units, confidence
    )


def ratio(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = 4000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Ratio:
    """The geometric mean of a / b over pairs, with its interval. As `paired`; raises InputError for values that are not above 0 as well."""
    first, second = _checked(a, "a"), _checked(b, "b")
    for name, values in (("a", first), ("b", second)):
        if values.min() <= 0:
            raise InputError(f"a ratio needs values above 0; {name} has {values.min():g}")
    found = paired(np.log(first), np.log(second), groups=groups, resamples=resamples, seed=seed, confidence=confidence)
    return Ratio(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.samples, found.units, confidence)


def share_difference(a: float, b: float, count_a: int, count_b: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a - b, two shares of `count_a` and `count_b` independent trials (Newcombe's, from Wilson's intervals).

    For shares whose trials are not known one by one; where both asked the same questions it is wider than a paired interval.
    """
    (low_a, high_a), (low_b, high_b) = (wilson(share, count, confidence) for share, count in ((a, count_a), (b, count_b)))
    down = math.hypot(a - low_a, high_b - b)
    up = math.hypot(high_a - a, b - low_b)
    return a - b - down, a - b + up


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent trials. Raises InputError for no trials or no share."""
    if count < 1 or not 0 <= share <= 1:
        raise InputError(f"{share:g} of {count} trials is no share; give one between 0 and 1 of at least one trial")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    spread = z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


# --------------------------------------------------------------------------------------------------------------------------------- regret

LOWER_IS_BETTER = ("kld", "nll_delta", "ttft_ms", "tpot_ms", "e2el_ms")


@dataclasses.dataclass(frozen=True)
class Regret:
    """What a strategy loses to the oracle of the same budget.

    Attributes:
      budget: both read or keep this, a fraction of the prompt or tokens.
      loss: above 0 where the oracle is better, whichever way the samples count.
    """

    strategy: str
    oracle: str
    budget: int | float
    setting: dict[str, Any]
    loss: Difference


def regret(records: Sequence[Record], sample: str = "recall", oracle: str = "oracle_topk", *, confidence: float = 0.95) -> list[Regret]:
    """Every strategy that has a budget against the oracle with the same budget in the same cell, prompt by prompt.

    Records of a cell that differ in their repeat alone are joined, and the repeats resampled whole where there are enough of them. A
    strategy without a budget, without an oracle beside it, or without these samples is left out.
    """
    joined = points(records)
    yardsticks = {(p.setting_key, p.budget): p for p in joined if p.identity.family == oracle}
    found = []
    for point in joined:
        against = yardsticks.get((point.setting_key, point.budget))
        if against is None or point.budget is None or point.identity.family == oracle:
            continue
        pairs = point.paired_samples(against, sample)
        if pairs is None:
            continue
        mine, best, groups = pairs
        if sample not in LOWER_IS_BETTER:
            mine, best = best, mine
        loss = paired(mine, best, groups=groups, confidence=confidence)
        found.append(Regret(point.strategy, against.strategy, point.budget, dict(point.setting), loss))
    return found


# ---------------------------------------------------------------------------------------------------------------------------------- bytes


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """What a decode step reads per token it makes, computed: weights once a step over its rows, and a row's cache."""

    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A speedup beside the bytes that could account for it.

    Attributes:
      computed, computed_baseline: bytes a token.
      computed_speedup: the ratio of the two, what a step bound by bytes would gain.
      measured_speedup: the ratio of the mean times per token.
      explained: the computed over the measured speedup, on the log scale (1: bytes account for all of it); None where nothing was gained or
        lost.
      computed_floor_ms: reading the bytes of a step at the given bandwidth; None without one.
      floor_fraction: that floor over the measured time per token; 1 is as fast as the memory.
    """

    strategy: str
    baseline: str
    computed: StepBytes
    computed_baseline: StepBytes
    computed_speedup: float
    measured_speedup: float
    explained: float | None
    computed_floor_ms: float | None
    floor_fraction: float | None

    def sentence(self) -> str:
        """In words, computed and measured told apart."""
        mine, theirs = (size.total / 2**20 for size in (self.computed, self.computed_baseline))
        weights = self.computed.weights / 2**20
        gained = f"{self.strategy} reads {mine:.2f} MiB a token, {weights:.2f} of them weights, {self.baseline} {theirs:.2f}: "
        gained += f"{self.computed_speedup:.2f} times as fast by bytes (computed), {self.measured_speedup:.2f} by the clock (measured)"
        if self.floor_fraction is not None:
            gained += f"; {100 * self.floor_fraction:.0f} % of what the memory would allow (computed)"
        return gained


def bytes_per_token(record: Record, weight_bytes: float) -> StepBytes:
    """Of an offline record: its batch shares one reading of the weights. Computed, not measured.

    Raises InputError for a record under load, where the rows of a step are not one number.
    """
    read, rows = record.get("kv_bytes_read_per_token"), record.get("batch_size")
    if read is None or rows is None:
        raise InputError(f"the record of {record.get('strategy')} has no kv_bytes_read_per_token at one batch size; take an offline one")
    return StepBytes(weight_bytes / rows, float(read))


def explain(record: Record, baseline: Record, weight_bytes: float, bandwidth: float | None = None) -> Explanation:
    """How much of what `record` gains over `baseline` its bytes account for.

    Args:
      record, baseline: offline records of one model and batch size.
      weight_bytes: read once a step (`step_weight_bytes`).
      bandwidth: of the memory, bytes/s, for the floor.

    Raises InputError when the two are not comparable.
    """
    for key in ("model_id", "dtype", "batch_size", "input_len", "output_len"):
        if record.get(key) != baseline.get(key):
            pair = f"{record.get(key)} and {baseline.get(key)}"
            raise InputError(f"{key} is {pair}: a speedup compares records that differ in strategy alone")
    mine, theirs = bytes_per_token(record, weight_bytes), bytes_per_token(baseline, weight_bytes)
    computed, measured = theirs.total / mine.total, baseline["mean_tpot_ms"] / record["mean_tpot_ms"]
    floor = None if bandwidth is None else 1e3 * mine.total * record["batch_size"] / bandwidth
    return Explanation(
        record["strategy"], baseline["strategy"], mine, theirs, computed, measured,
        math.log(computed) / math.log(measured) if measured != 1 else None,
        floor, None if floor is None else floor / record["mean_tpot_ms"],
    )  # fmt: skip


def step_weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Parameters a decode step reads: all but rows of tables that are looked up, not multiplied. Guides of policies that speculate not
    counted."""
    table = 0 if config.tie_embeddings else config.vocab_size * (config.embedding_size or config.hidden_size)
    learned = (config.max_position + OPT_POSITION_OFFSET) * config.hidden_size if config.rope is None else 0
    return (config.parameter_count - table - learned) * jnp.dtype(dtype).itemsize


# -------------------------------------------------------------------------------------------------------------------------------- details


def _checked(values: ArrayLike, name: str) -> np.ndarray:
    found = np.asarray(values, float)
    if found.ndim != 1 or not len(found):
        raise InputError(f"samples {name} of shape {list(found.shape)}; give a list of numbers, one per prompt")
    if bad := int((~np.isfinite(found)).sum()):
        raise InputError(f"{bad} of {len(found)} samples {name} are not finite; leave such pairs out of both")
    return found


def _clustered(values: np.ndarray, groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [u, k] and sizes [u] by cluster, in the order clusters appear; without groups a sample each."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise InputError(f"{len(groups)} groups for {len(values)} pairs; give the cluster of each pair")
    index = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    where = np.array([index[label] for label in groups])
    sums = np.stack([np.bincount(where, column, len(index)) for column in values.T], axis=1)
    return sums, np.bincount(where, minlength=len(index)).astype(float)


@functools.lru_cache(maxsize=32)
def _drawn(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each unit [resamples, units]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1 / units), resamples).astype(float)


def _interval(estimates: np.ndarray, estimate: float, sums: np.ndarray, sizes: np.ndarray, confidence: float) -> tuple[float, float]:
    """Of a mean over units with these sums and sizes; `estimates`: of every resample."""
    units = len(sizes)
    quantile = student(confidence, units - 1)
    if units < LEAST_UNITS:
        error = math.sqrt(units / (units - 1) * float(((sums - estimate * sizes) ** 2).sum())) / float(sizes.sum())
        return estimate - quantile * error, estimate + quantile * error
    tail = statistics.NormalDist().cdf(-math.sqrt(units / (units - 1)) * quantile)
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


@functools.cache
def student(confidence: float, freedom: int) -> float:
    """The t that a variable of `freedom` degrees of freedom stays within, either way, with this probability."""
    if freedom > 1000:
        return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in itertools.repeat(None, 60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < tan(angle) sqrt(freedom)), the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
