"""A JSON object of keys and values, and several questions about one and the same (the idea of SCBench's Retr.KV, arXiv:2412.10319)."""

import dataclasses
from collections import Counter
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Task, Turn, check_number, turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.needles import number
from kvjax.quality.tasks.texts import WORDS


@dataclasses.dataclass(frozen=True)
class KeyValue(Task):
    """`turns`: questions about one context, each asked of the cache as it was after the context. Asked `before`, only the first is: a
    cache that was compressed with one question in view serves that question. `digits`: of a value.
    """

    name: ClassVar[str] = "kv"
    turns: int = 5
    digits: int = 5

    def __post_init__(self):
        check_number(self.name, "turns", self.turns, 1, 16)
        check_number(self.name, "digits", self.digits, 1, 18)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        words = self._words(frame)
        begin, brace, close = frame.begin("Below is a JSON object of keys and values."), frame.ids("\n\n{"), frame.ids("\n}")
        room = length - sum(map(len, (begin, brace, close, self._turn(frame, f"{words[0]}_10", "1").query)))
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

    def _words(self, frame: Frame) -> list[str]:
        """Words that make all questions equally long."""
        sizes = {word: len(self._turn(frame, f"{word}_10", "1").query) for word in WORDS}
        usual = Counter(sizes.values()).most_common(1)[0][0]
        return [word for word in WORDS if sizes[word] == usual]

    def _turn(self, frame: Frame, key: str, value: str) -> Turn:
        return turn(frame, f'\n\nWhat is the value of the key "{key}"?', f'The value of the key "{key}" is "', [value])


def _line(key: str, value: str) -> str:
    return f'\n "{key}": "{value}"'
