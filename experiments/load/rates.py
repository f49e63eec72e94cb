"""Latency and throughput over request rates: every strategy, every rate, the same requests, one memory limit.

    python -m experiments.load.rates
    python -m experiments.load.rates --strategies=full,vllm --rates=2,4 --num_prompts=20 --output_dir=runs/rates

Writes records.jsonl (a record per strategy and rate, as they are done), rates.png and rates.md into --output_dir. An interrupted run goes
on where it stopped: what is recorded under the same settings is not measured again. Each strategy keeps one engine for all rates, after a
warm-up that compiles everything and serves a few requests.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags, logging
from rich.console import Console

import kvjax
from kvjax.cache import parse_strategy, split_specs
from kvjax.engine.engine import Engine
from kvjax.engine.load import Fixed, Load, make_load
from kvjax.engine.metrics import parse_goodput
from kvjax.engine.serve import serve
from kvjax.files import dumps, replace
from kvjax.report.record import load_record

FLAGS = flags.FLAGS
SETTINGS = ("model", "input_len", "output_len", "num_prompts", "kv_memory", "max_num_seqs", "goodput", "seed")
COLUMNS = (
    ("output_throughput", "output (tok/s)", "{:.0f}"),
    ("request_throughput", "requests/s", "{:.2f}"),
    ("request_goodput", "goodput (req/s)", "{:.2f}"),
    ("mean_ttft_ms", "mean TTFT (ms)", "{:.0f}"),
    ("p99_ttft_ms", "P99 TTFT (ms)", "{:.0f}"),
    ("mean_tpot_ms", "mean TPOT (ms)", "{:.1f}"),
    ("p99_itl_ms", "P99 ITL (ms)", "{:.0f}"),
    ("peak_running", "peak running", "{:d}"),
    ("num_preemptions", "preemptions", "{:d}"),
    ("kv_usage_mean", "mean page usage", "{:.2f}"),
)


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("model", "kvjax-4m", "The model.")
    flags.DEFINE_string("strategies", "full,vllm,h2o+paged", "What to compare.")
    flags.DEFINE_list("rates", ["1", "2", "4", "6", "8", "12", "inf"], "Requests per second.")
    flags.DEFINE_integer("num_prompts", 96, "Requests per rate.", lower_bound=1)
    flags.DEFINE_integer("input_len", 256, "Tokens per prompt.", lower_bound=1)
    flags.DEFINE_integer("output_len", 256, "Tokens generated per prompt.", lower_bound=1)
    flags.DEFINE_string("kv_memory", "16MiB", "Memory of the cache.")
    flags.DEFINE_integer("max_num_seqs", 64, "Requests computed at a time.", lower_bound=1)
    flags.DEFINE_string("goodput", "ttft:1000,tpot:20", "Objectives in ms.")
    flags.DEFINE_integer("seed", 0, "Seed of the requests.")
    flags.DEFINE_string("output_dir", "experiments/results/rates_cpu", "Where records, table and figure go.")


def requests(model: kvjax.Model, rate: float, count: int) -> Load:
    """The same prompts at any rate."""
    lengths: dict[str, Any] = dict(input_len=Fixed(FLAGS.input_len), output_len=Fixed(FLAGS.output_len))
    return make_load(model, num_requests=count, request_rate=rate, seed=FLAGS.seed, **lengths)


def run(console: Console) -> None:
    """Measures what is missing, then draws what there is."""
    directory = pathlib.Path(FLAGS.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "records.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    settings = {name: FLAGS[name].value for name in SETTINGS}
    done = {(r["strategy"], str(r["request_rate"])) for r in found if r["settings"] == settings}
    specs = [parse_strategy(spec) for spec in split_specs(FLAGS.strategies)]
    rates = [float(rate) for rate in FLAGS.rates]
    model = kvjax.load_model(FLAGS.model)
    for strategy in specs:
        missing = [rate for rate in rates if (strategy.describe(), _name(rate)) not in done]
        if not missing:
            continue
        engine = Engine(
            model, strategy, kv_memory=FLAGS.kv_memory, max_num_seqs=FLAGS.max_num_seqs, max_model_len=FLAGS.input_len + FLAGS.output_len
        )
        console.print(f"{strategy.describe()}: compiling", highlight=False)
        engine.warm_up([FLAGS.input_len])
        serve(engine, requests(model, math.inf, 4))
        for rate in missing:
            load = requests(model, rate, FLAGS.num_prompts)
            service = serve(engine, load)
            options = {"request_rate": _name(rate), "settings": settings, "kv_memory": FLAGS.kv_memory, "max_concurrency": None}
            record = load_record(service, engine, model, load, options, parse_goodput(FLAGS.goodput), False)
            if not service.complete:
                console.print(f"interrupted: {service.record_note()}; this rate is not recorded, the ones before are")
                raise SystemExit(130)
            with path.open("a", encoding="utf-8") as file:
                file.write(dumps(record) + "\n")
            found.append(record)
            console.print(f"{strategy.describe()} at {_name(rate)}: " + _cells(record), highlight=False)
    shown = [r for r in found if r["settings"] == settings]
    order = [s.describe() for s in specs]
    shown = [r for name in order for r in sorted(shown, key=lambda r: float(r["request_rate"])) if r["strategy"] == name]
    replace(directory / "rates.md", table(shown))
    figure(shown, order, directory / "rates.png")
    console.print(f"wrote records.jsonl, rates.md and rates.png to {directory}", highlight=False)


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one line per strategy and rate."""
    lines = ["| strategy | rate | " + " | ".join(label for _, label, _ in COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) + 1)]
    lines += [f"| {r['strategy']} | {r['request_rate']} | {_cells(r)} |" for r in records]
    return "\n".join(lines) + "\n"


def figure(records: list[dict[str, Any]], order: list[str], path: pathlib.Path) -> None:
    """Latencies and throughput over the offered rate."""
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    panels = (
        ("mean_ttft_ms", "mean time to first token (ms)", "log"),
        ("mean_tpot_ms", "mean time per output token (ms)", "linear"),
        ("output_throughput", "output tokens/s", "linear"),
        ("request_goodput", "goodput (requests/s)", "linear"),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name, marker in zip(order, "osD^vP*", strict=False):
            finite = [r for r in records if r["strategy"] == name and r["request_rate"] != "inf"]
            axis.plot([float(r["request_rate"]) for r in finite], [r[key] for r in finite], marker=marker, markersize=4, label=name)
        axis.set(xlabel="offered load (requests/s)", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    first = records[0]
    fig.suptitle(
        f"{first['model_id']} on {first['device_kind']}: {FLAGS.input_len} tokens of prompt, {FLAGS.output_len} generated, "
        f"{FLAGS.kv_memory} of KV memory; goodput: {FLAGS.goodput} (ms)",
        fontsize=10,
    )
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _name(rate: float) -> str:
    return "inf" if math.isinf(rate) else f"{rate:g}"


def _cells(record: dict[str, Any]) -> str:
    return " | ".join("-" if record[key] is None else pattern.format(record[key]) for key, _, pattern in COLUMNS)


def main(argv: list[str]) -> None:
    del argv
    run(Console(width=160))


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
