"""Guesses against the truth: a NumPy decoder that guesses, fetches and judges, and cases with a known answer."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from rich.console import Console

from kvjax.cache import parse_strategy
from kvjax.cache.policies import InfiniGen
from kvjax.calibrate import calibrate, calibrated
from kvjax.engine import offline
from kvjax.errors import InputError, SpecError
from kvjax.models import Model, load_model, parameters
from kvjax.quality.speculation import MEASURES, Speculation, audit
from kvjax.report import record, table

PROMPT, STEPS = 24, 4


@pytest.fixture(scope="module")
def deep(byte_model, opt_model) -> dict[str, Model]:
    """The small random models with three layers, of which the last two are guessed for (full_layers=1), and attention that is not flat."""

    def sharper(path, leaf):
        return 4 * leaf if path[-2:-1] in (("q",), ("k",)) else leaf

    found = {}
    for name, model in (("bytes", byte_model), ("opt", opt_model)):
        config = dataclasses.replace(model.config, num_layers=3)
        found[name] = Model(config, parameters.map_with_path(sharper, parameters.random(config)), None)
    return found


@pytest.fixture(scope="module")
def calibrations(deep):
    return {name: calibrate(model, rows(model)) for name, model in deep.items()}


def rows(model: Model, count: int = 2) -> np.ndarray:
    return np.random.default_rng(3).integers(0, model.config.vocab_size, (count, PROMPT + STEPS)).astype(np.int32)


# -------------------------------------------------------------------------------------------------------------- a decoder in NumPy


@dataclasses.dataclass
class Naive:
    """A step without arrays of its own kind: keys and values in lists, one row, one head, one token after the other."""

    policy: InfiniGen
    keys: list
    values: list
    chosen: dict
    found: list

    def positions(self, kv, num_tokens):
        return len(self.keys[0][0][0]) + jnp.arange(num_tokens)[None]

    def look_ahead(self, layer, queries, kv):
        following = layer + 1
        if following == len(self.keys) or following < self.policy.full_layers or not self.keys[following][0][0]:
            return
        guessed = np.asarray(queries(), np.float64)  # [B, Hkv, G, P]
        join = np.max if self.policy.group == "max" else np.mean
        self.chosen[following] = []
        for b, heads in enumerate(guessed):
            logits = [join(q @ np.array([partial for _, partial in self.keys[following][b][n]]).T, axis=0) for n, q in enumerate(heads)]
            most = int(len(logits[0]) * self.policy.budget)
            ranked = [self.ranked(x, most) for x in logits]
            count = min(max(int(np.mean([len(fixed) + near for fixed, _, near in ranked])), 1), most)
            self.chosen[following].append([{*fixed, *order[: count - len(fixed)]} for fixed, order, _ in ranked])

    def ranked(self, logits, most):
        """The tokens that are always read where `most` may be, the others by their logits, and how many of those are near the highest."""
        sinks = min(self.policy.sinks, most // 2)
        recent = min(self.policy.recent, most // 2 - sinks)
        fixed = [p for p in range(len(logits)) if p < sinks or p >= len(logits) - recent]
        order = [p for p in np.argsort(-logits, kind="stable").tolist() if p not in fixed]
        near = sum(logits[p] > logits[order[0]] - self.policy.alpha for p in order)
        return fixed, order, near

    def attend(self, layer, q, k, v, kv, guide, ahead):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        partial = np.einsum("bsnd,ndp->bsnp", k, np.asarray(guide.key, np.float64))
        out = np.zeros_like(q)
        groups = q.shape[2] // k.shape[2]
        chosen = self.chosen.pop(layer, None)
        for b in range(q.shape[0]):
            truths = []
            for n in range(k.shape[2]):
                mine, theirs = self.keys[layer][b][n], self.values[layer][b][n]
                for s in range(q.shape[1]):
                    mine.append((k[b, s, n], partial[b, s, n]))
                    theirs.append(v[b, s, n])
                    logits = np.array([key for key, _ in mine]) @ q[b, s, n * groups : (n + 1) * groups].T / np.sqrt(q.shape[-1])
                    read = range(len(mine)) if chosen is None else [*sorted(chosen[b][n]), len(mine) - 1]
                    weights = np.exp(logits[read] - logits[read].max(0))
                    out[b, s, n * groups : (n + 1) * groups] = (weights / weights.sum(0)).T @ np.array(theirs)[read]
                truths.append(logits.T)
            if chosen is not None:
                self.found.append((layer, b, self.judge(truths, chosen[b])))
        return jnp.asarray(out, jnp.float32), kv

    def judge(self, truths, chosen):
        """MEASURES of one row, from the logits [G, tokens and the newest] of each kv head."""
        join = np.max if self.policy.group == "max" else np.mean
        joined = [join(x[:, :-1], axis=0) for x in truths]
        ranked = [self.ranked(x, len(x)) for x in joined]
        near = int(np.mean([len(fixed) + count for fixed, _, count in ranked]))
        precision, recall, mass = [], [], []
        for logits, (fixed, best, _), fetched in zip(truths, ranked, chosen, strict=True):
            guessed = fetched - set(fixed)
            precision.append(len(guessed & set(best[: len(guessed)])) / max(len(guessed), 1))
            recall.append(len(guessed & set(best[: near - len(fixed)])) / (near - len(fixed)))
            probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            mass.append(probability[:, [*fetched, -1]].sum(1).mean())
        return np.mean(precision), np.mean(recall), np.mean(mass), len(chosen[0]), near

    def hidden(self, x):
        return x[:, -1:]

    def finish(self, kv, num_tokens):
        return kv


def naively(model: Model, policy: InfiniGen, token_ids: np.ndarray) -> np.ndarray:
    """MEASURES by NumPy: [measure, layer, row, step]."""
    batch, heads = len(token_ids), model.config.num_kv_heads

    def empty() -> list:
        return [[[[] for _ in range(heads)] for _ in range(batch)] for _ in range(model.config.num_layers)]

    step = Naive(policy, empty(), empty(), {}, [])
    for part in (token_ids[:, :PROMPT], *np.split(token_ids[:, PROMPT:], STEPS, axis=1)):
        model.decoder.apply(model.params, part, None, step)
    layers = range(policy.full_layers, model.config.num_layers)
    return np.array([[[m for i, b, m in step.found if (i, b) == (layer, row)] for row in range(batch)] for layer in layers]).transpose(
        3, 0, 1, 2
    )


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("bytes", "infinigen_paper(alpha=2,partial=0.3,budget=0.4,sinks=1,recent=2,full_layers=1)"),
        ("bytes", "infinigen_paper(alpha=1.5,partial=0.2,budget=0.9,sinks=0,recent=0,columns=union,group=mean,full_layers=1)"),
        ("opt", "infinigen_paper(alpha=4,partial=0.3,budget=0.5,sinks=0,recent=4,full_layers=1)"),
    ],
)
def test_agrees_with_numpy(deep, calibrations, name, spec):
    strategy = parse_strategy(spec)
    model = calibrated(deep[name], strategy, calibrations[name])
    found = audit(model, strategy, rows(model), prompt_len=PROMPT)
    expected = naively(model, strategy.policy, rows(model))
    assert found.layers == (1, 2)
    assert 0.02 < expected[0].mean() < 0.98, "the guesses are neither all right nor all wrong"
    for measure, values in zip(MEASURES, expected, strict=True):
        assert_allclose(found.values[measure], values, atol=1e-4, err_msg=measure)


# -------------------------------------------------------------------------------------------------------------- known by construction


def test_layers_that_see_the_same_input_are_guessed_exactly(deep):
    """No block adds anything to the hidden state, and all columns are seen: the guess is the truth, whatever part of it is fetched."""

    def silent(path, leaf):
        return 0 * leaf if path[-2:-1] in (("o",), ("down",)) else leaf

    model = dataclasses.replace(deep["bytes"], params=parameters.map_with_path(silent, deep["bytes"].params))
    strategy = parse_strategy("infinigen_paper(alpha=20,partial=1.0,budget=0.2,sinks=1,recent=0,full_layers=1)")
    found = audit(calibrated(model, strategy, calibrate(model, rows(model))), strategy, rows(model), prompt_len=PROMPT)
    assert_allclose(found.values["precision"], 1)
    near, fetched = (found.values[name] for name in ("near", "fetched"))
    assert (near > fetched).any(), "the budget binds somewhere"
    assert_allclose(found.values["recall"], np.minimum((fetched - 1) / (near - 1), 1), atol=1e-6)
    assert (found.values["mass_covered"] < 1).all()


def test_everything_fetched_covers_everything(deep, calibrations):
    """Here from a pool that has room for 20 tokens: the truth is what it holds."""
    strategy = parse_strategy("infinigen_paper(alpha=inf,budget=1.0,sinks=2,recent=3,pool=20,full_layers=1)")
    found = audit(calibrated(deep["bytes"], strategy, calibrations["bytes"]), strategy, rows(deep["bytes"]), prompt_len=PROMPT)
    for measure in ("precision", "recall", "mass_covered"):
        assert_allclose(found.values[measure], 1, atol=1e-6)
    for measure in ("fetched", "near"):
        assert_allclose(found.values[measure], 20)


def test_trained_model_guesses_better_than_chance():
    model, strategy = load_model("kvjax-1m"), parse_strategy("infinigen_paper")
    workload = offline.make_workload(model, num_prompts=2, input_len=160, seed=0, num_facts=2)
    token_ids = np.concatenate([workload.prompts, workload.continuation], axis=1)
    found = audit(calibrated(model, strategy), strategy, token_ids, prompt_len=160)
    assert found.layers == tuple(range(2, model.config.num_layers))
    share = found.overall("fetched").value / (160 + workload.continuation.shape[1] / 2)
    assert share < 0.21
    for measure in ("precision", "recall", "mass_covered"):
        assert 2 * share < found.overall(measure).value < 1


# ------------------------------------------------------------------------------------------------------------------------- summaries


def test_record_by_hand():
    """Two layers, two rows, one step; the standard error is over rows."""
    values = {measure: np.array([[[0.2], [0.4]], [[0.6], [0.8]]]) for measure in MEASURES}
    flat = Speculation((2, 5), values).record()
    assert [key for key in flat if "precision" in key] == [
        "speculation_precision", "speculation_precision_se", "speculation_precision_layer_2", "speculation_precision_layer_5",
    ]  # fmt: skip
    error = np.std([0.4, 0.6], ddof=1) / np.sqrt(2)
    for measure in MEASURES:
        assert flat[f"speculation_{measure}"] == pytest.approx(0.5)
        assert flat[f"speculation_{measure}_se"] == pytest.approx(error)
        assert flat[f"speculation_{measure}_layer_5"] == pytest.approx(0.7)


def test_one_row_has_no_error_and_no_layer_no_record():
    assert Speculation((2,), dict.fromkeys(MEASURES, np.ones((1, 1, 3)))).overall("recall").error is None
    assert Speculation((), dict.fromkeys(MEASURES, np.ones((0, 2, 3)))).record() == {}


def test_measured_recorded_and_shown(deep, calibrations):
    """Through offline.measure: when quality is asked for, on the first batch, and not otherwise."""
    model, strategy = deep["opt"], parse_strategy("infinigen_paper(alpha=1,partial=0.3,budget=0.5,full_layers=1)")
    prepared = calibrated(model, strategy, calibrations["opt"])
    workload = offline.make_workload(model, num_prompts=3, input_len=PROMPT, seed=0, continuation_len=STEPS)
    options = dict(batch_size=2, output_len=2)
    (quality,) = offline.judge([(prepared, strategy)], workload, batch_size=2, reserve=2)
    measured = offline.measure(prepared, strategy, workload, quality=quality, **options)
    whole = np.concatenate([workload.prompts, workload.continuation], axis=1)[:2, :-1]  # nothing is compared with the last one's logits
    alone = audit(prepared, strategy, whole, prompt_len=PROMPT)
    assert measured.speculation is not None
    assert measured.speculation.record() == alone.record()
    assert offline.measure(prepared, strategy, workload, **options).speculation is None

    asked = options | {"input_len": PROMPT, "seed": 0}
    flat = record.record(measured, model, workload, asked)
    assert flat["speculation_precision"] == alone.overall("precision").value
    assert [name for name, value in flat.items() if isinstance(value, dict | list)] == ["strategy_identity"]
    text = io.StringIO()
    table.show([flat], Console(file=text, width=150))
    for words in ("speculation (guess against the truth)", "precision (%)", "attention mass covered (%)"):
        assert words in text.getvalue()


def test_refuses_what_does_not_guess(deep):
    model = deep["bytes"]
    for spec in ("full", "offload", "h2o"):
        with pytest.raises(SpecError, match="guesses nothing"):
            audit(model, parse_strategy(spec), rows(model), prompt_len=PROMPT)
    with pytest.raises(SpecError, match="calibrated model"):
        audit(model, parse_strategy("infinigen"), rows(model), prompt_len=PROMPT)
    with pytest.raises(InputError, match="1 <= prompt_len < S"):
        audit(model, parse_strategy("infinigen"), rows(model), prompt_len=PROMPT + STEPS)


def test_memory_of_the_transfer_does_not_matter(deep, calibrations):
    """An audit gives the same whichever way the strategy moves tokens."""
    found = []
    for transfer in ("device", "jit", "driven"):
        strategy = parse_strategy("infinigen_paper(alpha=1,partial=0.3,budget=0.5,full_layers=1)", transfer=transfer)
        model = calibrated(deep["opt"], strategy, calibrations["opt"])
        found.append(jax.tree.map(float, audit(model, strategy, rows(model), prompt_len=PROMPT).record()))
    assert found[0] == found[1] == found[2]
