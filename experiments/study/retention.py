"""Recall by the depth of the fact: what a strategy remembers of the beginning, the middle and the end of a prompt.

    python -m experiments.study.retention --quick

Teacher-forced and not timed (kvjax.quality.forced). More budgets, controls and intervals: python -m experiments.infinigen.retention
"""

from collections.abc import Sequence

from experiments.study.frame import Experiment, Figure, budgeted, main, samples, unique
from kvjax.report.figures import Panel
from kvjax.report.statistics import paired
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Quality

DEPTH = "task_recall_depth_"
SHARE = Panel("share", "facts recalled (%)", "linear", "more", factor=100)


def cells(
    model: str, strategies: Sequence[str], budgets: Sequence[float], num_prompts: int, batch_size: int, input_len: int, num_facts: int
) -> list[Cell]:
    points: list[tuple[str, float | None]] = [(name, None) for name in strategies if budgeted(name, 1.0) is None]
    points += [(name, budget) for name in strategies if budgeted(name, 1.0) is not None for budget in budgets]
    return [
        Quality(name, model, budget, num_prompts=num_prompts, batch_size=batch_size, input_len=input_len, num_facts=num_facts).cell()
        for name, budget in points
    ]


def by_depth(records: Sequence[Record]) -> list[Record]:
    """A row for every depth of every record."""
    rows = []
    for record in records:
        depths = [key for key in record if key.startswith(DEPTH)]
        rows += [record | {"depth": float(key.removeprefix(DEPTH)), "share": record[key]} for key in depths]
    return rows


def findings(records: Sequence[Record]) -> list[str]:
    told = []
    for record in records:
        depths = sorted((float(key.removeprefix(DEPTH)), record[key]) for key in record if key.startswith(DEPTH))
        name, budget = record["cell"]["strategy"], record["cell"].get("budget")
        first, last = depths[0], depths[-1]
        told.append(
            f"{name}{f' at {budget:.0%}' if budget else ''} recalls {record['task_recall']:.1%}: {first[1]:.0%} of the facts at depth "
            f"{first[0]:g}, {last[1]:.0%} at {last[0]:g}."
        )
    full = samples(records, "recall", strategy="full")
    for name, budget in unique((r["cell"]["strategy"], r["cell"].get("budget")) for r in records):
        theirs = samples(records, "recall", strategy=name, budget=budget)
        if name in ("h2o", "infinigen") and len(theirs) == len(full) > 1:
            verdict = paired(theirs, full).verdict((f"{name} at {budget:.0%}", "the full cache"), "more")
            told.append(f"Recall prompt by prompt: {verdict}.")
    return told


EXPERIMENT = Experiment(
    name="retention",
    title="Recall by the depth of the fact",
    question="What does a strategy remember of the beginning, the middle and the end of a prompt?",
    quick=dict(
        model="kvjax-1m", strategies=("full", "streaming", "h2o", "infinigen"), budgets=(0.2,), num_prompts=8, batch_size=8, input_len=256,
        num_facts=8,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "streaming", "h2o", "infinigen", "oracle_topk"), budgets=(0.1, 0.2, 0.4), num_prompts=48,
        batch_size=24, input_len=952, num_facts=8,
    ),
    cells=cells,
    figures=(
        Figure(
            "retention", "Facts recalled by where they stand in the prompt",
            "Facts at even depths of a prompt, all asked at its end; a budget is a share of the prompt. Teacher-forced.",
            "depth", "depth of the fact (0: start of the prompt)", (SHARE,), rows=by_depth,
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
