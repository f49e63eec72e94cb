"""Advises which KV-cache strategy to use, from the results of a study.

    python -m kvjax.advise --results=experiments/results/study_cpu --request_rate=4 --ttft=200 --tpot=50 --kv_memory=16MiB --min_recall=0.9
    python -m kvjax.advise --results=runs/study --input_len=952 --objective=memory --min_recall=0.9
    python -m kvjax.advise --results=runs/study --recommendations

Without --request_rate the question is about whole batches, offline. A need that is left out is no need. Outside what was measured it says
which range there is and exits with 3; bad input exits with 2.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging
from rich.console import Console
from rich.table import Table

from kvjax.advise import OBJECTIVES, Advice, Needs, OutsideData, advise, recommendations
from kvjax.command import Printer, answered, fail, start
from kvjax.engine.memory import parse_memory
from kvjax.errors import SpecError
from kvjax.files import dumps
from kvjax.report.cells import read_results

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("results", None, "Directory of the results of a study: <experiment>/records.jsonl.")
    flags.DEFINE_float("ttft", None, "Milliseconds to the first token, for --attainment of the requests.", lower_bound=0.0)
    flags.DEFINE_float("tpot", None, "Milliseconds per further token, for --attainment of the requests.", lower_bound=0.0)
    flags.DEFINE_float("attainment", 0.9, "Share of the requests that --ttft and --tpot are for.")
    flags.DEFINE_string("kv_memory", None, "Device memory for the cache, such as 16MiB.")
    flags.DEFINE_float("min_recall", None, "Least share of facts recalled.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("max_kld", None, "Greatest divergence from the full cache, nats.", lower_bound=0.0)
    flags.DEFINE_string("request_rate", None, "Requests per second, or inf for all at once; left out: offline.")
    flags.DEFINE_integer("input_len", None, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Prompts of a batch (offline); left out: the best for each strategy.", lower_bound=1)
    flags.DEFINE_string("model", None, "The model, as the records name it.")
    flags.DEFINE_enum("objective", "throughput", OBJECTIVES, "What is to be best among what meets the needs.")
    flags.DEFINE_bool("recommendations", False, "A Markdown table for a handful of needs instead; other needs are ignored.")
    flags.DEFINE_bool("json", False, "One JSON object.")


def needs() -> Needs:
    """What the flags ask for. Raises SpecError."""
    rate = None
    if FLAGS.request_rate is not None:
        try:
            rate = float(FLAGS.request_rate)
        except ValueError:
            rate = float("nan")
        if not rate > 0:
            raise SpecError(f"--request_rate={FLAGS.request_rate}: give requests per second, such as 4, or inf")
    return Needs(
        FLAGS.ttft, FLAGS.tpot, None if FLAGS.kv_memory is None else parse_memory(FLAGS.kv_memory), FLAGS.min_recall, FLAGS.max_kld,
        FLAGS.objective, FLAGS.attainment, rate, FLAGS.input_len, FLAGS.model, FLAGS.batch_size,
    )  # fmt: skip


def show(found: Advice, console: Console) -> None:
    """Prints an advice."""
    console.print(f"\n[bold]{found.headline()}[/bold]", highlight=False)
    if found.command:
        console.print(f"  {found.command}", highlight=False, soft_wrap=True)
    for sentence in found.assumed:
        console.print(f"  assumed: {sentence}", style="dim", highlight=False)
    for sentence in found.notes:
        console.print(f"  note: {sentence}", style="dim", highlight=False)
    if found.margin is not None and found.equals:
        console.print(f"  nearest: {found.margin.text}", highlight=False)
    if found.figures:
        table = _table("what it rests on", "", "", "")
        for figure in found.figures:
            table.add_row(figure.label, figure.text, figure.mark, figure.source)
        console.print(table)
    if found.crossovers:
        console.print("\n[bold]what would change the answer[/bold]", highlight=False)
        for change in found.crossovers:
            console.print(f"  {change.sentence()}", highlight=False)
    else:
        console.print("\nno other rate, length, memory or bar within the data changes the answer", highlight=False)
    table = _table("passed over", "why")
    for name, why in found.passed:
        table.add_row(name, why)
    console.print(table)


def _table(*heads: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold", title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def run() -> None:
    if FLAGS.results is None:
        raise SpecError("no results given; name their directory, for example --results=experiments/results/study_cpu")
    asked = needs()
    records = read_results(pathlib.Path(FLAGS.results))
    if FLAGS.recommendations:
        print(recommendations(records), end="")
        return
    found = advise(records, asked)
    if FLAGS.json:
        print(dumps(found.record()))
    else:
        show(found, Printer())


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        try:
            run()
        except OutsideData as error:
            fail(error, code=3)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
