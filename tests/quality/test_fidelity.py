"""Fidelity figures known by hand."""

import numpy as np
import pytest

from kvjax.quality.fidelity import Comparison, compare


def comparison(full, other, targets) -> Comparison:
    return Comparison(*(np.asarray(part) for part in compare(full, other, targets)))


def test_a_model_against_itself_is_exact():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 11)).astype(np.float32)
    found = comparison(logits, logits, rng.integers(0, 11, (3, 5))).summary()
    assert {name: estimate.value for name, estimate in found.items()} == {
        "kld_mean": 0.0, "kld_median": 0.0, "kld_p99.9": 0.0, "same_top1": 1.0, "nll_delta": 0.0, "first_divergence_step": 5.0,
    }  # fmt: skip
    assert all(estimate.error == 0.0 for estimate in found.values())


def test_divergence_and_likelihood_by_hand():
    full, other = np.log([[[0.5, 0.5], [0.9, 0.1]]]), np.log([[[0.25, 0.75], [0.9, 0.1]]])
    found = comparison(full + 3.0, other - 7.0, np.array([[0, 1]]))
    np.testing.assert_allclose(found.kld, [[0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.0]], atol=1e-6)
    np.testing.assert_allclose(found.nll_delta, [[np.log(2), 0.0]], atol=1e-6)
    assert found.same_top.tolist() == [[False, True]]


def test_divergence_counts_from_the_full_cache():
    """KL(full || other): what the full cache finds likely and the other does not weighs most."""
    sure, unsure = np.log([[[0.99, 0.01]]]), np.log([[[0.5, 0.5]]])
    forward, backward = (compare(a, b, np.array([[0]]))[0].item() for a, b in ((sure, unsure), (unsure, sure)))
    assert forward == pytest.approx(0.99 * np.log(1.98) + 0.01 * np.log(0.02), abs=1e-6)
    assert backward == pytest.approx(0.5 * np.log(0.5 / 0.99) + 0.5 * np.log(50), abs=1e-5)


def test_first_divergence_is_the_first_step_that_disagrees():
    same = np.array([[True, True, False, True], [True, True, True, True], [False, True, False, False]])
    found = Comparison(np.zeros((3, 4)), same, np.zeros((3, 4))).summary()
    assert found["first_divergence_step"].value == pytest.approx((2 + 4 + 0) / 3)
    assert found["same_top1"].value == pytest.approx(8 / 12)


def test_standard_error_is_over_rows():
    rng = np.random.default_rng(1)
    per_row = rng.standard_normal((100, 1)) * np.ones((1, 50))
    found = Comparison(per_row, np.ones((100, 50), bool), per_row).summary()
    assert found["kld_mean"].error == pytest.approx(per_row[:, 0].std() / 10, rel=0.2)


def test_one_row_has_no_standard_error():
    found = Comparison(np.ones((1, 4)), np.ones((1, 4), bool), np.ones((1, 4))).summary()
    assert [estimate.error for estimate in found.values()] == [None] * 6
