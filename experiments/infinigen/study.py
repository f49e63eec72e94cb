"""The frame of the ablations: a declared list of cases, measured, drawn over one number, and summed up in a sentence or two.

    python -m experiments.infinigen.alpha
    python -m experiments.infinigen.alpha --num_prompts=8 --output_dir=runs/alpha

Every ablation is a script of its own: skew, partial, columns, alpha, group, budget, pool, layers. They share records.jsonl in --output_dir;
what it holds under the same settings is not measured again. Each writes a figure (PNG and SVG) and a table in Markdown under its own name.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, logging
from rich.console import Console

from experiments.infinigen import quality
from experiments.infinigen.quality import Bench, Record
from kvjax.cache import InfiniGen, Strategy, tokens
from kvjax.files import replace

OUTPUT_DIR = "experiments/results/ablations_cpu"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which the colour-blind can tell apart."""

MARKERS = "osD^vP"
LEAST_KLD = 1e-5
"""What a figure shows; below it is rounding."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy and where it stands in the figure.

    Attributes:
      fed: only the first fifth of a document goes in as a prompt; the rest is decoded, token by token. A pool is a fraction of the
        document all the same.
    """

    series: str
    x: float
    policy: InfiniGen
    fed: bool = False

    def strategy(self, input_len: int) -> Strategy:
        policy = self.policy
        if self.fed and policy.pool is not None:
            policy = dataclasses.replace(policy, pool=tokens(policy.pool, input_len))
        return quality.strategy_of(policy)


Points = dict[tuple[str, float], Record]


@dataclasses.dataclass(frozen=True)
class Study:
    """An ablation.

    Attributes:
      axis: what x is.
      legend: what the series are.
      findings: sentences, computed from the records by (series, x).
    """

    name: str
    title: str
    axis: str
    legend: str
    cases: tuple[Case, ...]
    findings: Callable[[Points], list[str]]


COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("task_recall", "recall (%)", "{:.1f}", 100),
    ("fidelity_kld_mean", "KLD mean (nats)", "{:.4f}", 1),
    ("fidelity_kld_p99.9", "KLD 99.9 %", "{:.2f}", 1),
    ("fidelity_same_top1", "same top token (%)", "{:.2f}", 100),
    ("kv_wanted_fraction_speculating", "wanted, guessing layers (%)", "{:.1f}", 100),
    ("kv_fetched_fraction_speculating", "fetched, guessing layers (%)", "{:.1f}", 100),
    ("kv_fetched_fraction", "fetched, all layers (%)", "{:.1f}", 100),
    ("speculation_precision", "precision (%)", "{:.1f}", 100),
    ("speculation_recall", "recall of the top (%)", "{:.1f}", 100),
    ("speculation_mass_covered", "mass covered (%)", "{:.1f}", 100),
)


def main(study: Study) -> None:
    """Runs a study as a program."""

    def run(argv: list[str]) -> None:
        del argv
        perform(study, *quality.settings(), Console(width=160))

    quality.define_flags(OUTPUT_DIR, num_prompts=16)
    logging.set_verbosity(logging.WARNING)
    app.run(run)


def perform(study: Study, settings: quality.Settings, directory: pathlib.Path, console: Console) -> list[Record]:
    """Measures what is missing, then draws and writes what there is. Returns the records of the cases."""
    whole = Bench(settings)
    fed = Bench(dataclasses.replace(settings, prefilled=settings.input_len // 5))
    cases = [(fed if case.fed else whole, case.strategy(settings.input_len)) for case in study.cases]
    records = quality.collect(cases, directory / "records.jsonl", console)
    points = {(case.series, case.x): record for case, record in zip(study.cases, records, strict=True)}
    replace(directory / f"{study.name}.md", markdown(study, points))
    figure(study, points, directory / study.name)
    console.print(f"wrote {study.name}.md, {study.name}.png and {study.name}.svg to {directory}", highlight=False)
    for sentence in study.findings(points):
        console.print(sentence, highlight=False)
    return records


def markdown(study: Study, points: Points) -> str:
    """The table and the sentences."""
    first = next(iter(points.values()))
    shown = [column for column in COLUMNS if any(column[0] in r for r in points.values())]
    heads = [study.legend, study.axis, *(label for _, label, _, _ in shown)]
    lines = [f"# {study.title}", "", about(first), "", *study.findings(points), ""]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for (series, x), record in points.items():
        endless = {"speculation_recall"} if "alpha=inf" in record["strategy"] else set()  # its top is everything
        cells = [pattern.format(scale * record[key]) if key in record.keys() - endless else "-" for key, _, pattern, scale in shown]
        lines.append("| " + " | ".join([series, f"{x:g}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def about(record: Record) -> str:
    """What the documents of a record are, in a sentence."""
    s = record["settings"]
    return (
        f"{record['model_id']} ({record['dtype']}), {s['num_prompts']} documents of {s['input_len']} tokens with {s['num_facts']} facts, "
        f"teacher-forced; fidelity is against the full cache on the same tokens."
    )


def figure(study: Study, points: Points, path: pathlib.Path) -> None:
    """Recall, divergence, what is read and what attention that covers, over the study's number; one line a series."""
    guessed = any("speculation_mass_covered" in r for r in points.values())
    fig, axes = plt.subplots(1, 4 if guessed else 3, figsize=(15 if guessed else 12, 3.7), layout="constrained")
    series = list(dict.fromkeys(name for name, _ in points))
    finite = [x for _, x in points if math.isfinite(x)]
    beyond = max(finite) + 0.15 * (max(finite) - min(finite))  # where infinity stands
    for name, colour, marker in zip(series, COLOURS, MARKERS, strict=False):
        mine = sorted((x, r) for (s, x), r in points.items() if s == name)
        x = [min(value, beyond) for value, _ in mine]
        found = [r for _, r in mine]
        style: dict[str, Any] = dict(color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=name)
        recalls = [100 * r["task_recall"] for r in found]
        ranges = [quality.recall_interval(r) for r in found]
        errors = [[max(0, m - 100 * low) for m, (low, _) in zip(recalls, ranges, strict=True)]]
        errors.append([max(0, 100 * high - m) for m, (_, high) in zip(recalls, ranges, strict=True)])
        axes[0].errorbar(x, recalls, errors, capsize=2, elinewidth=0.8, **style)
        divergence = [max(r["fidelity_kld_mean"], LEAST_KLD / 10) for r in found]
        axes[1].errorbar(x, divergence, [quality.Z * r["fidelity_kld_mean_se"] for r in found], capsize=2, elinewidth=0.8, **style)
        axes[2].plot(x, [100 * r["kv_wanted_fraction_speculating"] for r in found], **style)
        if guessed:
            axes[3].plot(x, [100 * r.get("speculation_mass_covered", math.nan) for r in found], **style)
    axes[0].set(ylabel="facts recalled (%)")
    axes[1].set(ylabel="KLD to the full cache (nats)", yscale="log")
    axes[1].set_ylim(bottom=max(axes[1].get_ylim()[0], LEAST_KLD))
    axes[2].set(ylabel="tokens read, guessing layers (%)", ylim=(0, None))
    if guessed:
        axes[3].set(ylabel="true attention covered (%)", ylim=(None, 104))
    for axis in axes:
        axis.set(xlabel=study.axis)
        axis.grid(alpha=0.3)
        if any(math.isinf(x) for _, x in points):
            ticks = sorted(set(finite))
            axis.set_xticks([*ticks, beyond], [*(f"{tick:g}" for tick in ticks), "∞"])
    if len(series) > 1:
        axes[0].legend(fontsize=8, title=study.legend, title_fontsize=8)
    fig.suptitle(study.title, fontsize=10)
    save(fig, path)


def save(fig, path: pathlib.Path) -> None:
    """As PNG and as SVG."""
    fig.savefig(path.with_suffix(".png"), dpi=150)
    fig.savefig(path.with_suffix(".svg"))
    plt.close(fig)


def best(points: Points, series: Sequence[str], key: str = "fidelity_kld_mean") -> dict[float, str]:
    """Which series has the least of `key`, for every x they share."""
    shared = set.intersection(*({x for s, x in points if s == name} for name in series))
    return {x: min(series, key=lambda name: points[name, x][key]) for x in sorted(shared)}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
