"""The frame of the study: an experiment declares cells, figures and sentences; running, resuming, drawing and writing are here.

    python -m experiments.study.sparsity --quick
    python -m experiments.study.sparsity --full --output_dir=experiments/results/study_cpu

Results go to <output_dir>/<name>: records.jsonl (a record a cell, as it is done), records.csv, about.json, and every figure as PNG and SVG.
The same command goes on where an interrupted one stopped. --quick and --full differ in the sizes an experiment declares, in nothing else.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging
from rich.console import Console

from kvjax import compilation
from kvjax.command import Printer, answered, start
from kvjax.errors import KvjaxError, SpecError
from kvjax.files import dumps, replace
from kvjax.report import figures
from kvjax.report.figures import Panel
from kvjax.report.record import setting
from kvjax.sweep import Cell, Measure, Record, runner
from kvjax.sweep.measures import Bench

OUTPUT_DIRS = {True: "runs/study", False: "experiments/results/study_cpu"}
"""By --quick."""

SETTING = ("device_kind", "platform", "cpu_count", "python_version", "jax_version", "jaxlib_version", "git_commit", "date")

UNLIMITED = ("full", "vllm", "offload")
"""Strategies without a budget."""

TTFT = Panel("mean_ttft_ms", "mean time to first token (ms)", "log", "less")
TPOT = Panel("mean_tpot_ms", "mean time per output token (ms)", "linear", "less")
THROUGHPUT = Panel("output_throughput", "output (tokens/s)", "linear", "more")
KLD = Panel("fidelity_kld_mean", "divergence from the full cache (nats)", "linear", "less")
RECALL = Panel("task_recall", "facts recalled (%)", "linear", "more", factor=100)
DEVICE_BYTES = Panel("kv_device_total_bytes", "cache on the device (MiB)", "linear", "less", factor=2**-20)
MOVED_BYTES = Panel("kv_bytes_moved_per_token", "moved from host per token (KiB)", "linear", "less", factor=2**-10)


def as_they_are(records: Sequence[Record]) -> list[Record]:
    return list(records)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of an experiment.

    Attributes:
      stem: the file's name without its ending.
      rows: which records are drawn, and as what; those of cells that do not fit or failed are drawn as crosses.
    """

    stem: str
    title: str
    caption: str
    x: str
    x_label: str
    panels: tuple[Panel, ...]
    x_scale: Literal["linear", "log"] = "linear"
    rows: Callable[[Sequence[Record]], list[Record]] = as_they_are


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A part of the study.

    Attributes:
      question: what a reader learns.
      cells: makes them from the sizes of --quick or --full.
      figures: the first is the one that about.json describes.
      findings: sentences, computed from the finished records alone.
    """

    name: str
    title: str
    question: str
    quick: Mapping[str, Any]
    full: Mapping[str, Any]
    cells: Callable[..., Sequence[Cell]]
    figures: tuple[Figure, ...]
    findings: Callable[[Sequence[Record]], list[str]]

    def grid(self, quick: bool) -> Sequence[Cell]:
        return self.cells(**(self.quick if quick else self.full))

    def command(self, quick: bool, output_dir: pathlib.Path) -> str:
        """What makes the results again."""
        return f"python -m experiments.study.{self.name} --{'quick' if quick else 'full'} --output_dir={output_dir}"


def perform(
    experiment: Experiment, quick: bool, output_dir: pathlib.Path, console: Console, measure: Measure | None = None
) -> list[Record]:
    """Measures what is missing, draws and writes what there is, says what was found. Returns a record for every cell."""
    directory = output_dir / experiment.name
    records = runner.run(experiment.name, experiment.grid(quick), directory, measure or Bench(), console)
    done = [record for record in records if record["outcome"] == "done"]
    if not done:
        raise KvjaxError(f"{experiment.name}: no cell could be measured; the first says: {records[0]['error']}")
    for figure in experiment.figures:
        figures.lines(
            figure.rows(records), figure.x, figure.x_label, figure.panels, figure.title, directory / figure.stem, x_scale=figure.x_scale
        )
    findings = experiment.findings(done) + missing(records)
    replace(directory / "about.json", dumps(about(experiment, quick, output_dir, done, findings), indent=1) + "\n")
    console.print(f"{experiment.name}: wrote records, about.json and {len(experiment.figures)} figure(s) to {directory}", highlight=False)
    for sentence in findings:
        console.print(f"  {sentence}", highlight=False)
    return records


def about(experiment: Experiment, quick: bool, output_dir: pathlib.Path, done: Sequence[Record], findings: list[str]) -> dict[str, Any]:
    """What about.json says."""
    command, first = experiment.command(quick, output_dir), experiment.figures[0]
    where = setting()
    return {
        "name": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "command": command,
        "quick": quick,
        "x": first.x,
        "x_label": first.x_label,
        "x_scale": first.x_scale,
        "series": "strategy",
        "panels": [dataclasses.asdict(panel) for panel in first.panels],
        "figures": [
            {
                "file": f"{figure.stem}.svg",
                "png": f"{figure.stem}.png",
                "title": figure.title,
                "caption": figure.caption,
                "command": command,
            }
            for figure in experiment.figures
        ],
        "findings": findings,
        "setting": {key: where.get(key) for key in SETTING} | {"model_id": ", ".join(unique(r["model_id"] for r in done))},
        "seconds": sum(record["seconds"] for record in done),
    }


def missing(records: Sequence[Record]) -> list[str]:
    """A sentence on what could not be measured, and one on what went wrong."""
    told = []
    for outcome, what in (("infeasible", "do not fit into their memory"), ("failed", "failed")):
        found = [record for record in records if record["outcome"] == outcome]
        if found:
            names = ", ".join(unique(runner.title(record["cell"]) for record in found[:3])) + (" and others" if len(found) > 3 else "")
            told.append(f"{len(found)} of {len(records)} cells {what} ({names}): {found[0]['error']}")
    return told


# ------------------------------------------------------------------------------------------------------------------------------- records


def budgeted(strategy: str, budget: float) -> float | None:
    """The budget of a cell: none for what has none."""
    return None if strategy in UNLIMITED else budget


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


Curves = dict[str, dict[Any, float]]


def curves(records: Sequence[Record], x: str, key: str) -> Curves:
    """Means over repeats of a figure: by what the cell calls the strategy, then by x (of the cell, else of the record), ascending."""
    found: dict[str, dict[Any, list[float]]] = {}
    for record in records:
        at = record["cell"].get(x, record.get(x))
        if isinstance(record.get(key), int | float):
            found.setdefault(record["cell"]["strategy"], {}).setdefault(at, []).append(record[key])
    return {
        name: {at: sum(values) / len(values) for at, values in sorted(points.items(), key=lambda item: sortable(item[0]))}
        for name, points in found.items()
    }


def sortable(x: Any) -> tuple[float, str]:
    """Numbers by size, "inf" behind them, other text by name."""
    try:
        return float(x), ""
    except (TypeError, ValueError):
        return float("inf"), str(x)


def samples(records: Sequence[Record], name: str, **cell: Any) -> list[float]:
    """The samples of all repeats of the cells that say so, in the order of the repeats."""
    chosen = [r for r in records if all(r["cell"].get(key) == value for key, value in cell.items())]
    return [x for record in sorted(chosen, key=lambda r: r["cell"].get("repeat", 0)) for x in record["samples"].get(name, [])]


def times(value: float) -> str:
    """1.234 -> '1.23 times'."""
    return f"{value:.2f} times" if value < 10 else f"{value:.0f} times"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


# --------------------------------------------------------------------------------------------------------------------------- the program


def define_flags() -> None:
    """Called once, by the program."""
    flags.DEFINE_bool("quick", False, "Small sizes: whether everything works, and a first impression.")
    flags.DEFINE_bool("full", False, "The sizes of the study.")
    flags.DEFINE_string(
        "output_dir", None, f"Where results go, a directory an experiment; default: {OUTPUT_DIRS[True]} or {OUTPUT_DIRS[False]}."
    )


def asked() -> tuple[bool, pathlib.Path]:
    """--quick or --full, and the directory. Raises SpecError."""
    values = flags.FLAGS
    if values.quick == values.full:
        raise SpecError("give either --quick (minutes) or --full (the study)")
    return values.quick, pathlib.Path(values.output_dir or OUTPUT_DIRS[values.quick])


def main(*experiments: Experiment) -> None:
    """Runs experiments as a program: exit code 1 when a cell failed, 2 for bad input, 130 on Ctrl-C."""

    def run(argv: list[str]) -> None:
        with answered():
            console = Printer(160)
            if len(argv) > 1:
                raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
            compilation.apply_flag()
            quick, output_dir = asked()
            bench = Bench()
            failed = [r for e in chosen(experiments) for r in perform(e, quick, output_dir, console, bench) if r["outcome"] == "failed"]
        if failed:
            sys.exit(1)

    define_flags()
    compilation.define_flag()
    if len(experiments) > 1:
        names = ", ".join(e.name for e in experiments)
        flags.DEFINE_list("only", None, f"Some of the experiments, separated by commas: {names}.")
    logging.set_verbosity(logging.WARNING)
    start(run)


def chosen(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Those of --only. Raises SpecError for one that does not exist."""
    if len(experiments) == 1 or flags.FLAGS.only is None:
        return list(experiments)
    by_name = {experiment.name: experiment for experiment in experiments}
    if unknown := [name for name in flags.FLAGS.only if name not in by_name]:
        raise SpecError(f"--only={unknown[0]}: no such experiment; choose from {', '.join(by_name)}")
    return [by_name[name] for name in flags.FLAGS.only]
