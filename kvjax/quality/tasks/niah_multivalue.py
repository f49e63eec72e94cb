"""Several needles about one thing, all of which are asked for (RULER's niah_multivalue)."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, check_choice, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import HAYSTACKS, hidden, number, spread
from kvjax.quality.tasks.texts import WORDS

_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


@dataclasses.dataclass(frozen=True)
class NiahMultivalue(Task):
    """`values`: codes of the one thing."""

    name: ClassVar[str] = "niah_multivalue"
    values: int = 4
    digits: int = 5
    haystack: str = "prose"

    def __post_init__(self):
        check_choice(self.name, "haystack", self.haystack, HAYSTACKS)
        check_number(self.name, "digits", self.digits, 1, 18)
        check_number(self.name, "values", self.values, 2, max(_COUNTS))

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        word = str(rng.choice(frame.alike(WORDS)))
        codes = [number(rng, self.digits) for _ in range(self.values)]
        depths, count = spread(rng, self.values), _COUNTS[self.values]
        question = f"\n\nWhat are the {count} secret codes of the {word}?"
        return hidden(
            self, frame, length, rng, haystack=self.haystack,
            intro=f"The {count} secret codes of one thing are stated in the text below. Remember all of them.\n\nText:",
            needles=[f"One of the secret codes of the {word} is {code}." for code in codes], depths=depths, asked=depths,
            turns=[turn(frame, question, f"The {count} secret codes of the {word} are:\n\n1.", codes)],
        )  # fmt: skip
