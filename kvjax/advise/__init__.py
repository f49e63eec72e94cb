"""Which strategy to use, from records: for these bounds, this memory, this rate, this much quality.

    advise(records, Needs(ttft=200, tpot=50, kv_memory=16 * 2**20, min_recall=0.9, request_rate=4))

It says what to use and how to set it, by how much it is ahead and of what, where the answer would change, why everything else was passed
over, and how each figure it rests on came about: measured, interpolated between two measured cells, or modelled. It does not extrapolate:
outside its data it raises OutsideData. kvjax/advise/evidence.py says what is joined with what, and decide.py how a tie is broken.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kvjax.advise import decide as _decide
from kvjax.advise.crossover import Crossover, crossovers
from kvjax.advise.decide import Margin
from kvjax.advise.evidence import Figure, Grid, Quality, chosen_grid, grids
from kvjax.advise.needs import OBJECTIVES, Needs, OutsideData
from kvjax.engine.metrics import parse_goodput
from kvjax.errors import KvjaxError
from kvjax.report.cells import Record, points, value

__all__ = ["OBJECTIVES", "Advice", "Crossover", "Figure", "Margin", "Needs", "OutsideData", "advise", "recommendations"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """An answer, and all it rests on.

    Attributes:
      needs: as asked, what was left open filled in.
      strategy: a spec string; None where nothing measured qualifies.
      setting: what to set beside it; command: runs it.
      margin: over the best other strategy that qualifies; None where there is none.
      equals: strategies that are not distinguishable from the best.
      figures: of the named strategy.
      crossovers: where the answer changes.
      passed: every other strategy and why it was not named.
      assumed: what the needs left open.
      notes: what these measurements cannot say.
    """

    needs: Needs
    experiment: str
    strategy: str | None
    setting: dict[str, Any]
    command: str | None
    margin: Margin | None
    equals: tuple[str, ...]
    figures: tuple[Figure, ...]
    crossovers: tuple[Crossover, ...]
    passed: tuple[tuple[str, str], ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def decided(self) -> bool | None:
        """Whether the named strategy is distinguishably ahead of the next; None where that is not known or there is no other."""
        return None if self.margin is None else False if self.equals else self.margin.distinguishable

    def headline(self) -> str:
        """The answer in a sentence."""
        if self.strategy is None:
            return "None of the strategies measured meets these needs."
        if self.margin is None:
            return f"Use {self.strategy}: nothing else that was measured there meets these needs."
        if self.equals:
            others = ", ".join(self.equals)
            return f"Use {self.strategy}: in {self.needs.objective} not distinguishable from {others}, and it loses or needs the least."
        return f"Use {self.strategy}: {self.margin.text}."

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "needs": self.needs.record(),
            "experiment": self.experiment,
            "strategy": self.strategy,
            "decided": self.decided,
            "headline": self.headline(),
            "setting": self.setting,
            "command": self.command,
            "margin": None if self.margin is None else dataclasses.asdict(self.margin),
            "equals": list(self.equals),
            "figures": [dataclasses.asdict(figure) for figure in self.figures],
            "crossovers": [dataclasses.asdict(change) | {"sentence": change.sentence()} for change in self.crossovers],
            "passed_over": [{"strategy": name, "reason": why} for name, why in self.passed],
            "assumed": list(self.assumed),
            "notes": list(self.notes),
        }


def advise(records: Sequence[Record], needs: Needs, explain: bool = True) -> Advice:
    """The strategy to use.

    Args:
      explain: look for crossovers too, which takes most of the time.

    Raises OutsideData where the records do not cover what is asked, with the range they have.
    """
    grid, needs, assumed = chosen_grid(records, needs)
    quality = Quality(points(records))
    decision = _decide.decide(grid, quality, needs)
    named = decision.named
    others = [one for one in decision.judged if one is not named and not one.failures]
    nearest = max(others, key=lambda one: decision.goal.sign * one.goal.value if one.goal else -math.inf, default=None)
    setting = _decide.setting_of(named, grid, needs) if named else {}
    return Advice(
        needs=needs,
        experiment=grid.sweep,
        strategy=named.name if named else None,
        setting=setting,
        command=_decide.command(setting, needs) if named else None,
        margin=_decide.margin(named, nearest, decision.goal) if named and nearest else None,
        equals=tuple(one.name for one in decision.equals if one is not named),
        figures=named.figures if named else (),
        crossovers=tuple(crossovers(grid, quality, needs)) if explain else (),
        passed=tuple(_decide.reasons(decision, grid)),
        assumed=tuple(assumed),
        notes=tuple(_notes(decision, grid)),
    )


def _notes(decision: _decide.Decision, grid: Grid) -> list[str]:
    found = []
    if grid.points[0].get("device_kind") == "cpu" and any(one.figure("host_bytes") for one in decision.judged):
        found.append("times of strategies that keep the cache in host memory are those of a CPU, where the link is a copy in memory")
    return found


SHOWN = 3
"""Of strategies that are not distinguishable, in the table."""

QUALITY_BAR = 0.9
"""Of the facts recalled, for the table of recommendations."""


def usual_needs(records: Sequence[Record]) -> list[tuple[str, Needs]]:
    """A handful of needs the records can speak to, in words: little and much load, with and without a bar on recall; offline, three aims.

    Rates are the lowest and the highest measured, bounds on latency those the loads were measured with.
    """
    found: list[tuple[str, Needs]] = []
    loads = max(grids(records, load=True), key=lambda grid: (len(grid.strategies), len(grid.points)), default=None)
    if loads is not None:
        rates = [rate for rate in loads.values("request_rate") if math.isfinite(rate)]
        model, bounds = loads.points[0].get("model_id"), _bounds(loads.points[0].records[0])
        memory = loads.limits[-1] if loads.limits else None
        for rate in dict.fromkeys((rates[0], rates[-1]) if rates else ()):
            for bar in (QUALITY_BAR, None):
                needs = Needs(**bounds, request_rate=rate, model=model, kv_memory=memory, min_recall=bar)
                found.append((f"{rate:g} requests/s, {_bar(bar)}", needs))
    for aim in OBJECTIVES:
        for bar in (QUALITY_BAR, None):
            found.append((f"offline, best {aim}, {_bar(bar)}", Needs(objective=aim, min_recall=bar)))
    return found


def recommendations(records: Sequence[Record]) -> str:
    """A Markdown table: for a handful of needs, what to use, by what margin and on what evidence. Needs outside the data are left out."""
    lines = ["| need | use | margin | rests on |", "| --- | --- | --- | --- |"]
    for label, needs in usual_needs(records):
        try:
            found = advise(records, needs, explain=False)
        except OutsideData:
            continue
        if found.strategy is None:
            lines.append(f"| {label} | nothing measured qualifies | | {found.experiment} |")
            continue
        margin = "nothing else qualifies" if found.margin is None else found.margin.text
        if found.equals:
            others = [f"`{name}`" for name in found.equals[:SHOWN]] + [f"{len(found.equals) - SHOWN} others"] * (len(found.equals) > SHOWN)
            margin = f"not distinguishable: {', '.join(others)}; this one loses or needs the least"
        marks = ", ".join(dict.fromkeys(figure.mark for figure in found.figures))
        lines.append(f"| {label} | `{found.strategy}`{_batch(found)} | {margin} | {found.experiment}: {marks} |")
    return "\n".join(lines) + "\n"


def _bar(bar: float | None) -> str:
    return "any quality" if bar is None else f"{100 * bar:g} % of the facts recalled"


def _batch(found: Advice) -> str:
    size = found.setting.get("batch_size")
    return "" if size is None else f", batch {size}"


def _bounds(record: Record) -> dict[str, Any]:
    """The bounds on TTFT and TPOT a load was measured with, as Needs has them."""
    given = value(record, "goodput")
    if not isinstance(given, str):
        return {}
    try:
        goodput = parse_goodput(given)
    except KvjaxError:
        return {}
    return {name: bound for name in ("ttft", "tpot") if (bound := getattr(goodput, name)) is not None}
