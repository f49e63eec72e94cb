"""One needle: a secret code stated once (RULER's niah_single, arXiv:2404.06654, appendix B)."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, check_choice, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import HAYSTACKS, hidden, number
from kvjax.quality.tasks.texts import WORDS


@dataclasses.dataclass(frozen=True)
class NiahSingle(Task):
    """`haystack`: `prose`, or `repeat` for the same few sentences again and again. `digits`: of the code."""

    name: ClassVar[str] = "niah_single"
    haystack: str = "prose"
    digits: int = 7

    def __post_init__(self):
        check_choice(self.name, "haystack", self.haystack, HAYSTACKS)
        check_number(self.name, "digits", self.digits, 1, 18)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        word, code = str(rng.choice(frame.alike(WORDS))), number(rng, self.digits)
        return hidden(
            self, frame, length, rng, haystack=self.haystack,
            intro="A secret code is stated somewhere in the text below. Remember it.\n\nText:",
            needles=[f"The secret code of the {word} is {code}."], depths=[depth], asked=[depth],
            turns=[turn(frame, f"\n\nWhat is the secret code of the {word}?", f"The secret code of the {word} is", [code])],
        )  # fmt: skip
