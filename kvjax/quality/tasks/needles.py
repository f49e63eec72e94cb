"""What the needle tasks share: sentences with secret codes, in a haystack."""

from collections.abc import Sequence

import numpy as np

from kvjax.quality.tasks.base import Example, Task, Turn
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.texts import REPEATED, fill, insert, prose

HAYSTACKS = ("prose", "repeat")


def sentences_of(haystack: str) -> Sequence[str]:
    """The sentences a haystack is made of."""
    return prose() if haystack == "prose" else REPEATED


def number(rng: np.random.Generator, digits: int) -> str:
    """A random number that does not begin with 0."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def hidden(
    task: Task, frame: Frame, length: int, rng: np.random.Generator, *, haystack: str, intro: str, needles: Sequence[str],
    depths: Sequence[float], turns: Sequence[Turn], asked: Sequence[float],
) -> Example:  # fmt: skip
    """An example of sentences hidden at `depths`; `asked` are the depths of those that are asked for."""
    begin = frame.begin(intro)
    placed = [frame.ids(" " + needle) for needle in needles]
    used = len(begin) + len(turns[0].query) + sum(map(len, placed))
    sentences = sentences_of(haystack)
    if length < used + 1:
        raise task.too_short(length, used + 1)
    start = int(rng.integers(len(sentences))) if haystack == "prose" else 0
    body = insert(fill(frame, sentences, start, length - used), placed, depths)
    return Example(np.asarray(begin + body, np.int32), tuple(turns), tuple(asked))


def spread(rng: np.random.Generator, count: int) -> list[float]:
    """A random depth in each of `count` equal parts."""
    return [float((part + rng.random()) / count) for part in range(count)]
