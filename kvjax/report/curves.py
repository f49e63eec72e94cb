"""Records as points of a figure: what shares a line, what shares a place on it, and repeats summed up."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvjax.cache.identity import Identity
from kvjax.report.fields import Record, finished, identity_of, number, value

NOT_SETTING = ("repeat", "seed", "cell_id", "scratch", "audit")
"""Keys of a cell in which repeats of a point differ, what else is measured of one of them included."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Records that lie on one line.

    Attributes:
      identity: of the strategy that gives it its look.
      points: the records of each place on x, in the order of x; what has no place there is under None.
    """

    label: str
    identity: Identity
    points: dict[Any, list[Record]]


def curves(records: Iterable[Record], x: str, series: str = "strategy") -> list[Curve]:
    """Records by series, then by place on x, repeats together.

    A series is what the cell declares, so that `h2o` at five budgets is one curve. Where two records of a series stand at one x and are
    no repeats of each other, the series falls into several curves, named by the keys in which they differ.
    """
    chosen = list(records)
    grouped: dict[str, list[Record]] = {}
    for record in chosen:
        declared = record.get("cell", {}).get(series)
        grouped.setdefault(str(_stated(record, series) if declared is None else declared), []).append(record)
    found = []
    for name, members in grouped.items():
        apart = _apart(members, x, series)
        parts: dict[str, list[Record]] = {}
        for record in members:
            parts.setdefault(", ".join(f"{key} {record.get('cell', {}).get(key)}" for key in apart), []).append(record)
        for part, mine in parts.items():
            described = {identity_of(r).label for r in mine} if series == "strategy" else {name}
            label = described.pop() if len(described) == 1 else name
            places: dict[Any, list[Record]] = {}
            for record in mine:
                places.setdefault(_place(value(record, x)), []).append(record)
            in_order = {place: places[place] for place in sorted(places, key=_order)}
            found.append(Curve(f"{label}, {part}" if part else label, identity_of(mine[0]), in_order))
    return found


def _order(place: Any) -> tuple[bool, float]:
    """Numbers first, in their order; names and None after them as they come."""
    return (False, place) if isinstance(place, float) else (True, 0.0)


def _place(found: Any) -> Any:
    """A float where it is a number, else the text itself."""
    parsed = number(found)
    return parsed if parsed is not None else None if found is None else str(found)


def _apart(records: Sequence[Record], *along: str) -> list[str]:
    """Keys of the cell in which records differ that share their place on `along`, but for what tells repeats apart."""
    shared: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        shared.setdefault(json.dumps([_stated(record, key) for key in along], default=str), []).append(record.get("cell", {}))
    keys = dict.fromkeys(key for cells in shared.values() for cell in cells for key in cell)
    return [
        key
        for key in keys
        if key not in (*NOT_SETTING, *along) and any(len({json.dumps(cell.get(key)) for cell in cells}) > 1 for cells in shared.values())
    ]


def _stated(record: Record, key: str) -> Any:
    """What a record says under a key; the strategy that was measured, not the name its cell has for it."""
    return identity_of(record).label if key == "strategy" else value(record, key)


def by_strategy(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Repeats together, by the label of the strategy and by what else of the cell differs between records of one label."""
    apart = _apart(records, "strategy")
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        extra = ", ".join(f"{key} {record.get('cell', {}).get(key)}" for key in apart)
        found.setdefault((identity_of(record).label, extra), []).append(record)
    return found


@dataclasses.dataclass(frozen=True)
class Summary:
    """A figure over the repeats of a point."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        spread = f" ({self.low:.4g} to {self.high:.4g}, {self.count} repeats)" if self.count > 1 else ""
        return f"{self.mean:.4g}{spread}"


def summary(records: Iterable[Record], key: str, factor: float = 1.0) -> Summary | None:
    """Mean, least and most of a key over finished repeats; None where none of them has a finite figure."""
    found = [factor * v for r in records if finished(r) and (v := number(r.get(key))) is not None and math.isfinite(v)]
    return Summary(math.fsum(found) / len(found), min(found), max(found), len(found)) if found else None
