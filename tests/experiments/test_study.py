"""The study's frame and what every experiment declares; one of them from end to end on a tiny model."""

import csv
import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import pytest
from rich.console import Console

from experiments.study import frame
from experiments.study.__main__ import EXPERIMENTS
from kvjax.cache import parse_strategy
from kvjax.engine.memory import parse_memory
from kvjax.errors import KvjaxError, MemoryLimitError, SpecError
from kvjax.sweep import cell_id, in_turns, measures
from kvjax.sweep.measures import Bench, Load, Offline, Quality, parse, strategy_in

QUIET = Console(quiet=True)
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def made(cell):
    """A record with every figure that experiments draw or tell of; what it says depends on the cell alone."""
    worth = 1 + int(cell_id(cell), 16) % 97
    declared, budget = parse(cell), cell.get("budget") or 1.0
    common = {
        "strategy": strategy_in(declared).describe(), "model_id": cell["model"],
        "parameter_count": {"kvjax-1m": 1e6}.get(cell["model"], 4e6),
        "mean_ttft_ms": 10.0 * worth, "mean_tpot_ms": 1.0 + budget, "output_throughput": 900.0 - worth,
        "task_recall": min(1.0, 0.6 + budget),
        "fidelity_kld_mean": 1 / worth, "kv_device_total_bytes": 2**20 * budget, "kv_bytes_moved_per_token": 0.0,
        **{f"task_recall_depth_{depth:g}": min(1.0, depth + budget) for depth in (0, 0.25, 0.5, 0.75)},
        "samples": {name: [budget / (worth + i) for i in range(4)] for name in ("kld", "recall", "nll_delta", "ttft_ms")},
    }  # fmt: skip
    if isinstance(declared, Load):
        hits = 0.5 if declared.prefix_caching else None
        rate = declared.request_rate
        common |= {
            "request_rate": rate, "request_goodput": 20.0 if rate == "inf" else 0.95 * rate, "p99_ttft_ms": 20.0 * worth, "max_num_seqs": 4,
            "peak_running": 4, "kv_fragmentation_mean": 0.1, "prefix_cache_hit_rate": hits,
        }  # fmt: skip
    else:
        common |= {"request_rate": "inf", "kv_bytes_read_per_token": 1000.0, "kv_transient_bytes": 10_000, "matched_knob": 12}
    return common


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_an_experiment_declares_cells_that_can_be_measured(experiment, quick):
    cells = experiment.grid(quick)
    assert len({cell_id(cell) for cell in cells}) == len(cells)
    strategies = {}
    for cell in cells:
        declared = parse(cell)
        assert declared.cell() == cell
        parse_strategy(declared.strategy)
        strategy_in(declared)
        if isinstance(declared, Load):
            assert parse_memory(declared.kv_memory) > 0
        else:
            assert declared.batch_size <= declared.num_prompts or declared.num_prompts < 8
            assert declared.input_len >= 9 * declared.num_facts
            extra = 8 * declared.num_facts
            assert declared.input_len + max(getattr(declared, "output_len", 1), extra) <= 2048
        setting = {name: value for name, value in cell.items() if name not in ("strategy", "budget", "repeat", "prefix_caching")}
        strategies.setdefault(json.dumps(setting, sort_keys=True), []).append(cell["strategy"])
    assert all("full" in names or "vllm" in names for names in strategies.values() if len(names) > 1)
    repeats = [((cell["model"], cell.get("num_layers")), cell["repeat"]) for cell in in_turns(cells)]
    models = list(dict.fromkeys(model for model, _ in repeats))
    assert repeats == sorted(repeats, key=lambda pair: (models.index(pair[0]), pair[1]))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_quick_and_full_differ_in_sizes_alone(experiment):
    kinds = [{type(parse(cell)) for cell in experiment.grid(quick)} for quick in (True, False)]
    assert kinds[0] == kinds[1]
    assert set(experiment.quick) - set(experiment.full) <= {"max_model_len"}
    assert len(experiment.grid(True)) < len(experiment.grid(False))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_an_experiment_draws_and_tells_what_its_records_say(experiment, tmp_path):
    records = frame.perform(experiment, True, tmp_path, QUIET, made)
    directory = tmp_path / experiment.name
    about = json.loads((directory / "about.json").read_text())
    assert (about["name"], about["quick"], about["series"]) == (experiment.name, True, "strategy")
    assert about["command"] == f"python -m experiments.study.{experiment.name} --quick --output_dir={tmp_path}"
    for figure in about["figures"]:
        assert (directory / figure["png"]).stat().st_size > 5000
        assert (directory / figure["file"]).read_text().startswith("<?xml")
        assert figure["caption"].endswith(".")
    assert {panel["key"] for panel in about["panels"]} <= {key for r in records for key in r} | {"share"}
    assert len(about["findings"]) >= 2
    assert all(
        sentence.endswith((".", ")", "nats).")) and "nan" not in sentence and "None" not in sentence for sentence in about["findings"]
    )
    assert about["setting"]["cpu_count"] > 0
    with (directory / "records.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(records)


def test_findings_say_what_did_not_fit_and_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(frame.figures, "lines", lambda *_, **__: None)

    def measure(cell):
        if cell["strategy"] == "h2o" and cell["budget"] == 0.1:
            raise MemoryLimitError("too small")
        if cell["strategy"] == "infinigen":
            raise ValueError("broken")
        return made(cell)

    frame.perform(BY_NAME["sparsity"], True, tmp_path, QUIET, measure)
    found = json.loads((tmp_path / "sparsity" / "about.json").read_text())["findings"]
    assert any("1 of 7 cells do not fit into their memory (h2o model=kvjax-1m budget=0.1" in line and "too small" in line for line in found)
    assert any("2 of 7 cells failed (infinigen" in line and "ValueError: broken" in line for line in found)

    def never(cell):
        raise ValueError("broken")

    with pytest.raises(KvjaxError, match="no cell could be measured; the first says: ValueError: broken"):
        frame.perform(BY_NAME["retention"], True, tmp_path, QUIET, never)


def test_one_command_is_one_grid(tmp_path, monkeypatch):
    """What is there is not measured again, and a grid of other sizes does not take it for its own."""
    monkeypatch.setattr(frame.figures, "lines", lambda *_, **__: None)
    seen = []

    def measure(cell):
        seen.append(cell)
        return made(cell)

    experiment = BY_NAME["context_length"]
    for quick in (True, True, False):
        frame.perform(experiment, quick, tmp_path, QUIET, measure)
    assert len(seen) == len(experiment.grid(True)) + len(experiment.grid(False))
    assert not json.loads((tmp_path / experiment.name / "about.json").read_text())["quick"]


def test_measures_from_end_to_end_on_a_tiny_model(tmp_path, byte_model):
    """One bench, all three measures; the same prompts for every strategy and other ones for another repeat."""
    bench = Bench({"bytes": byte_model})
    sizes = dict(model="bytes", num_prompts=3, batch_size=2, input_len=72, num_facts=4)
    cells = [Offline(s, output_len=6, repeat=r, **sizes).cell() for r in (0, 1) for s in ("full", "h2o(heavy=8,recent=8)")]
    cells += [Offline("h2o", output_len=6, currency="device_bytes", target=60_000, **sizes).cell()]
    cells += [Offline("full", output_len=6, limit="16KiB", **sizes).cell()]
    cells += [Quality("full", **sizes).cell(), Quality("h2o(heavy=8,recent=8)", **sizes).cell()]
    serve = dict(model="bytes", num_prompts=5, input_len="uniform(8,24)", output_len=4, max_num_seqs=2, prefill_chunk=16, max_model_len=32)
    cells += [Load("vllm", kv_memory="256KiB", request_rate=rate, goodput="ttft:60000", **serve).cell() for rate in (200, "inf")]
    cells += [Load("vllm", kv_memory="1KiB", **serve).cell()]
    experiment = frame.Experiment(
        "tiny", "Tiny", "Does it run?", {}, {}, lambda: cells,
        (frame.Figure("tiny", "Tiny", "All of it.", "repeat", "repeat", (frame.TPOT, frame.KLD)),), lambda records: ["It ran."],
    )  # fmt: skip
    found = frame.perform(experiment, True, tmp_path, QUIET, bench)
    assert [r["outcome"] for r in found] == ["done"] * 5 + ["infeasible", "done", "done", "done", "done", "infeasible"], [
        r["error"] for r in found
    ]
    full, h2o, full_again, h2o_again, matched, limited, _, forced, slow, at_once, tight = found
    for record in (full, h2o, full_again, h2o_again, matched):
        assert {name: len(values) for name, values in record["samples"].items()} == dict.fromkeys(
            ("ttft_ms", "tpot_ms", "e2el_ms", "recall", "kld", "nll_delta"), 3
        )
        assert math.isclose(sum(record["samples"]["kld"]) / 3, record["fidelity_kld_mean"], rel_tol=1e-4, abs_tol=1e-7)
        assert math.isclose(sum(record["samples"]["recall"]) / 3, record["task_recall"], abs_tol=1e-9)
        assert math.isclose(sum(record["samples"]["ttft_ms"]) / 3, record["mean_ttft_ms"], rel_tol=1e-6)
    assert full["samples"]["kld"] == [0, 0, 0]
    assert h2o["samples"]["kld"] != h2o_again["samples"]["kld"]
    assert forced["samples"]["kld"] == pytest.approx(h2o["samples"]["kld"], rel=1e-3)
    assert forced["strategy"] == h2o["strategy"] == "h2o(heavy=8,recent=8)"
    assert matched["kv_device_total_bytes"] == matched["matched_cost"] <= 60_000 < full["kv_device_total_bytes"]
    assert "a batch of 2 takes" in limited["error"]
    assert "kv_memory of 1024 bytes is too small" in tight["error"]
    for record in (slow, at_once):
        assert all(len(values) == 5 and None not in values for values in record["samples"].values())
        assert math.isclose(sum(record["samples"]["e2el_ms"]) / 5, record["mean_e2el_ms"], rel_tol=1e-6)
        assert record["max_num_seqs"] == 2
    assert (slow["request_rate"], at_once["request_rate"]) == (200, "inf")
    assert len(bench._engines._made) == 1  # kept for the other rate, and none for what does not fit


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="the system does not say")
def test_a_bench_lets_go_of_its_programs_before_the_maps_run_out(monkeypatch, byte_model):
    bench = Bench({"bytes": byte_model})
    cell = Quality("h2o(heavy=8,recent=8)", model="bytes", num_prompts=2, batch_size=2, input_len=72, num_facts=4).cell()
    before = bench(cell)
    kept = jax.jit(lambda x: x + 1)
    kept(1.0)
    assert kept._cache_size() == 1
    in_use = measures.maps_in_use()
    assert 0 < in_use < 1
    monkeypatch.setattr(measures, "CROWDED", in_use / 2)
    after = bench(cell)
    assert kept._cache_size() == 0
    assert after["samples"] == before["samples"]
    kept(1.0)
    monkeypatch.setattr(measures, "CROWDED", 1.0)
    bench(cell)
    assert kept._cache_size() == 1


def test_another_model_takes_the_place_of_the_first(byte_model, opt_model):
    bench = Bench({"bytes": byte_model, "opt": opt_model})
    first = bench.model(Quality("full", model="bytes"))
    assert first is byte_model
    bench._engines._made["kept"] = None
    assert bench.model(Quality("full", model="opt")) is opt_model
    assert not bench._engines._made
    assert len(bench._models) == 1


def test_flags_choose_sizes_directory_and_experiments(monkeypatch):
    def given(**values):
        monkeypatch.setattr(
            frame.flags, "FLAGS", types.SimpleNamespace(**{"quick": False, "full": False, "output_dir": None, "only": None, **values})
        )

    given(quick=True)
    assert frame.asked() == (True, pathlib.Path("runs/study"))
    given(full=True, output_dir="there")
    assert frame.asked() == (False, pathlib.Path("there"))
    for values in ({}, {"quick": True, "full": True}):
        given(**values)
        with pytest.raises(SpecError, match="give either --quick"):
            frame.asked()
    given(only=["sparsity", "retention"])
    assert [e.name for e in frame.chosen(EXPERIMENTS)] == ["sparsity", "retention"]
    given(only=["speed"])
    with pytest.raises(SpecError, match="--only=speed: no such experiment; choose from request_rate, sparsity"):
        frame.chosen(EXPERIMENTS)


def test_the_program_refuses_bad_input_in_a_line():
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-m", "experiments.study", "--quick", "--full"], capture_output=True, text=True, cwd=root)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "kvjax: give either --quick (minutes) or --full (the study)\n"
