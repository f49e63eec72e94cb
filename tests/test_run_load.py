"""The command line under load: one real run read back in full, an interrupted one, a trace, prompts from a file."""

import json
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from kvjax import run
from kvjax.command import parse_flags
from kvjax.engine import serve
from kvjax.report import profile

ENGINE = ["--model=kvjax-1m", "--random_weights", "--kv_memory=2MiB", "--max_num_seqs=4", "--prefill_chunk=64"]
LOAD = [*ENGINE, "--num_prompts=9", "--input_len=uniform(20,90)", "--output_len=uniform(2,6)", "--page_size=16"]
VLLM_KEYS = {
    "date", "backend", "label", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration", "completed",
    "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
    "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests",
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p90", "p95", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip
OWN_KEYS = {
    "schema_version", "strategy", "store", "complete", "num_preemptions", "prefix_cache_hit_rate", "peak_running", "peak_waiting",
    "kv_usage_peak", "kv_usage_mean", "kv_fragmentation_mean", "kv_memory_bytes", "kv_pool_bytes", "kv_page_bytes", "kv_bytes_per_token",
    "kv_staging_bytes", "kv_metadata_bytes", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
}  # fmt: skip


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run: the process, and where it wrote."""
    directory = tmp_path_factory.mktemp("load")
    command = [sys.executable, "-m", "kvjax.run", *LOAD, "--compare=vllm,h2o(heavy=8,recent=8)", "--request_rate=40", "--goodput=ttft:1e6"]
    command += [f"--output_dir={directory / 'out'}", f"--profile_dir={directory / 'trace'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=400), directory


def test_run_succeeds_and_prints_one_table(finished):
    process, directory = finished
    assert (process.returncode, process.stderr) == (0, "")
    for words in ("40.0 requests/s, 2MiB of KV memory", "P99 TTFT", "goodput", "preemptions", "peak usage of pages", "held per token"):
        assert words in process.stdout
    assert (directory / "out" / "load.png").stat().st_size > 10_000


def test_records_series_and_requests_agree(finished):
    out = finished[1] / "out"
    records, series, requests = (read(out / name) for name in ("records.jsonl", "series.jsonl", "requests.jsonl"))
    assert [(r["strategy"], r["store"]) for r in records] == [("full+paged(16)", "paged"), ("h2o(heavy=8,recent=8)", "dense")]
    for record in records:
        assert VLLM_KEYS | OWN_KEYS <= set(record)
        assert (record["completed"], record["failed"], record["complete"], record["request_rate"]) == (9, 0, True, 40.0)
        assert record["request_goodput"] == record["request_throughput"]
        assert record["kv_memory_bytes"] <= 2 * 2**20
        mine = [r for r in requests if r["strategy"] == record["strategy"]]
        assert sum(r["output_len"] for r in mine) == record["total_output_tokens"] == sum(len(r["output_tokens"]) for r in mine)
        assert sum(r["input_len"] for r in mine) == record["total_input_tokens"]
        assert {r["finish_reason"] for r in mine} == {"length"}
        assert max(r["start_time"] for r in mine) == pytest.approx(9 / 40)
        samples = [s for s in series if s["strategy"] == record["strategy"]]
        assert max(s["kv_usage"] for s in samples) == record["kv_usage_peak"] > 0
        assert (samples[-1]["running"], samples[-1]["waiting"], samples[-1]["kv_usage"]) == (0, 0, 0)
    first, second = ([r["start_time"] for r in requests if r["strategy"] == record["strategy"]] for record in records)
    assert first == second, "the load is the same for every strategy"


@pytest.mark.parametrize("strategy", ["full+paged(16)", "h2o(heavy=8_recent=8)"])
def test_trace_has_the_scopes(finished, strategy):
    times = profile.scope_times(finished[1] / "trace" / strategy)
    for scope in ("prefill/attend", "decode/attend", "decode/write", *(() if strategy == "full+paged(16)" else ("decode/evict",))):
        assert times[scope].events > 0


@pytest.fixture
def invoke(capsys):
    """A function that runs the command line in this process, and returns what it printed."""
    if "strategy" not in flags.FLAGS:
        run.define_flags()

    def call(*arguments: str) -> str:
        with flagsaver.flagsaver():
            run.main(parse_flags(["kvjax.run", *arguments]))
        return capsys.readouterr().out

    return call


def test_interrupted_run_writes_what_it_has(invoke, monkeypatch, tmp_path, capsys):
    real = serve.serve

    def interrupted(engine, load, **options):
        presses = iter([KeyboardInterrupt])

        def progress(ended: int, running: int) -> None:
            if ended and (press := next(presses, None)):
                raise press

        return real(engine, load, **options | {"progress": progress})

    monkeypatch.setattr(serve, "SAMPLE_EVERY", 0.0)
    monkeypatch.setattr(run.serve, "serve", interrupted)
    with pytest.raises(SystemExit) as stopped:
        invoke(*LOAD, "--strategy=vllm", "--request_rate=inf", f"--output_dir={tmp_path}")
    assert stopped.value.code == 130
    assert "interrupted: " in capsys.readouterr().out
    (record,) = read(tmp_path / "record.json")
    assert record["complete"] is False
    assert 0 < record["completed"] < 9
    reasons = [r["finish_reason"] for r in read(tmp_path / "requests.jsonl")]
    assert reasons.count("abort") == 9 - record["completed"]


def test_interrupt_before_the_second_strategy_serves(invoke, monkeypatch, tmp_path):
    real, calls = run.serve_one, []

    def serve_one(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "serve_one", serve_one)
    with pytest.raises(SystemExit) as stopped:
        invoke(*LOAD, "--compare=vllm,full", "--request_rate=inf", f"--output_dir={tmp_path}")
    assert stopped.value.code == 130
    (record,) = read(tmp_path / "records.jsonl")
    assert (record["strategy"], record["complete"], record["completed"]) == ("full+paged(16)", True, 9)
    assert len(read(tmp_path / "requests.jsonl")) == 9


def test_a_run_in_which_everything_failed_does_not_succeed(invoke, monkeypatch, tmp_path, capsys):
    real = serve.serve

    def failing(engine, load, **options):
        service = real(engine, load, **options)
        for one in service.served:
            one.reason, one.tokens, one.token_times = "error: logits are not finite", [], []
        return service

    monkeypatch.setattr(run.serve, "serve", failing)
    with pytest.raises(SystemExit) as stopped:
        invoke(*LOAD, "--strategy=vllm", "--request_rate=inf", f"--output_dir={tmp_path}")
    assert stopped.value.code == 1
    assert "full+paged(16): none of the 9 requests was completed; the first: error: logits are not finite" in capsys.readouterr().err
    record = json.loads((tmp_path / "record.json").read_text("utf-8"), parse_constant=lambda word: pytest.fail(word))
    assert (record["completed"], record["failed"], record["refused"]) == (0, 9, 0)
    assert (tmp_path / "load.png").exists()


def test_closed_loop_reports_the_clients_queue(invoke, tmp_path):
    invoke(*LOAD, "--strategy=vllm", "--max_concurrency=2", f"--output_dir={tmp_path}")
    (record,) = read(tmp_path / "record.json")
    assert record["max_concurrent_requests"] <= 2
    assert record["peak_waiting"] + record["peak_running"] <= 2 + 2
    assert record["mean_client_queue_time_ms"] > 0
    assert record["mean_e2el_including_client_queue_ms"] == pytest.approx(record["mean_e2el_ms"] + record["mean_client_queue_time_ms"])


def test_trace_and_prompts_from_files(invoke, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,input_length,output_length\n0.0,30,3\n0.1,50,2\n0.2,20,4\n")
    invoke(*ENGINE, "--strategy=vllm", f"--trace={trace}", "--trace_speed=2", f"--output_dir={tmp_path / 'a'}")
    requests = read(tmp_path / "a" / "requests.jsonl")
    assert [(r["input_len"], r["output_len"]) for r in requests] == [(30, 3), (50, 2), (20, 4)]
    assert [r["start_time"] for r in requests] == pytest.approx([0, 0.05, 0.1])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "import os\n", "max_tokens": 3}) + "\n" + json.dumps({"prompt_token_ids": [1, 2, 3]}) + "\n")
    invoke(*ENGINE, "--strategy=vllm", f"--prompts={prompts}", "--output_len=5", f"--output_dir={tmp_path / 'b'}")
    assert [(r["input_len"], r["output_len"]) for r in read(tmp_path / "b" / "requests.jsonl")] == [(10, 3), (3, 5)]


def test_guesses_under_load_are_judged_and_traced(invoke, tmp_path):
    few = [*ENGINE, "--num_prompts=3", "--input_len=40", "--output_len=6"]
    printed = invoke(
        *few, "--strategy=infinigen", "--request_rate=inf", f"--output_dir={tmp_path / 'out'}", f"--profile_dir={tmp_path / 'trace'}"
    )
    for words in ("speculation (guess against the truth)", "attention mass covered", "moved from host per token", "fetching"):
        assert words in printed
    (record,) = read(tmp_path / "out" / "record.json")
    assert 0 < record["speculation_precision"] <= 1
    assert 0 < record["speculation_mass_covered"] <= 1
    assert 0 <= record["fetch_hidden_fraction"] <= 1
    assert record["kv_bytes_moved_per_token"] > 0
