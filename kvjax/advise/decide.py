"""The choice: who qualifies, who is best, what that rests on, and why the others were passed over.

Among candidates that meet every need the one with the best figure of the objective wins. Where others are not distinguishable from it (the
paired interval of the difference holds 0), the choice among them goes by what is lost least: divergence from the full cache, then recall,
then memory.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from kvjax.advise.evidence import (
    YARDSTICKS,
    Candidate,
    Figure,
    Grid,
    Objective,
    Quality,
    candidates,
    device_bytes,
    difference,
    latency,
    limit_of,
    objective,
)
from kvjax.advise.needs import Needs
from kvjax.report.fields import family
from kvjax.report.statistics import Difference
from kvjax.report.table import human_bytes


@dataclasses.dataclass(frozen=True)
class Margin:
    """By how much the named strategy is ahead of another in the objective.

    Attributes:
      gain: in the objective's unit, above 0 where the named one is better; low, high: its 95 % interval, where samples stand side by side.
      relative: gain over the other's figure.
      basis: what the interval rests on, or that there is none.
      distinguishable: None without an interval.
    """

    over: str
    gain: float
    low: float | None
    high: float | None
    relative: float | None
    basis: str
    distinguishable: bool | None
    text: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """A candidate, its figures, and the needs it fails (a sentence each)."""

    candidate: Candidate
    goal: Figure | None
    figures: tuple[Figure, ...]
    failures: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.candidate.strategy

    def figure(self, key: str) -> Figure | None:
        return next((f for f in self.figures if f.key == key), None)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Who was judged, who is best by the figures alone, and who is named.

    Attributes:
      judged: the best candidate of every strategy, the yardsticks left out.
      equals: not distinguishable from the best, itself included.
    """

    judged: tuple[Judged, ...]
    best: Judged | None
    named: Judged | None
    equals: tuple[Judged, ...]
    goal: Objective


def decide(grid: Grid, quality: Quality, needs: Needs, ties: bool = True) -> Decision:
    """Judges every strategy at the place asked about. `ties`: look which are not distinguishable from the best; else it is named."""
    goal = objective(grid, needs)
    by_strategy: dict[str, list[Judged]] = {}
    for candidate in candidates(grid, needs):
        if family(candidate.strategy) not in YARDSTICKS:
            by_strategy.setdefault(candidate.strategy, []).append(judge(candidate, grid, quality, needs, goal))
    judged = tuple(min(mine, key=functools.partial(_order, sign=goal.sign)) for mine in by_strategy.values())
    able = [one for one in judged if not one.failures]
    if not able:
        return Decision(judged, None, None, (), goal)
    best = min(able, key=functools.partial(_order, sign=goal.sign))
    if not ties:
        return Decision(judged, best, best, (best,), goal)
    equals = tuple(one for one in able if one is best or margin(best, one, goal).distinguishable is False)
    return Decision(judged, best, min(equals, key=_loss) if len(equals) > 1 else best, equals, goal)


def _order(one: Judged, sign: int) -> tuple[bool, float]:
    """Those that qualify first, the best figure first."""
    return bool(one.failures), math.inf if one.goal is None else -sign * one.goal.value


def _loss(one: Judged) -> tuple[float, float, float]:
    kld, recall, size = (one.figure(key) for key in ("fidelity_kld_mean", "task_recall", "device_bytes"))
    return (
        kld.value if kld else math.inf,
        -recall.value if recall else 0.0,
        size.value if size else math.inf,
    )


def judge(candidate: Candidate, grid: Grid, quality: Quality, needs: Needs, goal: Objective) -> Judged:
    """A candidate against the needs."""
    figures: list[Figure] = []
    failures: list[str] = []
    source, mark = candidate.source(needs.kv_memory), candidate.mark

    reached = candidate.at(goal.point)
    ranked = None
    if reached is None:
        failures.append(f"{goal.label} was not recorded")
    else:
        ranked = Figure(goal.key, goal.label, reached, goal.text(reached), mark, source)
        if goal.key != "device_bytes":
            figures.append(ranked)
    for name in ("ttft", "tpot"):
        most = getattr(needs, name)
        ends = [latency(point, name, needs.attainment) for point, _ in candidate.ends]
        if any(end is None for end in ends):
            if most is not None:
                failures.append(f"{name.upper()} was not recorded")
            continue
        found = sum(end[0] * weight for end, (_, weight) in zip(ends, candidate.ends, strict=True) if end)
        which = next(end[1] for end in ends if end)
        label = f"{which} {name.upper()}"
        figures.append(Figure(f"{name}_ms", label, found, f"{found:.4g} ms", mark, source))
        if most is not None and found > most:
            failures.append(f"{label} is {found:.4g} ms, {most:g} allowed")
    size = candidate.at(device_bytes)
    if size is not None:
        figures.append(Figure("device_bytes", "device memory of the cache", size, human_bytes(size), mark, source))
    if candidate.over > 0:
        needed = human_bytes((needs.kv_memory or 0) + candidate.over)
        limit = limit_of(candidate.ends[0][0])
        within = f"; with {human_bytes(limit)} it used that much, with less it was not measured" if limit is not None else ""
        failures.append(f"needs {needed} of device memory, {human_bytes(needs.kv_memory or 0)} allowed{within}")
    host = candidate.at(lambda point: point.most("kv_host_total_bytes"))
    if host:
        figures.append(Figure("host_bytes", "host memory of the cache", host, human_bytes(host), mark, source))
    for key, bound in (("task_recall", needs.min_recall), ("fidelity_kld_mean", needs.max_kld)):
        assert needs.input_len is not None
        known = quality.figure(candidate, key, needs.input_len)  # type: ignore[arg-type]
        if isinstance(known, str):
            if bound is not None:
                failures.append(known)
            continue
        figures.append(known)
        if bound is None:
            continue
        if key == "task_recall" and known.value < bound:
            failures.append(f"recalls {known.text} of the facts, at least {100 * bound:g} % wanted")
        if key == "fidelity_kld_mean" and known.value > bound:
            failures.append(f"diverges by {known.text} from the full cache, at most {bound:g} wanted")
    return Judged(candidate, ranked, tuple(figures), tuple(failures))


def margin(ahead: Judged, behind: Judged, goal: Objective) -> Margin:
    """By how much one is ahead of another, with the interval of the paired difference where there is one.

    Between two measured places the interval is interpolated as the figures are, which is rather too wide: their errors are independent.
    """
    assert ahead.goal is not None
    assert behind.goal is not None
    gain, other = goal.sign * (ahead.goal.value - behind.goal.value), behind.goal.value
    low = high = None
    distinguishable: bool | None = None
    ends = difference(ahead.candidate, behind.candidate, goal)
    known = [end for end in ends if end is not None]
    if goal.exact:
        basis, distinguishable = "counted", gain != 0
    elif len(known) < len(ends):
        basis = "point estimates, no interval"
    else:
        weights = [weight for _, weight in ahead.candidate.ends]
        bounds = [sum(w * goal.sign * getattr(end, side) for end, w in zip(known, weights, strict=True)) for side in ("low", "high")]
        low, high = sorted(bounds)
        distinguishable = low > 0 or high < 0
        basis = _basis(known[0], goal)
        if len(known) > 1:
            places = (f"{goal.sign * end.mean:+.3g} at {_place(ahead.candidate, i)}" for i, end in enumerate(known))
            basis += f", interpolated: {' and '.join(places)}"
    scaled = None if low is None or high is None or not other else f"{100 * low / other:+.1f} to {100 * high / other:+.1f} %"
    if gain == 0 and not low and not high:
        text = f"the same as {behind.name}"
    elif distinguishable is False:
        text = f"not distinguishable from {behind.name} ({100 * gain / other if other else 0:+.1f} %, {scaled})"
    else:
        text = f"{goal.text(abs(gain))} {'better' if gain > 0 else 'worse'} than {behind.name}"
        if other:
            text += f" ({100 * gain / other:+.1f} %" + (f", 95 % interval {scaled})" if scaled else ")")
    relative = gain / other if other else None
    return Margin(behind.name, gain, low, high, relative, basis, distinguishable, f"{text}; {basis}")


def _basis(found: Difference, goal: Objective) -> str:
    what = "requests" if goal.sample or (goal.key == "goodput" and goal.ttft is not None) else "runs"
    clusters = "" if found.units == found.samples else f" in {found.units} clusters"
    return f"{found.samples} {what} each, paired{clusters}"


def _place(candidate: Candidate, end: int) -> str:
    point, _ = candidate.ends[end]
    return f"{candidate.along}={point.get(candidate.along or 'request_rate'):g}"


def setting_of(named: Judged, grid: Grid, needs: Needs) -> dict[str, Any]:
    """What to set to use a strategy as it was measured."""
    point = named.candidate.ends[-1][0]
    found: dict[str, Any] = {"strategy": named.name, "model": needs.model, "input_len": needs.input_len}
    if grid.load:
        memory = needs.kv_memory if needs.kv_memory is not None else limit_of(point)
        found |= {"request_rate": f"{needs.request_rate:g}", "kv_memory": None if memory is None else _written(memory)}
    else:
        found |= {"batch_size": named.candidate.batch_size}
    if isinstance(length := point.get("output_len"), int):
        found["output_len"] = length
    return {key: what for key, what in found.items() if what is not None}


def _written(size: float) -> str:
    """16777216 -> '16MiB', as flags take it."""
    return f"{int(size) // 2**20}MiB" if size % 2**20 == 0 else str(int(size))


def command(setting: dict[str, Any], needs: Needs) -> str:
    """The command that runs the strategy at the place asked about."""
    words = ["python -m kvjax.run"]
    for key, what in setting.items():
        text = str(what)
        words.append(f"--{key}='{text}'" if "(" in text else f"--{key}={text}")
    bounds = [f"{name}:{getattr(needs, name):g}" for name in ("ttft", "tpot") if getattr(needs, name) is not None]
    if bounds and "request_rate" in setting:
        words.append(f"--goodput={','.join(bounds)}")
    return " ".join(words)


def reasons(decision: Decision, grid: Grid) -> list[tuple[str, str]]:
    """Every strategy of the grid that is not named, and why."""
    found = []
    named = decision.named
    for one in sorted(decision.judged, key=functools.partial(_order, sign=decision.goal.sign)):
        if one is named:
            continue
        if one.failures:
            found.append((one.name, "; ".join(one.failures)))
        elif named is not None:
            ahead = margin(named, one, decision.goal)
            if ahead.gain < 0 or ahead.distinguishable is False:
                found.append((one.name, f"{_tie(named, one)}; {margin(one, named, decision.goal).text}"))
            else:
                found.append((one.name, f"behind: {named.name} is {ahead.text}"))
    judged = {one.name for one in decision.judged}
    for strategy in grid.strategies:
        if family(strategy) in YARDSTICKS:
            found.append((strategy, "a yardstick: it reads every key to choose among them, so it saves nothing"))
        elif strategy not in judged:
            found.append((strategy, "not measured at, or on both sides of, the place asked about"))
    known = {name for name, _ in found} | judged
    found += [(strategy, why) for strategy, why in grid.infeasible.items() if strategy not in known]
    return found


def _tie(named: Judged, one: Judged) -> str:
    for key, word in (("fidelity_kld_mean", "diverges less"), ("task_recall", "recalls more"), ("device_bytes", "needs less memory")):
        mine, theirs = named.figure(key), one.figure(key)
        if mine and theirs and mine.value != theirs.value:
            return f"as good, but {named.name} {word} ({mine.text} against {theirs.text})"
        if mine and not theirs:
            return f"as good, but only of {named.name} is it known what it loses"
    return f"as good as {named.name} in all that was measured"


def equal_names(decision: Decision) -> Sequence[str]:
    return [one.name for one in decision.equals if one is not decision.named]
