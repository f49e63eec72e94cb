"""Texts that every Python brings along or that stand here: prose, source code, a dull paragraph, words."""

import pydoc_data.topics
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from kvjax.quality import recall
from kvjax.quality.tasks.frame import Frame

REPEATED = (
    "The grass is soft and the river runs slowly.",
    "Clouds drift over the hills.",
    "A road leads from the village to the sea.",
)
"""Sentences to repeat: a haystack that holds nothing else of interest."""

_WORDS = """
anchor apple bamboo basket button camera candle carpet castle cherry circle copper cotton dragon eagle engine fabric
falcon farmer feather finger flower forest garden garlic ginger guitar hammer harbor hunter insect island jacket
jungle kettle kitten ladder lantern lemon magnet marble market meadow mirror monkey needle office olive orange
orchid oyster palace pencil pepper planet pocket potato rabbit ribbon river rocket saddle school shadow shelter
silver spider spring square statue sugar summer sunset tailor temple ticket timber tower tunnel turtle valley velvet
village violin wagon walnut whistle window winter wizard
"""
WORDS = tuple(_WORDS.split())
"""Common nouns, none of them part of another."""

_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_NO_PROSE = ("::=", "***", "===", "---", ">>>", "|")
_SHORTEST = 60


@cache
def prose() -> tuple[str, ...]:
    """Sentences of the Python language reference as `pydoc_data.topics` holds it, in order: about 45,000 words."""
    sentences: list[str] = []
    for topic in sorted(pydoc_data.topics.topics):
        for block in re.split(r"\n\s*\n", pydoc_data.topics.topics[topic]):
            paragraph = " ".join(block.removeprefix("* ").split())
            listing = block.startswith(" ") or any(sign in block for sign in _NO_PROSE)
            if not listing and len(paragraph) >= _SHORTEST and paragraph.endswith("."):
                sentences += _SENTENCE.split(paragraph)
    return tuple(sentences)


def fill(frame: Frame, sentences: Sequence[str], start: int, room: int) -> list[list[int]]:
    """Exactly `room` tokens of the sentences from number `start` on, around the end if need be: a list a sentence.

    The last one is cut short after a word.
    """
    pieces: list[list[int]] = []
    at = start
    while room:
        ids = frame.ids(" " + sentences[at % len(sentences)])
        if len(ids) > room:
            return [*pieces, _cut(frame, sentences, at, room)]
        pieces.append(ids)
        room -= len(ids)
        at += 1
    return pieces


def _cut(frame: Frame, sentences: Sequence[str], start: int, room: int) -> list[int]:
    """`room` tokens of the beginning of a sentence, the first that can be cut so after a word; padding if none can."""
    for at in range(start, start + min(len(sentences), 50)):
        words = [f" {word}" for word in sentences[at % len(sentences)].split()]
        sizes = np.cumsum([len(frame.ids(word)) for word in words]).tolist()
        if room in sizes[:-1]:
            return frame.ids("".join(words[: sizes.index(room) + 1]))[:room]
    return frame.pad(room)


def insert(pieces: list[list[int]], needles: Sequence[list[int]], depths: Sequence[float]) -> list[int]:
    """The pieces in one, with every needle between two of them, nearest to its depth (0 the beginning, 1 the end)."""
    ends = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    total = ends[-1] + len(pieces[-1]) if pieces else 0
    places = [int(np.abs(ends - depth * total).argmin()) for depth in depths]
    ids: list[int] = []
    for number in range(max(len(pieces), 1)):
        here = sorted((depths[i], i) for i, place in enumerate(places) if place == number)
        for _, i in here:
            ids += needles[i]
        ids += pieces[number] if pieces else []
    return ids


def passage(frame: Frame, kind: str, rng: np.random.Generator, length: int) -> list[int]:
    """`length` consecutive tokens of `prose` or `code` from a random place, without a chat template."""
    plain = Frame(frame.tokenizer)
    if kind == "code":
        source = recall.standard_library(held_out=True)
        size = min(64 * length + 1024, len(source) - 1)  # no source has tokens so long
        at = int(rng.integers(0, len(source) - size))
        lines = source[at : at + size].tobytes().decode(errors="ignore").splitlines(keepends=True)[1:]
        ids: list[int] = plain.begin("")
        for line in lines:
            if len(ids) >= length:
                break
            ids += plain.ids(line)
        return ids[:length]
    sentences = prose()
    at = int(rng.integers(len(sentences)))
    ids = plain.begin(sentences[at])
    while len(ids) < length:
        at += 1
        ids += plain.ids(" " + sentences[at % len(sentences)])
    return ids[:length]
