"""The benchmark's own arithmetic: floors, bars, interleaving, tables. Nothing is timed here."""

import contextlib
import os
import pathlib
import time
import types

import pytest

from experiments.bench import bars, floors, machine, tables
from experiments.bench.timing import Sample, interleave
from kvjax.cache import parse_strategy
from kvjax.models.config import preset

CONFIG = preset("bench-32m")
FULL, H2O = parse_strategy("full"), parse_strategy("h2o(heavy=128,recent=128)")


def record(phase, engine, seconds, batch=1, context=2048, **changes):
    return {
        "phase": phase, "engine": engine, "batch": batch, "context": context, "median_seconds": seconds, "floor_seconds": 0.5 * seconds,
        "floor_fraction": 0.5, "tokens_equal": 33, "tokens_total": 33, "tokens_repeatable": True, "disturbed": 0, "discarded": 1,
        "versions": {"jax": "1"}, "peer_versions": {"torch": "2"}, "copy_bytes_per_second": 27e9, "matmul_flops_per_second": 172e9,
        "device_kind": "a processor", "git_commit": "abc", "model_id": "bench-32m", "steps": 32, "reps": 7, "warm_up": 2, **changes,
    }  # fmt: skip


def found(records):
    return {bar.name: bar for bar in bars.evaluate(records)}


def test_a_decode_step_reads_all_weights_but_the_embedding_table_and_the_live_cache():
    assert floors.weight_bytes(CONFIG) == 4 * (CONFIG.parameter_count - 8192 * 512)
    per_token = 4 * 2 * 8 * 4 * 64  # float32, keys and values, layers, kv heads, head dim
    assert floors.decode_bytes(CONFIG, FULL, 8, 1024, 1) == floors.weight_bytes(CONFIG) + 8 * 1025 * per_token
    assert floors.decode_bytes(CONFIG, FULL, 1, 512, 3) == floors.weight_bytes(CONFIG) + 514 * per_token  # 513, 514, 515
    rates = floors.Rates(bandwidth=1e9, flops=1.0)
    assert floors.decode_floor(CONFIG, FULL, 1, 512, 3, rates) == floors.decode_bytes(CONFIG, FULL, 1, 512, 3) / 1e9


def test_an_evicting_strategy_reads_its_budget_and_the_new_token_and_never_more_than_there_is():
    assert floors.attended_tokens(H2O, 2048, 32) == floors.attended_tokens(H2O, 512, 32) == 257
    assert floors.attended_tokens(H2O, 64, 31) == floors.attended_tokens(FULL, 64, 31) == 80
    assert floors.attended_tokens(parse_strategy("h2o(heavy=0.25,recent=0.25)"), 1000, 32) == 501


def test_a_prompt_costs_its_matrices_causal_attention_and_one_head():
    matrices = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)
    one = floors.prefill_flops(CONFIG, 1, 1)
    assert one == 2 * (matrices + 8 * 2 * 512 + 8192 * 512)
    two = floors.prefill_flops(CONFIG, 1, 2)
    assert two - one == 2 * (matrices + 8 * 2 * 512 * 2)  # the second token sees two
    assert floors.prefill_flops(CONFIG, 8, 2) == 8 * two
    assert floors.prefill_floor(CONFIG, 1, 2048, floors.Rates(1.0, 172e9)) == pytest.approx(0.76, abs=0.01)


def test_decode_bars_take_transformers_fastest_and_the_batchs_own_llama_cpp_target():
    times = {"kvjax": 1.0, "kvjax-step": 1.25, "hf-static-eager": 1.6, "hf-dynamic-loop": 2.0, "llama.cpp-f32": 0.9}
    records = [record("decode", engine, seconds, batch) for batch in (1, 8) for engine, seconds in times.items()]
    at = found(records)
    best = at["decode, batch 1, context 2048: transformers' best / kvjax"]
    assert (best.value, best.verdict, best.remark) == (1.6, "PASS", "1.28 for kvjax-step")
    assert at["decode, batch 1, context 2048: llama.cpp f32 / kvjax"].verdict == "PASS"
    assert at["decode, batch 8, context 2048: llama.cpp f32 / kvjax"].verdict == "FAIL"


def test_without_peers_their_bars_are_not_measured():
    verdicts = [bar.verdict for bar in bars.evaluate([record("decode", "kvjax", 1.0)])]
    assert verdicts == ["not measured", "not measured", "not measured", "PASS"]


def test_prefill_bars_loosen_at_the_long_context():
    records = [record("prefill", engine, t, context=c) for c in (1024, 2048) for engine, t in (("kvjax", 1.0), ("hf-static-eager", 0.95))]
    records += [record("prefill", "kvjax-h2o", 1.41)]
    at = found(records)
    assert at["prefill, batch 1, context 1024: transformers' static cache / kvjax"].verdict == "FAIL"
    assert at["prefill, batch 1, context 2048: transformers' static cache / kvjax"].verdict == "PASS"
    assert at["prefill, batch 1, context 2048: H2O / full cache"].verdict == "FAIL"


def test_h2o_is_judged_by_its_way_to_its_own_floor_at_the_long_context_only():
    assert bars.way_to_floor(10.0, 6.0, 5.0) == 0.8
    full, h2o = record("decode", "kvjax", 10.0), record("decode", "kvjax-h2o", 6.1, floor_seconds=5.0)
    bar = found([full, h2o])["decode, batch 1, context 2048: H2O's way from the full cache to its floor"]
    assert (bar.value, bar.verdict) == (pytest.approx(0.78), "FAIL")
    short = [{**r, "context": 128} for r in (full, h2o)]
    assert found(short)["decode, batch 1, context 128: H2O's way from the full cache to its floor"].verdict == "not judged"


def test_flat_is_the_slowest_context_over_the_fastest():
    bar = found([record("flat", "kvjax-h2o-256", seconds, context=c) for c, seconds in ((512, 5.0), (1024, 5.2), (2048, 5.4))])
    bar = bar["decode, batch 1: H2O with equal slots at contexts 512, 1024, 2048, slowest / fastest"]
    assert (bar.value, bar.verdict) == (pytest.approx(1.08), "PASS")


def test_one_different_token_fails_except_from_an_engine_that_works_in_float16():
    good = record("decode", "kvjax", 1.0)
    name = "greedy tokens equal to kvjax's, all engines and cells"
    assert found([good, record("decode", "llama.cpp-f32-fa", 1.0, tokens_equal=30)])[name].verdict == "PASS"
    bar = found([good, record("decode", "hf-static-eager", 1.0, tokens_equal=32)])[name]
    assert bar.verdict == "FAIL"
    assert "hf-static-eager" in bar.remark
    assert found([record("decode", "kvjax", 1.0, tokens_repeatable=False)])[name].verdict == "FAIL"


class Scripted:
    """An entry whose samples take 1, 2, 3, ... seconds by its own account."""

    pid = 7

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.turns, self.fails_at = name, log, 0, fails_at

    def prepare(self):
        return

    def sample(self):
        self.turns += 1
        self.log.append(self.name)
        if self.turns == self.fails_at:
            raise RuntimeError("it broke\nand more")
        return Sample(float(self.turns), ((1, 2),))


def watching(disturbances):
    """A watch whose n-th turn is disturbed by `disturbances[n]`."""
    turns = iter(disturbances)

    @contextlib.contextmanager
    def watch(pid):
        assert pid == 7
        yield types.SimpleNamespace(cores=1.5, disturbance=next(turns, None))

    return watch


def test_engines_take_turns_and_warm_ups_do_not_count():
    log = []
    timings = interleave([Scripted("a", log), Scripted("b", log)], watching([]), reps=2, warm_up=1, retries=0, settle=0)
    assert log == ["a", "b"] * 3
    assert [t.seconds for t in timings] == [[2.0, 3.0]] * 2
    assert timings[0].median == 2.5
    assert timings[0].cores == [1.5, 1.5]
    assert timings[0].tokens == ((1, 2),)


def test_a_disturbed_sample_is_taken_again_until_the_limit(monkeypatch):
    monkeypatch.setattr("experiments.bench.timing._DISTURBED_PAUSE_SECONDS", 0)
    (timing,) = interleave([Scripted("a", [])], watching([None, "x", None, "y"]), reps=2, warm_up=1, retries=1, settle=0)
    assert timing.seconds == [3.0, 4.0]
    assert (timing.discarded, timing.disturbed) == (["x"], 1)


def test_an_engine_that_fails_drops_out_and_the_others_go_on():
    log = []
    entries = [Scripted("a", log, fails_at=2), Scripted("b", log)]
    broken, good = interleave(entries, watching([]), reps=2, warm_up=1, retries=0, settle=0, errors=(RuntimeError,))
    assert broken.failure == "it broke"
    assert good.seconds == [2.0, 3.0]
    assert log == ["a", "b", "a", "b", "b"]


@pytest.mark.skipif(not pathlib.Path("/proc/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("timed", [os.getpid(), -1], ids=["itself", "nobody"])
def test_a_watch_counts_every_process_but_the_timed_one_as_another(timed):
    with machine.Watch(timed) as seen:
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass
    is_other = any(f"({os.getpid()})" in name for name in seen.others)
    assert (seen.cores > 0, is_other) == ((True, False) if timed == os.getpid() else (False, True))


def test_markdown_has_every_engine_and_bar_and_marks_disturbed_figures():
    records = [record("decode", "kvjax", 0.005, disturbed=2), record("decode", "llama.cpp-f32", 0.006), record("prefill", "kvjax", 1.1)]
    text = tables.markdown(records, ["a note"], "the command")
    assert "| engine | b1 c2048 |\n| --- | ---: |\n| floor, full cache | 2.50 |\n| kvjax | 5.00 (50 %)* |" in text
    assert "| llama.cpp-f32 | 6.00 (50 %, x1.20) |" in text
    assert "| kvjax | 1100 (50 %) |" in text
    assert "| decode, batch 1, context 2048: llama.cpp f32 / kvjax | 1.200 | >= 0.85 | PASS |  |" in text
    assert "- a note" in text
    assert "3 samples discarded" in text
    assert "jax 1, torch 2" in text
