"""What the transfers cost: bytes, link bandwidth, how much of it hides behind compute, and the step time they leave.

    python -m experiments.infinigen.offload
    python -m experiments.infinigen.offload --model=opt-13b --random_weights --batch_size=8 --context=2048      (on a card)

The entries: the full cache on the device and InfiniGen with its pool there, of which the faster is the ideal; everything in host memory and
fetched whole, layer by layer (a full offload); and InfiniGen, by every way to bring tokens to the device. They decode the same prompts
greedily and take turns, sample by sample; in the end every row has `--context` tokens. Then a few steps of each are traced, for the time in
fetches and the share of it during which other work ran.

Bars, for InfiniGen with its pool on the host: 90 % of the transfer hidden, steps within 1.5 times the ideal. On a CPU the link is a copy in
memory by the same cores that compute, so the bars do not apply; the figures are there to see that the script works.

Writes records.jsonl (a record per entry), offload.md, offload.png and offload.svg into --output_dir. What is recorded under the same
settings is not measured again; entries are only comparable when they took turns, so a single missing one has all of them measured anew.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags, logging
from jaxtyping import Int
from rich.console import Console

import kvjax
from experiments.bench import machine
from experiments.bench.timing import Sample, Timing, interleave
from experiments.infinigen import quality
from experiments.infinigen.study import COLOURS, save
from kvjax.cache import TRANSFERS, Full, Strategy, dense, host, ledger, parse_policy
from kvjax.calibrate import calibrate, calibrated
from kvjax.engine import offline
from kvjax.files import json_lines, replace
from kvjax.models import Model
from kvjax.report import profile
from kvjax.report.record import setting

Record = dict[str, Any]
LEAST_HIDDEN, MOST_OVER_IDEAL = 0.9, 1.5
LINK_BYTES, LINK_COPIES = 256 << 20, 8


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("model", "kvjax-4m", "A bundled model, a preset (with --random_weights), or a directory.")
    flags.DEFINE_bool("random_weights", False, "Random weights: speed and bytes are real, what the model says is not.")
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")
    flags.DEFINE_integer("batch_size", 8, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("context", 1024, "Tokens of every row in the end.", lower_bound=64)
    flags.DEFINE_string("infinigen", "infinigen_paper(alpha=4,partial=0.3,budget=0.2)", "The policy.")
    flags.DEFINE_list("transfers", list(TRANSFERS), "Ways to bring tokens to the device.")
    flags.DEFINE_integer("steps", 8, "Decode steps a sample.", lower_bound=1)
    flags.DEFINE_integer("reps", 7, "Samples that count, per entry.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Samples before them; the first one compiles.", lower_bound=1)
    flags.DEFINE_integer("retries", 7, "Disturbed samples discarded per entry before they count.", lower_bound=0)
    flags.DEFINE_integer("traced_steps", 8, "Decode steps under the profiler.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the prompts.")
    flags.DEFINE_bool("quick", False, "Two prompts, 128 tokens, two samples, into runs/quick: whether the script runs, and nothing more.")
    flags.DEFINE_string("trace_dir", "runs/offload", "Where the profiler's traces go.")
    flags.DEFINE_string("output_dir", None, "Where the results go; default: experiments/results/offload_ and the backend.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is recorded under other settings is measured again."""

    model: str
    random_weights: bool
    dtype: str | None
    batch_size: int
    context: int
    infinigen: str
    steps: int
    reps: int
    warm_up: int
    retries: int
    traced_steps: int
    seed: int

    @property
    def new_tokens(self) -> int:
        """The most that an entry generates: the prompt's own next token, one step to try, and all samples."""
        return 2 + self.steps * (self.warm_up + self.reps + self.retries) + self.traced_steps


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
      role: `ideal`, `offload` or `infinigen`.
    """

    role: str
    strategy: Strategy

    @property
    def name(self) -> str:
        transfer = self.strategy.store.options.get("transfer")
        where = "" if transfer is None else f", {transfer}"
        return self.strategy.policy.describe() + where


def contenders(infinigen: str, transfers: Sequence[str]) -> list[Contender]:
    """Ideals first."""
    policy = parse_policy(infinigen)
    found = [Contender("ideal", Strategy(Full(), dense()))]
    if "device" in transfers:
        found.append(Contender("ideal", Strategy(policy, host("device"))))
    hosted = [t for t in transfers if t != "device"]
    found += [Contender("offload", Strategy(Full(), host(t))) for t in hosted]  # type: ignore[arg-type]
    return found + [Contender("infinigen", Strategy(policy, host(t))) for t in hosted]  # type: ignore[arg-type]


class Decoding:
    """Greedy steps of one contender after its prompts, all on one stream. A sample is seconds per step, its tokens known to the host."""

    def __init__(self, contender: Contender, model: Model, prompts: Int[np.ndarray, "B N"], settings: Settings):
        self.name, self.contender, self.pid = contender.name, contender, os.getpid()
        self._steps = settings.steps
        self._stream = kvjax.stream(
            model, prompts, strategy=contender.strategy, max_new_tokens=settings.new_tokens, stop_tokens=(), seed=settings.seed
        )
        self.tokens: list[np.ndarray] = []
        self.advance(1)

    def advance(self, steps: int) -> None:
        """Takes steps, and waits for all they do."""
        for _ in range(steps):
            self.emitted = next(self._stream)
            self.tokens.append(self.emitted.tokens)
        jax.block_until_ready(self.emitted.state)

    def prepare(self) -> None:
        jax.block_until_ready(self.emitted.state)

    def sample(self) -> Sample:
        began = time.perf_counter()
        self.advance(self._steps)
        return Sample((time.perf_counter() - began) / self._steps)


def link_bytes_per_second() -> float:
    """The fastest of some copies from host memory to the device; on a CPU, of copies in memory by one thread."""
    times = []
    if jax.default_backend() == "cpu":
        source, target = np.ones(LINK_BYTES // 4, np.float32), np.zeros(LINK_BYTES // 4, np.float32)
        for _ in range(LINK_COPIES):
            began = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - began)
        return LINK_BYTES / min(times)
    on_host = jax.device_put(jnp.ones(LINK_BYTES // 4, jnp.float32), jax.memory.Space.Host)
    copy = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))
    jax.block_until_ready(copy(on_host))
    for _ in range(LINK_COPIES):
        began = time.perf_counter()
        jax.block_until_ready(copy(on_host))
        times.append(time.perf_counter() - began)
    return LINK_BYTES / min(times)


def measure(settings: Settings, entrants: Sequence[Contender], trace_dir: pathlib.Path, console: Console) -> list[Record]:
    """All entrants in turns. One that cannot run is left out, with the reason in its record."""
    console.print("loading", highlight=False)
    model = kvjax.load_model(settings.model, dtype=settings.dtype, random_weights=settings.random_weights)
    prompt_len = settings.context - settings.new_tokens
    if prompt_len < 64:
        raise kvjax.InputError(f"--context={settings.context} leaves a prompt of {prompt_len} tokens before the samples; give more")
    prompts = offline.make_workload(model, settings.batch_size, prompt_len, settings.seed, min(8, prompt_len // 16)).prompts
    calibration = calibrate(model) if any(c.strategy.policy.guesses for c in entrants) else None
    common = setting() | {"settings": dataclasses.asdict(settings), "model_id": model.config.name, "dtype": str(model.dtype)}
    common |= {"batch_size": settings.batch_size, "context": settings.context, "device": device_name()}
    common |= {"link_bytes_per_second": link_bytes_per_second()}
    records: dict[str, Record] = {}
    entries = []
    for contender in entrants:
        transfer = contender.strategy.store.options.get("transfer")
        record = {"entry": contender.name, "role": contender.role, "strategy": contender.strategy.describe(), "transfer": transfer}
        records[contender.name] = common | record
        console.print(f"{contender.name}: prompts and first step", highlight=False)
        try:
            entry = Decoding(contender, calibrated(model, contender.strategy, calibration), prompts, settings)
            entry.advance(1)
            entries.append(entry)
        except (kvjax.KvjaxError, NotImplementedError, AssertionError, TypeError) as error:
            records[contender.name]["failure"] = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.print(f"{contender.name}: cannot run: {records[contender.name]['failure']}", highlight=False)
    console.print(f"timing {len(entries)} entries, {settings.reps} samples of {settings.steps} steps each", highlight=False)
    timings = interleave(entries, machine.Watch, reps=settings.reps, warm_up=settings.warm_up, retries=settings.retries)
    for entry, timing in zip(entries, timings, strict=True):
        records[entry.name] |= timed(entry, timing, settings)
    for entry in entries:
        console.print(f"{entry.name}: tracing", highlight=False)
        records[entry.name] |= traced(entry, records[entry.name], settings, trace_dir)
    leaders = {entry.contender.strategy.policy: entry for entry in reversed(entries)}  # the first of every policy
    for entry in entries:
        leader = leaders[entry.contender.strategy.policy]
        shared = min(len(entry.tokens), len(leader.tokens))
        pairs = [(a == b).mean() for a, b in zip(entry.tokens[:shared], leader.tokens[:shared], strict=True)]
        records[entry.name] |= {"agrees_with": leader.name, "tokens_equal_share": float(np.mean(pairs))}
    return list(records.values())


def timed(entry: Decoding, timing: Timing, settings: Settings) -> Record:
    """Times, and the bytes that a step brings over."""
    found: Record = {
        "median_seconds": timing.median,
        "min_seconds": min(timing.seconds),
        "max_seconds": max(timing.seconds),
        "samples_seconds": timing.seconds,
        "discarded": len(timing.discarded),
        "disturbed": timing.disturbed,
    }
    books = ledger(entry.contender.strategy, entry.emitted.state).record()
    found |= {key: value for key, value in books.items() if key.startswith("kv_") and value is not None}
    moved = float(books["kv_bytes_moved_per_token"] or 0) * settings.batch_size
    return found | {"bytes_moved_per_step": moved}


def traced(entry: Decoding, record: Record, settings: Settings, directory: pathlib.Path) -> Record:
    """Time in fetches and the part of it that other work hid, from a trace."""
    measure_hidden = getattr(profile, "hidden_fraction", None)
    if not record["bytes_moved_per_step"]:
        return {}
    if measure_hidden is None:
        return {"trace_note": "kvjax.report.profile has no hidden_fraction: nothing was traced"}
    where = directory / entry.name.replace(",", "_").replace(" ", "")
    with profile.trace(where):
        entry.advance(settings.traced_steps)
    hidden = measure_hidden(where)
    found: Record = {"fetch_seconds_per_step": hidden.seconds / settings.traced_steps, "fetch_hidden_fraction": hidden.fraction}
    if hidden.seconds:
        found["achieved_link_bytes_per_second"] = record["bytes_moved_per_step"] * settings.traced_steps / hidden.seconds
    return found


def device_name() -> str:
    """The card, or the processor."""
    return machine.cpu_model() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def ideal(records: Sequence[Record]) -> Record | None:
    """The faster of those that have everything on the device."""
    return min((r for r in records if r["role"] == "ideal" and "median_seconds" in r), key=lambda r: r["median_seconds"], default=None)


def bars(records: Sequence[Record]) -> list[str]:
    """What the bars ask, what was measured, and the verdict."""
    best, told = ideal(records), []
    for record in (r for r in records if r["role"] == "infinigen"):
        ratio = None if best is None or "median_seconds" not in record else record["median_seconds"] / best["median_seconds"]
        applies = record["platform"] != "cpu"
        for what, value, met, shown in (
            ("at least 90 % of the transfer hidden", hidden := record.get("fetch_hidden_fraction"), _at_least(hidden), "{:.1%}"),
            (f"steps within {MOST_OVER_IDEAL} times the ideal", ratio, ratio is not None and ratio <= MOST_OVER_IDEAL, "{:.2f}"),
        ):
            verdict = "not measured" if value is None else "met" if met else "missed"
            if not applies:
                verdict = "not applicable: on a CPU the link is a copy in memory"
            told.append(f"{record['entry']}: {what}: {'-' if value is None else shown.format(value)}: {verdict}")
    return told


def _at_least(hidden: float | None) -> bool:
    return hidden is not None and hidden >= LEAST_HIDDEN


_COLUMNS = (
    ("median_seconds", "step (ms)", "{:.2f}", 1e3),
    ("over_ideal", "over the ideal", "{:.2f}", 1),
    ("over_offload", "over the full offload", "{:.2f}", 1),
    ("bytes_moved_per_step", "moved a step (MB)", "{:.2f}", 1e-6),
    ("kv_fetched_fraction", "fetched (%)", "{:.1f}", 100),
    ("fetch_seconds_per_step", "in fetches a step (ms)", "{:.2f}", 1e3),
    ("achieved_link_bytes_per_second", "achieved (GB/s)", "{:.2f}", 1e-9),
    ("fetch_hidden_fraction", "hidden (%)", "{:.1f}", 100),
    ("tokens_equal_share", "same tokens (%)", "{:.1f}", 100),
)


def markdown(records: Sequence[Record]) -> str:
    """The table, the bars, and what they were measured on."""
    first, best = records[0], ideal(records)
    s = first["settings"]
    weights = ", random weights" if s["random_weights"] else ""
    lines = ["# InfiniGen and the full offload: transfers and step times", ""]
    lines += [
        f"{first['model_id']} ({first['dtype']}{weights}), batch {s['batch_size']}, context {s['context']}, on {first['device']}, jax "
        f"{first['jax_version']}: medians of {s['reps']} samples of {s['steps']} steps, in turns. The fastest plain copy to the device "
        f"makes {first['link_bytes_per_second'] / 1e9:.1f} GB/s.",
        "",
    ]
    if first["platform"] == "cpu":
        lines += ["On a CPU the link is a copy in memory, made by the cores that compute: these figures say nothing about a card.", ""]
    if s["random_weights"]:
        lines += ["With random weights attention is nearly even: the budget, and not alpha, decides how much is fetched.", ""]
    lines += [f"- {line}" for line in bars(records)] + [""]
    heads = ["entry", *(label for _, label, _, _ in _COLUMNS)]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for record in records:
        row = dict(record)
        if best is not None and "median_seconds" in record:
            row["over_ideal"] = record["median_seconds"] / best["median_seconds"]
        whole = [r for r in records if r["role"] == "offload" and r["transfer"] == record["transfer"] and "median_seconds" in r]
        if whole and "median_seconds" in record:
            row["over_offload"] = record["median_seconds"] / whole[0]["median_seconds"]
        cells = ["-" if row.get(key) is None else pattern.format(scale * row[key]) for key, _, pattern, scale in _COLUMNS]
        lines.append("| " + " | ".join([record["entry"], *cells]) + " |")
    lines += [""] + [f"{r['entry']} did not run: {r['failure']}." for r in records if "failure" in r]
    lines += [f"{r['entry']}: {r['trace_note']}." for r in records if "trace_note" in r]
    return "\n".join(lines).rstrip() + "\n"


def figure(records: Sequence[Record], path: pathlib.Path) -> None:
    """Step times, with what lies between the fastest and the slowest sample."""
    ran = [r for r in records if "median_seconds" in r]
    colour = dict(zip(("ideal", "offload", "infinigen"), ("#999999", COLOURS[1], COLOURS[0]), strict=True))
    fig, axis = plt.subplots(figsize=(9, 0.55 * len(ran) + 1.5), layout="constrained")
    times = [1e3 * r["median_seconds"] for r in ran]
    spread = [[t - 1e3 * r["min_seconds"] for t, r in zip(times, ran, strict=True)]]
    spread.append([1e3 * r["max_seconds"] - t for t, r in zip(times, ran, strict=True)])
    axis.barh(
        [r["entry"] for r in ran], times, xerr=spread, color=[colour[r["role"]] for r in ran], error_kw=dict(elinewidth=0.8, capsize=2)
    )
    for row, (record, length) in enumerate(zip(ran, times, strict=True)):
        hidden = record.get("fetch_hidden_fraction")
        share = "" if hidden is None else f", {100 * hidden:.0f} % of the fetch hidden"
        axis.annotate(
            f" {length:.1f} ms{share}",
            (1e3 * record["max_seconds"], row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.invert_yaxis()
    axis.set(xlabel="decode step of the batch (ms)", xlim=(0, 1.45e3 * max(r["max_seconds"] for r in ran)))
    axis.tick_params(axis="y", labelsize=8)
    first = records[0]
    fig.suptitle(f"{first['model_id']}, batch {first['batch_size']}, context {first['context']}, {first['device_kind']}", fontsize=10)
    save(fig, path)


def perform(
    settings: Settings, transfers: Sequence[str], directory: pathlib.Path, trace_dir: pathlib.Path, console: Console
) -> list[Record]:
    """Measures unless all is recorded, then writes what there is."""
    directory.mkdir(parents=True, exist_ok=True)
    path, entrants = directory / "records.jsonl", contenders(settings.infinigen, transfers)
    here = {"settings": dataclasses.asdict(settings), "device": device_name()}
    before = quality.read(path)
    mine = {r["entry"]: r for r in before if all(r.get(key) == value for key, value in here.items()) and "failure" not in r}
    if all(c.name in mine for c in entrants):
        console.print("recorded already", highlight=False)
        records = [mine[c.name] for c in entrants]
    else:
        records = measure(settings, entrants, trace_dir, console)
        others = [r for r in before if any(r.get(key) != value for key, value in here.items())]
        replace(path, json_lines([*others, *records]))
    replace(directory / "offload.md", markdown(records))
    if any("median_seconds" in r for r in records):
        figure(records, directory / "offload")
    console.print(markdown(records), markup=False, highlight=False)
    console.print(f"wrote records.jsonl, offload.md, offload.png and offload.svg to {directory}", highlight=False)
    return records


def main(argv: list[str]) -> None:
    del argv
    values = flags.FLAGS
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Settings)}
    settings = Settings(**chosen)
    directory = pathlib.Path(values.output_dir or f"experiments/results/offload_{jax.default_backend()}")
    if values.quick:
        settings = dataclasses.replace(settings, batch_size=2, context=128, steps=2, reps=2, warm_up=1, retries=0, traced_steps=2)
        directory = pathlib.Path(values.output_dir or "runs/quick/offload")
    perform(settings, values.transfers, directory, pathlib.Path(values.trace_dir), Console(width=160))


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
