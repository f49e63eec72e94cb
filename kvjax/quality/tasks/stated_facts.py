"""The recall task of the bundled models (kvjax.quality.recall): facts in code, their true answers fed."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import InputError
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.quality import recall
from kvjax.quality.tasks.base import Example, Query, Task, Turn, check_number
from kvjax.quality.tasks.frame import Frame


@dataclasses.dataclass(frozen=True)
class StatedFacts(Task):
    """`facts`: stated at even depths, all of them asked for in one continuation. For models that read bytes."""

    name: ClassVar[str] = "recall"
    metric: ClassVar[str] = "recall"
    queries: ClassVar[tuple[Query, ...]] = ("after",)
    fed: ClassVar[bool] = True
    facts: int = 8

    def __post_init__(self):
        check_number(self.name, "facts", self.facts, 1, 1024)

    def example(self, frame: Frame, length: int, rng: np.random.Generator, depth: float) -> Example:
        if not isinstance(frame.tokenizer, ByteTokenizer):
            raise InputError("task recall asks models that read bytes, such as kvjax-4m; ask this one with niah_single or kv")
        test = recall.recall_test(rng, length, self.facts)
        query = test.continuation.astype(np.int32)
        return Example(test.prompt.astype(np.int32), (Turn(query, asked=test.answers),), tuple(float(d) for d in test.depths))
