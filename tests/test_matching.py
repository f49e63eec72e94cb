"""Budgets matched by cost: the arithmetic against the ledgers of real runs, and the search against every budget there is."""

import dataclasses
import math

import numpy as np
import pytest

import kvjax
from kvjax.cache import CacheShape, Strategy, ledger, parse_strategy
from kvjax.calibrate import calibrate, calibrated
from kvjax.generation import cache_shape
from kvjax.matching import MatchError, Sizes, cost, largest_batch, least_knob, match

SHAPE = CacheShape(num_layers=3, num_kv_heads=2, group_size=2, head_dim=16, dtype=np.dtype("float32"))
SMALL = Sizes(SHAPE, batch=2, prompt=40, output=5)
PAGES = "h2o(heavy=4,recent=4)+paged"
GUESSING = "infinigen(partial=1.0,full_layers=0)"


@pytest.fixture(scope="module")
def spent(byte_model):
    """The ledger of a real run of two prompts of 40 tokens that generate 5 each, and its sizes."""
    calibration = calibrate(byte_model)
    prompts = np.random.default_rng(0).integers(0, 256, (2, 40))

    def run(strategy):
        model = calibrated(byte_model, strategy, calibration)
        *_, last = kvjax.stream(model, prompts, strategy=strategy, max_new_tokens=5, stop_tokens=())
        return ledger(strategy, last.state)

    return run, Sizes(cache_shape(byte_model), 2, 40, 5)


@pytest.mark.parametrize("spec", [PAGES, "offload", "infinigen(alpha=inf,budget=9,full_layers=1)"])
def test_costs_are_what_a_real_run_takes(spent, spec):
    run, sizes = spent
    strategy = parse_strategy(spec, page_size=8)
    books = run(strategy)
    assert cost(strategy, "device_bytes", sizes) == books.device.total
    assert cost(strategy, "moved_bytes", sizes) == pytest.approx(books.bytes_moved_per_token, rel=1e-6)


def test_a_guess_that_wants_less_moves_no_more_than_its_cost_says(spent):
    run, sizes = spent
    matched = match(parse_strategy("infinigen(alpha=1,full_layers=1)"), "moved_bytes", 20_000, sizes)
    moved = run(matched.strategy).bytes_moved_per_token
    assert 0 < moved <= matched.cost <= 20_000


def test_a_matched_pool_fits_a_real_run(spent):
    run, sizes = spent
    free = parse_strategy("infinigen(full_layers=1)")
    target = 0.7 * cost(free, "device_bytes", sizes)
    matched = match(free, "device_bytes", target, sizes)
    assert matched.strategy.policy.pool == matched.knob < 40
    books = run(matched.strategy)
    assert books.device.total == matched.cost <= target
    assert books.bytes_moved_per_token <= cost(matched.strategy, "moved_bytes", sizes)


@pytest.mark.parametrize("spec", ["full", "vllm", "streaming", "h2o", "h2o+paged", "h2o+host", "infinigen(pool=0.5)", "oracle_topk"])
def test_device_bytes_are_those_of_the_arrays(spec):
    strategy = parse_strategy(spec, page_size=8)
    kv = strategy.init(SHAPE, [40, 40], 40, 8)
    sizes = dataclasses.replace(SMALL, reserve=8)
    assert cost(strategy, "device_bytes", sizes) == ledger(strategy, kv).device.total


@pytest.mark.parametrize("currency", ["tokens", "device_bytes", "moved_bytes"])
@pytest.mark.parametrize("spec", ["streaming", "h2o", "h2o+paged", "h2o+host", GUESSING])
def test_the_largest_budget_within_the_price_is_found(spec, currency):
    """Against trying all of them, and at a price between two costs as at a cost itself."""
    strategy = parse_strategy(spec, page_size=8)
    if currency == "moved_bytes" and strategy.store.name != "host":
        assert match(strategy, currency, 0, SMALL).strategy == strategy  # moves nothing as it is
        return

    def limited(knob):
        policy = strategy.policy
        pooled = spec == GUESSING and currency == "device_bytes"
        return Strategy(dataclasses.replace(policy, pool=knob) if pooled else policy.with_budget(knob), strategy.store)

    least = 5 if spec == "streaming" else 1
    costs = {knob: cost(limited(knob), currency, SMALL) for knob in range(least, SMALL.length + 1)}
    assert list(costs.values()) == sorted(costs.values())
    for target in (costs[least], costs[12], costs[12] + 0.5, costs[30] - 1):
        found = match(strategy, currency, target, SMALL)
        assert found.knob == max(knob for knob, price in costs.items() if price <= target)
        assert found.cost == costs[found.knob]
        assert found.strategy == limited(found.knob)
    with pytest.raises(MatchError, match=rf"costs at least .* \(with {least} tokens\), more than "):
        match(strategy, currency, costs[least] - 1, SMALL)


def test_equal_tokens_are_equal_tokens():
    specs = ("streaming", "h2o", "h2o+paged", "infinigen", "oracle_topk")
    matched = [match(parse_strategy(spec), "tokens", 12, SMALL) for spec in specs]
    assert [m.cost for m in matched] == [12] * len(specs)
    assert matched[0].strategy.describe() == "streaming(sinks=4,window=8)"
    assert matched[1].strategy.describe() == "h2o(heavy=6,recent=6)"
    assert matched[-1].strategy.policy.k == 12


@pytest.mark.parametrize(
    ("spec", "currency", "target", "why"),
    [
        ("full", "tokens", 12, "full has no budget to turn down: 45 tokens, more than 12"),
        ("vllm", "device_bytes", 1e4, r"vllm has no budget to turn down: \d+ bytes on the device, more than 10000"),
        ("offload", "moved_bytes", 1e3, r"offload has no budget to turn down: \d+ bytes moved per token, more than 1000"),
        ("oracle_topk", "device_bytes", 1e4, "keeps every token whatever it reads"),
        ("streaming(sinks=0.1,window=0.2)", "tokens", 12, "no budget in tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_for_the_price_is_one_clear_line(spec, currency, target, why):
    with pytest.raises(MatchError, match=why) as error:
        match(parse_strategy(spec), currency, target, SMALL)
    assert "\n" not in str(error.value)


def test_what_has_no_knob_is_itself_where_the_price_allows():
    full = parse_strategy("full")
    found = match(full, "device_bytes", 1e9, SMALL)
    assert (found.strategy, found.knob, found.cost) == (full, None, cost(full, "device_bytes", SMALL))


def test_a_pool_that_costs_more_than_it_saves_is_left_out():
    """A pool takes positions and scores of every slot; with few partial keys that is more than there is to save."""
    free = parse_strategy("infinigen")
    price = cost(free, "device_bytes", SMALL)
    assert cost(parse_strategy("infinigen(pool=30)"), "device_bytes", SMALL) > price
    assert match(free, "device_bytes", price, SMALL).strategy == free


def test_the_largest_batch_fits_and_one_more_row_does_not():
    for spec in ("full", "h2o", "h2o+paged", "infinigen"):
        strategy = parse_strategy(spec)
        rows = largest_batch(strategy, 10**6, SMALL)
        assert cost(strategy, "device_bytes", dataclasses.replace(SMALL, batch=rows)) <= 10**6
        assert cost(strategy, "device_bytes", dataclasses.replace(SMALL, batch=rows + 1)) > 10**6
    assert largest_batch(parse_strategy("full"), 1000, SMALL) == 0


def test_unknown_currencies_and_sizes_are_refused():
    with pytest.raises(kvjax.SpecError, match="unknown currency 'euro'; choose from tokens, device_bytes, moved_bytes"):
        cost(parse_strategy("full"), "euro", SMALL)
    with pytest.raises(kvjax.SpecError, match="must all be at least 1"):
        Sizes(SHAPE, 0, 40, 5)


def test_a_fetch_is_priced_by_the_sizes_it_can_have():
    """Four sizes up to the capacity of 45 slots: 12, 23, 34, 45. Steps hold 40 to 43 tokens; two layers and the first are read whole."""
    row = 2 * 2 * 16 * 4
    assert cost(parse_strategy("offload"), "moved_bytes", SMALL) == 3 * 45 * row
    one = parse_strategy("infinigen(budget=10)")  # 3, 5, 8 or 10 of 10: up to all of them
    assert cost(one, "moved_bytes", SMALL) == (2 * 45 + 10) * row
    assert cost(one, "moved_bytes", dataclasses.replace(SMALL, output=1)) == 0
    assert math.isclose(cost(parse_strategy("infinigen(budget=10,full_layers=0)"), "moved_bytes", SMALL), (45 + 2 * 10) * row)


def test_the_least_knob_is_found():
    assert least_knob(lambda n: float(n) if n > 4 else None, 45) == 5
    assert least_knob(lambda n: float(n), 45) == 1
    assert least_knob(lambda n: None, 45) is None
