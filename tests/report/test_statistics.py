"""Paired statistics on synthetic data whose answers are known.

Coverage is checked by counting: of `draws` independent data sets the share whose interval holds the truth is binomial, so it lies within
3.3 standard errors of 0.95 in 999 of 1,000 runs. Seeds are fixed; a failure is a change of the code.
"""

import math

import numpy as np
import pytest
from made_results import FULL, H2O, ORACLE, STREAMING, offline

from kvjax.advise.evidence import device_bytes
from kvjax.errors import InputError
from kvjax.models.config import preset
from kvjax.report import statistics
from kvjax.report.cells import blocks, points
from kvjax.report.statistics import explain, paired, ratio, regret, share_difference, step_weight_bytes, student, wilson


def covered(made, truth: float, draws: int, **options) -> float:
    """The share of intervals that hold the truth; `made(rng)` gives a, b and groups."""
    held = 0
    for index in range(draws):
        a, b, groups = made(np.random.default_rng(index))
        found = paired(a, b, groups=groups, resamples=1000, **options)
        held += found.low <= truth <= found.high
    return held / draws


def binomial(share: float, draws: int) -> float:
    return 3.3 * math.sqrt(share * (1 - share) / draws)


def test_the_mean_and_its_parts_are_those_of_the_samples():
    rng = np.random.default_rng(0)
    b = rng.normal(50, 10, 400)
    found = paired(b + rng.normal(3, 1, 400), b)
    assert found.low < 3 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.1)  # the spread of the differences, not that of the samples
    assert found.mean == pytest.approx(found.first - found.second)
    assert found.relative == pytest.approx(found.mean / found.second)
    assert found.relative_low < found.relative < found.relative_high
    assert (found.samples, found.units, found.distinguishable) == (400, 400, True)


@pytest.mark.parametrize("size", [6, 24])  # below and above LEAST_UNITS
def test_intervals_cover_the_truth_as_often_as_they_say(size):
    def made(rng):
        b = rng.normal(10, 3, size)
        return b + rng.normal(0.5, 1, size), b, None

    draws = 800
    assert covered(made, 0.5, draws) == pytest.approx(0.95, abs=binomial(0.95, draws))
    assert covered(made, 0.5, draws, confidence=0.8) == pytest.approx(0.8, abs=binomial(0.8, draws))


def test_intervals_of_skewed_samples_cover_nearly_as_often():
    """Exponential differences: a skew of 2, of which percentiles correct a part. The theory of the bootstrap promises 0.95 in the limit."""

    def made(rng):
        return rng.exponential(1, 48), np.zeros(48), None

    assert 0.92 <= covered(made, 1.0, 800) <= 0.97


def test_clusters_widen_the_interval_where_samples_hang_together():
    def made(rng):
        shift = np.repeat(rng.normal(0, 1, 12), 10)
        return shift + rng.normal(0, 0.5, 120), np.zeros(120), list(np.repeat(np.arange(12), 10))

    def flat(rng):
        a, b, _ = made(rng)
        return a, b, None

    draws = 600
    assert covered(made, 0.0, draws) == pytest.approx(0.95, abs=binomial(0.95, draws))
    assert covered(flat, 0.0, draws) < 0.75
    a, b, groups = made(np.random.default_rng(7))
    whole, apart = paired(a, b, groups=groups), paired(a, b)
    assert whole.units == 12
    assert whole.mean == apart.mean
    assert whole.high - whole.low > 2 * (apart.high - apart.low)


def test_clusters_of_unequal_size_weigh_by_their_samples():
    a, groups = [1.0, 1.0, 1.0, 5.0], ["x", "x", "x", "y"]
    found = paired(a, np.zeros(4), groups=groups)
    assert found.mean == 2.0
    assert found.units == 2


def test_identical_inputs_give_exactly_zero():
    x = np.random.default_rng(0).normal(5, 2, 30)
    for groups in (None, [i % 5 for i in range(30)]):
        found = paired(x, x, groups=groups)
        assert (found.mean, found.low, found.high, found.relative) == (0, 0, 0, 0)
        assert not found.distinguishable
        assert found.verdict(("h2o", "full")) == "h2o and full are not distinguishable (+0, +0 to +0)"
    same = ratio(np.abs(x), np.abs(x))
    assert (same.value, same.low, same.high, same.distinguishable) == (1, 1, 1, False)


def test_a_difference_that_is_always_the_same_is_told():
    found = paired([1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5])
    assert (found.low, found.mean, found.high, found.distinguishable) == (0.5, 0.5, 0.5, True)
    assert found.verdict(("a", "b")) == "a is higher than b by 0.5 (0.5 to 0.5)"
    assert "worse" in found.verdict(("a", "b"), better="less")
    assert "better" in found.verdict(("a", "b"), better="more")


def test_ratios_are_geometric_and_do_not_depend_on_which_way_round():
    rng = np.random.default_rng(1)
    b = rng.lognormal(0, 1, 200)
    a = 0.7 * b * rng.lognormal(0, 0.1, 200)
    found, back = ratio(a, b), ratio(b, a)
    assert found.value == pytest.approx(math.exp(np.mean(np.log(a / b))))
    assert found.low < 0.7 < found.high
    assert found.value * back.value == pytest.approx(1)
    assert found.distinguishable
    assert "times" in found.verdict()
    assert ratio(a, a * np.resize([1.01, 1 / 1.01], 200)).distinguishable is False


def test_a_relative_difference_needs_a_base_above_zero():
    found = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found.relative is None
    assert found.relative_low is None


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=40), rng.normal(size=40)
    assert paired(a, b) == paired(a, b)
    assert paired(a, b, seed=1) != paired(a, b)


@pytest.mark.parametrize(
    ("a", "b", "options", "says"),
    [
        ([1.0, 2.0], [1.0], {}, "unequal lengths, 2 and 1"),
        ([1.0, math.nan], [1.0, 2.0], {}, "1 of 2 samples a are not finite"),
        ([1.0, 2.0], [math.inf, 2.0], {}, "samples b are not finite"),
        ([], [], {}, "samples a of shape [0]"),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, "samples a of shape [1, 2]"),
        ([1.0], [2.0], {}, "at least 2 independent pairs, there is 1"),
        ([1.0, 2.0], [2.0, 3.0], {"groups": ["x", "x"]}, "at least 2 independent clusters, there is 1"),
        ([1.0, 2.0], [2.0, 3.0], {"groups": ["x"]}, "1 groups for 2 pairs"),
        ([1.0, 2.0], [2.0, 3.0], {"confidence": 95}, "confidence=95 is not between 0 and 1"),
        ([1.0, 2.0], [2.0, 3.0], {"resamples": 0}, "resamples=0"),
    ],
)
def test_bad_samples_are_refused(a, b, options, says):
    with pytest.raises(InputError) as refused:
        paired(a, b, **options)
    assert says in str(refused.value)


def test_a_ratio_of_what_is_not_above_zero_is_refused():
    with pytest.raises(InputError, match=r"values above 0; b has 0"):
        ratio([1.0, 2.0], [0.0, 1.0])


@pytest.mark.parametrize(
    ("freedom", "expected"),  # two-sided 95 % of printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980), (5000, 1.960)],
)
def test_students_t_is_that_of_the_tables(freedom, expected):
    assert student(0.95, freedom) == pytest.approx(expected, abs=6e-4)


def test_shares_have_the_intervals_of_the_papers():
    """Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I), example (a): 56/70 and 48/80."""
    assert share_difference(56 / 70, 48 / 80, 70, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    with pytest.raises(InputError, match="no share"):
        wilson(1.2, 10)


def test_blocks_are_consecutive_and_about_the_square_root_long():
    assert blocks(10) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert blocks(5, 2) == [0, 0, 1, 1, 2]


def test_regret_is_what_the_oracle_of_the_same_budget_has_more():
    records = [
        offline(ORACLE, recall=0.9, kld=0.001), offline(H2O, recall=0.4, kld=1.5), offline(STREAMING, recall=0.1, kld=2.0),
        offline(FULL, recall=0.95, kld=0.0), offline("h2o(heavy=0.2,recent=0.2)", recall=0.6, kld=1.0),
    ]  # fmt: skip
    found = {one.strategy: one for one in regret(records)}
    assert set(found) == {H2O, STREAMING}, "no oracle has the budget of the others"
    assert found[H2O].loss.mean == pytest.approx(0.5, abs=0.01)
    assert found[H2O].budget == 0.2
    assert found[H2O].loss.distinguishable
    divergence = {one.strategy: one.loss.mean for one in regret(records, "kld")}
    assert divergence[STREAMING] == pytest.approx(1.999, rel=0.05), "above 0 where the oracle is better"


def test_regret_joins_repeats_as_clusters():
    records = [offline(s, recall=r, repeat=i) for i in range(3) for s, r in ((ORACLE, 0.9), (H2O, 0.4))]
    (found,) = regret(records)
    assert (found.loss.samples, found.loss.units) == (96, 3)


def test_bytes_account_for_a_speedup_that_follows_them():
    config = preset("kvjax-4m")
    weights = step_weight_bytes(config, "float32")
    assert weights == 4 * config.parameter_count - (0 if config.tie_embeddings else 4 * config.vocab_size * config.hidden_size)
    full, other = offline(FULL, size=64 * 2**20), offline(H2O, size=16 * 2**20)
    total = {r["strategy"]: weights / 8 + r["kv_bytes_read_per_token"] for r in (full, other)}
    other["mean_tpot_ms"] = full["mean_tpot_ms"] * total[H2O] / total[FULL]
    found = explain(other, full, weights, bandwidth=8 * total[H2O] / (other["mean_tpot_ms"] / 1e3) / 2)
    assert found.computed_speedup == pytest.approx(found.measured_speedup)
    assert found.explained == pytest.approx(1)
    assert found.floor_fraction == pytest.approx(2), "twice as fast as half the bandwidth allows"
    assert "(computed)" in found.sentence()
    assert "(measured)" in found.sentence()


def test_a_speedup_of_records_that_differ_in_more_is_refused():
    with pytest.raises(InputError, match="batch_size is 8 and 4"):
        explain(offline(H2O), offline(FULL, batch_size=4), 1e6)
    under_load = offline(H2O) | {"kv_bytes_read_per_token": None}
    with pytest.raises(InputError, match="take an offline one"):
        statistics.bytes_per_token(under_load, 1e6)


def test_points_leave_out_what_did_not_finish():
    failed = offline(H2O, repeat=1) | {"outcome": "failed"}
    interrupted = offline(H2O, repeat=2) | {"complete": False}
    (point,) = points([offline(H2O), failed, interrupted])
    assert len(point.records) == 1


def test_what_is_weighed_of_one_repeat_alone_does_not_part_it_from_the_others():
    weighed, other = offline(H2O), offline(H2O, repeat=1)
    weighed = weighed | {"kv_transient_bytes": 1000, "cell": weighed["cell"] | {"scratch": True}}
    (point,) = points([weighed, other])
    assert len(point.records) == 2
    assert device_bytes(point) == weighed["kv_device_total_bytes"] + 1000
