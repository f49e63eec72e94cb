"""The engine over the stores of a card, here with the operations' XLA forms: the tokens are those of each request alone on a CPU."""

import numpy as np
import pytest

from kvjax import Engine, generate
from kvjax.cache import H2O, Full, Policy, Store, Strategy, dense, host, paged
from kvjax.cache.ledger import nbytes
from kvjax.calibrate import calibrated
from kvjax.models import Model

PAGES = paged(16).on("gpu")
LENGTHS = ((1, 30), (150, 12), (7, 40), (64, 17), (48, 40))  # prompt and max_tokens
CASES: list[tuple[Policy, Store, bool]] = [
    (Full(), dense().on("gpu"), False),
    (Full(), PAGES, True),
    (H2O(heavy=8, recent=8), PAGES, False),
    (Full(), host("device").on("gpu"), False),
]


pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(scope="module")
def model(restless) -> Model:
    return restless()


@pytest.mark.parametrize(("policy", "store", "shares"), CASES, ids=[f"{p.describe()}-{s.name}" for p, s, _ in CASES])
def test_greedy_tokens_survive_company_and_preemption(model, policy, store, shares):
    """Three rows for five requests, one of them with two samples of its prompt; where pages are shared, a prompt comes twice."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 251, length) for length, _ in LENGTHS]
    rows = generate(model, prompts, strategy=Strategy(policy, dense()), max_new_tokens=40, stop_tokens=()).tokens
    expected = {(f"r{i}", 0): row[:new] for i, (row, (_, new)) in enumerate(zip(rows, LENGTHS, strict=True))}
    strategy = Strategy(policy, store)
    engine = Engine(
        calibrated(model, strategy), strategy, kv_memory="1MiB", max_num_seqs=3, max_model_len=200, prefill_chunk=32, prefix_caching=shares
    )
    held = nbytes([(layer.pool.k, layer.pool.v) for layer in engine._layers if store.name != "host"])
    assert held == engine.budget.num_pages * engine.budget.page
    for i, (prompt, (_, new)) in enumerate(zip(prompts, LENGTHS, strict=True)):
        engine.add(f"r{i}", prompt, max_tokens=new, stop_tokens=(), n=1 + (i == 4))
    expected["r4", 1] = expected["r4", 0]
    found: dict[tuple[str, int], list[int]] = {}
    steps = 0
    while engine.busy:
        if (steps := steps + 1) in (12, 25) and engine.scheduler.running:
            engine.preempt(engine.scheduler.running[0].request, swap=store.name == "host")
        if shares and steps == 60:
            engine.add("again", prompts[1], max_tokens=12, stop_tokens=())
            expected["again", 0] = expected["r1", 0]
        for output in engine.step():
            found.setdefault((output.request, output.index), []).extend(output.tokens)
    engine.scheduler.blocks.check()
    assert engine.scheduler.preemptions
    assert bool(engine.scheduler.blocks.prefix_hit_tokens) == shares
    assert found == expected
