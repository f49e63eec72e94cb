"""A chain of assignments among dull sentences: which variables end up with a value (RULER's variable tracking)."""

import dataclasses
import itertools
import string
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, check_choice, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import HAYSTACKS, hidden, number, spread
from kvjax.quality.tasks.texts import REPEATED

_LETTERS, _DIGITS = 5, 5


@dataclasses.dataclass(frozen=True)
class VariableTracking(Task):
    """`hops`: assignments after the first, each of the last variable.

    `shots`: solved examples before the text, 0 or 1.
    """

    name: ClassVar[str] = "vt"
    hops: int = 4
    shots: int = 1
    haystack: str = "repeat"

    def __post_init__(self):
        check_choice(self.name, "haystack", self.haystack, HAYSTACKS)
        check_number(self.name, "hops", self.hops, 1, 16)
        check_number(self.name, "shots", self.shots, 0, 1)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        intro = "Variables get their values in the text below. Keep track of them.\n\nText:"
        if self.shots:
            names, value, chain = self._chain(rng)
            parts = [f"{REPEATED[i % len(REPEATED)]} {line}" for i, line in enumerate(chain)]
            intro += f" {' '.join(parts)}{_question(value)}\nAnswer: {_opening(names, value)} {', '.join(names)}.\n\nText:"
        names, value, chain = self._chain(rng)
        depths = spread(rng, len(chain))
        return hidden(
            self, frame, length, rng, haystack=self.haystack, intro=intro, needles=chain, depths=depths, asked=depths,
            turns=[turn(frame, _question(value), _opening(names, value), names)],
        )  # fmt: skip

    def _chain(self, rng: np.random.Generator) -> tuple[list[str], str, list[str]]:
        """Names, the value, and the assignments."""
        names: dict[str, None] = {}
        while len(names) <= self.hops:
            names["".join(rng.choice(list(string.ascii_uppercase), _LETTERS))] = None
        chain, value = list(names), number(rng, _DIGITS)
        lines = [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
        return chain, value, [f"VAR {chain[0]} = {value}.", *lines]


def _question(value: str) -> str:
    return f"\n\nQuestion: Which variables have the value {value}?"


def _opening(names: list[str], value: str) -> str:
    return f"The {len(names)} variables with the value {value} are:"
