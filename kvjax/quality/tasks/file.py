"""A user's own task: a JSONL file, one example a line."""

import dataclasses
import json
import pathlib
from typing import Any, ClassVar

import numpy as np

from kvjax.errors import InputError
from kvjax.quality.tasks.base import Example, Task, turn
from kvjax.quality.tasks.frame import Frame

_FIELDS = ("prompt", "context", "question", "answers", "opening", "max_tokens")


@dataclasses.dataclass(frozen=True)
class FileTask(Task):
    """Lines of `context`, `question` and `answers`, or of `prompt` and `answers`.

    Also `opening` (how the answer begins) and `max_tokens`.

    A prompt that is one piece can only be asked before it is compressed. Prompts are as long as they are, whatever
    length is asked for.
    """

    name: ClassVar[str] = "file"
    path: str = ""

    def describe(self) -> str:
        return self.path

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        raise NotImplementedError("a file's examples are read all at once")

    def examples(self, frame: Frame, length: int, count: int, seed: int) -> list[Example]:
        return [_example(frame, line, where) for where, line in self.lines()[:count]]

    @property
    def pieces(self) -> bool:
        """Whether every line tells its context from its question."""
        return all("context" in line for _, line in self.lines())

    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Every line with the place it stands at. Raises InputError, naming file and line, for what cannot be read."""
        try:
            text = pathlib.Path(self.path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"task file {self.path}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}") from None
        rows = [(f"{self.path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not rows:
            raise InputError(
                f"task file {self.path} is empty; give a JSON object a line, with prompt (or context and question) and answers"
            )
        return [(where, _checked(where, line)) for where, line in rows]


def _checked(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: give an object with prompt (or context and question) and answers")
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise InputError(f"{where}: unknown field {unknown[0]!r}; a line has {', '.join(_FIELDS)}")
    if ("prompt" in row) == ("context" in row) or ("context" in row) != ("question" in row):
        raise InputError(f"{where}: give either prompt, or context and question")
    for field in ("prompt", "context", "question", "opening"):
        if field in row and (not isinstance(row[field], str) or (field != "opening" and not row[field])):
            raise InputError(f"{where}: {field} must be a text that is not empty")
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise InputError(f"{where}: answers must be a list of texts, at least one, none of them empty")
    limit = row.get("max_tokens", 1)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InputError(f"{where}: max_tokens must be a whole number from 1")
    return row


def _example(frame: Frame, row: dict[str, Any], where: str) -> Example:
    try:
        context = np.asarray(frame.begin(row.get("prompt") or row["context"]), np.int32)
        one = turn(frame, row.get("question", ""), row.get("opening", ""), row["answers"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if "max_tokens" in row:
        one = dataclasses.replace(one, max_new=row["max_tokens"])
    return Example(context, (one,))
