"""A long list in which a few words come often and the others seldom (RULER's common words extraction)."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.texts import WORDS

_RATIO = 10  # a common word comes so much oftener than another


@dataclasses.dataclass(frozen=True)
class CommonWords(Task):
    """`common`: words that come often, ten times as often as each of the others, which fill the other half."""

    name: ClassVar[str] = "cwe"
    common: int = 10

    def __post_init__(self):
        check_number(self.name, "common", self.common, 1, 30)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        words = [str(word) for word in rng.permutation(WORDS)]
        common, others = words[: self.common], words[self.common :]
        begin = frame.begin("Some words come often in the list below, others seldom. Remember those that come often.")
        heading = frame.ids("\n\nList:")
        question, opening = "\n\nWhich word comes most often in the list?", "The word that comes most often is:"
        if self.common > 1:
            question = f"\n\nWhich {self.common} words come most often in the list?"
            opening = f"The {self.common} words that come most often are:"
        one = turn(frame, question, opening, common)
        room = length - len(begin) - len(heading) - len(one.query)
        sizes = {word: len(frame.ids(f" {word},")) for word in words}

        def tokens(often: int) -> int:
            return sum(sizes[word] for word in self._list(common, others, often))

        if tokens(1) > room:
            raise self.too_short(length, length - room + tokens(1))
        often = next(n for n in itertools.count(1) if tokens(n + 1) > room)
        listed = self._list(common, others, often)
        spare = room - sum(sizes[word] for word in listed)
        for word in rng.permutation(others):  # fill up, once each
            if sizes[word] <= spare:
                listed, spare = [*listed, str(word)], spare - sizes[word]
        body = [token for word in rng.permutation(listed) for token in frame.ids(f" {word},")]
        return Example(np.asarray(begin + frame.pad(spare) + heading + body, np.int32), (one,))

    def _list(self, common: list[str], others: list[str], often: int) -> list[str]:
        """The list in which every common word comes `often` times; as many others, each a tenth as often, at least once."""
        seldom = max(1, often // _RATIO)
        count = len(common) * often // seldom
        return common * often + [word for word in others[:count] for _ in range(seldom)]
