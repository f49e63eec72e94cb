"""Tasks put to strategies: one prefill for all of them gives what separate passes give, question by question."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import InputError, SpecError
from kvjax.generation import as_strategy, feed, run_prefill, score
from kvjax.models import load_model
from kvjax.quality import asked, fidelity
from kvjax.quality.tasks import Frame, parse_task

STRATEGIES = ["h2o(heavy=0.1,recent=0.1)", "oracle_topk(k=0.1)", "full"]


def under(model, *strategies):
    """Contenders: one model under several strategies."""
    return [(model, strategy) for strategy in strategies]


@pytest.fixture
def model(byte_model):
    """Random weights: what it writes is nonsense, but another nonsense for every other cache."""
    return dataclasses.replace(byte_model, config=dataclasses.replace(byte_model.config, max_position=512, stop_tokens=(ord("e"),)))


def written_apart(model, strategy, context, query, room):
    """What greedy decoding writes: a prefill of its own for one row, then token by token."""
    strategy = as_strategy(strategy)
    rows = np.asarray(context, np.int32)[None]
    logits, kv = run_prefill(model, strategy, rows, np.asarray([rows.shape[1]], np.int32), len(query) + room)
    logits = logits[:, None]
    if len(query):
        logits, kv = feed(model, strategy, kv, np.asarray(query, np.int32)[None])
    out = []
    for _ in range(room):
        token = int(logits[0, -1].argmax())
        if token in model.config.stop_tokens:
            break
        out.append(token)
        logits, kv = feed(model, strategy, kv, np.asarray([[token]], np.int32))
    return model.tokenizer.decode(out)


@pytest.mark.parametrize(("query", "stringing"), [("before", "calls"), ("after", "unroll")])
def test_equals_separate_passes(model, query, stringing):
    model = dataclasses.replace(model, stringing=stringing)
    task = parse_task("kv(turns=2,pairs=0,digits=3)")
    outcome = asked.ask(under(model, *STRATEGIES), task, length=300, count=3, query=query, batch_size=2, seed=5)
    examples = task.examples(Frame.of(model.tokenizer), 300, 3, seed=5)
    some = set()
    for spec, answers in zip(STRATEGIES, outcome.answers, strict=True):
        for one, written in zip(examples, answers.written, strict=True):
            assert len(written) == (1 if query == "before" else 2)
            for turn, text in zip(one.turns, written, strict=False):
                context, rest = (one.prompt(), []) if query == "before" else (one.context, turn.query)
                assert text == written_apart(model, spec, context, rest, turn.max_new), spec
                some.add(text)
    assert len(some) > 4, "strategies and examples differ"
    assert outcome.full.written == outcome.answers[-1].written
    assert (outcome.length, outcome.query, outcome.templated) == (300, query, False)


def test_questions_of_several_lengths_are_as_if_alone(model, tmp_path):
    rows = [
        {"context": "The cat sat on the mat. " * count, "question": "\nWho sat" + "?" * count, "answers": ["cat"], "max_tokens": 7}
        for count in (1, 6, 3)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = parse_task(str(path))
    strategies = ["h2o(heavy=8,recent=8)"]
    outcome = asked.ask(under(model, *strategies), task, length=0, count=3, query="after", batch_size=3)
    for spec, answers in zip(strategies, outcome.answers, strict=True):
        for one, (text,) in zip(task.examples(Frame.of(model.tokenizer), 0, 3, 0), answers.written, strict=True):
            assert text == written_apart(model, spec, one.context, one.turns[0].query, 7)
    path.write_text('{"prompt": "one piece", "answers": ["x"]}')
    with pytest.raises(SpecError, match="prompts in one piece"):
        asked.ask(under(model, "full"), parse_task(str(path)), length=0, count=1, query="after")


def test_what_is_fed_is_compared_with_the_full_cache(byte_model):
    task = parse_task("prose(tokens=9)")
    outcome = asked.ask(under(byte_model, "h2o(heavy=0.1,recent=0.1)"), task, length=120, count=3, batch_size=2, seed=2)
    examples = task.examples(Frame.of(byte_model.tokenizer), 120, 3, seed=2)
    rows = np.stack([one.prompt() for one in examples])
    full = score(byte_model, rows, prompt_len=120)[:, :-1]
    for spec, answers in zip(["h2o(heavy=0.1,recent=0.1)"], outcome.answers, strict=True):
        logits = score(byte_model, rows, prompt_len=120, strategy=spec)[:, :-1]
        kld, same, delta = fidelity.compare(full, logits, jnp.asarray(rows[:, 120:]))
        np.testing.assert_allclose(answers.comparison.kld, kld, atol=1e-6)
        np.testing.assert_array_equal(answers.comparison.same_top, same)
        np.testing.assert_allclose(answers.nll - outcome.full.nll, np.asarray(delta).mean(1), atol=1e-5)
        assert answers.scores is None
    assert float(np.abs(outcome.answers[0].comparison.kld).max()) > 1e-4
    (record,) = asked.records(outcome)
    assert record["fidelity_kld_mean"] == pytest.approx(float(outcome.answers[0].comparison.kld.mean()))
    assert record["task_perplexity"] == pytest.approx(float(np.exp(outcome.answers[0].nll.mean())))
    assert record["task_ranked"] is True
    assert "task_score" not in record


def test_trained_model_is_asked_for_facts():
    """kvjax-1m remembers facts, and streaming forgets those outside its window."""
    model = load_model("kvjax-1m")
    outcome = asked.ask(under(model, "streaming(sinks=4,window=160)", "full"), parse_task("recall(facts=4)"), length=400, count=3, seed=1)
    streaming, full = outcome.answers
    assert full.score >= 0.75
    assert outcome.gated
    assert 0 < streaming.score <= 0.5, "the newest facts are inside the window"
    one, two = asked.records(outcome)
    assert one["task_loss"] == pytest.approx(full.score - streaming.score)
    assert two["task_gain_over_first"] == pytest.approx(full.score - streaming.score)
    assert (one["task_full_score"], one["task_gate"], one["task_ranked"]) == (full.score, 0.5, True)


def test_below_the_gate_nothing_is_ranked(byte_model):
    outcome = asked.ask(under(byte_model, "streaming"), parse_task("niah_single(digits=9)"), length=230, count=2)
    assert outcome.full.score == 0.0
    assert not outcome.gated
    assert asked.records(outcome)[0]["task_ranked"] is False


def test_what_cannot_be_asked_is_said(byte_model, opt_model):
    with pytest.raises(SpecError, match="task recall can only be asked after, not before"):
        asked.ask(under(byte_model, "full"), parse_task("recall"), length=200, count=1, query="before")
    with pytest.raises(SpecError, match="named twice"):
        asked.ask(under(byte_model, "full", "full"), parse_task("kv"), length=200, count=1)
    with pytest.raises(InputError, match="exceed the 256 positions"):
        asked.ask(under(byte_model, "full"), parse_task("niah_single"), length=256, count=1)
    with pytest.raises(InputError, match="no tokenizer"):
        asked.ask(under(opt_model, "full"), parse_task("niah_single"), length=100, count=1)
