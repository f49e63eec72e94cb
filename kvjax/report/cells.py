"""The cells of a study, read back: records by the setting they were measured in, repeats joined, samples paired.

A results directory holds <experiment>/records.jsonl, a record a finished cell.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvjax.cache.identity import Identity
from kvjax.errors import InputError
from kvjax.report.fields import budget_of, finished, identity_of, under_load, value

Record = dict[str, Any]

REPEATS = ("repeat", "seed", "cell_id")
"""What tells repeats of a point apart."""

OF_STRATEGY = (
    "strategy", "budget", "store", "policy", "spec", "transfer", "page_size", "calibration", "label", "currency", "target",
    "audit", "quality", "scratch", "host_memory", "limit",
)  # fmt: skip
"""What a cell may say about its strategy, and what else is measured of it; the rest is the setting."""

ALWAYS = ("sweep", "model_id", "dtype", "device_kind", "request_rate", "input_len", "output_len", "batch_size", "kv_memory")
"""Part of a setting, whether or not the cell declares it."""

LEAST_RUNS = 3
"""Fewer repeats than these are not resampled whole; parts of them are."""


def read_results(directory: pathlib.Path) -> list[Record]:
    """The records of every experiment under a results directory; of a cell that was run again, the last.

    A last line that was cut short is left out. Raises InputError where there is none.
    """
    files = sorted(directory.glob("*/records.jsonl")) if directory.is_dir() else []
    found: dict[Any, Record] = {}
    for file in files:
        lines = file.read_text("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):
                    continue
                raise InputError(f"{file}, line {number}, is not JSON; remove the line, and its cell is measured again") from None
            if not isinstance(record, dict) or "strategy" not in record:
                raise InputError(f"{file}, line {number}, is no record of a strategy; is this a directory that kvjax.sweep wrote?")
            record.setdefault("sweep", file.parent.name)
            cell = json.dumps(record["cell"], sort_keys=True) if "cell" in record else (str(file), number)
            found[record["sweep"], cell] = record
    if not found:
        raise InputError(
            f"no records under {directory}; it should hold <experiment>/records.jsonl, as `python -m experiments.study` writes"
        )
    return list(found.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One strategy in one setting, with all its repeats in order.

    Attributes:
      strategy: its label (kvjax.cache.Identity).
      setting: what else it was measured under, by key; without what tells repeats apart and without the strategy.
    """

    strategy: str
    budget: int | float | None
    setting: tuple[tuple[str, Any], ...]
    records: tuple[Record, ...]

    @functools.cached_property
    def identity(self) -> Identity:
        return identity_of(self.records[0])

    @property
    def scales(self) -> bool:
        """Whether what is kept grows with the prompt, so that the strategy is the same one at another length."""
        return self.identity.unlimited or isinstance(self.budget, float)

    @functools.cached_property
    def setting_key(self) -> str:
        return json.dumps(self.setting, sort_keys=True, default=str)

    def get(self, key: str) -> Any:
        return dict(self.setting).get(key)

    def without(self, *keys: str) -> str:
        """The setting but for these, to tell which points lie on one curve."""
        return json.dumps([pair for pair in self.setting if pair[0] not in keys], sort_keys=True, default=str)

    def mean(self, key: str) -> float | None:
        """Over the repeats that have the figure."""
        found = [r[key] for r in self.records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        return float(np.mean(found)) if found else None

    def most(self, key: str) -> float | None:
        found = [r[key] for r in self.records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        return float(max(found)) if found else None

    def samples(self, name: str) -> np.ndarray | None:
        """Of all repeats, those that are no number left out; None where there are none."""
        found = [x for r in self.records for x in (r.get("samples") or {}).get(name, ()) if x is not None and math.isfinite(x)]
        return np.array(found) if found else None

    def paired_samples(self, other: "Point", name: str, least: int = 2) -> tuple[np.ndarray, np.ndarray, list[Any] | None] | None:
        """This point's samples of a name, the other's, and the cluster of each pair; None where fewer than `least` stand side by side.

        See `paired_values`. Times of an offline batch are one measurement, so its prompts are one cluster; their answers are independent.
        """
        timed = name.endswith("_ms") and not under_load(self.records[0])
        return self.paired_values(other, lambda record: (record.get("samples") or {}).get(name) or (), timed, least)

    def paired_values(
        self, other: "Point", of: Callable[[Record], Sequence[float | None]], by_batch: bool = False, least: int = 2
    ) -> tuple[np.ndarray, np.ndarray, list[Any] | None] | None:
        """Values of both points, and the cluster of each pair; None where fewer than `least` clusters stand side by side.

        Repeats are paired by their seed, values by their place; a pair with a number missing is left out. Clusters are the repeats where
        there are `LEAST_RUNS` of them. With fewer they are blocks that follow each other of requests under load, batches with `by_batch`;
        else prompts are independent (None).
        """
        theirs = {_repeat(r): r for r in other.records}
        load, size = under_load(self.records[0]), self.get("batch_size") or 1
        pairs: list[tuple[float, float]] = []
        runs: list[Any] = []
        parts: list[Any] = []
        for record in self.records:
            partner = theirs.get(_repeat(record))
            mine, against = of(record), () if partner is None else of(partner)
            if not mine or len(mine) != len(against):
                continue
            for part, a, b in zip(blocks(len(mine), size if by_batch else None), mine, against, strict=True):
                if a is not None and b is not None and math.isfinite(a) and math.isfinite(b):
                    pairs.append((a, b))
                    runs.append(_repeat(record))
                    parts.append((_repeat(record), part))
        groups = runs if len(set(runs)) >= LEAST_RUNS else parts if load or by_batch else None
        if len(pairs if groups is None else set(groups)) < least:
            return None
        return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]), groups

    def paired_figures(self, other: "Point", figure: Callable[[Record], float | None]) -> tuple[np.ndarray, np.ndarray] | None:
        """A figure of each run beside the other's, repeat by repeat; None for fewer than two runs."""
        theirs = {_repeat(r): figure(r) for r in other.records}
        both = [(figure(r), theirs.get(_repeat(r))) for r in self.records]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        if len(pairs) < 2:
            return None
        return np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs], float)


def points(records: Iterable[Record]) -> list[Point]:
    """The finished records, repeats joined, in the order settings and strategies first appear."""
    found: dict[str, list[Record]] = {}
    settings: dict[str, tuple[tuple[str, Any], ...]] = {}
    for record in records:
        if not finished(record):
            continue
        setting = setting_of(record)
        key = json.dumps([identity_of(record).label, budget_of(record), setting], default=str)
        found.setdefault(key, []).append(record)
        settings[key] = setting
    joined = []
    for key, repeats in found.items():
        repeats.sort(key=lambda r: str(_repeat(r)))
        joined.append(Point(identity_of(repeats[0]).label, budget_of(repeats[0]), settings[key], tuple(repeats)))
    return joined


def setting_of(record: Record) -> tuple[tuple[str, Any], ...]:
    """What a record was measured under, but for its strategy and its repeat; pairs in the order of their keys."""
    declared = {key: value(record, key) for key in record.get("cell", {}) if key not in (*REPEATS, *OF_STRATEGY, "model")}
    declared |= {key: value(record, key) for key in ALWAYS}
    declared["under_load"] = under_load(record)
    return tuple(sorted((key, _frozen(what)) for key, what in declared.items()))


def _frozen(what: Any) -> Any:
    return json.dumps(what) if isinstance(what, list | dict) else what


def _repeat(record: Record) -> Any:
    cell = record.get("cell", {})
    return (cell.get("repeat", 0), cell.get("seed", record.get("seed")))


def blocks(count: int, size: int | None = None) -> list[int]:
    """Clusters of consecutive samples, by default about the square root of their number long.

    Requests that follow each other meet the same queue; a block keeps them together (the non-overlapping block bootstrap).
    """
    length = size or max(1, round(math.sqrt(count)))
    return [index // length for index in range(count)]
