"""Keys with values, and several questions about one context (the idea of SCBench, arXiv:2412.10319)."""

import dataclasses
from collections import Counter
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, Turn, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import hidden, number, spread
from kvjax.quality.tasks.texts import WORDS


@dataclasses.dataclass(frozen=True)
class KeyValue(Task):
    """`turns`: questions about one context, each asked of the cache as it was after the context. Asked `before`, only
    the first is: a cache that was compressed with one question in view serves that question.

    `pairs`: keys in a text of prose; 0: the context is one JSON object, of as many keys as fit. `digits`: of a value.
    """

    name: ClassVar[str] = "kv"
    turns: int = 4
    pairs: int = 4
    digits: int = 7

    def __post_init__(self):
        check_number(self.name, "pairs", self.pairs, 0, 40)
        check_number(self.name, "turns", self.turns, 1, min(self.pairs or 16, 16))
        check_number(self.name, "digits", self.digits, 1, 18)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        return self._in_prose(frame, length, rng) if self.pairs else self._object(frame, length, rng, depth)

    def _in_prose(self, frame: Frame, length: int, rng: np.random.Generator) -> Example:
        keys = [str(word) for word in rng.choice(self._words(frame, ""), self.pairs, replace=False)]
        values = [number(rng, self.digits) for _ in keys]
        depths = spread(rng, self.pairs)
        order = rng.permutation(self.pairs)[: self.turns]
        return hidden(
            self, frame, length, rng, haystack="prose", intro="Keys and their values are stated in the text below. Remember them.\n\nText:",
            needles=[f'The value of the key "{key}" is "{value}".' for key, value in zip(keys, values, strict=True)], depths=depths,
            turns=[self._turn(frame, keys[place], values[place]) for place in order], asked=[depths[place] for place in order],
        )  # fmt: skip

    def _object(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        words = self._words(frame, "_10")
        begin, brace, close = frame.begin("Below is a JSON object of keys and values."), frame.ids("\n\n{"), frame.ids("\n}")
        asked = len(self._turn(frame, f"{words[0]}_10", "1").query)
        room = length - len(begin) - len(brace) - len(close) - asked
        pairs: dict[str, str] = {}
        size = 0
        while len(pairs) < 80 * len(words):
            key, value = f"{rng.choice(words)}_{rng.integers(10, 100)}", number(rng, self.digits)
            line = len(frame.ids(_line(key, value) + ","))
            if size + line > room:
                break
            if key not in pairs:
                pairs[key] = value
                size += line
        if len(pairs) < self.turns:
            raise self.too_short(length, length - room + self.turns * line)
        lines = [_line(key, value) for key, value in pairs.items()]
        body = [token for text in lines[:-1] for token in frame.ids(text + ",")] + frame.ids(lines[-1])
        places = [int(((depth + i / self.turns) % 1) * len(pairs)) for i in range(self.turns)]
        keys = list(pairs)
        turns = tuple(self._turn(frame, keys[place], pairs[keys[place]]) for place in places)
        context = np.asarray(begin + frame.pad(room - len(body)) + brace + body + close, np.int32)
        return Example(context, turns, tuple(place / len(pairs) for place in places))

    def _words(self, frame: Frame, ending: str) -> list[str]:
        """Words that make all questions equally long."""
        sizes = {word: len(self._turn(frame, word + ending, "1").query) for word in WORDS}
        usual = Counter(sizes.values()).most_common(1)[0][0]
        return [word for word in WORDS if sizes[word] == usual]

    def _turn(self, frame: Frame, key: str, value: str) -> Turn:
        return turn(frame, f'\n\nWhat is the value of the key "{key}"?', f'The value of the key "{key}" is "', [value])


def _line(key: str, value: str) -> str:
    return f'\n "{key}": "{value}"'
