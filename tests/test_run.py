"""The command line, end to end on random weights."""

import json
import subprocess
import sys

import pytest

from kvjax.report import profile

SMALL = ["--model=kvjax-1m", "--random_weights", "--num_prompts=3", "--batch_size=2", "--input_len=96", "--num_facts=2", "--output_len=6"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kvjax.run", *arguments], capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("run")
    done = run(*SMALL, "--compare=full,h2o(heavy=8,recent=8)", f"--output_dir={where}/out", f"--profile_dir={where}/trace")
    assert done.returncode == 0, done.stderr
    return where, done


def test_record_is_strict_json_with_the_keys_promised(finished):
    where, done = finished

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    full, h2o = (json.loads(line, parse_constant=refuse) for line in (where / "out" / "record.json").read_text().splitlines())
    assert full["strategy"] == "full"
    assert h2o["strategy"] == "h2o(heavy=8,recent=8)"
    assert h2o["completed"] == 3
    assert h2o["total_output_tokens"] == 18
    assert full["fidelity_kld_mean"] == pytest.approx(0, abs=1e-6)
    assert full["fidelity_same_top1"] == 1.0
    assert h2o["kv_device_total_bytes"] < full["kv_device_total_bytes"] / 3
    for key in ("mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "task_recall", "kept_fraction", "kv_bytes_read_per_token", "schema_version"):
        assert key in h2o
    assert len((where / "out" / "requests.jsonl").read_text().splitlines()) == 6
    assert "generated" in (where / "out" / "samples.txt").read_text()
    assert "recall by depth" in done.stdout


def test_trace_has_the_named_scopes(finished):
    where, _ = finished
    times = profile.scope_times(where / "trace" / "h2o(heavy=8_recent=8)")
    for scope in ("prefill", "prefill/attend", "prefill/evict", "decode", "decode/attend", "decode/evict"):
        assert times[scope].seconds > 0, scope


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy=h3o"], "unknown strategy 'h3o'; choose from full, streaming, h2o, oracle_topk"),
        (["--strategy=h2o(heavie=3)"], "h2o has no argument 'heavie'; it takes heavy, recent, decode, group"),
        (["--budget=1.5"], "--budget=1.5"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    done = run(*SMALL, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
