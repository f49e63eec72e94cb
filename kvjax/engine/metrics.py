"""Latency and throughput of requests, by the definitions and under the JSON keys of `vllm bench serve`; and what the engine's time series
says about the KV cache."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.errors import SpecError

TPOT_DEFINITION = "(e2el - ttft) / (output_tokens - 1) per request; requests with one token left out"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One finished request; times in seconds on a common clock.

    Attributes:
      start: when it was sent.
      token_times: when each output token was known to the client; at least one.
      queue: how long the client held it back before `start`, to keep to a concurrency cap; in no figure but its own two.
    """

    start: float
    token_times: tuple[float, ...]
    input_tokens: int
    queue: float = 0.0

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        steps = len(self.token_times) - 1
        return (self.e2el - self.ttft) / steps if steps else None

    @property
    def itls(self) -> list[float]:
        """Gaps between successive tokens."""
        return list(np.diff(self.token_times))


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Latency objectives of one request, in milliseconds; None: no objective. At least one is set."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def __post_init__(self):
        limits = {name: limit for name, limit in vars(self).items() if limit is not None}
        if not limits:
            raise SpecError("goodput without an objective; give ttft, tpot or e2el in milliseconds, such as ttft:200,tpot:50")
        for name, limit in limits.items():
            if not (math.isfinite(limit) and limit >= 0):
                raise SpecError(f"goodput {name}:{limit:g} is not a number of milliseconds >= 0; write for example {name}:200")

    def met(self, timeline: Timeline) -> bool:
        """Whether all objectives hold (<=). A request of one token has a TPOT of 0 here."""
        found = {"ttft": timeline.ttft, "tpot": timeline.tpot or 0.0, "e2el": timeline.e2el}
        return all(found[name] <= limit / 1e3 for name, limit in vars(self).items() if limit is not None)


def parse_goodput(spec: str) -> Goodput:
    """The objectives in `ttft:200,tpot:50`: milliseconds for any of ttft, tpot and e2el. Raises SpecError with what is allowed."""
    known = [field.name for field in dataclasses.fields(Goodput)]
    limits: dict[str, float] = {}
    for part in spec.split(","):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name not in known:
            raise SpecError(f"goodput {spec!r}: unknown objective {name!r}; choose from {', '.join(known)}, such as ttft:200,tpot:50")
        if name in limits:
            raise SpecError(f"goodput {spec!r} gives {name} twice")
        try:
            limits[name] = float(value)
        except ValueError:
            raise SpecError(f"goodput {spec!r}: {value!r} is not a number of milliseconds; write for example {name}:200") from None
    return Goodput(**limits)


def summarise(
    timelines: Sequence[Timeline],
    duration: float | None = None,
    percentiles: Sequence[float] = (99,),
    *,
    failed: int = 0,
    goodput: Goodput | None = None,
    closed_loop: bool = False,
) -> dict[str, Any]:
    """The summary keys of `vllm bench serve` for finished requests; every value is a finite number, but `request_goodput` may be None.

    Standard deviations are of the population, percentiles interpolate linearly, inter-token latencies are pooled over all requests.
    `max_output_tokens_per_s` is the fullest of the 1-second buckets counted from the first start; `max_concurrent_requests` counts a
    request from its start up to, not including, its last token. Both are over finished requests.

    Without a finished request the latency keys are left out; without a failed one either, only `completed` is given.

    Args:
      duration: seconds; None: from the first start to the last token. Over a duration of zero (one request whose only token came at once)
        a rate has no value; every throughput is then 0.
      failed: how many more requests did not finish.
      goodput: objectives; None: `request_goodput` is None.
      closed_loop: give the client's queueing times even if no request was held back.
    """
    if not timelines and not failed:
        return {"completed": 0}
    first, last = min((t.start for t in timelines), default=0.0), max((t.token_times[-1] for t in timelines), default=0.0)
    duration = last - first if duration is None else duration
    inputs, outputs = sum(t.input_tokens for t in timelines), sum(len(t.token_times) for t in timelines)
    good = None if goodput is None else sum(goodput.met(t) for t in timelines)

    def rate(count: int) -> float:
        return count / duration if duration > 0 else 0.0

    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(timelines),
        "failed": failed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(timelines)),
        "request_goodput": None if good is None else rate(good),
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
        "max_output_tokens_per_s": _fullest_second(timelines, first),
        "max_concurrent_requests": _peak_concurrency(timelines),
    }
    if not timelines:
        return result
    samples = {
        "ttft": [t.ttft for t in timelines],
        "tpot": [t.tpot for t in timelines if t.tpot is not None],
        "itl": [gap for t in timelines for gap in t.itls],
        "e2el": [t.e2el for t in timelines],
    }
    if closed_loop or any(t.queue > 0 for t in timelines):
        samples |= {"client_queue_time": [t.queue for t in timelines], "e2el_including_client_queue": [t.queue + t.e2el for t in timelines]}
    for name, seconds in samples.items():
        ms = np.asarray(seconds or [0.0]) * 1e3
        result |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms)), f"std_{name}_ms": float(ms.std())}
        result |= {f"p{p:g}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}
    return result


def _fullest_second(timelines: Sequence[Timeline], first: float) -> float:
    """Most tokens in one of the 1-second buckets that begin at `first`."""
    if not timelines:
        return 0.0
    seconds = (np.concatenate([t.token_times for t in timelines]) - first).astype(np.int64)
    return float(np.unique(seconds, return_counts=True)[1].max())


def _peak_concurrency(timelines: Sequence[Timeline]) -> int:
    """Most requests under way at once; at one instant those that end leave before others begin."""
    events = sorted([(t.start, 1) for t in timelines] + [(t.token_times[-1], -1) for t in timelines])
    return max(0, *np.cumsum([change for _, change in events], dtype=int).tolist()) if events else 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """The engine at one moment.

    Attributes:
      time: seconds.
      running: requests in the batch.
      waiting: requests that have arrived and are not in the batch.
      kv_usage: pages in use / pages.
      kv_live_tokens: tokens that the pages in use hold.
      kv_fragmentation: share of the slots of pages in use that hold no token; 0 with no page in use.
      context_tokens: tokens that the requests in the batch have behind them, kept or not.
      preemptions: since the engine started.
      prefix_hit_tokens: prompt tokens found in the prefix cache, since the engine started.
      prefix_query_tokens: prompt tokens looked up there, since the engine started.
    """

    time: float
    running: int
    waiting: int
    kv_usage: float
    kv_live_tokens: int
    kv_fragmentation: float
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    context_tokens: int = 0


def lengths(samples: Sequence[Sample]) -> np.ndarray:
    """Seconds that each sample holds, until the next one [samples]; the last holds for none, and all alike where no time passes."""
    times = np.array([s.time for s in samples])
    held = np.append(np.diff(times), 0.0) if len(samples) else times
    return held if held.any() else np.ones_like(held)


def summarise_series(samples: Sequence[Sample]) -> dict[str, float | int | None]:
    """Peaks and time-weighted means of samples in time order; a sample holds until the next one.

    `kv_fragmentation_mean` is over the time in which any page was in use, so that idle time does not hide waste.
    `prefix_cache_hit_rate` is tokens found / tokens looked up, None if none was. Without samples everything else is 0.
    """
    held = lengths(samples)
    usage, fragmentation = np.array([s.kv_usage for s in samples]), np.array([s.kv_fragmentation for s in samples])
    queried = samples[-1].prefix_query_tokens if samples else 0
    return {
        "kv_usage_peak": float(usage.max(initial=0.0)),
        "kv_usage_mean": _mean(usage, held),
        "kv_fragmentation_mean": _mean(fragmentation, held * (usage > 0)),
        "peak_running": max((s.running for s in samples), default=0),
        "peak_waiting": max((s.waiting for s in samples), default=0),
        "num_preemptions": samples[-1].preemptions if samples else 0,
        "prefix_cache_hit_rate": samples[-1].prefix_hit_tokens / queried if queried else None,
    }


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted mean; 0 where nothing weighs."""
    return float(values @ weights / weights.sum()) if weights.any() else 0.0
