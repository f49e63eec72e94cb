"""Layers strung together by calls against layers unrolled; prompts staged once against prompts prefilled for each strategy."""

import dataclasses

import jax
import numpy as np
import pytest

import kvjax
from kvjax.engine.engine import Engine
from kvjax.generation import as_strategy, commit, feed, run_prefill, stage_prompts
from kvjax.models.decoder import UNROLLED_LAYERS, default_stringing
from kvjax.quality.speculation import audit

PROMPTS = ["def main():\n    return 1\n", "import os\nimport sys\n\n"]
SPECS = ["full", "h2o(heavy=4,recent=4)+paged", "oracle_topk(k=0.3)", "infinigen(budget=0.5,full_layers=1)"]
EVICT = ["tova(budget=6)", "random(budget=6)", "h2o(heavy=4,recent=4)+host"]


@pytest.fixture(scope="module")
def models(request):
    """The same model, unrolled and by calls, for a strategy."""
    byte_model = request.getfixturevalue("byte_model")

    def prepared(spec: str):
        strategy = as_strategy(spec)
        model = kvjax.calibrated(byte_model, strategy) if strategy.policy.guesses else byte_model
        return strategy, model, dataclasses.replace(model, stringing="calls")

    return prepared


def test_deep_models_take_calls_on_a_cpu(byte_model):
    assert default_stringing(byte_model.config) == "unroll"
    assert default_stringing(dataclasses.replace(byte_model.config, num_layers=UNROLLED_LAYERS + 1)) == "calls"


@pytest.mark.parametrize("spec", [*SPECS, EVICT[0], *(pytest.param(spec, marks=pytest.mark.slow) for spec in EVICT[1:])])
def test_calls_give_what_unrolled_layers_give(models, spec):
    strategy, unrolled, calls = models(spec)
    a, b = (kvjax.generate(m, PROMPTS, strategy=strategy, max_new_tokens=9, steps_per_call=4) for m in (unrolled, calls))
    assert a.tokens == b.tokens
    assert a.ledger == b.ledger
    ids = np.random.default_rng(1).integers(0, 256, (2, 40))
    x, y = (kvjax.score(m, ids, prompt_len=30, strategy=strategy) for m in (unrolled, calls))
    np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
def test_chunks_and_an_audit_by_calls(models):
    strategy, unrolled, calls = models(SPECS[3])
    ids = np.random.default_rng(2).integers(0, 256, (2, 24))
    plan = kvjax.PrefillPlan(chunk=7)
    x, y = (audit(m, strategy, ids, prompt_len=18, prefill=plan) for m in (unrolled, calls))
    assert x.layers == y.layers == (1,)
    for name in x.values:
        np.testing.assert_allclose(x.values[name], y.values[name], atol=1e-6)


@pytest.mark.parametrize("spec", ["vllm", "h2o(heavy=4,recent=4)", pytest.param(SPECS[3], marks=pytest.mark.slow)])
def test_an_engine_by_calls_gives_the_same_tokens(models, spec):
    strategy, unrolled, calls = models(spec)
    results = []
    for model in (unrolled, calls):
        engine = Engine(model, strategy, kv_memory="4MiB", max_num_seqs=4)
        for i, prompt in enumerate(PROMPTS):
            engine.add(str(i), prompt, max_tokens=6)
        tokens: dict[str, list[int]] = {}
        while engine.busy:
            for output in engine.step():
                tokens.setdefault(output.request, []).extend(output.tokens)
        results.append(tokens)
    assert [len(x) for x in results[0].values()] == [6, 6]
    assert results[0] == results[1]


def test_prompts_staged_once_are_what_every_strategy_would_have_made(models):
    specs = [*SPECS, EVICT[0], "h2o(heavy=3,recent=2,group=max)", "streaming(sinks=2,window=5)"]
    strategies = [as_strategy(spec) for spec in specs]
    guided = {spec: models(spec)[1] for spec in specs}
    rng = np.random.default_rng(3)
    tokens, lengths = rng.integers(0, 256, (2, 23)).astype(np.int32), np.array([23, 17], np.int32)
    staged = stage_prompts(guided["full"], strategies, tokens, lengths)
    for spec, strategy in zip(specs, strategies, strict=True):
        logits, alone = run_prefill(guided[spec], strategy, tokens, lengths, 8)
        shared = commit(guided[spec], staged, strategy, 8)
        np.testing.assert_allclose(staged.logits, logits, atol=2e-6)
        assert jax.tree.structure(shared) == jax.tree.structure(alone)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, err_msg=spec), shared, alone)  # noqa: B023
        after, _ = feed(guided[spec], strategy, shared, tokens[:, :4])
        expected, _ = feed(guided[spec], strategy, alone, tokens[:, :4])
        np.testing.assert_allclose(after, expected, atol=2e-5)
