"""The suite for a card, without one: its parts at toy sizes, its records, its bars, and the tables of block sizes that it makes."""

import io
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels import OPERATIONS, tuned
from kvjax.kernels.paged_attention import mosaic_gpu as paged_gpu
from rich.console import Console

from experiments.gpu import correctness, decode, kernels, peers, probes, timing, tune
from experiments.gpu.book import Book
from kvjax.models.config import preset


def book(directory, part: str, match: str = "", minutes: float = 5.0) -> Book:
    return Book(directory, part, minutes, Console(file=io.StringIO()), dry_run=True, match=match)


@pytest.mark.parametrize(
    ("part", "perform", "match", "cases"),
    [
        ("correctness", correctness.perform, "gather|speculate", 3),
        ("kernels", kernels.perform, "copy|h2o_evict", 2),
        ("decode", decode.perform, "copy|full", 2),
        ("probes", probes.perform, "scatter|zero_copy", 2),
        ("tune", tune.perform, "", 1),
    ],
)
def test_a_dry_run_goes_through_a_part(part, perform, match, cases, tmp_path):
    found = book(tmp_path, part, match)
    perform(found, True)
    assert [r["failure"] for r in found.records.values() if "failure" in r] == []
    assert len(found.records) == cases
    lines = (tmp_path / f"{part}.jsonl").read_text().splitlines()
    assert all(json.loads(line)["dry_run"] for line in lines)
    page = (tmp_path / f"{part}.md").read_text().lower()
    assert "dry run" in page
    assert "met" not in page.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--part=kernels"],
            "kvjax: --part=kernels needs an NVIDIA GPU, and JAX finds cpu here; --dry_run goes through the code without one",
        ),
        (["--part=everything"], "kvjax: flag --part=everything"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, message):
    process = subprocess.run([sys.executable, "-m", "experiments.gpu_suite", *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr.startswith(message)
    assert len(process.stderr.splitlines()) == 1


class TestBook:
    def test_what_is_recorded_is_not_measured_again_and_what_failed_is(self, tmp_path):
        first = book(tmp_path, "part")

        def breaks():
            raise ValueError("no\nsuch kernel")

        first.run("good", lambda: {"median_seconds": 1.0})
        first.run("bad", breaks)
        assert first.records["bad"]["failure"] == "ValueError: no such kernel"
        second = book(tmp_path, "part")
        second.run("good", breaks)
        second.run("bad", lambda: {"median_seconds": 2.0})
        assert {case: r["median_seconds"] for case, r in second.records.items()} == {"good": 1.0, "bad": 2.0}
        assert len(second.found) == 2

    def test_no_case_is_begun_when_the_time_is_over(self, tmp_path):
        late = book(tmp_path, "part", minutes=0.0)
        time.sleep(0.001)
        assert late.run("good", lambda: {}) is None
        assert late.unfinished == ["good"]
        assert not (tmp_path / "part.jsonl").exists()


class TestTiming:
    def test_a_slope_is_the_time_of_a_call(self):
        """Every call sleeps as long; what a program takes besides does not count."""
        seconds = 0.02

        def slept(x):
            time.sleep(seconds)
            return np.asarray(x)

        def step(carry, given):
            carry = jax.pure_callback(slept, jax.ShapeDtypeStruct(carry.shape, carry.dtype), carry + given)
            return carry, ()

        found = timing.measure(step, [jnp.zeros(3)], [jnp.ones(3), jnp.ones(3)], calls=(1, 5), repetitions=3)
        assert seconds < found.seconds < 4 * seconds
        assert found.kernel_seconds is None
        assert found.best == found.seconds

    def test_every_set_keeps_a_state_of_its_own(self):
        seen = []

        def step(state, given):
            jax.debug.callback(lambda s, g: seen.append((float(s), float(g))), state, given, ordered=True)
            return state + given, ()

        timing.measure(step, [jnp.zeros(()), jnp.zeros(())], [jnp.ones(()), 10 * jnp.ones(())], calls=(1, 4), repetitions=1)
        jax.effects_barrier()
        assert seen[:3] == [(0, 1), (1, 1), (0, 10)]

    def test_busy_time_counts_what_overlaps_once(self):
        events = [("a", 0.0, 10.0), ("b", 2.0, 5.0), ("c", 8.0, 14.0), ("d", 20.0, 21.0)]
        assert timing.busy_seconds(events) == pytest.approx(15e-9)
        assert timing.busy_seconds([]) == 0

    def test_sets_exceed_the_caches(self):
        assert timing.sets_for(np.empty(2**30, np.int8)) == 2
        assert timing.sets_for(np.empty(2**26, np.int8)) == 4
        assert timing.sets_for(np.empty(8, np.int8)) == 16


def record(operation, implementation, shape, seconds, rate=None):
    return {
        "operation": operation, "implementation": implementation, "shape": shape, "median_seconds": 9.0, "kernel_seconds": seconds,
        "bytes_per_second": rate,
    }  # fmt: skip


def test_bars_are_those_of_the_kernels_alone():
    paged, h2o, prompt = "llama-3-8b b32 c8192 z64", "llama-3-8b b32 c1664", "llama-3-8b b1 8192x8192"
    records = [
        record("copy", "xla", "1 GiB", 1.0, 4e12),
        record("paged_attention", "mosaic_gpu", paged, 1.0, 3.8e12),
        record("paged_attention", "mosaic_gpu", f"{paged} statistics", 1.04, 3.7e12),
        record("paged_attention", "xla", paged, 0.1, 38e12),
        record("h2o_attention", "mosaic_gpu", h2o, 1.0),
        record("h2o_evict", "mosaic_gpu", h2o, 0.06),
        record("prefill_attention", "mosaic_gpu", prompt, 2.0),
        record("flash_prefill", "cudnn", prompt, 1.0),
        record("column_mass", "mosaic_gpu", prompt, 0.55),
    ]
    found = {words: (value, kernels._verdict(value, limit, more)) for words, value, limit, more in kernels.bars(records)}
    assert found == {
        f"paged decode, {paged} (G=4): of the copy's bandwidth": (pytest.approx(0.95), "met"),
        f"statistics, {paged}: more time": (pytest.approx(0.04), "met"),
        f"evict, {h2o}: of its attention": (pytest.approx(0.06), "missed"),
        f"column mass, {prompt}: of a flash prefill": (pytest.approx(0.55), "met"),
    }
    (_, value, limit, more), *_ = kernels.bars(records[1:2])
    assert (value, kernels._verdict(value, limit, more)) == (None, "not measured")


def test_peers_are_asked_for_the_same_shapes():
    asked = dict(peers.requests(dry_run=False))
    assert asked["decode llama-3-8b b32 c8192"]["kv_heads"] == 8
    assert {f"generate {cell}" for cell in decode.CELLS} <= asked.keys()
    assert peers.described(preset("opt-13b"))["ffn_dim"] == 20480
    assert peers.described(preset("llama-3-8b"))["num_key_value_heads"] == 8


class TestTuned:
    @pytest.fixture
    def tables(self, monkeypatch, tmp_path):
        """The tables of all kernels, in a folder of the test's own."""
        monkeypatch.setattr(tuned, "where", lambda operation: tmp_path / f"{operation}.json")
        tuned.table.cache_clear()
        for operation in ("paged_attention", "gather"):
            (tmp_path / f"{operation}.json").write_text("{}")
        yield tmp_path
        tuned.table.cache_clear()

    def test_shipped_tables_can_be_read(self):
        for operation in OPERATIONS:
            tuned.table.cache_clear()
            assert isinstance(tuned.table(operation), dict)

    def test_what_was_tuned_takes_the_place_of_the_rule_on_that_card_and_key(self, tables):
        sizes = (32, 8, 8192, 128, 2)
        rule = paged_gpu.tiling(*sizes, 132, "NVIDIA H200")
        key = paged_gpu.tuning_key(32 * 8, 8192, 128, 2)
        (tables / "paged_attention.json").write_text(json.dumps({"NVIDIA H200": {key: {"splits": rule.splits + 5}}}))
        tuned.table.cache_clear()
        for device, more in (("NVIDIA H200", 5), ("NVIDIA H200 141GB HBM3e", 5), ("NVIDIA H100 80GB HBM3", 0), ("", 0)):
            assert paged_gpu.tiling(*sizes, 132, device) == paged_gpu.Tiling(rule.splits + more, rule.stages)
        assert paged_gpu.tiling(1, 8, 8192, 128, 2, 132, "NVIDIA H200") == paged_gpu.tiling(1, 8, 8192, 128, 2, 132)

    @pytest.mark.parametrize("text", ["", "[]", '{"NVIDIA H200": {"key": {"splits": "many"}}}', '{"NVIDIA H200": 3}'])
    def test_what_is_no_table_is_refused(self, text, tables):
        (tables / "gather.json").write_text(text)
        with pytest.raises(ValueError, match=r"gather\.json is no table of tuned block sizes"):
            tuned.find("gather", "NVIDIA H200", "key")

    def test_install_puts_in_what_was_found_on_a_card_alone(self, tables):
        (tables / "gather.json").write_text(
            json.dumps({"NVIDIA H100": {"row512B": {"block_bytes": 4096}}, "NVIDIA H200": {"old": {"block_bytes": 1}}})
        )
        tuned.table.cache_clear()
        found = book(tables, "tune")
        common = {"operation": "gather", "device_kind": "NVIDIA H200", "dry_run": False}
        found.records = {
            "better": common | {"key": "row512B", "chosen": {"block_bytes": 8192}},
            "rule": common | {"key": "old", "chosen": None},
            "dry": common | {"key": "toy", "chosen": {"block_bytes": 1}, "dry_run": True},
        }
        tune.install(found)
        assert json.loads((tables / "gather.json").read_text()) == {
            "NVIDIA H100": {"row512B": {"block_bytes": 4096}},
            "NVIDIA H200": {"row512B": {"block_bytes": 8192}},
        }

    def test_a_dry_run_is_not_installed(self, tables):
        found = book(tables, "tune")
        found.records = {"dry": {"operation": "gather", "key": "k", "chosen": {"block_bytes": 1}, "dry_run": True, "device_kind": "cpu"}}
        tune.install(found)
        assert (tables / "gather.json").read_text() == "{}"
