"""What a task is: prompts made by seed and exact to the token, what is asked about them, and how answers are judged."""

import abc
import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int

from kvjax.errors import InputError
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.metrics import METRICS

Query = Literal["before", "after"]
"""When a question is seen: before the prompt is compressed, as its end, or after, fed to the compressed context."""
QUERIES = get_args(Query)

_GOLDEN = (5**0.5 - 1) / 2
_SPARE = 4  # tokens that may stand around an answer: quotation marks, a full stop, a number in a list


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question about a context.

    Attributes:
      query: tokens behind the context: the question, what closes the chat template, how the answer begins. For a task
        that is fed (`Task.fed`) the true continuation.
      answers: right answers, as texts; empty for a task that is fed.
      max_new: tokens that an answer may take.
      asked: indices into `query` of answers that are judged there, [Q, digits]; None for all others.
    """

    query: Int[np.ndarray, " T"]
    answers: tuple[str, ...] = ()
    max_new: int = 0
    asked: Int[np.ndarray, "Q digits"] | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A context and the questions about it.

    Attributes:
      context: tokens before the question, those of the chat template included.
      turns: each is asked of the same context, as if the others had not been.
      depths: where what is asked for stands, 0 (the beginning) to 1 (the end); empty where it stands everywhere.
    """

    context: Int[np.ndarray, " C"]
    turns: tuple[Turn, ...]
    depths: tuple[float, ...] = ()

    def prompt(self, turn: int = 0) -> Int[np.ndarray, " N"]:
        """Context and question in one."""
        return np.concatenate([self.context, self.turns[turn].query])


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A kind of prompt with questions. A subclass makes one example; its fields are its settings.

    Attributes:
      name: what it is called on the command line.
      metric: how answers are judged (kvjax.quality.tasks.metrics); empty for a task that is fed and has no answers.
      queries: when its questions can be asked.
      fed: the continuation is fed token by token and predictions are compared, instead of answers being written.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "match_all"
    queries: ClassVar[tuple[Query, ...]] = QUERIES
    fed: ClassVar[bool] = False

    @abc.abstractmethod
    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        """One example whose context and first question are `length` tokens; `depth` is where to put what is asked for.

        Raises InputError when `length` is too short.
        """

    def examples(self, frame: Frame, length: int, count: int, seed: int) -> list[Example]:
        """`count` examples.

        Each depends on the seed, the length and its number alone, so that the first of many are those of few.

        Raises InputError when `length` is too short, or when this tokenizer is of no use to the task.
        """
        made = []
        for number in range(count):
            rng = np.random.default_rng([seed, length, number, zlib.crc32(self.describe().encode())])
            made.append(self.example(frame, length, rng, (0.5 + seed * 0.1 + number * _GOLDEN) % 1))
        return made

    def score(self, written: str, turn: Turn) -> float:
        """How right an answer is, 0 to 1."""
        return METRICS[self.metric](written, turn.answers)

    def describe(self) -> str:
        """Name and the settings that are not the default ones."""
        changed = [
            f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self) if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def too_short(self, length: int, least: int) -> InputError:
        """The error of a prompt that cannot hold the task."""
        return InputError(f"task {self.describe()} does not fit into {length} tokens; it takes at least {least}")


def turn(frame: Frame, question: str, opening: str, answers: Sequence[str]) -> Turn:
    """A question whose answer the model writes behind `opening`."""
    room = sum(len(frame.ids(f" {answer}")) + _SPARE for answer in answers)
    return Turn(np.asarray(frame.end(question, opening), np.int32), tuple(answers), room)


def fingerprint(examples: Sequence[Example]) -> str:
    """A digest of all tokens, by which to see whether two measurements asked the same."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.context, *(turn.query for turn in example.turns)):
            digest.update(np.asarray([len(part)], np.int64).tobytes() + np.asarray(part, np.int64).tobytes())
    return digest.hexdigest()[:16]


def check_choice(task: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises InputError for a setting that is none of the choices."""
    if value not in choices:
        raise InputError(f"task {task} has no {name}={value}; choose from {', '.join(map(str, choices))}")


def check_number(task: str, name: str, value: Any, least: int, most: int) -> None:
    """Raises InputError for a setting that is no whole number in this range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"task {task} needs {name} as a whole number from {least} to {most}, not {value}")
