"""Cells: what one point of a grid is, what it is called, and in which order a grid is measured.

A cell is a flat dict of JSON scalars that says all there is to say about one measurement. Its id is a hash of its canonical JSON, so it
depends on no order. An infinite number is written "inf", as in records: JSON has no other way.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.errors import SpecError

Cell = Mapping[str, Any]
"""Names to str, int, float, bool or None."""

ID_LENGTH = 16
"""Hexadecimal digits: a grid of a million cells has two of one id with a probability of 3e-8."""


def cell_id(cell: Cell) -> str:
    """The name of a cell. A number is what it is worth: 1 and 1.0 are one. Raises SpecError for a cell that is not flat JSON."""
    return hashlib.sha256(canonical(cell).encode()).hexdigest()[:ID_LENGTH]


def canonical(cell: Cell) -> str:
    """The cell's one JSON text: names sorted, no spaces, whole floats as ints. Raises SpecError for a cell that is not flat JSON."""
    return json.dumps({_name(name): _scalar(name, cell[name]) for name in sorted(cell, key=str)}, separators=(",", ":"), ensure_ascii=False)


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise SpecError(f"cell key {name!r} is not a name; cells are flat dicts of names to numbers, text, True, False or None")
    return name


def _scalar(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float):
        raise SpecError(f"cell value {name}={value!r} is a {type(value).__name__}; cells hold numbers, text, True, False or None")
    if not math.isfinite(value):
        raise SpecError(f'cell value {name}={value!r} is no JSON; write "inf" for an infinite one')
    return int(value) if value.is_integer() else value


def checked(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Cells by id, in order. Raises SpecError for a cell that is not flat JSON, or is declared twice."""
    found: dict[str, Cell] = {}
    for cell in cells:
        name = cell_id(cell)
        if name in found:
            raise SpecError(f"a cell is declared twice: {canonical(cell)}")
        found[name] = cell
    return found


def in_turns(cells: Sequence[Cell]) -> list[Cell]:
    """The order of measurement: a model's cells together, and of those all of repeat 0, then all of repeat 1, and so on.

    Within a repeat the declared order stays. So whatever slowly changes about a machine meets every strategy alike, repeats of a cell
    are as far apart as they can be, and a model is loaded once.
    """
    models = {model: rank for rank, model in enumerate(dict.fromkeys(_model(cell) for cell in cells))}
    return sorted(cells, key=lambda cell: (models[_model(cell)], cell.get("repeat") or 0))


def _model(cell: Cell) -> tuple[Any, Any]:
    return cell.get("model"), cell.get("num_layers")
