"""The conformance kit as tests call it: nothing that applies is skipped."""

from collections.abc import Iterable
from typing import Any

import pytest

from kvjax.cache import Policy, Store
from kvjax.testing import check_strategy

KEEPS_EVERYTHING = {"budget_holds_and_nothing_returns", "protected_survive_ties", "bounded_chunks_stay_bounded"}
"""Checks that say nothing of a policy that keeps everything."""


def assert_conforms(policy: Policy, store: Store, checks: tuple[str, ...]) -> None:
    """Raises AssertionError unless all these checks run and pass, but for those that do not apply."""
    report = check_strategy(policy, store, checks=checks)
    assert [outcome.name for outcome in report.outcomes] == list(checks)
    skipped = {outcome.name for outcome in report.outcomes if outcome.skipped}
    assert skipped == (KEEPS_EVERYTHING & set(checks) if not policy.evicts else set())


def further(cases: Iterable[Any]) -> list[Any]:
    """Cells of a matrix that run with the slow tests alone."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
