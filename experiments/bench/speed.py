"""Times kvjax beside transformers and llama.cpp on this machine's CPU, against floors measured in the same run.

    KVJAX_PEERS_PYTHON=/path/to/python3.11 python -m experiments.bench.speed
    python -m experiments.bench.speed --quick                       # does it all work? Its figures mean nothing
    python -m experiments.bench.speed --phases=decode --batches=1 --contexts=512

The peers run in worker processes of their own Python environment (experiments/bench/peers); without KVJAX_PEERS_PYTHON kvjax stands beside
its floors alone. All engines load the same float32 weights and continue the same prompts; that they agree on every greedy token is checked.
They take turns, sample by sample, and a sample during which another process used more than 15 % of a core is discarded and taken again.

Writes speed.jsonl (a record per cell and engine, as cells finish) and speed.md into --output_dir.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
from absl import app, flags, logging
from rich.console import Console

import kvjax
from experiments.bench import bars, floors, kvjax_side, machine, peers_side, tables
from experiments.bench.peers.agree import equal_tokens
from experiments.bench.peers.client import WorkerError
from experiments.bench.timing import Entry, Timing, interleave
from kvjax.cache import Strategy, parse_strategy
from kvjax.files import dumps, replace
from kvjax.models import Model
from kvjax.report.record import setting

FLAGS = flags.FLAGS

Phase = Literal["decode", "prefill", "flat"]
PHASES: tuple[Phase, ...] = ("decode", "prefill", "flat")
BATCH_ONE_ONLY = ("hf-static-compile", "hf-static-freeze")
_FLOOR_REPS = 7
_QUICK = {"contexts": ["64", "128"], "reps": 2, "warm_up": 1, "output_dir": "runs/bench/quick"}


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_list("batches", ["1", "8"], "Batch sizes of the decode cells.")
    flags.DEFINE_list("contexts", ["512", "1024", "2048"], "Prompt lengths in tokens.")
    flags.DEFINE_list("phases", list(PHASES), "What to measure: decode, prefill, flat (H2O at equal slots across contexts).")
    flags.DEFINE_list(
        "peers",
        ["hf-dynamic-loop", "hf-static-eager", "hf-static-freeze", "llama.cpp-f32"],
        "Engines beside kvjax; also hf-generate, hf-static-compile, llama.cpp-f32-fa. Empty: none.",
    )
    flags.DEFINE_integer("steps", 32, "Decode steps a sample.", lower_bound=1)
    flags.DEFINE_integer("reps", 7, "Samples that count, per engine and cell.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Samples before them; the first one compiles.", lower_bound=1)
    flags.DEFINE_integer("retries", 14, "Disturbed samples discarded per engine and cell before they count.", lower_bound=0)
    flags.DEFINE_integer("threads", os.cpu_count(), "Threads of the peers and of the copy; JAX takes all cores.", lower_bound=1)
    flags.DEFINE_string("work_dir", "runs/bench", "Where the model is kept between runs.")
    flags.DEFINE_string("output_dir", "experiments/results/bench_cpu", "Where speed.jsonl and speed.md go.")
    flags.DEFINE_bool("quick", False, "A functional run: contexts 64 and 128, 2 samples, results into runs/bench/quick.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Engines that take turns."""

    phase: Phase
    title: str
    entries: Sequence[Any]


class Bench:
    """One run: makes the cells, times them, keeps the records and writes them after every cell."""

    def __init__(self, model: Model, peers: peers_side.Peers, output_dir: pathlib.Path, console: Console):
        self.model, self.peers, self.console, self.output_dir = model, peers, console, output_dir
        self.source = kvjax_side.Prompts(model, FLAGS.steps)
        self.records: list[dict[str, Any]] = []
        self.notes = list(peers.notes)
        self._probes: list[Entry] = [machine.CopyProbe(FLAGS.threads), machine.MatmulProbe()]
        self._setting = setting_of_run(peers)

    def run(self, phases: Sequence[Phase], batches: Sequence[int], contexts: Sequence[int]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        replace(self.output_dir / "speed.jsonl", "")
        for i, phase in enumerate(phases):
            for cell in self.cells(phase, batches, contexts):
                self.measure(cell)
            if i == 0:
                self.check_idle()
        if phases:
            self.write()

    def cells(self, phase: Phase, batches: Sequence[int], contexts: Sequence[int]) -> list[Cell]:
        if phase == "prefill":
            return [Cell(phase, f"prefill batch 1 context {context}", self.prefill_entries(context)) for context in contexts]
        if phase == "decode":
            pairs = [(batch, context) for batch in batches for context in contexts]
            return [Cell(phase, f"decode batch {b} context {c}", self.decode_entries(b, c)) for b, c in pairs]
        own = {batch: [kvjax_side.Decode(self.source, "kvjax-h2o-256", batch, context) for context in contexts] for batch in batches}
        return [Cell(phase, f"flat batch {batch} contexts {', '.join(map(str, contexts))}", entries) for batch, entries in own.items()]

    def decode_entries(self, batch: int, context: int) -> list[Any]:
        own = [kvjax_side.Decode(self.source, name, batch, context) for name in ("kvjax", "kvjax-step", "kvjax-h2o")]
        wanted = [(worker, name) for worker, name in self.peers.of("decode") if batch == 1 or name not in BATCH_ONE_ONLY]
        return own + [peers_side.Decode(worker, name, batch, context, FLAGS.steps) for worker, name in wanted]

    def prefill_entries(self, context: int) -> list[Any]:
        own = [kvjax_side.Prefill(self.source, name, 1, context) for name in ("kvjax", "kvjax-h2o")]
        return own + [peers_side.Prefill(worker, name, 1, context) for worker, name in self.peers.of("prefill")]

    def measure(self, cell: Cell) -> None:
        """Times a cell, floors first, and adds its records."""
        began = time.perf_counter()
        watched: dict[str, Any] = dict(watch=machine.Watch, retries=FLAGS.retries)
        copy, matmul = interleave(self._probes, reps=_FLOOR_REPS, warm_up=1, **watched)
        rates = floors.Rates(1 / copy.median, 1 / matmul.median)
        timings = interleave(cell.entries, reps=FLAGS.reps, warm_up=FLAGS.warm_up, errors=(WorkerError,), **watched)
        turns = list(zip(cell.entries, timings, strict=True))
        self.notes += [f"{cell.title}: {entry.name} dropped out: {timing.failure}" for entry, timing in turns if timing.failure]
        added = [self.record(cell, entry, timing, rates, turns) for entry, timing in turns if len(timing.seconds) == FLAGS.reps]
        self.records += added
        self.write()
        with (self.output_dir / "speed.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(dumps(record) + "\n" for record in added)
        self.source.release()
        self.peers.release()
        shown = ", ".join(f"{_label(cell, record)} {1e3 * record['median_seconds']:.2f} ms" for record in added)
        lost = sum(len(timing.discarded) for timing in timings)
        line = f"{cell.title}: {shown} ({lost} discarded, {time.perf_counter() - began:.0f} s)"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def record(self, cell: Cell, entry: Any, timing: Timing, rates: floors.Rates, turns: list[tuple[Any, Timing]]) -> dict[str, Any]:
        """The flat record of one engine in one cell."""
        config, strategy = self.model.config, _strategy(entry)
        if cell.phase == "prefill":
            floor = floors.prefill_floor(config, entry.batch, entry.context, rates)
        else:
            floor = floors.decode_floor(config, strategy, entry.batch, entry.context, FLAGS.steps, rates)
        expected = next(t.tokens for e, t in turns if t.tokens and (e.context, _strategy(e)) == (entry.context, strategy))
        return {
            **self._setting,
            "model_id": config.name,
            "dtype": str(self.model.dtype),
            "phase": cell.phase,
            "batch": entry.batch,
            "context": entry.context,
            "steps": FLAGS.steps,
            "engine": entry.name,
            "strategy": strategy.describe(),
            "unit": "prompt" if cell.phase == "prefill" else "decode step of the batch",
            "median_seconds": timing.median,
            "min_seconds": min(timing.seconds),
            "max_seconds": max(timing.seconds),
            "samples_seconds": timing.seconds,
            "tokens_per_second": entry.batch * (entry.context if cell.phase == "prefill" else 1) / timing.median,
            "floor_seconds": floor,
            "floor_fraction": floor / timing.median,
            "copy_bytes_per_second": rates.bandwidth,
            "matmul_flops_per_second": rates.flops,
            "cores": statistics.median(timing.cores),
            "reps": FLAGS.reps,
            "warm_up": FLAGS.warm_up,
            "discarded": len(timing.discarded),
            "discarded_because": timing.discarded,
            "disturbed": timing.disturbed,
            "tokens_equal": equal_tokens(timing.tokens, expected),
            "tokens_total": sum(map(len, expected)),
            "tokens_distinct": len({token for row in timing.tokens for token in row}),
            "tokens_repeatable": timing.repeatable,
        }

    def check_idle(self) -> None:
        """Notes what kvjax and the workers use between their turns: threads that spin would slow the others down."""
        time.sleep(0.05)
        with machine.Watch(os.getpid()) as seen:
            time.sleep(0.5)
        used = {str(os.getpid()): seen.cores}
        for worker in self.peers.workers:
            used[worker.name] = sum(cores for name, cores in seen.others.items() if name.endswith(f"({worker.pid})"))
        idle = ", ".join(f"{'kvjax' if name == str(os.getpid()) else name} {100 * cores:.1f} %" for name, cores in used.items())
        self.notes.append(f"between turns the engines use, of a core: {idle}")

    def write(self) -> None:
        """The markdown of what there is so far."""
        command = "python -m experiments.bench.speed " + " ".join(sys.argv[1:])
        replace(self.output_dir / "speed.md", tables.markdown(self.records, self.notes, command.strip()))


def setting_of_run(peers: peers_side.Peers) -> dict[str, Any]:
    """What all records share."""
    base = setting()
    names = ("jax", "jaxlib", "numpy", "python")
    shared = {key: base[key] for key in ("schema_version", "date", "platform", "cpu_count", "git_commit")}
    return shared | {
        "device_kind": machine.cpu_model(),
        "versions": {name: base[f"{name}_version"] for name in names},
        "peer_versions": peers.versions,
        "threads": FLAGS.threads,
        "quick": FLAGS.quick,
    }


def _strategy(entry: Any) -> Strategy:
    """A peer's is the full cache."""
    return getattr(entry, "strategy", parse_strategy("full"))


def _label(cell: Cell, record: dict[str, Any]) -> str:
    return f"context {record['context']}" if cell.phase == "flat" else record["engine"]


def whole_numbers(flag: str, texts: Sequence[str]) -> list[int]:
    """The values of a flag; ends the program with a message where they are not positive whole numbers."""
    if not texts or not all(text.isdecimal() and int(text) for text in texts):
        sys.exit(f"--{flag}={','.join(texts)}: give positive whole numbers, separated by commas")
    return [int(text) for text in texts]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
    if FLAGS.quick:
        for name, value in _QUICK.items():
            if not FLAGS[name].present:
                FLAGS[name].value = value
    batches, contexts = whole_numbers("batches", FLAGS.batches), whole_numbers("contexts", FLAGS.contexts)
    if unknown := [phase for phase in FLAGS.phases if phase not in PHASES]:
        sys.exit(f"--phases: there is no {unknown[0]!r}; choose from {', '.join(PHASES)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    began = time.perf_counter()
    directory = kvjax_side.model_directory(pathlib.Path(FLAGS.work_dir))
    model = kvjax.load_model(directory, dtype="float32")
    console.print(f"{machine.cpu_model()}, jax {jax.__version__}", highlight=False)
    output_dir = pathlib.Path(FLAGS.output_dir)
    with peers_side.running(directory, FLAGS.peers, FLAGS.threads) as peers:
        for note in peers.notes:
            console.print(note, highlight=False, markup=False)
        bench = Bench(model, peers, output_dir, console)
        left_out = [name for name in FLAGS.peers if name in BATCH_ONE_ONLY]
        if peers.workers and left_out and max(batches) > 1:
            bench.notes.append(f"{', '.join(left_out)} at batch 1 only: beyond it compiled decoding is slower than eager")
        try:
            bench.run(cast(Sequence[Phase], FLAGS.phases), batches, contexts)
        except KeyboardInterrupt:
            console.print("interrupted; what follows is what there is", style="bold red")
        tables.show(bench.records, bench.notes, console)
    failed = sum(bar.verdict == "FAIL" for bar in bars.evaluate(bench.records))
    disturbed = any(record["disturbed"] for record in bench.records)
    warning = "; a quick run, whose figures mean nothing" if FLAGS.quick else "; disturbed samples count: not a result" if disturbed else ""
    line = f"{failed} bars failed{warning}; wrote speed.jsonl and speed.md to {output_dir} ({time.perf_counter() - began:.0f} s)"
    console.print(f"\n{line}", highlight=False)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
