"""Measures KV-cache strategies on a model: speed, bytes, fidelity to the full cache, and what is still remembered.

    python -m kvjax.run --strategy=h2o
    python -m kvjax.run --compare=full,streaming,h2o,oracle_topk --budget=0.2
    python -m kvjax.run --strategy="h2o(heavy=8,recent=8)" --output_dir=runs/h2o --profile_dir=runs/trace

A strategy is a name, or a name with arguments. An int is tokens, a float is a fraction of the prompt:

    full                              everything kept
    streaming(sinks=4,window=252)     the first tokens and a sliding window
    h2o(heavy=0.1,recent=0.1)         heavy hitters and recent tokens; also decode=False, group=first|max
    oracle_topk(k=0.2)                keeps all, reads the exact top k: the upper bound

The default model ships with kvjax. Its prompts state facts, put Python source between them and ask for the facts afterwards, so the table
shows directly what a strategy forgets.
"""

import os
import pathlib
import sys
import tempfile
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvjax.cache import Full, Strategy, parse_strategy, split_specs
from kvjax.engine import offline
from kvjax.errors import InputError, KvjaxError, SpecError
from kvjax.generation import PREFILL_MODES, PrefillPlan, check_positions, generate
from kvjax.models import Model, load_model
from kvjax.quality import recall
from kvjax.report import plots, profile, table
from kvjax.report import record as records
from kvjax.sampling import Sampling

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("strategy", "h2o", "The strategy to measure: a name, or a spec such as h2o(heavy=8,recent=8).")
    flags.DEFINE_string("compare", None, "Several strategies, separated by commas, side by side in one table; replaces --strategy.")
    flags.DEFINE_string("budget", None, "Tokens (an int) or fraction of the prompt (a float) each strategy may keep or read in total.")
    flags.DEFINE_enum("store", "dense", ["dense"], "Where the cache's bytes live.")
    flags.DEFINE_string("model", "kvjax-4m", "A bundled model, a preset (with --random_weights), or a Hugging Face or orbax directory.")
    flags.DEFINE_bool("random_weights", False, "Random weights: speed and bytes are real, what the model says is not.")
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")
    flags.DEFINE_integer("num_prompts", 16, "Prompts to run.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Prompts per batch.", lower_bound=1)
    flags.DEFINE_integer("input_len", 952, "Tokens per prompt.", lower_bound=1)
    flags.DEFINE_integer("output_len", 64, "Tokens to generate per prompt.", lower_bound=1)
    flags.DEFINE_integer("num_facts", 8, "Facts stated per prompt, at evenly spaced depths (byte-level models).", lower_bound=1)
    flags.DEFINE_integer("prefill_chunk", None, "Tokens of the prompt per call; default: all at once.", lower_bound=1)
    flags.DEFINE_enum("prefill_mode", "faithful", PREFILL_MODES, "With chunks: evict once the prompt is complete, or after every chunk.")
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: no limit.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Sample from the most likely tokens that reach this probability.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 0, "Seed of the prompts and of sampling.")
    flags.DEFINE_bool("quality", True, "Measure fidelity and recall; --noquality gives speed and bytes alone, sooner.")
    flags.DEFINE_string("output_dir", None, "Write record.json, requests.jsonl, samples.txt and overview.png here.")
    flags.DEFINE_string("profile_dir", None, "Write an XLA profiler trace of one batch per strategy here, and print time by scope.")


def parse_budget(text: str | None) -> int | float | None:
    """An int for tokens, a float for a fraction of the prompt. Raises SpecError."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            amount = kind(text)
        except ValueError:
            continue
        if amount > 0 and (kind is int or amount <= 1):
            return amount
    raise SpecError(f"--budget={text}: give a whole number of tokens (256) or a fraction of the prompt (0.2)")


def strategies() -> list[Strategy]:
    """What the flags ask for."""
    specs = split_specs(FLAGS.strategy if FLAGS.compare is None else FLAGS.compare)
    if not specs:
        raise SpecError("no strategy given; name at least one, for example --strategy=h2o")
    chosen = [parse_strategy(spec, FLAGS.store) for spec in specs]
    if (budget := parse_budget(FLAGS.budget)) is not None:
        chosen = [Strategy(s.policy.with_budget(budget), s.store) for s in chosen]
    names = [s.describe() for s in chosen]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"strategy {twice.pop()} is named twice")
    return chosen


def writable(flag: str) -> pathlib.Path | None:
    """The directory a flag names, made where it is missing; None without one. Raises InputError when nothing can be written there."""
    value = FLAGS[flag].value
    if value is None:
        return None
    path = pathlib.Path(value)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"--{flag}={path}: cannot write there: {error.strerror}") from None


def run(console: Console) -> None:
    """Loads, measures, prints, writes."""
    chosen = strategies()
    plan = PrefillPlan(FLAGS.prefill_chunk, FLAGS.prefill_mode)
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    output_dir, profile_dir = writable("output_dir"), writable("profile_dir")
    model = load_model(FLAGS.model, dtype=FLAGS.dtype, random_weights=FLAGS.random_weights)
    batch_size = min(FLAGS.batch_size, FLAGS.num_prompts)
    questions = FLAGS.num_facts * recall.STATEMENT_BYTES
    check_positions(model, FLAGS.input_len, max(FLAGS.output_len, questions))
    workload = offline.make_workload(model, FLAGS.num_prompts, FLAGS.input_len, FLAGS.seed, FLAGS.num_facts)

    full = Strategy(Full(), chosen[0].store)
    per_strategy = offline.steps_of(workload, batch_size, FLAGS.quality)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    measured = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reference: full cache", total=per_strategy * len(chosen) + 1)
        against = offline.reference(model, full, workload, batch_size, FLAGS.output_len, plan) if FLAGS.quality else None
        progress.advance(task)
        for strategy in chosen:
            name = strategy.policy.describe()

            def report(what: str, name: str = name) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            progress.update(task, description=f"{name}: compiling")
            measured.append(
                offline.measure(
                    model, strategy, workload if FLAGS.quality else offline.without_questions(workload), batch_size=batch_size,
                    output_len=FLAGS.output_len, seed=FLAGS.seed, sampling=sampling, plan=plan, against=against, progress=report,
                )
            )  # fmt: skip
    options = {name: FLAGS[name].value for name in ("input_len", "output_len", "seed", "prefill_chunk", "prefill_mode")}
    options |= {"batch_size": batch_size, "random_weights": FLAGS.random_weights}
    found = [records.record(m, model, workload, options) for m in measured]
    table.show(found, console)
    if output_dir is not None:
        records.write(output_dir, found, measured, workload, model)
        plots.overview(found, output_dir / "overview.png")
        console.print(f"wrote record.json, requests.jsonl, samples.txt and overview.png to {output_dir}", highlight=False)
    if profile_dir is not None:
        profile_strategies(profile_dir, model, chosen, workload, batch_size, sampling, plan, console)


def profile_strategies(
    parent: pathlib.Path, model: Model, chosen: list[Strategy], workload, batch_size: int, sampling, plan, console: Console
) -> None:
    """One traced batch per strategy, after compiling, and the time its scopes took."""
    settings: dict[str, Any] = dict(
        max_new_tokens=min(32, FLAGS.output_len), sampling=sampling, seed=FLAGS.seed, stop_tokens=(), prefill=plan
    )
    prompts = workload.prompts[:batch_size]
    for strategy in chosen:
        directory = parent / strategy.policy.describe().replace(",", "_")
        generate(model, prompts, strategy=strategy, **settings)
        with profile.trace(directory):
            generate(model, prompts, strategy=strategy, **settings)
        console.print(f"\ntrace of {strategy.describe()} in {directory} (TensorBoard, XProf or Perfetto open it)", highlight=False)
        for scope, spent in profile.scope_times(directory).items():
            console.print(f"  {scope:<24}{1e3 * spent.seconds:>10.2f} ms in {spent.events} instructions", highlight=False)


def parse_flags(argv: list[str]) -> list[str]:
    """Sets FLAGS and returns what is no flag. A flag that is unknown or out of range ends the program like any other bad input."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()) + "; see --help")


def fail(message: object) -> NoReturn:
    print(f"kvjax: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run(console)
    except KvjaxError as error:
        fail(error)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse_flags)
