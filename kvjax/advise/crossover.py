"""Where the answer changes: one need moved over what the data cover, the others as they are.

Along the rate and the length of the prompt the choice is made at every measured place; where two neighbours differ, the place in between
where the interpolated figures cross is looked for (or, at a tie, where their intervals stop or begin to tell them apart). Memory and the
bars on quality change the answer at thresholds alone: what a strategy needs, recalls or diverges by.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

from kvjax.advise.decide import Decision, decide
from kvjax.advise.evidence import Grid, Mark, Quality, candidates, device_bytes
from kvjax.advise.needs import Needs
from kvjax.report.table import human_bytes

STEPS = 16
"""Places looked at between two measured ones."""

UNITS = {"request_rate": "requests/s", "input_len": "tokens of prompt"}


@dataclasses.dataclass(frozen=True)
class Crossover:
    """The answer is `before` below `at` and `after` above it; None: nothing qualifies.

    Attributes:
      low, high: the measured places on both sides; the same as `at` for a threshold.
      tie: what changes at `at` is whether the figures can be told apart, not which is better.
    """

    axis: str
    at: float
    low: float
    high: float
    before: str | None
    after: str | None
    mark: Mark
    tie: bool = False

    def sentence(self) -> str:
        first, second = self.before or "nothing qualifies", self.after or "nothing qualifies"
        if self.axis in UNITS:
            told = ", where they can no longer, or only now, be told apart" if self.tie else ""
            how = f"{self.mark} between {self.low:g} and {self.high:g}{told}"
            return f"{self.axis} about {self.at:.3g} {UNITS[self.axis]}: {first} below, {second} above ({how})"
        shown = {"kv_memory": human_bytes, "min_recall": lambda x: f"{100 * x:.1f} %", "max_kld": lambda x: f"{x:.3g} nats"}[self.axis]
        side = ("up to it", "above") if self.axis == "min_recall" else ("below", "from it on")
        return f"{self.axis} {shown(self.at)}: {first} {side[0]}, {second} {side[1]} ({self.mark})"


def crossovers(grid: Grid, quality: Quality, needs: Needs) -> list[Crossover]:
    """All changes of the answer that the grid tells of, axis by axis, ascending."""
    found = []
    if grid.load and math.isfinite(needs.request_rate or math.inf):
        found += _along(grid, quality, needs, "request_rate")
    found += _along(grid, quality, needs, "input_len")
    found += _thresholds(grid, quality, needs)
    return found


def _decided(grid: Grid, quality: Quality, needs: Needs, axis: str, ties: bool, x: float) -> Decision:
    moved: dict[str, Any] = {axis: x}  # a length between two measured ones need not be a whole number of tokens
    return decide(grid, quality, dataclasses.replace(needs, **moved), ties)


def _named(decision: Decision) -> str | None:
    return decision.named.name if decision.named else None


def _along(grid: Grid, quality: Quality, needs: Needs, axis: str) -> list[Crossover]:
    at = functools.partial(_decided, grid, quality, needs, axis)
    places = [x for x in grid.values(axis) if math.isfinite(x)]
    answers = {x: decision for x in places if (decision := at(True, x)).judged}
    measured = sorted(answers)
    found = []
    for low, high in itertools.pairwise(measured):
        before, after = _named(answers[low]), _named(answers[high])
        if before == after:
            continue
        plain, careful = (functools.lru_cache(maxsize=None)(lambda x, ties=ties: _named(at(ties, x))) for ties in (False, True))
        tie = (plain(low), plain(high)) != (before, after)
        for x, first, second in _crossings(careful if tie else plain, low, high):
            found.append(Crossover(axis, x, low, high, first, second, "interpolated", tie))
    return found


def _crossings(answer: Callable[[float], str | None], low: float, high: float) -> list[tuple[float, str | None, str | None]]:
    """Where a piecewise constant function of a place changes, to a ten-thousandth of the way."""
    places = [low + (high - low) * i / STEPS for i in range(STEPS + 1)]
    found = []
    for left, right in itertools.pairwise(places):
        if answer(left) == answer(right):
            continue
        first, second = left, right
        while second - first > 1e-4 * (high - low):
            middle = (first + second) / 2
            first, second = (middle, second) if answer(middle) == answer(left) else (first, middle)
        found.append(((first + second) / 2, answer(left), answer(second)))
    return found


def _thresholds(grid: Grid, quality: Quality, needs: Needs) -> list[Crossover]:
    """Of the memory and the bars on quality; a bar on divergence is moved only where one is set."""
    judged = decide(grid, quality, dataclasses.replace(needs, kv_memory=None), ties=False).judged
    found = []
    for axis, key in (("kv_memory", "device_bytes"), ("min_recall", "task_recall"), ("max_kld", "fidelity_kld_mean")):
        at = functools.partial(_decided, grid, quality, needs, axis, True)
        known = {figure.value: figure.mark for one in judged if (figure := one.figure(key)) is not None}
        places = sorted(_sizes(grid, needs) if axis == "kv_memory" else known)
        if not places or (axis == "max_kld" and needs.max_kld is None):
            continue
        answers = [_named(at(place)) for place in places]
        if axis == "min_recall":  # what wins at a bar does so from the next lower recall up to it
            first = _named(decide(grid, quality, needs)) if needs.min_recall is None else answers[0]
            places, answers = [0.0, *places], [first, *answers]
            answers.append(_named(at(math.nextafter(places[-1], 2))) if places[-1] < 1 else answers[-1])
        else:
            places = places[1:]
        for place, (before, after) in zip(places, itertools.pairwise(answers), strict=True):
            if before != after:
                found.append(Crossover(axis, place, place, place, before, after, known.get(place, "measured")))
    return found


def _sizes(grid: Grid, needs: Needs) -> set[float]:
    """Bytes at which another point comes within reach."""
    ends = [point for one in candidates(grid, needs) for point, _ in one.ends]
    places = {(point.get("request_rate"), point.get("input_len")) for point in ends}
    there = [point for point in grid.points if (point.get("request_rate"), point.get("input_len")) in places]
    return {size for point in there if (size := device_bytes(point))}
