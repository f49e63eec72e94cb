"""The command line: one real run read back in full, and every bad input answered in one line."""

import json
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from kvjax import run
from kvjax.cache import paged, parse_strategy
from kvjax.command import parse_flags
from kvjax.engine import offline
from kvjax.errors import InputError
from kvjax.lock import locked
from kvjax.report import profile
from kvjax.report import record as records_of_runs

COMPARE = "full,streaming(sinks=2,window=20),h2o(heavy=8,recent=8)"
SMALL = ["--model=kvjax-1m", "--random_weights", "--num_prompts=3", "--batch_size=2", "--input_len=64", "--num_facts=2", "--output_len=4"]
VLLM_KEYS = {
    "date", "backend", "model_id", "num_prompts", "request_rate", "duration", "completed", "failed", "total_input_tokens",
    "total_output_tokens", "request_throughput", "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_ttft_ms",
    "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms",
    "std_itl_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms",
}  # fmt: skip
OWN_KEYS = {
    "schema_version", "strategy", "store", "seed", "device_kind", "jax_version", "git_commit", "tpot_definition",
    "kv_device_total_bytes", "kv_host_total_bytes", "kv_device_metadata_bytes", "kv_logical_bytes", "kv_transient_bytes",
    "kv_bytes_read_per_token", "kv_bytes_moved_per_token", "kept_fraction", "compression_ratio", "fidelity_kld_mean",
    "fidelity_kld_mean_se", "fidelity_kld_median", "fidelity_kld_p99.9", "fidelity_same_top1", "fidelity_nll_delta",
    "fidelity_first_divergence_step", "task_recall", "task_recall_depth_0", "task_recall_depth_0.5", "task_questions_per_depth",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run: the process, and where it wrote."""
    directory = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "kvjax.run", *SMALL, f"--compare={COMPARE}"]
    command += [f"--output_dir={directory / 'out'}", f"--profile_dir={directory / 'trace'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300), directory


@pytest.fixture(scope="module")
def records(finished) -> list[dict]:
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    lines = (finished[1] / "out" / "records.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_run_succeeds_and_prints_one_table(finished):
    process, directory = finished
    assert (process.returncode, process.stderr) == (0, "")
    for words in (
        "kvjax-1m (float32) on",
        "h2o(heavy=8,recent=8)",
        "output throughput",
        "mean TTFT",
        "tokens kept",
        "KLD mean",
        "recall by depth",
    ):
        assert words in process.stdout
    assert f"to {directory / 'out'}" in process.stdout.replace("\n", "")


def test_records_are_complete(records):
    assert [record["strategy"] for record in records] == ["full", "streaming(sinks=2,window=20)", "h2o(heavy=8,recent=8)"]
    for record in records:
        assert VLLM_KEYS | OWN_KEYS <= set(record)
        nested = {key for key, value in record.items() if isinstance(value, dict | list)}
        assert nested == {"strategy_identity"}, "the record is flat but for what the strategy is"
        assert (record["completed"], record["total_input_tokens"], record["total_output_tokens"]) == (3, 192, 12)
        assert record["output_throughput"] == pytest.approx(12 / record["duration"])


def test_records_tell_the_strategies_apart(records):
    full, streaming, h2o = records
    assert (full["fidelity_kld_mean"], full["fidelity_same_top1"], full["kept_fraction"]) == (0.0, 1.0, 1.0)
    assert streaming["fidelity_kld_mean"] > 0 < h2o["fidelity_kld_mean"]
    seen = 64 + 3  # the last token generated is never fed
    assert streaming["kept_fraction"] == pytest.approx(22 / seen)
    assert h2o["kept_fraction"] == pytest.approx(16 / seen)
    assert h2o["kv_device_total_bytes"] < streaming["kv_device_total_bytes"] < full["kv_device_total_bytes"]


def test_requests_and_samples(finished, records):
    out = finished[1] / "out"
    requests = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [(request["strategy"], request["request"]) for request in requests] == [(r["strategy"], i) for r in records for i in range(3)]
    for request in requests:
        assert len(request["output_tokens"]) == request["output_len"] == 4
        assert request["latency"] == pytest.approx(request["ttft"] + sum(request["itls"]))
    assert "=== full, request 0" in (out / "samples.txt").read_text()
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("strategy", ["full", "streaming(sinks=2_window=20)", "h2o(heavy=8_recent=8)"])
def test_trace_has_the_scopes(finished, strategy):
    times = profile.scope_times(finished[1] / "trace" / strategy)
    wanted = {"prefill", "prefill/attend", "decode", "decode/attend", "decode/write"} | (set() if strategy == "full" else {"decode/evict"})
    for scope in wanted:
        assert times[scope].seconds > 0
        assert times[scope].events > 0
    assert times["decode"].seconds >= times["decode/attend"].seconds


def test_no_trace(tmp_path):
    with pytest.raises(InputError, match="no profiler trace"):
        profile.scope_times(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(capsys):
    """A function that runs the command line in this process, and returns the one line it says before it exits with code 2."""
    if "strategy" not in flags.FLAGS:
        run.define_flags()

    def invoke(*arguments: str) -> str:
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            run.main(parse_flags(["kvjax.run", *arguments]))
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert len(captured.err.splitlines()) == 1
        return captured.err

    return invoke


REFUSED = [
    (
        ["--strategy=h20"],
        "kvjax: unknown strategy 'h20'; choose from full, streaming, h2o, tova, random, infinigen",
    ),
    (["--strategy=h2o(hevy=1)"], "strategy h2o has no argument 'hevy'; it takes heavy, recent"),
    (["--strategy=h2o(heavy=2.5)"], "h2o: heavy=2.5 is not a fraction"),
    (["--compare=full,full"], "strategy full is named twice"),
    (["--compare=vllm,full+paged(64)"], "strategy vllm is named twice"),
    (["--strategy=h2o+paged(size=16)"], "the paged store has no option 'size'; it takes page_size, extents"),
    (["--strategy=h2o+int3"], "unknown store or codec 'int3'"),
    (["--compare="], "no strategy given"),
    (["--budget=lots"], "--budget=lots: give a whole number of tokens (256) or a fraction of the prompt (0.2)"),
    (["--budget=0"], "--budget=0: give a whole number"),
    (["--budget=1.5"], "--budget=1.5: give a whole number"),
    (["--budget=nan"], "--budget=nan: give a whole number"),
    (["--strategy=streaming", "--budget=3"], "a budget of 3 leaves no window beside sinks=4"),
    (["--model=gpt-9"], "unknown model 'gpt-9'; bundled: kvjax-1m, kvjax-4m; fetched by name: smollm2-135m; presets: "),
    (["--model=opt-125m"], "preset opt-125m comes without weights"),
    ([*SMALL, "--dtype=int8"], "unknown dtype 'int8'; supported: float32, bfloat16, float16"),
    ([*SMALL, "--input_len=3000"], "3000 prompt tokens and 16 new ones exceed the 2048 positions of model kvjax-1m"),
    ([*SMALL, "--input_len=10"], "a prompt of 10 bytes cannot hold 2 facts"),
    (["--input_len=0"], "kvjax: a length of 0 tokens; give at least 1"),
    (["--input_len=many"], "kvjax: cannot read lengths 'many'; write tokens such as 512"),
    (["--input_len=uniform(8,16)"], "--input_len=uniform(8,16): offline all prompts have one length; give a number of tokens, or a load"),
    (["--batch_size=0"], "flag --batch_size=0: 0 is not a positive integer"),
    (["--store=cloud"], "flag --store=cloud: value should be one of <dense|paged|host>"),
    (["--strategy=vllm", "--store=dense"], "vllm means full in the paged store; for full in another store write full+dense"),
    (["--max_num_seqs=8"], "--max_num_seqs needs a load; add one of --request_rate"),
    (["--request_rate=4", "--batch_size=2"], "--batch_size has no meaning under load"),
    (["--request_rate=fast"], "--request_rate=fast: give requests per second, or inf for all at once"),
    (["--request_rate=-1", *SMALL[:2]], "request_rate=-1 is not a rate"),
    (["--ramp=linear:1"], "--ramp=linear:1: give a kind and two rates"),
    (["--request_rate=4", "--goodput=speed:1"], "unknown objective 'speed'"),
    (["--request_rate=4", "--kv_memory=much", *SMALL[:2]], "cannot read 'much' as an amount of memory"),
    (["--request_rate=4", "--kv_memory=64KiB", *SMALL[:2]], "kv_memory of 65536 bytes is too small"),
    (["--request_rate=4", "--strategy=h2o", "--store=paged", "--enable_prefix_caching", *SMALL[:2]], "prefix caching needs pages"),
    (["--request_rate=4", "--max_num_batched_tokens=8", *SMALL[:2]], "max_num_batched_tokens=8 leaves no room for prompts"),
    (["--trace=nowhere.jsonl", *SMALL[:2]], "nowhere.jsonl"),
    (["--prefill_mode=lazy"], "value should be one of <faithful|bounded>"),
    (["--temperature=-1"], "flag --temperature=-1"),
    (["--temperature=nan"], "temperature=nan is not a number >= 0"),
    (["--top_p=0"], "top_p=0.0 is not in (0, 1]"),
    (["--seed=-1"], "kvjax: --seed=-1 is out of range; give one from 0 to"),
    (["--seed=2147483640", "--num_prompts=9"], "kvjax: --seed=2147483640 is out of range; give one from 0 to 2147483639"),
    (["--seed=99999999999999999999", "--request_rate=1"], "kvjax: --seed=99999999999999999999 is out of range"),
    (["--top_k=99999999999"], "top_k=99999999999 is out of range"),
    (["--temperature=1e-45"], "temperature=1e-45 is beyond reason"),
    (["--link_gbps=nan"], "flag --link_gbps=nan is not a number >= 0.001"),
    (["--output_dir="], "--output_dir names no directory"),
    (["--input_len=1" + "0" * 30], "length=1000000000000000000000000000000 is out of range"),
    (["--budget=1" + "0" * 30], "more tokens than any prompt has"),
    (["--no_such_flag"], "Unknown command line flag 'no_such_flag'"),
    (["h2o"], "unexpected argument 'h2o'; flags start with --, see --help"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a[-2:]) for a, _ in REFUSED])
def test_bad_input_is_one_line(refused, arguments, message):
    assert message in refused(*arguments)


def test_one_run_at_a_time_writes_to_a_directory(refused, tmp_path):
    with locked(tmp_path):
        assert f"{tmp_path} is being written by process" in refused(*SMALL, f"--output_dir={tmp_path}")


def test_the_directory_of_a_sweep_is_left_alone(refused, tmp_path):
    (tmp_path / "records.csv").write_text("")
    assert f"{tmp_path} is the directory of a sweep (it holds records.csv)" in refused(*SMALL, f"--output_dir={tmp_path}")


@pytest.fixture
def ended(capsys):
    """A function that runs the command line in this process, and returns its exit code and what it said on the standard error."""
    if "strategy" not in flags.FLAGS:
        run.define_flags()

    def invoke(*arguments: str) -> tuple[object, str]:
        code: object = 0
        try:
            with flagsaver.flagsaver():
                run.main(parse_flags(["kvjax.run", *arguments]))
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return invoke


@pytest.mark.parametrize(
    ("problem", "code", "said"), [(KeyboardInterrupt(), 130, "kvjax: interrupted\n"), (InputError("no more"), 2, "kvjax: no more\n")]
)
def test_what_is_complete_is_written_whatever_ends_the_run(ended, monkeypatch, tmp_path, problem, code, said):
    real, calls = offline.measure, []

    def measure(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise problem
        return real(*arguments, **options)

    monkeypatch.setattr(offline, "measure", measure)
    for name in ("series.jsonl", "load.png", "record.json", "mine.txt"):
        (tmp_path / name).write_text("of an earlier run")
    result, errors = ended(*SMALL, "--noquality", "--compare=full,streaming", f"--output_dir={tmp_path}")
    assert (result, errors.splitlines(keepends=True)[-1]) == (code, said)
    assert "has an earlier run's record.json, series.jsonl, load.png: this run's will take their place" in errors
    assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "requests.jsonl", "samples.txt", "overview.png", "mine.txt"}
    assert [json.loads(line)["strategy"] for line in (tmp_path / "records.jsonl").read_text("utf-8").splitlines()] == ["full"]


def test_a_single_record_is_json(ended, monkeypatch, tmp_path):
    """What has no value is null; the file is one JSON value."""
    real = records_of_runs.record

    def record(*arguments):
        return real(*arguments) | {"fidelity_kld_mean": float("nan"), "fidelity_kld_mean_se": None, "duration": float("inf")}

    monkeypatch.setattr(records_of_runs, "record", record)
    assert ended(*SMALL, "--noquality", "--strategy=full", f"--output_dir={tmp_path}")[0] == 0
    written = json.loads((tmp_path / "record.json").read_text("utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (written["strategy"], written["fidelity_kld_mean"], written["duration"]) == ("full", None, "inf")


@pytest.mark.parametrize("flag", ["output_dir", "profile_dir"])
def test_directory_that_cannot_be_written(refused, tmp_path, flag):
    (tmp_path / "file").write_text("")
    assert refused(f"--{flag}={tmp_path / 'file'}").endswith(f"--{flag}={tmp_path / 'file'}: cannot write there: File exists\n")
    assert "cannot write there: Not a directory" in refused(f"--{flag}={tmp_path / 'file' / 'below'}")
    assert "cannot write there" in refused(f"--{flag}=/proc/kvjax")


def test_bad_flag_of_the_real_program():
    process = subprocess.run([sys.executable, "-m", "kvjax.run", "--batch_size=0"], capture_output=True, text=True, timeout=100)
    assert process.returncode == 2
    assert process.stderr.startswith("kvjax: flag --batch_size=0")
    assert len(process.stderr.splitlines()) == 1


def test_help_shows_the_flags_and_the_spec_strings():
    process = subprocess.run([sys.executable, "-m", "kvjax.run", "--help"], capture_output=True, text=True, timeout=100)
    for words in ("Measures KV-cache strategies", "h2o(heavy=0.1,recent=0.1)", "--compare:", "--profile_dir:", "--[no]random_weights:"):
        assert words in process.stdout


def test_stores_that_differ_in_an_option_are_compared_and_say_so(tmp_path):
    command = [
        sys.executable,
        "-m",
        "kvjax.run",
        *SMALL,
        "--noquality",
        "--compare=vllm,full+paged(16)",
        f"--output_dir={tmp_path / 'out'}",
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stderr) == (0, "")
    found = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [record["strategy"] for record in found] == ["vllm", "full+paged(16)"]
    assert [record["strategy_identity"]["options"]["page_size"] for record in found] == [64, 16]
    assert [parse_strategy(record["strategy"]).store for record in found] == [paged(64), paged(16)]
    fragments = [record["kv_device_fragmentation_bytes"] for record in found]
    assert fragments[0] > fragments[1]
