"""The bars the project set itself, as ratios between engines of the same cell. Pure functions of the records."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

LONG_CONTEXT = 2048
FLOAT16_ENGINES = ("llama.cpp-f32-fa",)
"""Work in float16 inside, so that near ties among their greedy tokens may fall the other way."""

_TRANSFORMERS = "hf-"
_LLAMA = "llama.cpp-f32"
_STATIC = "hf-static-eager"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar and what was measured.

    Attributes:
      name: what is compared, and in which cell.
      value: the ratio; None: an engine it needs was not measured.
      target: what the ratio is held against.
      at_most: the ratio must not exceed the target; otherwise it must reach it.
      counts: False where the cell is not the one the bar is about, so that the ratio is shown but not judged.
      remark: what else to know.
    """

    name: str
    value: float | None
    target: float
    at_most: bool = False
    counts: bool = True
    remark: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if not self.counts:
            return "not judged"
        return "PASS" if (self.value <= self.target if self.at_most else self.value >= self.target) else "FAIL"

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.target:.2f}"


def evaluate(records: Sequence[Record]) -> list[Bar]:
    """All bars that the cells among `records` are about."""
    return [*_decode(records), *_prefill(records), *_h2o(records), *_flat(records), *_tokens(records)]


def _decode(records: Sequence[Record]) -> Iterator[Bar]:
    for (batch, context), seconds in _cells(records, "decode"):
        theirs = [value for engine, value in seconds.items() if engine.startswith(_TRANSFORMERS)]
        best = min(theirs, default=None)
        yield _times(f"decode, batch {batch}, context {context}: transformers' best / kvjax", best, seconds, 1.5)
        target = 0.85 if batch == 1 else 1.0
        yield _times(f"decode, batch {batch}, context {context}: llama.cpp f32 / kvjax", seconds.get(_LLAMA), seconds, target)


def _times(name: str, theirs: float | None, seconds: Mapping[str, float], target: float) -> Bar:
    step = _ratio(theirs, seconds.get("kvjax-step"))
    return Bar(name, _ratio(theirs, seconds.get("kvjax")), target, remark="" if step is None else f"{step:.2f} for kvjax-step")


def _prefill(records: Sequence[Record]) -> Iterator[Bar]:
    cells = list(_cells(records, "prefill"))
    for (batch, context), seconds in cells:
        name = f"prefill, batch {batch}, context {context}: transformers' static cache / kvjax"
        yield Bar(name, _ratio(seconds.get(_STATIC), seconds.get("kvjax")), 1.0 if context < LONG_CONTEXT else 0.9)
    for (batch, context), seconds in cells:
        if context == max(c for (_, c), _ in cells):
            name = f"prefill, batch {batch}, context {context}: H2O / full cache"
            yield Bar(name, _ratio(seconds.get("kvjax-h2o"), seconds.get("kvjax")), 1.4, at_most=True, **_only_long(context))


def _h2o(records: Sequence[Record]) -> Iterator[Bar]:
    cells = list(_cells(records, "decode"))
    for (batch, context), seconds in cells:
        if context == max(c for (_, c), _ in cells):
            floor = next((r["floor_seconds"] for r in _of(records, "decode", batch, context) if r["engine"] == "kvjax-h2o"), None)
            full, h2o = seconds.get("kvjax"), seconds.get("kvjax-h2o")
            value = None if full is None or h2o is None or floor is None else way_to_floor(full, h2o, floor)
            name = f"decode, batch {batch}, context {context}: H2O's way from the full cache to its floor"
            yield Bar(name, value, 0.8, **_only_long(context))


def way_to_floor(full: float, reduced: float, floor: float) -> float:
    """How far a smaller cache has come from the full one's time towards its own floor: 1 at the floor, 0 where nothing is gained."""
    return (full - reduced) / (full - floor)


def _flat(records: Sequence[Record]) -> Iterator[Bar]:
    by_batch: dict[int, dict[int, float]] = {}
    for (batch, context), seconds in _cells(records, "flat"):
        by_batch.setdefault(batch, {})[context] = max(seconds.values())
    for batch, times in by_batch.items():
        if len(times) > 1:
            contexts = ", ".join(str(context) for context in sorted(times))
            name = f"decode, batch {batch}: H2O with equal slots at contexts {contexts}, slowest / fastest"
            yield Bar(name, max(times.values()) / min(times.values()), 1.1, at_most=True)


def _tokens(records: Sequence[Record]) -> Iterator[Bar]:
    checked = [r for r in records if r["engine"] not in FLOAT16_ENGINES]
    if checked:
        equal, total = sum(r["tokens_equal"] for r in checked), sum(r["tokens_total"] for r in checked)
        odd = [f"{r['engine']} (batch {r['batch']}, context {r['context']})" for r in checked if r["tokens_equal"] < r["tokens_total"]]
        odd += [f"{r['engine']} differs between turns" for r in checked if not r["tokens_repeatable"]]
        value = equal / total if all(r["tokens_repeatable"] for r in checked) else 0.0
        yield Bar("greedy tokens equal to kvjax's, all engines and cells", value, 1.0, remark=", ".join(odd) or f"{equal}/{total}")


def _cells(records: Sequence[Record], phase: str) -> Iterator[tuple[tuple[int, int], dict[str, float]]]:
    """((batch, context), engine -> median seconds) of a phase, in the order they were measured."""
    for cell in dict.fromkeys((r["batch"], r["context"]) for r in records if r["phase"] == phase):
        yield cell, {r["engine"]: r["median_seconds"] for r in _of(records, phase, *cell)}


def _of(records: Sequence[Record], phase: str, batch: int, context: int) -> list[Record]:
    return [r for r in records if (r["phase"], r["batch"], r["context"]) == (phase, batch, context)]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _only_long(context: int) -> dict[str, Any]:
    return {} if context >= LONG_CONTEXT else {"counts": False, "remark": f"meant for context {LONG_CONTEXT}"}
