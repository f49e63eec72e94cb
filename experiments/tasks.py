"""Tasks on a real model: what the full cache can do at each length, and what strategies lose where it can.

    python -m experiments.tasks --part=gate
    python -m experiments.tasks --part=strategies --infinigen=infinigen
    python -m experiments.tasks --part=report

A block is a few prompts of one task, length and way of asking, with a seed of their own; all strategies answer it from
one prefill. What is complete stands in records.jsonl, a line a block and strategy, and is not done again: the same
command goes on where it was stopped, and more --examples add to what is there. `report` writes TASKS.md and tasks.png
from the records alone; the other parts end with it.

The gate comes first: strategies are put to the tasks that the full cache does at least half of, at that length.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from matplotlib.figure import Figure

from kvjax import calibrate, compilation
from kvjax.cache import Strategy, parse_strategy, split_specs
from kvjax.command import Printer, answered, start
from kvjax.errors import InputError, SpecError
from kvjax.files import replace
from kvjax.lock import locked
from kvjax.models import load_model
from kvjax.quality import asked
from kvjax.quality.paired import Interval, difference, interval
from kvjax.quality.tasks import Query, Task, parse_tasks
from kvjax.report.record import model_fields, setting
from kvjax.report.tasks import signed, whole
from kvjax.sweep import log

FLAGS = flags.FLAGS

PARTS = ("gate", "strategies", "report")
TASKS = (
    "niah_single(haystack=repeat),niah_single,niah_multikey,niah_multivalue,kv,vt,vt(hops=1),cwe,cwe(common=1),fwe,fwe(asked=1),prose,code"
)
STRATEGIES = "h2o(heavy=0.1,recent=0.1),streaming(sinks=4,window=0.2),oracle_topk(k=0.2)"
RECORDS, REPORT, PLOT = "records.jsonl", "TASKS.md", "tasks.png"
TOKENS_AT_A_TIME = 8192  # of prompts, so that a batch of long ones is not too large
MOST_ROWS = 4

Record = dict[str, Any]


def define_flags() -> None:
    """Called once, when this module is the program."""
    compilation.define_flag()
    flags.DEFINE_enum("part", "gate", PARTS, "gate: the full cache; strategies: all of them; report: no measurement.")
    flags.DEFINE_string("model", "smollm2-135m", "The model.")
    flags.DEFINE_string("tasks", TASKS, "Tasks, separated by commas.")
    flags.DEFINE_list("lengths", None, "Tokens of a prompt; default: 1024,2048,4096,8000 for the gate, else 1024,2048.")
    flags.DEFINE_string("strategies", STRATEGIES, "Strategies, separated by commas; the full cache always is one.")
    flags.DEFINE_string("infinigen", None, "An infinigen spec, to be one of the strategies.")
    flags.DEFINE_enum("query", "both", ["before", "after", "both"], "When strategies see a question; the gate asks after.")
    flags.DEFINE_integer("examples", 20, "Prompts of a task and length.", lower_bound=1)
    flags.DEFINE_integer("block", 4, "Prompts of a block.", lower_bound=1)
    flags.DEFINE_bool("gate", True, "Leave out tasks that the full cache has not been shown to do half of.")
    flags.DEFINE_bool("chat_template", True, "Put the model's chat template around prompts.")
    flags.DEFINE_string("output_dir", "experiments/results/tasks_cpu", "Where records and report go.")


@dataclasses.dataclass(frozen=True)
class Block:
    """A few prompts that are asked in one go; `seed` numbers the blocks of a task, length and way of asking."""

    task: Task
    length: int
    query: Query
    seed: int

    def cell(self, strategy: str) -> str:
        """What names the record of a strategy's answers."""
        template = "" if FLAGS.chat_template else " plain"
        return f"{FLAGS.model}{template} {self.task.describe()} {self.length} {self.query} {FLAGS.block} {self.seed} {strategy}"


def blocks(tasks: Sequence[Task], lengths: Sequence[int], queries: Sequence[Query]) -> list[Block]:
    """All blocks, short prompts first and tasks in turn, so that what is done early says something of all."""
    count = -(-FLAGS.examples // FLAGS.block)
    return [
        Block(task, length, query, seed)
        for length in lengths
        for seed in range(count)
        for task in tasks
        for query in queries
        if query in task.queries
    ]


def lengths() -> list[int]:
    """What --lengths says. Raises SpecError."""
    given = FLAGS.lengths or (["1024", "2048", "4096", "8000"] if FLAGS.part == "gate" else ["1024", "2048"])
    try:
        found = [int(length) for length in given]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise SpecError(f"--lengths={','.join(given)}: give numbers of tokens, such as 1024,2048")
    return found


def strategies() -> list[Strategy]:
    """The full cache and, for their part, all others."""
    specs = ["full"]
    if FLAGS.part == "strategies":
        specs += [spec for spec in split_specs(FLAGS.strategies) if spec != "full"]
        specs += [] if FLAGS.infinigen is None else [FLAGS.infinigen]
    return [parse_strategy(spec) for spec in specs]


def passing(records: Iterable[Record], tasks: Sequence[Task], length: int) -> list[Task]:
    """Tasks of which the full cache does enough, as far as there are records, or that are not scored."""
    kept = []
    for task in tasks:
        scores = [
            score
            for record in records
            if record["task"] == task.describe() and record["task_length"] == length and record["strategy"] == "full"
            for score in record.get("task_scores", ())
        ]
        if not task.metric or (scores and np.mean(scores) >= asked.GATE):
            kept.append(task)
    return kept


def measure(path: pathlib.Path, console: Printer) -> None:
    """Asks what has not been asked."""
    tasks, chosen = parse_tasks(FLAGS.tasks), strategies()
    queries: list[Query] = ["after"] if FLAGS.part == "gate" else ["before", "after"] if FLAGS.query == "both" else [FLAGS.query]
    log.mend(path)
    done = log.latest(log.read(path))
    todo: list[Block] = []
    for length in lengths():
        able = tasks
        if FLAGS.part == "strategies" and FLAGS.gate:
            able = passing(done.values(), tasks, length)
            if left := [task.describe() for task in tasks if task not in able]:
                console.print(f"{length} tokens: below the gate or not measured, left out: {', '.join(left)}", highlight=False)
        todo += blocks(able, [length], queries)
    names = [strategy.describe() for strategy in chosen]
    todo = [block for block in todo if any(block.cell(name) not in done for name in names)]
    if not todo:
        console.print(f"{path} has all of it", highlight=False)
        return
    model = load_model(FLAGS.model)
    for block in todo:
        asked.prompts(model, block.task, block.length, 1, block.seed, FLAGS.chat_template)
    calibration = calibrate.calibrate(model) if any(strategy.policy.guesses for strategy in chosen) else None
    models = {name: calibrate.calibrated(model, s, calibration) for name, s in zip(names, chosen, strict=True)}
    began = time.monotonic()
    for number, block in enumerate(todo, 1):
        missing = [(models[name], s) for name, s in zip(names, chosen, strict=True) if block.cell(name) not in done]
        outcome = asked.ask(
            missing, block.task, length=block.length, count=FLAGS.block, query=block.query, seed=block.seed,
            batch_size=max(1, min(MOST_ROWS, FLAGS.block, TOKENS_AT_A_TIME // block.length)), chat_template=FLAGS.chat_template,
        )  # fmt: skip
        for record in asked.records(outcome):
            cell = block.cell(record["strategy"])
            log.append(path, {"cell_id": cell, **setting(), **model_fields(model), **record})
        spent = time.monotonic() - began
        console.print(
            f"[{number}/{len(todo)}] {block.task.describe()}, {block.length} tokens, asked {block.query}: full cache "
            f"{'not scored' if outcome.full.score is None else f'{outcome.full.score:.2f}'}; {spent / 60:.1f} minutes, about "
            f"{spent / number * (len(todo) - number) / 60:.0f} left",
            highlight=False,
        )


@dataclasses.dataclass(frozen=True)
class Pool:
    """All blocks of a task, length and way of asking, under one strategy, paired with the full cache's.

    Attributes:
      score, loss: of a task that is scored: the score, and what it lacks of the full cache's.
      nll, nll_more, kld, same: of a task that is fed: nats per token, what they are more than the full cache's, KLD to
        it in nats, share of steps with the same likeliest token.
    """

    examples: int
    score: Interval | None = None
    loss: Interval | None = None
    nll: float | None = None
    nll_more: Interval | None = None
    kld: float | None = None
    same: float | None = None


Key = tuple[str, int, str, str]
"""Task, length, query and strategy."""


def pools(records: Iterable[Record]) -> dict[Key, Pool]:
    """Records put together."""
    records = list(records)
    full = {(r["task"], r["task_length"], r["task_query"], r["task_fingerprint"]): r for r in records if r["strategy"] == "full"}
    groups: dict[Key, list[tuple[Record, Record]]] = {}
    for record in records:
        block = record["task"], record["task_length"], record["task_query"], record["task_fingerprint"]
        if block in full:
            groups.setdefault((*block[:3], record["strategy"]), []).append((record, full[block]))
    return {key: _pool(pairs) for key, pairs in groups.items()}


def _pool(pairs: Sequence[tuple[Record, Record]]) -> Pool:
    count = sum(one["task_examples"] for one, _ in pairs)
    score = loss = nll_more = None
    if "task_scores" in pairs[0][0]:
        own, reference = (np.concatenate([pair[side]["task_scores"] for pair in pairs]) for side in (0, 1))
        score, loss = interval(own), difference(reference, own)
    if "task_nlls" not in pairs[0][0]:
        return Pool(count, score, loss)
    own, reference = (np.concatenate([pair[side]["task_nlls"] for pair in pairs]) for side in (0, 1))
    nll_more = difference(own, reference, bounded=False)
    weights = [one["task_examples"] for one, _ in pairs]
    kld, same = (float(np.average([one[key] for one, _ in pairs], weights=weights)) for key in ("fidelity_kld_mean", "fidelity_same_top1"))
    return Pool(count, score, loss, float(own.mean()), nll_more, kld, same)


def report(records: Sequence[Record], directory: pathlib.Path) -> list[str]:
    """Writes the tables and the plot; returns their names."""
    pooled = pools(records)
    first = records[0]
    template = "the model's chat template" if any(r["task_chat_template"] for r in records) else "no chat template"
    weights = f", weights {first['model_weights']}" if first.get("model_weights") else ""
    lines = [
        f"# Tasks on {first['model_id']}",
        "",
        f"Model {first['model_id']}{weights}, computed in {first['dtype']}, {template}. Scores are per cent, in brackets 95 % intervals "
        "(bootstrap over prompts). Made by `python -m experiments.tasks`; every line is in records.jsonl.",
        "",
        *gate_table(pooled),
        *strategy_tables(pooled),
    ]
    replace(directory / REPORT, "\n".join(lines).rstrip() + "\n")
    figure = plot(pooled)
    if figure is None:
        return [REPORT]
    figure.savefig(directory / PLOT, dpi=150)
    return [REPORT, PLOT]


def gate_table(pooled: dict[Key, Pool]) -> list[str]:
    """The full cache by task and length, the question after the context."""
    full = {(task, length): pool for (task, length, query, name), pool in pooled.items() if name == "full" and query == "after"}
    sizes = sorted({length for _, length in full})
    lines = [
        "## The gate: what the full cache can do",
        "",
        f"Strategies are ranked only where it does at least {100 * asked.GATE:.0f} % (bold). Texts that are fed have perplexities.",
        "",
        _row(["task", *(f"{size} tokens" for size in sizes)]),
        _row(["---", *("--:" for _ in sizes)]),
    ]
    for task in dict.fromkeys(task for task, _ in full):
        lines.append(_row([task, *(_gate_cell(full.get((task, size))) for size in sizes)]))
    return [*lines, ""]


def _gate_cell(pool: Pool | None) -> str:
    if pool is None:
        return ""
    if pool.nll is not None and pool.score is None:
        return f"{np.exp(pool.nll):.1f} (n={pool.examples})"
    assert pool.score is not None
    text = whole(pool.score.mean)
    passed = pool.score.mean >= asked.GATE
    return f"{f'**{text}**' if passed else text}{_brackets(pool.score)} (n={pool.examples})"


def strategy_tables(pooled: dict[Key, Pool]) -> list[str]:
    """A table a length: scores by task, way of asking and strategy, with what they are beside the full cache."""
    lines: list[str] = []
    names = [name for name in dict.fromkeys(key[3] for key in pooled) if name != "full"]
    for length in sorted({key[1] for key in pooled if key[3] != "full"}):
        lines += [f"## Strategies, {length} tokens", "", "In brackets the difference to the full cache, paired by prompt.", ""]
        lines += [_row(["task", "asked", "n", "full", *names]), _row(["---", "---", *("--:" for _ in (0, 0, *names))])]
        for task, query in dict.fromkeys((key[0], key[2]) for key in pooled if key[1] == length and key[3] != "full"):
            full = pooled.get((task, length, query, "full"))
            if full is None:
                continue
            ranked = full.score is None or full.score.mean >= asked.GATE
            cells = [_cell(pooled.get((task, length, query, name)), ranked) for name in names]
            base = f"NLL {full.nll:.3f}" if full.score is None else whole(full.score.mean)
            lines.append(_row([task if ranked else f"{task} (below the gate, not ranked)", query, str(full.examples), base, *cells]))
        lines.append("")
    return lines


def _cell(pool: Pool | None, ranked: bool) -> str:
    if pool is None:
        return ""
    if pool.score is None or pool.loss is None:
        return "" if pool.nll_more is None else f"KLD {pool.kld:.4f}, NLL {pool.nll_more.mean:+.3f}"
    text = whole(pool.score.mean)
    if not ranked or pool.loss.low is None or pool.loss.high is None:
        return text
    return f"{text} ({signed(-pool.loss.mean)} [{whole(-pool.loss.high)}, {whole(-pool.loss.low)}])"


def _brackets(value: Interval) -> str:
    return "" if value.low is None or value.high is None else f" [{whole(value.low)}, {whole(value.high)}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(pooled: dict[Key, Pool]) -> Figure | None:
    """Scores with intervals: a panel a length and way of asking, a group a task past the gate, a bar a strategy."""
    ranked = {
        key: pool
        for key, pool in pooled.items()
        if pool.score is not None and (full := pooled.get((*key[:3], "full"))) and full.score and full.score.mean >= asked.GATE
    }
    compared = {key[:3] for key in ranked if key[3] != "full"}
    ranked = {key: pool for key, pool in ranked.items() if key[:3] in compared}
    panels = sorted({(length, query) for _, length, query, _ in ranked}, key=lambda panel: (panel[0], panel[1] == "after"))
    if not panels:
        return None
    names = list(dict.fromkeys(key[3] for key in ranked))
    names.sort(key=lambda name: name != "full")
    figure = Figure(figsize=(10, 2.6 * len(panels) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (length, query) in zip(axes, panels, strict=True):
        tasks = list(dict.fromkeys(key[0] for key in ranked if key[1:3] == (length, query)))
        for place, name in enumerate(names):
            own = [(i, ranked[task, length, query, name]) for i, task in enumerate(tasks) if (task, length, query, name) in ranked]
            means = [100 * pool.score.mean for _, pool in own if pool.score]
            lows = [
                100 * (pool.score.mean - (pool.score.mean if pool.score.low is None else pool.score.low)) for _, pool in own if pool.score
            ]
            highs = [
                100 * ((pool.score.mean if pool.score.high is None else pool.score.high) - pool.score.mean) for _, pool in own if pool.score
            ]
            places = [i + (place - (len(names) - 1) / 2) * 0.8 / len(names) for i, _ in own]
            axis.bar(places, means, 0.8 / len(names), yerr=[lows, highs], label=name, error_kw={"linewidth": 0.8})
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
        axis.set(ylim=(0, 105), ylabel="score (%)", title=f"{length} tokens, the question {query} compression")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(2, len(names)), fontsize=8)
    return figure


def run(console: Printer) -> None:
    """Measures, unless it is the report alone, and reports."""
    compilation.apply_flag()
    directory = pathlib.Path(FLAGS.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir={directory}: cannot write there: {error.strerror}") from None
    path = directory / RECORDS
    with locked(directory):
        if FLAGS.part != "report":
            measure(path, console)
        records = list(log.latest(log.read(path)).values())
        if not records:
            raise InputError(f"{path} has no records; measure first, with --part=gate")
        console.print(f"wrote {' and '.join(report(records, directory))} to {directory}", highlight=False)


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run(Printer())


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
