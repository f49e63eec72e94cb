"""The engine over a pool in host memory: tokens do not depend on the company, on preemption, or on swaps; memory is given back."""

import functools
import re
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from kvjax import Engine, SpecError, generate
from kvjax.cache import Strategy, parse_strategy
from kvjax.calibrate import Calibration, calibrate, calibrated
from kvjax.engine import programs
from kvjax.engine.load import Load, Request
from kvjax.engine.serve import serve
from kvjax.errors import KvjaxError
from kvjax.models import Model

INFINIGEN, POOLED = "infinigen(alpha=2,partial=0.3,budget=0.3)", "infinigen(alpha=2,partial=0.3,budget=0.3,pool=30)"
SPECS = [("full", "jit"), ("h2o(heavy=8,recent=8)", "jit"), (INFINIGEN, "jit"), (INFINIGEN, "device"), (POOLED, "jit")]
LENGTHS = ((1, 40), (180, 12), (7, 60), (33, 1), (64, 17), (100, 8), (50, 30))  # prompt and max_tokens


pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(scope="module")
def model(restless) -> Model:
    """Four layers, two of which speculate."""
    return restless(num_layers=4)


@pytest.fixture(scope="module")
def calibration(model) -> Calibration:
    return calibrate(model)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 251, length) for length, _ in LENGTHS]


@pytest.fixture(scope="module")
def alone(model, calibration, prompts):
    """(spec, transfer) -> the strategy, the model it takes, and what `generate` makes of each prompt."""

    @functools.cache
    def tokens(spec: str, transfer: str) -> tuple[Strategy, Model, list[list[int]]]:
        strategy = parse_strategy(spec, "host", transfer=transfer)
        guided = calibrated(model, strategy, calibration)
        rows = generate(guided, prompts, strategy=strategy, max_new_tokens=60, stop_tokens=()).tokens
        return strategy, guided, [row[:new] for row, (_, new) in zip(rows, LENGTHS, strict=True)]

    return tokens


def make(model: Model, strategy: Strategy | str, **options: Any) -> Engine:
    limits: dict[str, Any] = {"kv_memory": "4MiB", "max_num_seqs": 3, "max_model_len": 224, "prefill_chunk": 32}
    return Engine(model, strategy, **limits | options)


def finish(engine: Engine, tokens: dict[str, list[int]], between=lambda step: None) -> dict[str, list[int]]:
    """Steps until nothing is left to do, and makes sure that nothing is left behind."""
    step = 0
    while engine.busy:
        for output in engine.step():
            tokens.setdefault(output.request, []).extend(output.tokens)
        between(step := step + 1)
    engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.used_blocks == 0
    assert not engine._swapped
    return tokens


@pytest.mark.parametrize(("spec", "transfer"), SPECS)
def test_greedy_tokens_survive_company_recomputation_and_swaps(alone, prompts, spec, transfer):
    strategy, guided, expected = alone(spec, transfer)
    engine = make(guided, strategy)
    for swap in (None, False, True):
        rng = np.random.default_rng(1)

        def disturb(step, swap=swap, rng=rng):
            if swap is not None and step % 13 == 0 and step < 200 and engine.scheduler.running:
                running = engine.scheduler.running
                engine.preempt(running[int(rng.integers(len(running)))].request, swap=swap)

        before = engine.scheduler.preemptions
        for i, (prompt, (_, new)) in enumerate(zip(prompts, LENGTHS, strict=True)):
            engine.add(f"r{i}", prompt, max_tokens=new, stop_tokens=())
        tokens = finish(engine, {}, disturb)
        assert [tokens[f"r{i}"] for i in range(len(prompts))] == expected
        assert (engine.scheduler.preemptions - before >= 5) == (swap is not None)


@pytest.mark.parametrize("spec", [INFINIGEN, POOLED])
def test_a_swapped_request_goes_on_where_it_was(alone, prompts, spec):
    """With a single row: another request is served in between, and nothing of the first is computed again."""
    strategy, guided, expected = alone(spec, "jit")
    engine = make(guided, strategy, max_num_seqs=1)
    engine.add("first", prompts[2], max_tokens=60, stop_tokens=())
    tokens: dict[str, list[int]] = {}
    while len(tokens.get("first", [])) < 20:
        for output in engine.step():
            tokens.setdefault(output.request, []).extend(output.tokens)
    engine.preempt("first", swap=True)
    assert engine.scheduler.blocks.used_blocks == 1, "its seat stays"
    engine.scheduler.waiting.rotate(-1)
    engine.add("second", prompts[0], max_tokens=40, stop_tokens=())
    engine.scheduler.waiting.reverse()
    fed = "stage" if engine._staging is not None else "prefill"
    with mock.patch.object(programs, fed, wraps=getattr(programs, fed)) as prefill:
        finish(engine, tokens)
    assert prefill.call_count == 1, "one chunk, of the second request"
    assert tokens == {"first": expected[2], "second": expected[0]}


def test_aborting_a_swapped_request_gives_its_seat_back(alone, prompts):
    strategy, guided, _ = alone(INFINIGEN, "jit")
    engine = make(guided, strategy, max_num_seqs=1)
    engine.add("a", prompts[2], max_tokens=60, stop_tokens=())
    for _ in range(8):
        engine.step()
    engine.preempt("a", swap=True)
    engine.abort("a")
    finish(engine, {})


def test_samples_get_copies_of_the_seat(alone, prompts):
    strategy, guided, expected = alone(INFINIGEN, "jit")
    engine = make(guided, strategy)
    engine.add("n", prompts[4], max_tokens=17, n=2, stop_tokens=())
    heard: dict[int, list[int]] = {0: [], 1: []}
    while engine.busy:
        for output in engine.step():
            heard[output.index] += output.tokens
    assert heard == {0: expected[4], 1: expected[4]}


def test_nothing_is_compiled_under_load(alone, prompts):
    strategy, guided, _ = alone(INFINIGEN, "jit")
    engine = make(guided, strategy)
    engine.warm_up()
    compiled = []
    listen = lambda event, duration, **_: event.endswith("backend_compile_duration") and compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for i, (prompt, (_, new)) in enumerate(zip(prompts, LENGTHS, strict=True)):
            engine.add(f"r{i}", prompt, max_tokens=new, n=1 + i % 2, stop_tokens=())
        finish(engine, {}, lambda step: step % 9 == 0 and step < 60 and [engine.preempt(f"r{i}", swap=True) for i in range(7)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_a_load_tells_what_crossed_over(alone, prompts):
    strategy, guided, _ = alone(INFINIGEN, "jit")
    engine = make(guided, strategy)
    requests = tuple(Request(i, prompts[i], 20, 0.0, seed=i) for i in (1, 5))
    record = serve(engine, Load("prompts", requests, request_rate=float("inf"), burstiness=1.0)).record(engine)
    moved = engine.traffic()[:, 3].sum() * 2 * guided.config.head_dim * 4
    assert record["kv_bytes_moved_per_token"] == pytest.approx(moved / 38)  # the first tokens come from the prompts
    assert 0 < record["kv_wanted_fraction"] < record["kv_fetched_fraction"]
    assert record["transfer"] == "jit"
    assert record["kv_host_total_bytes"] == engine.budget.num_pages * engine.budget.seat > engine.budget.total


def test_what_makes_no_sense_is_refused(model, alone):
    strategy, guided, _ = alone(INFINIGEN, "jit")
    with pytest.raises(SpecError, match=re.escape("kvjax.calibrated(model, strategy)")):
        make(model, strategy)
    with pytest.raises(SpecError, match="offline only"):
        make(guided, parse_strategy(INFINIGEN, transfer="driven"))
    with pytest.raises(SpecError, match="host_memory is for the host store; vllm has none"):
        make(model, "vllm", host_memory="1MiB")
    with pytest.raises(KvjaxError, match="kv_memory of 1024 bytes is too small"):
        make(guided, strategy, kv_memory=1024)
    with pytest.raises(KvjaxError, match="host_memory of 1024 bytes is too small"):
        make(guided, strategy, host_memory=1024)
    paged = make(model, "vllm")
    paged.add("a", [1, 2, 3])
    with pytest.raises(SpecError, match="preemption by swap needs a pool in host memory; vllm has none"):
        paged.preempt("a", swap=True)
