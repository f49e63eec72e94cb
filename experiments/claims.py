"""The findings of arXiv:2604.05012, claim by claim, each with the test that decides it from records.

A verdict comes from intervals alone: confirmed or refuted where the interval leaves no doubt, undecided otherwise. Where a claim is about
several strategies their intervals hold together at 95 % (Bonferroni). Only the abstract's level of detail of the paper is known here; what
it says is put in our words.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from kvjax.advise import OutsideData, advise, usual_needs
from kvjax.advise.evidence import device_bytes
from kvjax.report.cells import Point, Record, points
from kvjax.report.fields import family
from kvjax.report.statistics import Difference, Ratio, paired, ratio, share_difference
from kvjax.report.table import human_bytes

Verdict = Literal["confirmed", "refuted", "undecided"]

BUDGET = 0.2
"""The budget the paper's methods are usually run at: a fifth of the prompt."""

SAVED = 0.65
"""A saving from here on is "about 70 %"."""

FITS = 0.95
"""Up to this share of pages in use, without a preemption, everything fits."""

KEPT = 0.05
"""Recall that may be missing from the full cache's where facts count as kept."""

EARLY = 0.25
"""Facts before this depth are early."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the records say.

    Attributes:
      text: the figures and their intervals.
      experiments: where the records come from.
    """

    verdict: Verdict
    text: str
    experiments: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A finding of the paper.

    Attributes:
      says: what the paper says, in our words.
      cannot: what these data cannot tell about it.
      shown: the experiment whose figure stands beside it, where it was run.
    """

    name: str
    title: str
    says: str
    cannot: str
    test: Callable[["Evidence"], Finding]
    shown: str


class Evidence:
    """The records of a study, as points."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.points = points(records)

    @functools.cached_property
    def by_setting(self) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.setting_key, []).append(point)
        return found

    def pairs(self, first: str, second: str, of: Callable[[Point], bool] = lambda point: True) -> dict[str, list[tuple[Point, Point]]]:
        """By the first one's spec string: points of strategies with these names that stand in the same setting; `of`: which second ones."""
        found: dict[str, list[tuple[Point, Point]]] = {}
        for there in self.by_setting.values():
            for mine in (p for p in there if family(p.strategy) == first):
                for other in (p for p in there if family(p.strategy) == second and p.strategy != mine.strategy and of(p)):
                    found.setdefault(mine.strategy, []).append((mine, other))
        return found


# ----------------------------------------------------------------------------------------------------------------------------- estimates


Pairs = Sequence[tuple[Point, Point]]


def pooled_ratio(pairs: Pairs, sample: str, confidence: float = 0.95) -> Ratio | None:
    """How many times the second's samples the first's are, over all cells; clusters are those of each cell."""
    found = _pooled(pairs, lambda a, b: a.paired_samples(b, sample, least=1), confidence, lowest=0.0)
    if found is None:
        return None
    a, b, groups = found
    return ratio(a, b, groups=groups, confidence=confidence)


def pooled_difference(pairs: Pairs, sample: str, confidence: float = 0.95) -> Difference | None:
    """By how much the first's samples exceed the second's, over all cells."""
    found = _pooled(pairs, lambda a, b: a.paired_samples(b, sample, least=1), confidence)
    return None if found is None else paired(found[0], found[1], groups=found[2], confidence=confidence)


def pooled_runs(pairs: Pairs, key: str, confidence: float = 0.95) -> Ratio | None:
    """How many times the second's figure of a run the first's is, over all cells and repeats."""

    def run(record: Record) -> list[float]:
        return [record[key]] if record.get(key) else []

    found = _pooled(pairs, lambda a, b: a.paired_values(b, run, least=1), confidence, lowest=0.0)
    return None if found is None else ratio(found[0], found[1], groups=found[2], confidence=confidence)


def _pooled(
    pairs: Pairs, of: Callable[[Point, Point], Any], confidence: float, lowest: float = -math.inf
) -> tuple[np.ndarray, np.ndarray, list[Any]] | None:
    first: list[float] = []
    second: list[float] = []
    clusters: list[Any] = []
    for cell, (a, b) in enumerate(pairs):
        found = of(a, b)
        if found is None:
            continue
        mine, theirs, groups = found
        for index, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            if x > lowest and y > lowest:
                first.append(x)
                second.append(y)
                clusters.append((cell, groups[index] if groups is not None else index))
    if len(set(clusters)) < 2:
        return None
    return np.array(first), np.array(second), clusters


def together(count: int) -> float:
    """The confidence of each of `count` intervals that hold together at 95 %."""
    return 1 - 0.05 / max(count, 1)


def shown(found: Ratio) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def experiments(pairs: Iterable[tuple[Point, Point]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(point.get("sweep")) for pair in pairs for point in pair))


def nothing(what: str) -> Finding:
    return Finding("undecided", f"No records test it: {what}.")


# --------------------------------------------------------------------------------------------------------------------------------- tests


def fits(point: Point) -> bool:
    """A load that vllm served without ever being short of pages."""
    usage = point.most("kv_usage_peak")
    return bool(point.get("under_load")) and not point.most("num_preemptions") and (usage is None or usage <= FITS)


def pressed(point: Point) -> bool:
    """A load in which vllm was short of pages."""
    usage = point.most("kv_usage_peak") or 0.0
    return bool(point.get("under_load")) and (bool(point.most("num_preemptions")) or usage > FITS)


def fastest(evidence: Evidence) -> Finding:
    rivals = {**evidence.pairs("h2o", "vllm", fits), **evidence.pairs("infinigen", "vllm", fits)}
    found = {name: pooled_ratio(pairs, "e2el_ms", together(len(rivals))) for name, pairs in rivals.items()}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        return nothing("no load under vllm that fits stands beside h2o or infinigen, with samples")
    text = "End to end a request takes, relative to vllm where that is not short of pages: "
    text += ", ".join(f"{shown(one)} times under {name}" for name, one in known.items()) + "."
    if any(one.high < 1 for one in known.values()):
        verdict: Verdict = "refuted"
    else:
        verdict = "confirmed" if all(one.low > 1 for one in known.values()) else "undecided"
    return Finding(verdict, text, experiments(pair for name in known for pair in rivals[name]))


def saves_memory(evidence: Evidence) -> Finding:
    offline = evidence.pairs("h2o", "full", lambda point: not point.get("under_load") and device_bytes(point) is not None)
    savings = []
    for name, pairs in offline.items():
        for mine, full in pairs:
            used, whole = device_bytes(mine), device_bytes(full)
            if used is not None and whole and mine.budget is not None:
                savings.append((1 - used / whole, name, mine, full))
    if not savings:
        return nothing("no h2o stands beside the full cache offline")
    best = max(savings, key=lambda one: one[0])
    usual = [one for one in savings if one[2].budget == BUDGET]
    text = f"Cache and scratch of a step, counted: at most {best[0]:.0%} less than the full cache's, under {best[1]} "
    text += f"({human_bytes(device_bytes(best[2]) or 0)} for {human_bytes(device_bytes(best[3]) or 0)})"
    if usual:
        text += f"; at a budget of {BUDGET:.0%} from {min(one[0] for one in usual):.0%} to {max(one[0] for one in usual):.0%}"
    text += ". Counts have no interval."
    served = [pair for pairs in evidence.pairs("h2o", "full", lambda p: bool(p.get("under_load"))).values() for pair in pairs]
    if served:
        shares = [1 - (device_bytes(a) or 0) / (device_bytes(b) or math.inf) for a, b in served]
        text += f" Under load, staging counted, between {min(shares):.0%} and {max(shares):.0%} less at the peak."
    tried = any(one[2].budget is not None and one[2].budget <= BUDGET for one in savings)
    verdict: Verdict = "confirmed" if best[0] >= SAVED else "refuted" if tried else "undecided"
    return Finding(verdict, text, experiments([(one[2], one[3]) for one in savings] + served))


def costs_answers(evidence: Evidence) -> Finding:
    pairs = [p for found in evidence.pairs("h2o", "full").values() for p in found if p[0].budget == BUDGET]
    found = pooled_difference(pairs, "recall")
    if found is None:
        return nothing(f"no recall of h2o at {BUDGET:.0%} beside the full cache's, prompt by prompt")
    text = f"At a budget of {BUDGET:.0%} h2o recalls {found.first:.1%} of the facts, the full cache {found.second:.1%}: "
    text += f"{100 * found.mean:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})."
    divergence = pooled_difference(pairs, "kld")
    if divergence is not None:
        text += f" It diverges by {divergence.mean:.3g} nats ({divergence.low:.3g} to {divergence.high:.3g})."
    verdict: Verdict = "confirmed" if found.high < 0 else "refuted" if found.low > -KEPT else "undecided"
    return Finding(verdict, text, experiments(pairs))


def costs_time(evidence: Evidence) -> Finding:
    pairs = [p for found in evidence.pairs("h2o", "full", lambda point: not point.get("under_load")).values() for p in found]
    pairs = [p for p in pairs if p[0].budget == BUDGET]
    first, further = pooled_ratio(pairs, "ttft_ms", together(2)), pooled_ratio(pairs, "tpot_ms", together(2))
    if first is None or further is None:
        return nothing(f"no times of h2o at {BUDGET:.0%} beside the full cache's at the same batch")
    text = f"At the same batch and a budget of {BUDGET:.0%} the first token takes {shown(first)} times as long as with the full cache, "
    text += f"every further one {shown(further)} times."
    verdict: Verdict = "undecided"
    if first.low > 1 or further.low > 1:
        verdict = "confirmed"
    elif first.high < 1 and further.high < 1:
        verdict = "refuted"
    return Finding(verdict, text, experiments(pairs))


def early_share(point: Point) -> tuple[float, int] | None:
    """Recall of the facts that stand early, and how many were asked for."""
    prefix = "task_recall_depth_"
    keys = {key for record in point.records for key in record if key.startswith(prefix) and float(key.removeprefix(prefix)) < EARLY}
    asked = sum(record.get("task_questions_per_depth") or 0 for record in point.records)
    shares = [share for key in keys if (share := point.mean(key)) is not None]
    return (float(np.mean(shares)), asked * len(shares)) if shares and asked else None


def keeps_early(evidence: Evidence) -> Finding:
    best: tuple[tuple[bool, int], Point, Point, Point] | None = None
    for mine, full in (p for found in evidence.pairs("infinigen", "full").values() for p in found):
        for h2o in evidence.by_setting[mine.setting_key]:
            if family(h2o.strategy) != "h2o" or not h2o.budget == mine.budget == BUDGET:
                continue
            asked = early_share(mine)
            if asked and early_share(h2o) and early_share(full):
                rank = (mine.get("sweep") == "retention", asked[1])  # long prompts with facts at even depths
                best = (rank, mine, h2o, full) if best is None or rank > best[0] else best
    if best is None:
        return nothing(f"infinigen, h2o (both at {BUDGET:.0%}) and the full cache were not asked for the same early facts")
    _, mine, h2o, full = best
    (ours, n), (theirs, m), (whole, k) = (share for point in (mine, h2o, full) if (share := early_share(point)))
    confidence = together(3)
    ahead, lost = share_difference(ours, theirs, n, m, confidence), share_difference(theirs, whole, m, k, confidence)
    left = pooled_difference([(mine, full)], "recall", confidence)
    text = f"Of the facts in the first {EARLY:.0%} of the prompt infinigen recalls {ours:.1%}, h2o {theirs:.1%}, "
    text += f"the full cache {whole:.1%}: "
    text += f"infinigen over h2o {100 * (ours - theirs):+.1f} points ({100 * ahead[0]:+.1f} to {100 * ahead[1]:+.1f}), "
    text += f"h2o over the full cache {100 * (theirs - whole):+.1f} ({100 * lost[0]:+.1f} to {100 * lost[1]:+.1f})."
    if left is not None:
        text += f" Over all depths infinigen is at {100 * left.mean:+.1f} points ({100 * left.low:+.1f} to {100 * left.high:+.1f}) of full."
    verdict: Verdict = "undecided"
    if ahead[1] < 0 or lost[0] > 0 or (left is not None and left.high < -KEPT):
        verdict = "refuted"
    elif ahead[0] > 0 and lost[1] < 0 and left is not None and left.low > -KEPT:
        verdict = "confirmed"
    return Finding(verdict, text, experiments([(mine, h2o), (mine, full)]))


def wins_under_pressure(evidence: Evidence) -> Finding:
    rivals = evidence.pairs("h2o", "vllm", pressed)
    found = {name: pooled_runs(pairs, "output_throughput", together(len(rivals))) for name, pairs in rivals.items()}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        return nothing("no load in which vllm was short of pages stands beside h2o, in two runs or more")
    rates = sorted({p.get("request_rate") for pairs in rivals.values() for _, p in pairs})
    text = f"Where vllm is short of pages (at {', '.join(f'{rate:g}' for rate in rates)} requests/s) the tokens/s delivered are, "
    text += "relative to vllm, " + ", ".join(f"{shown(one)} times under {name}" for name, one in known.items()) + "."
    verdict: Verdict = "undecided"
    if any(one.low > 1 for one in known.values()):
        verdict = "confirmed"
    elif all(one.high < 1 for one in known.values()):
        verdict = "refuted"
    return Finding(verdict, text, experiments(pair for name in known for pair in rivals[name]))


def prediction_pays(evidence: Evidence) -> Finding:
    pairs = [p for found in evidence.pairs("infinigen", "offload").values() for p in found if p[0].budget == BUDGET]
    found = pooled_ratio(pairs, "tpot_ms")
    if found is None:
        return nothing(f"infinigen at {BUDGET:.0%} does not stand beside offload with times")
    text = f"A token takes {shown(found)} times as long under infinigen as under offload, which fetches every layer whole"
    moved = [(a.mean("kv_bytes_moved_per_token"), b.mean("kv_bytes_moved_per_token")) for a, b in pairs]
    shares = [a / b for a, b in moved if a is not None and b]
    if shares:
        text += f"; it moves {float(np.mean(shares)):.0%} of the bytes (counted)"
    verdict: Verdict = "confirmed" if found.high < 1 else "refuted" if found.low > 1 else "undecided"
    return Finding(verdict, text + ".", experiments(pairs))


def none_is_best(evidence: Evidence) -> Finding:
    named: dict[str, list[str]] = {}
    sure: set[str] = set()
    swept = []
    for label, needs in usual_needs(evidence.records):
        try:
            found = advise(evidence.records, needs, explain=False)
        except OutsideData:
            continue
        if found.strategy is not None:
            named.setdefault(family(found.strategy), []).append(label)
            swept.append(found.experiment)
            if found.decided or found.margin is None or all(family(name) == family(found.strategy) for name in found.equals or ("",)):
                sure.add(family(found.strategy))
    if not named:
        return nothing("no need the study asks about can be answered")
    text = "Named by the needs below: " + "; ".join(f"{name} for {len(labels)}" for name, labels in named.items()) + ". "
    text += f"Beyond the noise: {', '.join(sorted(sure)) or 'none'}."
    verdict: Verdict = "confirmed" if len(sure) > 1 else "refuted" if len(named) == 1 else "undecided"
    return Finding(verdict, text, tuple(dict.fromkeys(swept)))


CPU = "These are times of a CPU with tiny models, in which a step of many rows is bound by arithmetic sooner than on a card."
NO_LINK = (
    "On a CPU the link between device and host is a copy in memory, beside the other work on the same cores; what a PCIe link adds, and "
    "how much of it prefetching hides, these data do not show."
)
LAYERS = (
    "In kvjax-4m the facts are recalled in layers 0 and 1, which InfiniGen reads in full: its recall here is no evidence that the guess "
    'finds what it should (README, "Offloaded"). It takes a deeper model to tell.'
)

CLAIMS = (
    Claim(
        "fastest", "While everything fits, vLLM is fastest",
        "With all keys and values on the device, paging has the lowest latency of the three; evicting or fetching only adds work.", CPU,
        fastest, "request_rate",
    ),
    Claim(
        "saves_memory", "H2O saves up to about 70 % of the memory",
        "Keeping heavy hitters and recent tokens alone takes up to about 70 % less device memory.",
        "The paper counts the memory of a GPU; what else is in its number is not known here. This is the cache and the scratch of a step.",
        saves_memory, "sparsity",
    ),
    Claim(
        "costs_answers", "H2O pays for it with answers", "What was evicted cannot be asked for any more.",
        "Recall of facts nobody could see coming is the hardest case for eviction; summaries lose less.", costs_answers, "sparsity",
    ),
    Claim(
        "costs_time", "H2O pays for it with latency",
        "Scores have to be kept and victims chosen at every step, which costs time where memory is no concern.", CPU, costs_time,
        "context_length",
    ),
    Claim(
        "keeps_early", "InfiniGen keeps the early facts that H2O loses",
        "Nothing is thrown away, so what stands at the beginning of a long prompt can still be read.", LAYERS, keeps_early, "retention",
    ),
    Claim(
        "wins_under_pressure", "Under memory pressure and high request rates evicting wins",
        "Once the cache of all requests no longer fits, a strategy that holds less of each computes more of them at once.", CPU,
        wins_under_pressure, "request_rate",
    ),
    Claim(
        "prediction_pays", "Guessing what to fetch beats fetching everything",
        "InfiniGen is faster than offloading because it moves the tokens that matter alone. Offloading without a guess, with the next "
        "layer's cache fetched ahead, is the baseline it has to beat; baselines that fetch on demand flatter it.",
        NO_LINK, prediction_pays, "sparsity",
    ),
    Claim(
        "none_is_best", "Which one is best depends on the need",
        "Each of the three has conditions under which it is the one to use: memory, request rate and how much quality may be lost decide.",
        "Needs are a handful, chosen beforehand; ask for others with python -m kvjax.advise.", none_is_best, "batch_size",
    ),
)  # fmt: skip
