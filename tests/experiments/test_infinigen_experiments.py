"""The InfiniGen studies' own arithmetic, resumption and reports; measured on a tiny model, or not at all."""

import dataclasses
import importlib
import json
import math

import numpy as np
import pytest
from rich.console import Console

import kvjax
from experiments.infinigen import offload, quality, retention, study
from experiments.infinigen.quality import Bench, Settings, kept_share, recall_interval, strategy_of, wilson
from kvjax.cache import H2O, Full, InfiniGen

ABLATIONS = ("skew", "partial", "columns", "alpha", "group", "budget", "pool", "layers")
SMALL = Settings("bytes", num_prompts=3, input_len=72, num_facts=4, batch_size=2, seed=0)
QUIET = Console(quiet=True)


def record(strategy, answered=("1111", "1110"), settings=SMALL, **changes):
    """What a study reads of a record."""
    share = np.array([[int(hit) for hit in row] for row in answered])
    depths = [0.0, 0.25, 0.5, 0.75]
    guesses = strategy.policy.guesses
    return {
        "settings": dataclasses.asdict(settings), "model_id": "bytes", "dtype": "float32", "strategy": strategy.describe(),
        "task_recall": float(share.mean()), "depths": depths, "answered": list(answered), "read_fraction": 0.5,
        **{f"task_recall_depth_{d:g}": float(x) for d, x in zip(depths, share.mean(0), strict=True)},
        "fidelity_kld_mean": 0.01, "fidelity_kld_mean_se": 0.001, "fidelity_kld_p99.9": 0.4, "fidelity_same_top1": 0.98,
        **({"kv_wanted_fraction_speculating": 0.1, "kv_fetched_fraction_speculating": 0.12, "kv_wanted_fraction": 0.4} if guesses else {}),
        **({"kv_fetched_fraction": 0.5, "kv_wanted_fraction_layer_0": 1.0, "kv_wanted_fraction_layer_1": 0.1} if guesses else {}),
        **({f"speculation_{m}": 0.9 for m in ("precision", "recall", "mass_covered")} if guesses else {}), **changes,
    }  # fmt: skip


def test_wilsons_interval():
    low, high = wilson(48, 48)
    assert (low, high) == pytest.approx((0.9259, 1), abs=1e-4)
    assert wilson(0, 48) == pytest.approx((0, 0.0741), abs=1e-4)
    low, high = wilson(24, 48)
    assert low + high == pytest.approx(1)
    assert low == pytest.approx(0.3639, abs=1e-3)


def test_intervals_resample_documents():
    full = record(strategy_of(Full()), answered=["1111"] * 20)
    half = record(strategy_of(H2O()), answered=["1111"] * 10 + ["0000"] * 10)
    assert recall_interval(full) == (1.0, 1.0)
    low, high = recall_interval(half)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / math.sqrt(20), abs=0.04)  # 20 documents and not 80 questions
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / math.sqrt(20), abs=0.04)
    assert kept_share(half, full) == pytest.approx((0.5, low, high))
    assert kept_share(half, half) == (1.0, 1.0, 1.0)


class Counting(Bench):
    """Measures nothing, and says how often."""

    measured = 0

    def measure(self, strategy):
        self.measured += 1
        return record(strategy, settings=self.settings)


def test_what_is_recorded_under_the_same_settings_is_not_measured_again(tmp_path):
    path, cases = tmp_path / "records.jsonl", [strategy_of(Full()), strategy_of(H2O()), strategy_of(Full())]
    bench = Counting(SMALL)
    found = quality.collect([(bench, s) for s in cases], path, QUIET)
    assert [r["strategy"] for r in found] == [s.describe() for s in cases]
    assert bench.measured == 2
    quality.collect([(bench, s) for s in cases], path, QUIET)
    assert bench.measured == 2
    other = Counting(dataclasses.replace(SMALL, seed=1))
    quality.collect([(other, cases[0])], path, QUIET)
    assert other.measured == 1
    path.write_text(path.read_text()[:-20])  # interrupted while writing
    again = Counting(dataclasses.replace(SMALL, seed=1))
    quality.collect([(again, cases[0]), (bench, cases[1])], path, QUIET)
    assert (again.measured, bench.measured) == (1, 2)
    assert [len(json.loads(line)["answered"]) for line in path.read_text().splitlines()] == [2, 2, 2]


@pytest.fixture(scope="module")
def bench(byte_model):
    return Bench(SMALL, byte_model)


def test_a_guess_with_nothing_left_out_is_the_full_cache(bench):
    full = bench.measure(strategy_of(Full()))
    ample = bench.measure(strategy_of(InfiniGen(alpha=math.inf, budget=1.0, full_layers=1)))
    assert len(full["answered"]) == len(ample["answered"]) == SMALL.num_prompts  # the last batch is padded
    assert full["fidelity_kld_mean"] == pytest.approx(0, abs=1e-6)
    assert ample["fidelity_kld_mean"] == pytest.approx(0, abs=1e-5)
    assert ample["answered"] == full["answered"]
    assert ample["kv_wanted_fraction_speculating"] == pytest.approx(1)
    assert ample["speculation_mass_covered"] == pytest.approx(1, abs=1e-5)
    assert ample["speculation_precision"] == pytest.approx(1)


def test_a_shared_prompt_changes_nothing(bench, byte_model):
    strategy = strategy_of(InfiniGen(alpha=2.0, budget=0.3, full_layers=1))
    bench.measure(strategy_of(InfiniGen(full_layers=1)))
    shared, alone = bench.measure(strategy), Bench(SMALL, byte_model).measure(strategy)
    assert {k: v for k, v in shared.items() if k != "date"} == {k: v for k, v in alone.items() if k != "date"}
    assert 0 < shared["kv_wanted_fraction_speculating"] <= 0.3
    assert shared["fidelity_kld_mean"] > 0


def test_a_document_that_is_fed_ends_in_the_same_answers(byte_model, bench):
    fed = Bench(dataclasses.replace(SMALL, prefilled=16), byte_model)
    whole, stepwise = (b.measure(strategy_of(Full())) for b in (bench, fed))
    assert stepwise["answered"] == whole["answered"]
    evicting = fed.measure(strategy_of(InfiniGen(pool=36, full_layers=1)))
    assert evicting["read_fraction"] < 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_reports_what_it_declares(name, tmp_path, monkeypatch):
    declared = importlib.import_module(f"experiments.infinigen.{name}").STUDY
    assert declared.name == name
    assert len({(case.series, case.x) for case in declared.cases}) == len(declared.cases)
    monkeypatch.setattr(study, "Bench", Counting)
    found = study.perform(declared, SMALL, tmp_path, QUIET)
    assert len(found) == len(declared.cases)
    assert all((tmp_path / f"{name}.{kind}").stat().st_size for kind in ("png", "svg", "md"))
    text = (tmp_path / f"{name}.md").read_text()
    assert text.count("\n| ") == len(declared.cases) + 2
    assert len({json.dumps([r["settings"], r["strategy"]]) for r in found}) == len({(c.policy, c.fed) for c in declared.cases})


def test_a_pool_is_a_share_of_the_document_however_it_comes():
    policy = InfiniGen(pool=0.5)
    at_once, fed = (study.Case("", 0.5, policy, fed=fed).strategy(100).policy for fed in (False, True))
    assert (at_once.pool, fed.pool) == (0.5, 50)


def test_retention_compares_at_matched_budgets(tmp_path, monkeypatch):
    class Made(Counting):
        def measure(self, strategy):
            forgets = isinstance(strategy.policy, H2O)
            return record(strategy, answered=["1000" if forgets else "1111"] * 3, settings=self.settings)

    monkeypatch.setattr(retention, "Bench", Made)
    retention.perform(SMALL, tmp_path, QUIET)
    text = (tmp_path / "retention.md").read_text()
    assert "infinigen 100.0 % (100.0 % to 100.0 %), h2o 25.0 %" in text
    assert "InfiniGen keeps 95 % of it, h2o does not" in text
    assert all((tmp_path / f"{name}.{kind}").stat().st_size for name in ("recall", "budgets") for kind in ("png", "svg"))
    kept = {budget: s.policy.kept_tokens(1000) for (name, budget), s in retention.cases().items() if name == "h2o"}
    assert kept == {0.05: 50, 0.1: 100, 0.2: 200, 0.4: 400, 0.6: 600}


def timed(entry, role, seconds, transfer=None, platform="gpu", **changes):
    return {"entry": entry, "role": role, "transfer": transfer, "median_seconds": seconds, "platform": platform, **changes}


def test_bars_are_judged_on_a_card_alone():
    records = [
        timed("full", "ideal", 0.012), timed("infinigen, device", "ideal", 0.010, "device"), timed("full, jit", "offload", 0.2, "jit"),
        timed("infinigen, jit", "infinigen", 0.014, "jit", fetch_hidden_fraction=0.93),
        timed("infinigen, driven", "infinigen", 0.016, "driven", fetch_hidden_fraction=0.5),
    ]  # fmt: skip
    verdicts = [line.rsplit(": ", 1)[1] for line in offload.bars(records)]
    assert verdicts == ["met", "met", "missed", "missed"]
    assert "1.40" in offload.bars(records)[1]  # against the faster ideal
    assert all("not applicable" in line for line in offload.bars([r | {"platform": "cpu"} for r in records]))
    del records[3]["fetch_hidden_fraction"]
    assert offload.bars(records)[0].endswith("not measured")


def test_offload_times_every_transfer_and_says_what_cannot_run(tmp_path, byte_model, monkeypatch):
    monkeypatch.setattr(kvjax, "load_model", lambda *_, **__: byte_model)
    settings = offload.Settings("bytes", False, None, 2, 80, "infinigen(budget=0.2,full_layers=1)", 1, 1, 1, 0, 1, 0)
    found = offload.perform(settings, ["device", "jit"], tmp_path, tmp_path / "traces", QUIET)
    assert [(r["role"], r["transfer"]) for r in found] == [("ideal", None), ("ideal", "device"), ("offload", "jit"), ("infinigen", "jit")]
    assert all(r["tokens_equal_share"] == 1 for r in found)
    assert found[1]["bytes_moved_per_step"] == 0
    assert 0 < found[3]["bytes_moved_per_step"] < found[2]["bytes_moved_per_step"]
    assert found[3]["fetch_seconds_per_step"] > 0
    assert "not applicable" in (tmp_path / "offload.md").read_text()
    lines = (tmp_path / "records.jsonl").read_text()
    monkeypatch.setattr(offload, "measure", None)
    assert offload.perform(settings, ["device", "jit"], tmp_path, tmp_path / "traces", QUIET) == found
    assert (tmp_path / "records.jsonl").read_text() == lines
