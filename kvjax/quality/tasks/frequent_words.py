"""A text in code whose words follow Zipf's law: which are the most frequent (RULER's frequent words extraction)."""

import dataclasses
import string
from collections import Counter
from typing import ClassVar

import numpy as np

from kvjax.errors import InputError
from kvjax.quality.tasks.base import Example, Task, check_number, turn
from kvjax.quality.tasks.frame import Frame

_LETTERS, _VOCABULARY = 6, 100
_ATTEMPTS = 100
_DOTS = 0.3  # share of places where dots stand instead of a word


@dataclasses.dataclass(frozen=True)
class FrequentWords(Task):
    """`alpha`: word number k comes with a probability in proportion to k ** -alpha.

    `asked`: how many words are asked for.
    """

    name: ClassVar[str] = "fwe"
    alpha: float = 2.0
    asked: int = 3

    def __post_init__(self):
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 1 <= self.alpha <= 4:
            raise InputError(f"task fwe needs alpha as a number from 1 to 4, not {self.alpha}")

        check_number(self.name, "asked", self.asked, 1, 10)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        begin = frame.begin("Count how often each coded word comes in the text below. Leave the dots out.")
        heading = frame.ids("\n\nText:")
        question, opening = "\n\nWhich coded word is the most frequent?", "The most frequent coded word is:"
        if self.asked > 1:
            question = f"\n\nWhich {self.asked} coded words are the most frequent?"
            opening = f"The {self.asked} most frequent coded words are:"
        room = length - len(begin) - len(heading) - len(frame.end(question, opening))
        for _ in range(_ATTEMPTS):
            body, counts = self._drawn(frame, max(room, 0), rng)
            top = counts.most_common(self.asked + 1)
            if len(top) > self.asked and top[self.asked][1] < top[self.asked - 1][1]:  # no tie, which would make answers arbitrary
                one = turn(frame, question, opening, [word for word, _ in top[: self.asked]])
                return Example(np.asarray(begin + frame.pad(room - len(body)) + heading + body, np.int32), (one,))
        raise self.too_short(length, max(length, 0) - min(room, 0) + 1)

    def _drawn(self, frame: Frame, room: int, rng: np.random.Generator) -> tuple[list[int], Counter[str]]:
        """At most `room` tokens of text, and how often each word comes in it."""
        words = ["".join(rng.choice(list(string.ascii_lowercase), _LETTERS)) for _ in range(_VOCABULARY)]
        weights = np.arange(1, _VOCABULARY + 1, dtype=float) ** -self.alpha
        drawn = rng.choice(_VOCABULARY, size=room, p=weights / weights.sum())
        body: list[int] = []
        counts: Counter[str] = Counter()
        for number, dotted in zip(drawn, rng.random(room) < _DOTS, strict=True):
            ids = frame.ids(" ...." if dotted else f" {words[number]}")
            if len(body) + len(ids) > room:
                break
            body += ids
            if not dotted:
                counts[words[number]] += 1
        return body, counts
