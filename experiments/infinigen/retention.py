"""What is remembered: recall by the depth of the fact, for every strategy, at matched budgets.

    python -m experiments.infinigen.retention
    python -m experiments.infinigen.retention --num_prompts=8 --output_dir=runs/retention

A budget is a share of the prompt: what streaming and h2o keep, what infinigen reads at most in the layers that guess, what oracle_topk
reads exactly. "infinigen, 1 token" is a control: its layers that guess read one token and the newest, so what it recalls is the work of
the layers that read everything.

Writes records.jsonl (a record per strategy, as they are done), recall.png and .svg (by depth), budgets.png and .svg (over the budget, and
over what is really read), and retention.md. What is recorded under the same settings is not measured again.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, logging
from rich.console import Console

from experiments.infinigen import quality
from experiments.infinigen.quality import Bench, Record, kept_share, recall_interval, wilson
from experiments.infinigen.study import about, percent, save
from kvjax.cache import H2O, Full, InfiniGenPaper, OracleTopK, Policy, Strategy, Streaming
from kvjax.files import replace

OUTPUT_DIR = "experiments/results/retention_cpu"
BUDGETS = (0.05, 0.1, 0.2, 0.4)
ALSO = 0.6
"""A budget for those that evict: about what infinigen reads of a small model, its full layers counted."""

LIMITED: dict[str, Policy] = {
    "streaming": Streaming(),
    "h2o": H2O(),
    "infinigen": InfiniGenPaper(),
    "infinigen, 1 full layer": InfiniGenPaper(full_layers=1),
    "oracle_topk": OracleTopK(),
}
STYLES = {
    "full": ("#000000", "", "-"),
    "offload": ("#56B4E9", "x", ":"),
    "streaming": ("#E69F00", "v", "-"),
    "h2o": ("#D55E00", "s", "-"),
    "infinigen": ("#0072B2", "o", "-"),
    "infinigen, 1 full layer": ("#CC79A7", "P", "--"),
    "infinigen, 1 token": ("#000000", "X", ""),
    "oracle_topk": ("#009E73", "D", "--"),
}
"""Colour (Okabe and Ito's), marker, line."""

BY_DEPTH = ("full", "offload", "streaming", "h2o", "infinigen", "oracle_topk")

Found = dict[tuple[str, float], Record]


def cases() -> dict[tuple[str, float], Strategy]:
    """By name and budget; what has no budget stands at 1."""
    found = {("full", 1.0): quality.strategy_of(Full()), ("offload", 1.0): quality.strategy_of(Full(), offloaded=True)}
    found["infinigen, 1 token", 1.0] = quality.strategy_of(InfiniGenPaper(budget=1))
    for name, policy in LIMITED.items():
        budgets = (*BUDGETS, ALSO) if name in ("streaming", "h2o") else BUDGETS
        found |= {(name, budget): quality.strategy_of(policy.with_budget(budget)) for budget in budgets}
    return found


def perform(settings: quality.Settings, directory: pathlib.Path, console: Console) -> Found:
    """Measures what is missing, then draws and writes what there is."""
    wanted, bench = cases(), Bench(settings)
    records = quality.collect([(bench, strategy) for strategy in wanted.values()], directory / "records.jsonl", console)
    found = dict(zip(wanted, records, strict=True))
    replace(directory / "retention.md", markdown(found))
    by_depth(found, directory / "recall")
    by_budget(found, directory / "budgets")
    console.print(f"wrote records.jsonl, retention.md, recall and budgets (.png and .svg) to {directory}", highlight=False)
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    return found


def findings(found: Found) -> list[str]:
    """What the records say about the claim that infinigen keeps what eviction loses."""
    full = found["full", 1.0]
    shares = {key: kept_share(record, full) for key, record in found.items()}
    told = []
    bar = {name: shares[name, 0.2] for name in ("infinigen", "h2o", "streaming")}
    verdicts = ", ".join(f"{name} {percent(value)} ({percent(low)} to {percent(high)})" for name, (value, low, high) in bar.items())
    met, other = bar["infinigen"][0] >= 0.95, bar["h2o"][0] < 0.95
    told.append(
        f"At 20 % of the prompt, of the full cache's recall ({percent(full['task_recall'])}) there is left: {verdicts}. InfiniGen "
        f"{'keeps' if met else 'does not keep'} 95 % of it, h2o {'does not' if other else 'does too'}."
    )
    told.append(
        f"InfiniGen keeps 95 % of the full recall {_reach(shares, 'infinigen')}; exact top-k, the bound, {_reach(shares, 'oracle_topk')}."
    )
    mine = found["infinigen", 0.2]
    told.append(
        f"A budget counts for the layers that guess alone. At 20 % they want {percent(mine['kv_wanted_fraction_speculating'])} of what is "
        f"held and fetch {percent(mine['kv_fetched_fraction_speculating'])}; with the {_full_layers(mine)} layers that read everything it "
        f"is {percent(mine['kv_wanted_fraction'])} and {percent(mine['kv_fetched_fraction'])} of all."
    )
    evicting = sorted(key for key in found if key[0] == "h2o")
    fair = next((key for key in evicting if found[key]["read_fraction"] >= mine["read_fraction"]), evicting[-1])
    one = found["infinigen, 1 full layer", 0.2]
    told.append(
        f"Over all layers, full ones counted: h2o at {percent(fair[1])} reads {percent(found[fair]['read_fraction'])} and recalls "
        f"{percent(found[fair]['task_recall'])}, infinigen at 20 % reads {percent(mine['read_fraction'])} and recalls "
        f"{percent(mine['task_recall'])}; with one full layer in place of two it reads {percent(one['read_fraction'])} and recalls "
        f"{percent(one['task_recall'])}."
    )
    control, lowest = found["infinigen, 1 token", 1.0], found["infinigen", min(BUDGETS)]
    share, low, high = shares["infinigen, 1 token", 1.0]
    where = "in the layers that read everything" if share >= 0.95 else "in the layers that guess as well"
    told.append(
        f"The control, whose guessing layers read one token and the newest, keeps {percent(share)} ({percent(low)} to {percent(high)}) of "
        f"the recall, at a divergence of {control['fidelity_kld_mean']:.4f} nats ({lowest['fidelity_kld_mean']:.4f} at "
        f"{percent(min(BUDGETS))}): this model looks facts up {where}."
    )
    return told


def markdown(found: Found) -> str:
    """Sentences, recall by depth, and what is read."""
    full = found["full", 1.0]
    depths, count = full["depths"], len(full["answered"])
    lines = ["# Recall by the depth of the fact, at matched budgets", "", about(full)]
    lines += [f"Every depth is asked about {count} times. Intervals are 95 %: Wilson's at a depth, documents resampled over all.", ""]
    for sentence in findings(found):
        lines += [sentence, ""]
    heads = ["strategy", "budget", *(f"{depth:.2f}" for depth in depths), "all (interval)", "of the full cache's (interval)"]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for (name, budget), record in found.items():
        low, high = recall_interval(record)
        share, least, most = kept_share(record, full)
        cells = [f"{100 * record[f'task_recall_depth_{depth:g}']:.0f}" for depth in depths]
        cells += [f"{100 * record['task_recall']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]
        cells += [f"{100 * share:.1f} ({100 * least:.1f} to {100 * most:.1f})"]
        lines.append("| " + " | ".join([name, "-" if budget == 1 else f"{100 * budget:g} %", *cells]) + " |")
    lines += ["", "Shares in %, of the tokens held: attended to over all layers; wanted and fetched by the layers that guess.", ""]
    heads = ["strategy", "budget", "attended, all layers", "wanted, guessing", "fetched, guessing", "fetched, all layers"]
    heads += ["KLD mean (nats)", "same top token (%)"]
    guessed = [key for key in ("speculation_precision", "speculation_recall", "speculation_mass_covered") if key in found["infinigen", 0.2]]
    heads += [key.replace("_", " ") + " (%)" for key in guessed]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    keys = ("read_fraction", "kv_wanted_fraction_speculating", "kv_fetched_fraction_speculating", "kv_fetched_fraction")
    for (name, budget), record in found.items():
        cells = [f"{100 * record[key]:.1f}" if key in record else "-" for key in keys]
        cells += [f"{record['fidelity_kld_mean']:.4f} ± {record['fidelity_kld_mean_se']:.4f}", f"{100 * record['fidelity_same_top1']:.1f}"]
        cells += [f"{100 * record[key]:.1f}" if key in record else "-" for key in guessed]
        lines.append("| " + " | ".join([name, "-" if budget == 1 else f"{100 * budget:g} %", *cells]) + " |")
    return "\n".join(lines) + "\n"


def by_depth(found: Found, path: pathlib.Path) -> None:
    """Recall against depth, a panel a budget."""
    fig, axes = plt.subplots(1, len(BUDGETS), figsize=(4 * len(BUDGETS), 4), sharey=True, layout="constrained")
    for axis, budget in zip(axes, BUDGETS, strict=True):
        for rank, name in enumerate(BY_DEPTH):
            record = found.get((name, budget)) or found[name, 1.0]
            depths, count = record["depths"], len(record["answered"])
            shares = [record[f"task_recall_depth_{depth:g}"] for depth in depths]
            moved = [depth + 0.006 * (rank - len(BY_DEPTH) / 2) for depth in depths]  # so that lines which coincide can be told apart
            ranges = [wilson(share * count, count) for share in shares]
            _line(axis, name, moved, shares, ranges)
        axis.set(xlabel="depth of the fact (0: start of the prompt)", title=f"budget {100 * budget:g} %", ylim=(-4, 104))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="facts recalled (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BY_DEPTH), fontsize=9)
    fig.suptitle(_title(found), fontsize=10)
    save(fig, path)


def by_budget(found: Found, path: pathlib.Path) -> None:
    """Recall against the budget, and against what a step really attends to."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name in LIMITED:
        mine = sorted((budget, record) for (other, budget), record in found.items() if other == name)
        shares, ranges = [r["task_recall"] for _, r in mine], [recall_interval(r) for _, r in mine]
        _line(axes[0], name, [100 * budget for budget, _ in mine], shares, ranges)
        _line(axes[1], name, [100 * r["read_fraction"] for _, r in mine], shares, ranges)
    control = found["infinigen, 1 token", 1.0]
    _line(axes[1], "infinigen, 1 token", [100 * control["read_fraction"]], [control["task_recall"]], [recall_interval(control)])
    full = 100 * found["full", 1.0]["task_recall"]
    for axis in axes:
        axis.axhline(full, color="black", linewidth=1, label="full")
        axis.axhline(0.95 * full, color="black", linewidth=0.8, linestyle=":", label="95 % of full")
        axis.set(ylim=(-4, 104), xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="budget: kept, or read at most (% of the prompt)", ylabel="facts recalled (%)")
    axes[1].set(xlabel="attended to, mean over all layers (% of the tokens held)")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    fig.suptitle(_title(found), fontsize=10)
    save(fig, path)


def _line(axis: Any, name: str, x: Sequence[float], shares: Sequence[float], ranges: Sequence[tuple[float, float]]) -> None:
    colour, marker, line = STYLES[name]
    above = name == "oracle_topk"  # on infinigen's line, which is to be seen inside
    shape: dict[str, Any] = dict(fillstyle="none", markersize=9) if above else dict(markersize=5)
    errors = [[100 * max(0.0, s - low) for s, (low, _) in zip(shares, ranges, strict=True)]]
    errors.append([100 * max(0.0, high - s) for s, (_, high) in zip(shares, ranges, strict=True)])
    axis.errorbar(
        x, [100 * s for s in shares], errors, color=colour, marker=marker or None, linestyle=line, label=name, linewidth=1.4, capsize=2,
        elinewidth=0.7, alpha=0.9, **shape,
    )  # fmt: skip


def _reach(shares: dict[tuple[str, float], tuple[float, float, float]], name: str) -> str:
    reached = [budget for budget in BUDGETS if shares[name, budget][0] >= 0.95]
    return f"from {percent(min(reached))} on" if reached else "at no budget measured"


def _full_layers(record: Record) -> int:
    return sum(record[key] >= 0.999 for key in record if key.startswith("kv_wanted_fraction_layer_"))


def _title(found: Found) -> str:
    record = found["full", 1.0]
    s = record["settings"]
    return f"{record['model_id']}: {s['num_prompts']} prompts of {s['input_len']} tokens, {s['num_facts']} facts each; bars are 95 %"


def main(argv: list[str]) -> None:
    del argv
    perform(*quality.settings(), Console(width=160))


if __name__ == "__main__":
    quality.define_flags(OUTPUT_DIR, num_prompts=48)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
