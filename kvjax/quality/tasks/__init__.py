"""Tasks: prompts with questions, made without a network, the same for the same seed, exact to the token.

One file a task.

    tasks = parse_tasks("niah_single,niah_single(haystack=repeat),mine.jsonl")
    frame = Frame.of(model.tokenizer)
    examples = tasks[0].examples(frame, length=1024, count=20, seed=0)

Making prompts (a task's file), laying them out (frame, texts) and judging answers (metrics) know nothing of each other;
asking a model is kvjax.quality.asked. What is measured follows RULER (arXiv:2404.06654) and SCBench (arXiv:2412.10319);
all texts are kvjax's own, so scores are comparable between strategies here and not with scores published elsewhere.
"""

import ast
import dataclasses
from collections.abc import Mapping

from kvjax.cache import split_specs
from kvjax.errors import SpecError
from kvjax.quality.tasks.base import QUERIES, Example, Query, Task, Turn, fingerprint
from kvjax.quality.tasks.common_words import CommonWords
from kvjax.quality.tasks.continuation import Code, Prose
from kvjax.quality.tasks.file import FileTask
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.frequent_words import FrequentWords
from kvjax.quality.tasks.key_value import KeyValue
from kvjax.quality.tasks.metrics import METRICS
from kvjax.quality.tasks.niah_multikey import NiahMultikey
from kvjax.quality.tasks.niah_multivalue import NiahMultivalue
from kvjax.quality.tasks.niah_single import NiahSingle
from kvjax.quality.tasks.stated_facts import StatedFacts
from kvjax.quality.tasks.variable_tracking import VariableTracking

__all__ = [
    "METRICS",
    "QUERIES",
    "TASKS",
    "Example",
    "FileTask",
    "Frame",
    "Query",
    "Task",
    "Turn",
    "fingerprint",
    "parse_task",
    "parse_tasks",
]

TASKS: Mapping[str, type[Task]] = {
    kind.name: kind
    for kind in (
        NiahSingle, NiahMultikey, NiahMultivalue, VariableTracking, CommonWords, FrequentWords, KeyValue, Prose, Code, StatedFacts,
    )
}  # fmt: skip


def parse_tasks(text: str) -> list[Task]:
    """The tasks of a list such as `niah_single,kv(turns=3),mine.jsonl`.

    Raises as `parse_task`, and SpecError for an empty list and for a task that is named twice.
    """
    tasks = [parse_task(spec) for spec in split_specs(text)]
    names = [task.describe() for task in tasks]
    if not tasks:
        raise SpecError(f"no task given; choose from {', '.join(TASKS)}, or name a JSONL file")
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"task {twice.pop()} is named twice")
    return tasks


def parse_task(spec: str) -> Task:
    """The task of a name, a name with settings such as `kv(turns=3)`, or the path of a JSONL file.

    Raises:
      SpecError: an unknown name or setting.
      InputError: a setting's value that does not do, a file that cannot be read.
    """
    if spec.endswith((".jsonl", ".json")):
        task = FileTask(spec)
        task.lines()
        return task
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = ast.Constant(None)
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.args:
        raise SpecError(f"cannot read task {spec!r}; write a name, a name with settings like kv(turns=3), or a file that ends in .jsonl")
    kind = TASKS.get(call.func.id)
    if kind is None:
        raise SpecError(f"unknown task {call.func.id!r}; choose from {', '.join(TASKS)}, or name a file that ends in .jsonl")
    known = [field.name for field in dataclasses.fields(kind)]
    settings = {}
    for keyword in call.keywords:
        if keyword.arg not in known or keyword.arg in settings:
            raise SpecError(f"task {kind.name} takes {', '.join(known)}, each once; not {keyword.arg!r}")
        value = keyword.value
        try:
            settings[keyword.arg] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
        except ValueError:
            raise SpecError(f"task {spec!r}: a setting is a number or a word") from None
    return kind(**settings)
