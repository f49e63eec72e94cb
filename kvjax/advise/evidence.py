"""What the records say about a strategy at the place a user asks about.

What may be joined, and what may not:

- Speed and memory of all candidates come from one experiment in one setting (model, type, device, output length, arrivals), so that what
  differs between them is the strategy. They are never put together from two.
- Quality comes from any record of the same model and type whose *policy* is the same: the store changes where bytes live, not which
  tokens are read (tests/cache), and the engine compresses prompts as one call would (tests/engine). So `vllm` and `offload` answer as
  `full` does, and `h2o(...)+paged` as `h2o(...)`.
- Prompt lengths differ between experiments. A budget that is a fraction of the prompt is the same strategy at any length: its quality may
  be interpolated between two lengths, and carried over to another one, which is then marked as modelled. A budget in tokens is another
  strategy at another length; its quality counts at the length it was measured at alone. So does its speed.
- Speed is interpolated linearly between two measured cells that differ in the rate, or in the prompt's length; never in both, and never
  beyond. Latency grows faster than that towards saturation, so an interpolated one is rather too high.
- A load that ran in more memory than is allowed still counts if it never used more than that: it is taken to have run the same, and its
  figures say so.
- Bounds on TTFT and TPOT are checked against percentiles (`attainment`) of the requests where they are recorded, else the mean, and it is
  said which.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from kvjax.advise.needs import Needs, OutsideData
from kvjax.cache import parse_strategy
from kvjax.cache.spec import read_identity
from kvjax.engine.memory import parse_memory
from kvjax.errors import KvjaxError
from kvjax.report.cells import Point, Record, points
from kvjax.report.fields import family, scales, value
from kvjax.report.statistics import Difference, paired
from kvjax.report.table import human_bytes

Mark = Literal["measured", "interpolated", "modelled", "by definition"]

YARDSTICKS = ("oracle_topk",)
"""Bounds, not strategies: they read every key to choose among them."""

AXES = ("request_rate", "input_len", "batch_size", "kv_memory", "num_prompts")
"""Along these the points of one grid may differ."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number an advice rests on.

    Attributes:
      mark: how it came about.
      source: of which experiment, or between which two cells.
      low, high: its 95 % interval, where samples exist.
    """

    key: str
    label: str
    value: float
    text: str
    mark: Mark
    source: str
    low: float | None = None
    high: float | None = None

    def sentence(self) -> str:
        return f"{self.label}: {self.text} ({self.mark}, {self.source})"


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The points of one experiment in one setting, that differ in strategy, rate, length, batch and memory alone.

    Attributes:
      infeasible: by strategy, why a cell of this experiment could not be measured.
    """

    sweep: str
    load: bool
    points: tuple[Point, ...]
    infeasible: dict[str, str]

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(p.strategy for p in self.points))

    def values(self, key: str) -> list[Any]:
        """The numbers along an axis, ascending."""
        found = {p.get(key) for p in self.points}
        return sorted(x for x in found if isinstance(x, int | float) and not isinstance(x, bool))

    @property
    def limits(self) -> list[int]:
        """Memory limits of the loads, ascending; bytes."""
        return sorted({limit for p in self.points if (limit := limit_of(p)) is not None})


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A strategy at the place asked about: one measured point, or two with weights that add up to 1.

    Attributes:
      along: the axis between the two points.
      over: bytes by which every point at this place exceeds the memory allowed; 0 where one fits.
    """

    strategy: str
    ends: tuple[tuple[Point, float], ...]
    along: str | None = None
    batch_size: int | None = None
    over: float = 0.0

    @property
    def mark(self) -> Mark:
        return "measured" if len(self.ends) == 1 else "interpolated"

    def source(self, memory: float | None = None) -> str:
        """`request_rate, 3 runs` or `between request_rate=4 and 8`. `memory`: what is allowed."""
        first = self.ends[0][0]
        given = max((limit for point, _ in self.ends if (limit := limit_of(point)) is not None), default=0)
        beyond = f"; run with {human_bytes(given)}" if memory is not None and given > memory else ""
        if self.along is None:
            runs = len(first.records)
            return f"{first.get('sweep')}, {runs} run{'s' if runs > 1 else ''}{beyond}"
        low, high = (point.get(self.along) for point, _ in self.ends)
        return f"between {self.along}={low:g} and {high:g}{beyond}"

    def at(self, figure: Callable[[Point], float | None]) -> float | None:
        """A figure here; None where a point lacks it."""
        found = [(figure(point), weight) for point, weight in self.ends]
        return None if any(x is None for x, _ in found) else float(sum(x * weight for x, weight in found if x is not None))


# --------------------------------------------------------------------------------------------------------------------------------- figures


def limit_of(point: Point) -> int | None:
    """Bytes a load may use for its cache: what its engine was given."""
    given = point.get("kv_memory")
    return None if given is None else parse_memory(given)


def device_bytes(point: Point) -> float | None:
    """Most device memory the cache needed: offline, what is allocated with the scratch of a step; under load, the pages ever in use, rows'
    metadata and partial keys, and staging."""
    allocated = point.most("kv_device_total_bytes")
    if not point.get("under_load"):
        return None if allocated is None else allocated + (point.most("kv_transient_bytes") or 0.0)
    used = point.most("kv_peak_used_bytes")
    if used is None:
        return point.most("kv_memory_bytes")
    return used + (point.most("kv_metadata_bytes") or 0.0) + (point.most("kv_staging_bytes") or 0.0)


@functools.lru_cache(maxsize=65536)
def latency(point: Point, name: str, share: float) -> tuple[float, str] | None:
    """Milliseconds that a share of the requests stay within, the mean over runs, and which statistic that is."""
    runs = []
    for record in point.records:
        samples = [x for x in (record.get("samples") or {}).get(f"{name}_ms") or () if x is not None]
        if samples:
            runs.append(float(np.percentile(samples, 100 * share)))
        elif (known := record.get(f"p{100 * share:g}_{name}_ms")) is not None:
            runs.append(known)
    if runs:
        return float(np.mean(runs)), f"P{100 * share:g}"
    mean = point.mean(f"mean_{name}_ms")
    return None if mean is None else (mean, "mean")


def good_requests(record: Record, most_ttft: float | None, most_tpot: float | None) -> list[bool]:
    """Which requests of a load stayed within the bounds on TTFT and TPOT; empty without samples. One that failed did not."""
    samples = record.get("samples") or {}
    ttft, tpot = samples.get("ttft_ms"), samples.get("tpot_ms")
    if not ttft or not tpot or len(ttft) != len(tpot):
        return []
    most = (math.inf if most_ttft is None else most_ttft, math.inf if most_tpot is None else most_tpot)
    return [a is not None and a <= most[0] and (b or 0.0) <= most[1] for a, b in zip(ttft, tpot, strict=True)]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is to be best.

    Attributes:
      sign: 1 where more is better, -1 where less is.
      sample: the samples that are its parts, where it is their mean.
      exact: counted, the same in every run.
      ttft, tpot: the bounds, for a goodput.
    """

    key: str
    label: str
    unit: str
    sign: int
    sample: str = ""
    exact: bool = False
    ttft: float | None = None
    tpot: float | None = None

    def of(self, record: Record) -> float | None:
        """A record's figure."""
        if self.key != "goodput":
            return record.get(self.key, _e2el(record) if self.key == "mean_e2el_ms" else None)
        if parts := self.parts(record):
            return float(np.mean([x for x in parts if x is not None]))
        good = good_requests(record, self.ttft, self.tpot)
        return sum(good) / record["duration"] if good and record.get("duration") else None

    def parts(self, record: Record) -> Sequence[float | None]:
        """What a record's figure is the mean of, request by request; empty where it is no such mean.

        Requests within the bounds are counted against the rate they were offered at: how long a run took to drain is not theirs. Without a
        bound on TTFT, or all at once, they are counted against that time, as `request_goodput` is.
        """
        if self.key != "goodput":
            return (record.get("samples") or {}).get(self.sample) or ()
        rate = float(value(record, "request_rate") or math.inf)
        if self.ttft is None or math.isinf(rate):
            return ()
        return [rate * met for met in good_requests(record, self.ttft, self.tpot)]

    def point(self, point: Point) -> float | None:
        if self.exact:
            return device_bytes(point)
        found = [x for r in point.records if (x := self.of(r)) is not None]
        return float(np.mean(found)) if found else None

    def text(self, figure: float) -> str:
        return human_bytes(figure) if self.exact else f"{figure:.4g} {self.unit}"


def objective(grid: Grid, needs: Needs) -> Objective:
    """How candidates of a grid are ranked."""
    if needs.objective == "memory":
        return Objective("device_bytes", "device memory of the cache", "B", -1, exact=True)
    if needs.objective == "latency":
        return Objective("mean_e2el_ms", "mean latency, end to end", "ms", -1, "e2el_ms")
    if grid.load and (needs.ttft or needs.tpot):
        goal = Objective("goodput", "requests within the bounds", "requests/s", 1, ttft=needs.ttft, tpot=needs.tpot)
        if all(goal.of(r) is not None for p in grid.points for r in p.records):
            return goal
    return Objective("output_throughput", "output tokens", "tok/s", 1)


def _e2el(record: Record) -> float | None:
    ttft, tpot, count = record.get("mean_ttft_ms"), record.get("mean_tpot_ms"), value(record, "output_len")
    return None if ttft is None or tpot is None or not isinstance(count, int) else ttft + tpot * (count - 1)


# --------------------------------------------------------------------------------------------------------------------------------- quality


class Quality:
    """Recall and divergence by policy, wherever they were measured."""

    def __init__(self, found: Iterable[Point]):
        self._points: dict[tuple[str, str, Any], list[Point]] = {}
        for point in found:
            if point.get("prefill_mode") == "bounded" or not isinstance(point.get("input_len"), int):
                continue
            if any(point.mean(key) is not None for key in ("task_recall", "fidelity_kld_mean")):
                key = (point.identity.keep, point.get("model_id"), point.get("dtype"))
                self._points.setdefault(key, []).append(point)
        self._figures: dict[Any, Figure | str] = {}

    def figure(self, candidate: Candidate, key: Literal["task_recall", "fidelity_kld_mean"], length: int) -> Figure | str:
        """Of a candidate at a prompt length; where it is not known, why."""
        point = candidate.ends[0][0]
        where = (read_identity(candidate.strategy).keep, point.get("model_id"), point.get("dtype"))
        if (*where, key, length) not in self._figures:
            self._figures[(*where, key, length)] = self._find(where, key, length)
        return self._figures[(*where, key, length)]

    def _find(self, where: tuple[str, str, Any], key: str, length: int) -> Figure | str:
        label = {"task_recall": "facts recalled", "fidelity_kld_mean": "divergence from the full cache"}[key]
        if key == "fidelity_kld_mean" and where[0] == "full":
            return Figure(key, label, 0.0, "0", "by definition", "the full cache is the reference")
        by_length: dict[int, Point] = {}
        for point in self._points.get(where, ()):
            if point.mean(key) is not None:
                best = by_length.get(point.get("input_len"))
                if best is None or _prompts(point) > _prompts(best):
                    by_length[point.get("input_len")] = point
        if not by_length:
            return f"{label} of {where[0]} is not measured with {where[1]}"
        if length in by_length:
            return _quality(by_length[length], key, label)
        lengths = sorted(by_length)
        if not scales(where[0]):
            at = ", ".join(str(n) for n in lengths)
            return f"{label} was measured at {at} tokens of prompt, and a budget in tokens means something else at {length}"
        below, above = [n for n in lengths if n < length], [n for n in lengths if n > length]
        if below and above:
            low, high = (_quality(by_length[n], key, label) for n in (below[-1], above[0]))
            share = (length - below[-1]) / (above[0] - below[-1])
            mean = low.value + share * (high.value - low.value)
            source = f"between input_len={below[-1]} and {above[0]}"
            return Figure(key, label, mean, _shown(key, mean), "interpolated", source)
        nearest = below[-1] if below else above[0]
        known = _quality(by_length[nearest], key, label)
        reason = "it keeps everything" if where[0] == "full" else "its budget is a fraction of the prompt"
        source = f"as measured at {nearest} tokens of prompt, because {reason}"
        return dataclasses.replace(known, mark="modelled", source=source)


def _quality(point: Point, key: str, label: str) -> Figure:
    mean = point.mean(key)
    assert mean is not None
    samples = point.samples({"task_recall": "recall", "fidelity_kld_mean": "kld"}[key])
    source = f"{point.get('sweep')}, {_prompts(point)} prompts of {point.get('input_len')} tokens"
    if samples is None or len(samples) < 2:
        return Figure(key, label, mean, _shown(key, mean), "measured", source)
    spread = paired(samples, np.zeros(len(samples)))
    low, high = spread.low, spread.high
    if key == "task_recall":
        low, high = max(low, 0.0), min(high, 1.0)
    text = f"{_shown(key, mean)} ({_shown(key, low)} to {_shown(key, high)})"
    return Figure(key, label, mean, text, "measured", source, low, high)


def _shown(key: str, figure: float) -> str:
    return f"{100 * figure:.1f} %" if key == "task_recall" else f"{figure:.3g} nats"


def _prompts(point: Point) -> int:
    samples = point.samples("recall")
    return len(samples) if samples is not None else sum(int(value(r, "num_prompts") or 0) for r in point.records)


# ----------------------------------------------------------------------------------------------------------------------------------- grids


def grids(records: Sequence[Record], load: bool) -> list[Grid]:
    """The grids of the loads, or of the offline measurements, that were timed."""
    found: dict[str, list[Point]] = {}
    for point in points(records):
        timed = point.mean("output_throughput") is not None or point.mean("mean_tpot_ms") is not None
        if timed and point.get("under_load") == load and isinstance(point.get("input_len"), int):
            found.setdefault(point.without(*AXES), []).append(point)
    missing: dict[tuple[Any, Any], dict[str, str]] = {}
    for record in records:
        if record.get("outcome") in ("infeasible", "failed"):
            where = (record.get("sweep"), value(record, "model_id"))
            missing.setdefault(where, {})[_described(record["strategy"])] = f"{record['outcome']}: {record.get('error')}"
    return [
        Grid(inside[0].get("sweep"), load, tuple(inside), missing.get((inside[0].get("sweep"), inside[0].get("model_id")), {}))
        for inside in found.values()
    ]


def _described(spec: str) -> str:
    try:
        return parse_strategy(spec).describe()
    except KvjaxError:
        return spec


def candidates(grid: Grid, needs: Needs) -> list[Candidate]:
    """Every strategy of a grid at the place asked about, offline at every batch size; those not measured there left out."""
    assert needs.input_len is not None
    rate = needs.request_rate if grid.load else math.inf
    found = []
    for strategy in grid.strategies:
        mine = [p for p in grid.points if p.strategy == strategy]
        sizes = [None] if grid.load else [n for n in dict.fromkeys(p.get("batch_size") for p in mine) if needs.batch_size in (None, n)]
        for size in sizes:
            cells: dict[tuple[float, int], list[Point]] = {}
            for point in mine:
                if grid.load or point.get("batch_size") == size:
                    cells.setdefault((float(point.get("request_rate") or math.inf), point.get("input_len")), []).append(point)
            chosen = {place: _fitting(there, needs.kv_memory) for place, there in cells.items()}
            candidate = _located(strategy, chosen, float(rate or math.inf), needs.input_len, scales(strategy))
            if candidate is not None:
                found.append(dataclasses.replace(candidate, batch_size=size))
    return found


def _fitting(there: list[Point], memory: int | None) -> tuple[Point, float]:
    """Of points that differ in their memory limit, the one that comes closest to what is allowed, and by how many bytes it exceeds that."""
    used = {point: device_bytes(point) or 0.0 for point in there}
    fitting = [point for point in there if memory is None or used[point] <= memory]
    if fitting:
        return max(fitting, key=lambda p: ((limit_of(p) or 0) <= (memory or math.inf), limit_of(p) or 0)), 0.0
    least = min(there, key=lambda p: used[p])
    assert memory is not None
    return least, used[least] - memory


def _located(
    strategy: str, cells: dict[tuple[float, int], tuple[Point, float]], rate: float, length: int, scaling: bool
) -> Candidate | None:
    """The point at (rate, length), or the two next to it along one of them."""
    if (rate, length) in cells:
        point, over = cells[rate, length]
        return Candidate(strategy, ((point, 1.0),), over=over)
    lines: list[tuple[str, float, dict[float, tuple[Point, float]]]] = []
    if math.isfinite(rate):
        lines.append(("request_rate", rate, {r: cell for (r, n), cell in cells.items() if n == length and math.isfinite(r)}))
    if scaling:
        lines.append(("input_len", length, {n: cell for (r, n), cell in cells.items() if r == rate}))
    for along, x, line in lines:
        below, above = [v for v in line if v < x], [v for v in line if v > x]
        if below and above:
            low, high = max(below), min(above)
            share = (x - low) / (high - low)
            (first, over), (second, more) = line[low], line[high]
            return Candidate(strategy, ((first, 1 - share), (second, share)), along, over=max(over, more))
    return None


def chosen_grid(records: Sequence[Record], needs: Needs) -> tuple[Grid, Needs, list[str]]:
    """The grid that answers, the needs with what was left open filled in, and a sentence for each of those.

    Of the grids that cover the place, the one with the most strategies there; between equals, the one with fewer interpolated, then the
    one with more records. Raises OutsideData with the range there is.
    """
    load = needs.request_rate is not None
    every = grids(records, load)
    if not every:
        kind = "under load" if load else "offline"
        other = "leave request_rate out" if load else "give request_rate"
        raise OutsideData(f"the results hold no timed measurement {kind}; {other}, or measure one (python -m experiments.study)")
    assumed: list[str] = []
    models = [grid.points[0].get("model_id") for grid in every for _ in grid.points]
    if needs.model is None:
        model = max(dict.fromkeys(models), key=models.count)
        needs = dataclasses.replace(needs, model=model)
        if len(set(models)) > 1:
            assumed.append(f"model={model}, which most cells have")
    elif needs.model not in models:
        raise OutsideData(f"model={needs.model} is not in the results; they have {', '.join(dict.fromkeys(map(str, models)))}")
    every = [grid for grid in every if grid.points[0].get("model_id") == needs.model]
    best: tuple[tuple[int, int, int], Grid, Needs] | None = None
    for grid in every:
        lengths = grid.values("input_len") if needs.input_len is None else [needs.input_len]
        for length in lengths:
            wanted = dataclasses.replace(needs, input_len=length)
            found = [c for c in candidates(grid, wanted) if family(c.strategy) not in YARDSTICKS]
            if not found or _memory_problem(grid, found, wanted):
                continue
            strategies = {c.strategy for c in found}
            rank = (len(strategies), -sum(c.along is not None for c in found), len(grid.points))
            if best is None or rank > best[0]:
                best = (rank, grid, wanted)
    if best is None:
        raise OutsideData(_range(every, needs))
    _, grid, wanted = best
    if needs.input_len is None and len(grid.values("input_len")) > 1:
        assumed.append(f"input_len={wanted.input_len}, where most strategies were measured")
    if load and needs.kv_memory is None:
        assumed.append(f"kv_memory={human_bytes(grid.limits[-1])}, the largest limit measured" if grid.limits else "no memory limit")
    return grid, wanted, assumed


def _memory_problem(grid: Grid, found: Sequence[Candidate], needs: Needs) -> str | None:
    """Why a memory limit is outside what these candidates tell about; None where it is not."""
    if needs.kv_memory is None:
        return None
    least = min(device_bytes(point) or 0.0 for c in found for point, _ in c.ends)
    if all(c.over > 0 for c in found):
        return f"kv_memory={human_bytes(needs.kv_memory)} is less than anything measured there needed, {human_bytes(least)}"
    if grid.load and grid.limits and needs.kv_memory > grid.limits[-1]:
        had = " and ".join(dict.fromkeys(human_bytes(x) for x in (grid.limits[0], grid.limits[-1])))
        return f"kv_memory={human_bytes(needs.kv_memory)} is more than any load was given ({had}); nobody knows what more would change"
    return None


def _range(every: Sequence[Grid], needs: Needs) -> str:
    """One line: what is asked that the grids do not have, and what they have."""
    rates = sorted({r for grid in every for r in grid.values("request_rate")})
    lengths = sorted({n for grid in every for n in grid.values("input_len")})
    rate, length = needs.request_rate, needs.input_len
    if rate is not None and rate not in rates:
        finite = [r for r in rates if math.isfinite(r)]
        if not (math.isfinite(rate) and finite and finite[0] <= rate <= finite[-1]):
            return f"request_rate={rate:g} is outside the results, which have {_span(rates)} requests/s with {needs.model}"
    if length is not None and lengths and not lengths[0] <= length <= lengths[-1]:
        return f"input_len={length} is outside the results, which have {_span(lengths)} tokens of prompt with {needs.model}"
    if needs.batch_size is not None and needs.batch_size not in (sizes := sorted({n for g in every for n in g.values("batch_size")})):
        return f"batch_size={needs.batch_size} is not in the results, which have {', '.join(map(str, sizes))} with {needs.model}"
    for grid in every:
        for n in [length] if length is not None else grid.values("input_len"):
            wanted = dataclasses.replace(needs, input_len=n)
            found = [c for c in candidates(grid, wanted) if family(c.strategy) not in YARDSTICKS]
            if found and (problem := _memory_problem(grid, found, wanted)):
                return problem
    combined = "; ".join(f"{g.sweep}: {_span(g.values('input_len'))} tokens at {_span(g.values('request_rate'))}" for g in every)
    return f"no cell lies at or around request_rate={rate or 'inf'} with input_len={length}; the results have {combined} requests/s"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "none"
    shown = [f"{v:g}" for v in values if math.isfinite(v)]
    span = f"{shown[0]} to {shown[-1]} ({', '.join(shown)})" if len(shown) > 1 else ", ".join(shown)
    return span if math.isfinite(values[-1]) else ", and ".join(filter(None, [span, "inf"]))


def difference(winner: Candidate, other: Candidate, goal: Objective) -> list[Difference | None]:
    """The paired difference of the objective at each end; None where nothing stands side by side."""
    if len(winner.ends) != len(other.ends):
        return [None]
    return [_difference(a, b, goal) for (a, _), (b, _) in zip(winner.ends, other.ends, strict=True)]


@functools.lru_cache(maxsize=4096)
def _difference(a: Point, b: Point, goal: Objective) -> Difference | None:
    if goal.exact or a.without("kv_memory") != b.without("kv_memory"):
        return None
    pairs = a.paired_values(b, goal.parts, by_batch=not a.get("under_load"))
    if pairs is not None:
        return paired(pairs[0], pairs[1], groups=pairs[2])
    runs = a.paired_figures(b, goal.of)
    return None if runs is None else paired(*runs)
