"""Text that goes on: how well its tokens are predicted, fed one by one through decode (perplexity, KLD)."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.quality.tasks.base import Example, Query, Task, Turn, check_number
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.texts import passage


@dataclasses.dataclass(frozen=True)
class _Continuation(Task):
    """`tokens`: fed behind the prompt."""

    metric: ClassVar[str] = ""
    queries: ClassVar[tuple[Query, ...]] = ("after",)
    fed: ClassVar[bool] = True
    tokens: int = 64

    def __post_init__(self):
        check_number(self.name, "tokens", self.tokens, 1, 4096)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        if length < 1:
            raise self.too_short(length, 1)
        ids = np.asarray(passage(frame, self.name, rng, length + self.tokens), np.int32)
        return Example(ids[:length], (Turn(ids[length:]),))


@dataclasses.dataclass(frozen=True)
class Prose(_Continuation):
    """Sentences of the Python language reference."""

    name: ClassVar[str] = "prose"


@dataclasses.dataclass(frozen=True)
class Code(_Continuation):
    """Source code of the standard library."""

    name: ClassVar[str] = "code"
