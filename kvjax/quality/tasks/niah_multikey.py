"""Several needles alike, one of which is asked for (RULER's niah_multikey)."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, check_choice, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import HAYSTACKS, hidden, number, spread
from kvjax.quality.tasks.texts import WORDS


@dataclasses.dataclass(frozen=True)
class NiahMultikey(Task):
    """`keys`: codes that are stated, each of another thing."""

    name: ClassVar[str] = "niah_multikey"
    keys: int = 4
    digits: int = 7
    haystack: str = "prose"

    def __post_init__(self):
        check_choice(self.name, "haystack", self.haystack, HAYSTACKS)
        check_number(self.name, "digits", self.digits, 1, 18)
        check_number(self.name, "keys", self.keys, 2, 32)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        words = [str(word) for word in rng.choice(frame.alike(WORDS), self.keys, replace=False)]
        codes = [number(rng, self.digits) for _ in words]
        depths = spread(rng, self.keys)
        asked = int(depth * self.keys)
        word, code = words[asked], codes[asked]
        return hidden(
            self, frame, length, rng, haystack=self.haystack,
            intro="Secret codes of several things are stated in the text below. Remember them.\n\nText:",
            needles=[f"The secret code of the {word} is {code}." for word, code in zip(words, codes, strict=True)],
            depths=depths, asked=[depths[asked]],
            turns=[turn(frame, f"\n\nWhat is the secret code of the {word}?", f"The secret code of the {word} is", [code])],
        )  # fmt: skip
