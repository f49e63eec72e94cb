"""The findings of arXiv:2604.05012 against the records of a study, claim by claim: STUDY.md.

    python -m experiments.paper --results=experiments/results/study_cpu
    python -m experiments.paper --run --quick
    python -m experiments.paper --run --full --results=runs/study

With --run the study is measured first, in this process; what is there already is not measured again. Verdicts, figures and
recommendations are computed from the records (experiments/claims.py); nothing in STUDY.md is written by hand.
"""

import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging
from rich.console import Console

from experiments.claims import BUDGET, CLAIMS, Claim, Evidence, Finding
from kvjax.advise import OutsideData, advise, recommendations, usual_needs
from kvjax.command import Printer, answered, start
from kvjax.errors import KvjaxError, SpecError
from kvjax.files import replace
from kvjax.models.config import preset
from kvjax.report.cells import Record, points, read_results, setting_of
from kvjax.report.fields import budget_of, identity_of
from kvjax.report.statistics import explain, regret, step_weight_bytes

FLAGS = flags.FLAGS
FAILED = 1
PAPER = "arXiv:2604.05012"


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("results", None, "Directory of the results; default: that of the study, by --quick or --full.")
    flags.DEFINE_bool("run", False, "Measure the study first (with --quick or --full).")
    flags.DEFINE_bool("quick", False, "Small sizes: whether everything works.")
    flags.DEFINE_bool("full", False, "The sizes of the study.")


def write(directory: pathlib.Path) -> pathlib.Path:
    """Writes STUDY.md from the records under a results directory. Raises InputError where there are none."""
    records = read_results(directory)
    path = directory / "STUDY.md"
    replace(path, document(records, abouts(directory), directory))
    return path


def abouts(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What the about.json of every experiment says, by name."""
    found = {}
    for file in sorted(directory.glob("*/about.json")):
        try:
            found[file.parent.name] = json.loads(file.read_text("utf-8"))
        except json.JSONDecodeError:
            raise SpecError(f"{file} is not JSON; run its experiment again, it is written anew") from None
    return found


def document(records: Sequence[Record], about: dict[str, dict[str, Any]], directory: pathlib.Path) -> str:
    """STUDY.md."""
    evidence = Evidence(records)
    tested = [(claim, claim.test(evidence)) for claim in CLAIMS]
    lines = [f"# The findings of {PAPER}, tested", "", *introduction(records, about), ""]
    lines += ["| claim | verdict here |", "| --- | --- |"]
    lines += [f"| {claim.title} | **{finding.verdict}** |" for claim, finding in tested]
    lines += ["", "## Claim by claim", ""]
    for claim, finding in tested:
        lines += section(claim, finding, about, directory)
    lines += ["## When each is best", "", *best_when(records), ""]
    lines += ["## What choosing better could gain", "", *regrets(records), ""]
    lines += ["## Speedups and the bytes behind them", "", *speedups(records), ""]
    if about:
        lines += ["## The experiments", "", *experiments(about, directory)]
    lines += ["## Make it again", "", *commands(about)]
    return "\n".join(lines).rstrip() + "\n"


def introduction(records: Sequence[Record], about: dict[str, dict[str, Any]]) -> list[str]:
    """Where the figures come from."""
    done = [r for r in records if r.get("outcome", "done") == "done"]
    places = dict.fromkeys(f"{r.get('device_kind')}, {r.get('cpu_count')} processors" for r in done)
    models = dict.fromkeys(str(r.get("model_id")) for r in done)
    commits = dict.fromkeys(str(r.get("git_commit")) for r in done if r.get("git_commit"))
    said = f"{len(done)} cells measured on {'; '.join(places)}, with {', '.join(models)}"
    if commits:
        said += f" (commit {', '.join(commits)})"
    lost = [r for r in records if r.get("outcome", "done") != "done"]
    if lost:
        said += f"; {sum(r['outcome'] == 'infeasible' for r in lost)} more do not fit, {sum(r['outcome'] == 'failed' for r in lost)} failed"
    lines = [f"{said}. Verdicts are decided by code from the intervals (95 %, paired, bootstrap): confirmed or refuted where an interval"]
    lines += [
        "leaves no doubt, undecided otherwise. What was measured here is speed, bytes and answers of this code on this machine; it is no"
    ]
    lines += ["repetition of the paper's experiment on its hardware."]
    if any(one.get("quick") for one in about.values()):
        lines += ["", "**Made with --quick: small sizes that show that everything works. Verdicts here mean little.**"]
    return lines


def section(claim: Claim, finding: Finding, about: dict[str, dict[str, Any]], directory: pathlib.Path) -> list[str]:
    lines = [f"### {claim.title}: {finding.verdict}", ""]
    lines += [f"The paper: {claim.says}", "", f"Here: {finding.text}", ""]
    if finding.experiments:
        lines += [f"Tested by: {', '.join(finding.experiments)}.", ""]
    lines += [f"What these data cannot tell: {claim.cannot}", ""]
    return lines + picture(claim.shown if claim.shown in about else next(iter(finding.experiments), ""), about, directory)


def picture(name: str, about: dict[str, dict[str, Any]], directory: pathlib.Path, which: slice = slice(0, 1)) -> list[str]:
    """Figures of an experiment that are there."""
    lines = []
    for figure in about.get(name, {}).get("figures", [])[which]:
        files = [file for key in ("file", "png") if (file := figure.get(key)) and (directory / name / file).exists()]
        if files:
            lines += [f"![{figure.get('caption', name)}]({name}/{files[0]})", ""]
    return lines


def best_when(records: Sequence[Record]) -> list[str]:
    """The recommendations, how to set what they name, and where they change."""
    lines = [
        "From the records, by `python -m kvjax.advise`. Rows without a rate are about whole batches, offline.", "",
        *recommendations(records).splitlines(), "",
    ]  # fmt: skip
    settings: dict[str, None] = {}
    changes: dict[str, None] = {}
    for label, needs in usual_needs(records):
        try:
            found = advise(records, needs)
        except OutsideData:
            continue
        if found.command:
            settings[found.command] = None
        mine = [change for change in found.crossovers if found.strategy in (change.before, change.after)]
        changes |= dict.fromkeys(f"{label}: {change.sentence()}" for change in mine)
    if settings:
        lines += ["To run them as measured:", "", "```", *settings, "```", ""]
    if changes:
        lines += ["What would change these answers, one need moved at a time:", "", *(f"- {change}" for change in changes)]
    return lines


def regrets(records: Sequence[Record]) -> list[str]:
    """What every strategy loses to the exact top k of the same budget, in recall and divergence."""
    offline = [r for r in records if "max_num_seqs" not in r]
    rows = [("facts recalled", 100, "points", one) for one in regret(offline, "recall")]
    rows += [("divergence", 1, "nats", one) for one in regret(offline, "kld")]
    if not rows:
        return ["No oracle_topk stands beside another strategy of its budget."]
    lines = ["Loss to `oracle_topk`, which reads the truly most attended tokens of the same budget, prompt by prompt (95 % interval):", ""]
    lines += ["| experiment | strategy | budget | in | loss | |", "| --- | --- | ---: | --- | ---: | --- |"]
    for what, scale, unit, one in rows:
        loss = one.loss
        interval = f"{scale * loss.mean:.3g} {unit} ({scale * loss.low:.3g} to {scale * loss.high:.3g})"
        told = "" if loss.distinguishable else "not distinguishable"
        where = f"{one.setting.get('sweep')}, {one.setting.get('input_len')} tokens"
        lines.append(f"| {where} | `{one.strategy}` | {one.budget:g} | {what} | {interval} | {told} |")
    return lines


def speedups(records: Sequence[Record]) -> list[str]:
    """Measured speedups over the full cache at the same batch, beside what the bytes account for."""
    joined = _offline(records)
    full = {(r["sweep"], setting_of(r)): r for r in joined if identity_of(r).family == "full"}
    lines = []
    for record in joined:
        baseline = full.get((record["sweep"], setting_of(record)))
        if baseline is None or baseline is record or budget_of(record) not in (None, BUDGET):
            continue
        try:
            weights = step_weight_bytes(preset(record["model_id"]), record["dtype"])
            found = explain(record, baseline, weights)
        except (KvjaxError, KeyError, ZeroDivisionError):
            continue
        place = f"{record['sweep']}: {record['model_id']}, batch {record['batch_size']}, {record['input_len']} tokens"
        place += f", {case}" if (case := record.get("cell", {}).get("case")) else ""
        faster = min(found.computed_speedup, found.measured_speedup) > 1
        share = ""
        if faster and found.explained is not None:
            share = "all, and more was to be had" if found.explained > 1 else f"{100 * found.explained:.0f} %"
        lines.append(
            f"| {place} | `{record['strategy']}` | {found.computed.weights / 2**20:.2f} + {found.computed.cache / 2**20:.2f} | "
            f"{found.computed_speedup:.2f} | {found.measured_speedup:.2f} | {share} |"
        )
    if not lines:
        return ["No offline record stands beside the full cache at the same batch."]
    heads = [
        "where",
        "strategy",
        "MiB a token, weights + cache (computed)",
        "speedup by bytes (computed)",
        "TPOT speedup (measured)",
        "bytes account for",
    ]
    return [
        "Time per token over the full cache's, and what reading fewer bytes would give if nothing else took time. Weights are read once a",
        "step and shared by its rows. Times are medians over repeats; what bytes do not explain is arithmetic and overhead.",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *lines,
    ]


def _offline(records: Iterable[Record]) -> list[Record]:
    """What was timed offline, a record a cell: the first repeat's with the median time per token of all."""
    keys = ("mean_tpot_ms", "kv_bytes_read_per_token", "batch_size")
    timed = [r for r in records if "max_num_seqs" not in r and all(r.get(key) for key in keys)]
    return [
        {**point.records[0], "mean_tpot_ms": statistics.median(record["mean_tpot_ms"] for record in point.records)}
        for point in points(timed)
    ]


def experiments(about: dict[str, dict[str, Any]], directory: pathlib.Path) -> list[str]:
    lines = []
    for name, one in about.items():
        lines += [f"### {one.get('title', name)}", "", one.get("question", ""), ""]
        lines += [f"- {sentence}" for sentence in one.get("findings", [])]
        lines += ["", *picture(name, about, directory, slice(None))]
        if one.get("command"):
            lines += [f"    {one['command']}", ""]
    return lines


def commands(about: dict[str, dict[str, Any]]) -> list[str]:
    size = "--quick" if any(one.get("quick") for one in about.values()) else "--full"
    return [
        f"    python -m experiments.paper --run {size}",
        "    python -m experiments.paper --results=DIR    # from records that are there",
    ]


# --------------------------------------------------------------------------------------------------------------------------- the program


def measure(quick: bool, directory: pathlib.Path, console: Console) -> bool:
    """Runs the study into a directory; whether every cell that fits was measured."""
    from experiments.study.__main__ import EXPERIMENTS
    from experiments.study.frame import perform
    from kvjax.sweep.measures import Bench

    bench, whole = Bench(), True
    for experiment in EXPERIMENTS:
        found = perform(experiment, quick, directory, console, bench)
        whole &= all(record["outcome"] != "failed" for record in found)
    return whole


def run(console: Console) -> bool:
    if FLAGS.run and FLAGS.quick == FLAGS.full:
        raise SpecError("--run takes either --quick (minutes) or --full (the study)")
    if not FLAGS.run and (FLAGS.quick or FLAGS.full):
        raise SpecError("--quick and --full say how much to measure; add --run, or leave them out")
    directory = pathlib.Path(FLAGS.results or ("runs/study" if FLAGS.quick else "experiments/results/study_cpu"))
    whole = measure(FLAGS.quick, directory, console) if FLAGS.run else True
    path = write(directory)
    console.print(f"wrote {path}", highlight=False)
    evidence = Evidence(read_results(directory))
    for claim in CLAIMS:
        console.print(f"  {claim.title}: {claim.test(evidence).verdict}", highlight=False)
    return whole


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        whole = run(Printer(160))
    if not whole:
        sys.exit(FAILED)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
