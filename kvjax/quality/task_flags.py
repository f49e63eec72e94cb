"""The command line's part that is about tasks: flags, what they forbid, and the records of all that was asked."""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from kvjax.cache import Strategy
from kvjax.errors import SpecError
from kvjax.models import Model
from kvjax.quality import asked
from kvjax.quality.tasks import QUERIES, TASKS, Query, Task, parse_tasks

FLAGS = flags.FLAGS

NAMES = ("task", "query", "chat_template", "speed")


def define_flags() -> None:
    """Called once, by the program whose flags they are."""
    flags.DEFINE_string(
        "task", None,
        f"Tasks to put to the strategies, separated by commas: {', '.join(TASKS)}, with settings such as kv(turns=2), or JSONL "
        "files with context, question and answers (or prompt and answers) a line. They replace the other measures of quality.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "query", "after", [*QUERIES, "both"],
        "Whether a question is part of the prompt when that is compressed (before), or comes to the compressed context (after).",
    )  # fmt: skip
    flags.DEFINE_bool("chat_template", True, "Put the model's chat template around the prompts of tasks, where it has one.")
    flags.DEFINE_bool("speed", True, "Measure speed and bytes too; --nospeed puts tasks alone.")


def check_flags() -> list[Task]:
    """The tasks that are asked for, none without --task.

    Raises SpecError for a flag that would have no effect, and as `parse_tasks`.
    """
    if FLAGS.task is None:
        if idle := [name for name in NAMES if FLAGS[name].present]:
            raise SpecError(f"--{idle[0]} needs a task; add one, for example --task=niah_single")
        return []
    if not FLAGS.speed and FLAGS.profile_dir is not None:
        raise SpecError("--nospeed leaves nothing to trace for --profile_dir; leave one of them out")
    if FLAGS.prefill_mode == "bounded":
        raise SpecError("--prefill_mode=bounded has no meaning for tasks, whose prompts go in whole; leave it or --task out")
    tasks = parse_tasks(FLAGS.task)
    for task in tasks:
        if not _queries(task):
            asked.check_query(task, FLAGS.query)
    return tasks


def _queries(task: Task) -> list[Query]:
    """The ways of asking that the task knows among those asked for."""
    chosen = QUERIES if FLAGS.query == "both" else (FLAGS.query,)
    return [query for query in chosen if query in task.queries]


def steps(tasks: Sequence[Task], contenders: int, count: int, batch_size: int) -> int:
    """How often `ask` reports progress."""
    return sum(asked.steps_of(task, contenders, count, batch_size) * len(_queries(task)) for task in tasks)


def ask(
    contenders: Sequence[tuple[Model, Strategy]],
    tasks: Sequence[Task],
    *,
    length: int,
    count: int,
    batch_size: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Puts every task in every way the flags say.

    Returns by strategy what goes into its record: `tasks`, a list of the records of kvjax.quality.asked; nothing
    without tasks.
    """
    for task in tasks:  # what is wrong with any of them is said first
        asked.prompts(contenders[0][0], task, length, count, FLAGS.seed, FLAGS.chat_template)
    found: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for task in tasks:
        for query in _queries(task):
            outcome = asked.ask(
                contenders, task, length=length, count=count, query=query, seed=FLAGS.seed, batch_size=batch_size,
                chat_template=FLAGS.chat_template, progress=lambda name, task=task: progress(f"{task.describe()}: {name}"),  # type: ignore[misc]
            )  # fmt: skip
            for own, record in zip(found, asked.records(outcome), strict=True):
                own.append(record)
    return [{"tasks": own} if tasks else {} for own in found]
