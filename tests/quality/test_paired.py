"""Intervals of paired differences."""

import numpy as np
import pytest

from kvjax.quality.paired import difference, interval


def test_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        drawn = interval(rng.random(60) < 0.7, seed=trial)
        inside += drawn.low <= 0.7 <= drawn.high
    assert 180 <= inside <= 199


def test_pairing_takes_out_what_both_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=200)
    one, other = shared + rng.normal(0.1, 0.1, 200), shared
    paired = difference(one, other, bounded=False)
    assert paired.decided
    assert paired.mean == pytest.approx((one - other).mean())
    alone = interval(one, within=None)
    assert paired.high - paired.low < 0.05 < alone.high - alone.low


def test_values_alike_do_not_prove_much():
    same = difference(np.ones(10), np.ones(10))
    assert (same.mean, same.decided) == (0.0, False)
    assert same.high == pytest.approx(1 - 0.05**0.1)
    assert difference(np.ones(10), np.zeros(10)).decided
    assert interval([0.5]).low is None
    always = interval(np.ones(10))
    assert (always.low, always.high) == (pytest.approx(0.05**0.1), 1.0)
    assert interval([2.0, 2.0, 2.0], within=None).record("x") == {"x": 2.0, "x_low": 2.0, "x_high": 2.0}
