"""Puts an engine under a load by the wall clock, and measures what comes of it."""

import collections
import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvjax.engine.engine import Engine, Output, RequestRefused
from kvjax.engine.load import Load, Request
from kvjax.engine.metrics import Goodput, Sample, Timeline, lengths, summarise, summarise_series
from kvjax.generation import cache_shape
from kvjax.interrupts import Interrupt, held

SAMPLE_EVERY = 0.02
"""Seconds between samples of the engine's state, and one whenever more pages are in use than before: peaks are exact."""

LONGEST_SLEEP = 0.05
"""Seconds; an interrupt is noticed after it."""

COUNTERS = ("preemptions", "prefix_hit_tokens", "prefix_query_tokens")
"""Figures of a Sample that count from the engine's start; here they count from the load's."""

Progress = Callable[[int, int], None]
"""Told how many requests have ended, and how many are being served."""


@dataclasses.dataclass
class Served:
    """What became of one request; times in seconds since the load began.

    Attributes:
      start: when the client sent it.
      queue: how long the client had held it back by then, to keep to its concurrency cap.
      reason: why it ended: `stop`, `length`, `abort`, `error: ...`, or why it was refused. None: it has not ended.
      refused: the engine did not take it.
    """

    request: Request
    start: float
    queue: float
    token_times: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str | None = None
    refused: bool = False

    @property
    def completed(self) -> bool:
        return self.reason in ("stop", "length")

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.start, tuple(self.token_times), len(self.request.prompt), self.queue)


@dataclasses.dataclass(frozen=True)
class Service:
    """A load as it was served.

    Attributes:
      served: requests that were sent, in order.
      samples: the engine's state over time.
      duration: seconds from the beginning to the end of the last request.
      steps: of the engine.
      complete: False when it was interrupted.
      traffic: of a host store, per layer: tokens decoded, rows held, wanted and moved [L, 4].
    """

    served: tuple[Served, ...]
    samples: tuple[Sample, ...]
    duration: float
    steps: int
    complete: bool
    traffic: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4)))

    def record_note(self) -> str:
        """One line on how far it got."""
        return f"{sum(s.completed for s in self.served)} of {len(self.served)} requests sent had been completed after {self.duration:.1f} s"

    def record(self, engine: Engine, goodput: Goodput | None = None, closed_loop: bool = False) -> dict[str, Any]:
        """The keys of `vllm bench serve`, and `kv_*` of the engine's memory."""
        timelines = [s.timeline for s in self.served if s.completed]
        failed = sum(not s.completed for s in self.served)
        series = summarise_series(self.samples)
        budget = engine.budget
        weights = lengths(self.samples)
        held = weights @ [s.kv_usage * budget.num_pages * (budget.page or budget.row) for s in self.samples]
        context = weights @ [s.context_tokens for s in self.samples]
        return {
            **summarise(timelines, self.duration, (50, 90, 95, 99), failed=failed, goodput=goodput, closed_loop=closed_loop),
            **series,
            "complete": self.complete,
            "refused": sum(s.refused for s in self.served),
            "steps": self.steps,
            "kv_memory_bytes": budget.total,
            "kv_pool_bytes": budget.num_pages * budget.page,
            "kv_pages": budget.num_pages,
            "kv_page_size": engine.scheduler.blocks.block_size,
            "kv_page_bytes": budget.page,
            "kv_metadata_bytes": budget.rows * budget.row,
            "kv_staging_bytes": budget.staging,
            "kv_peak_used_bytes": round(float(series["kv_usage_peak"] or 0) * budget.num_pages) * budget.page,
            "kv_bytes_per_token": float(held / context) if context else None,
            **self._host_record(engine),
        }

    def _host_record(self, engine: Engine) -> dict[str, Any]:
        """What stood in host memory, and what crossed over; nothing without a host store."""
        tier = engine.strategy.store.tier
        if not tier.fetches:
            return {}
        tokens, held, wanted, moved = (self.traffic[:, i] for i in range(4))
        shape = cache_shape(engine.model)
        row = 2 * shape.head_dim * np.dtype(shape.dtype).itemsize
        found: dict[str, Any] = {
            "transfer": tier.options["transfer"],
            "kv_host_total_bytes": engine.budget.num_pages * engine.budget.seat,
            "kv_bytes_moved_per_token": float(moved.sum() * row / tokens.max()) if tokens.any() and tier.in_host else 0.0,
        }
        if held.all():
            found |= {"kv_fetched_fraction": float((moved / held).mean()), "kv_wanted_fraction": float((wanted / held).mean())}
        return found


def serve(
    engine: Engine,
    load: Load,
    *,
    max_concurrency: int | None = None,
    progress: Progress = lambda ended, running: None,
    stop_tokens: tuple[int, ...] | None = (),
) -> Service:
    """Sends the requests of a load when their time has come and steps the engine until all have ended.

    A request that the engine refuses counts as failed. An interrupt waits until the step that is under way is done: then what is under way
    is aborted, and what has been measured is returned, marked incomplete; a second one does not wait.

    Args:
      max_concurrency: requests a client has under way at most; others wait at the client, and their start is when they are sent.
      stop_tokens: ids that end a request; (): none, so that all generate what they ask for; None: the model's own.
    """
    with held() as interrupt:
        service = _serve(engine, load, max_concurrency, progress, stop_tokens, interrupt)
        interrupt.settle()
        return service


def _serve(
    engine: Engine, load: Load, max_concurrency: int | None, progress: Progress, stop_tokens: tuple[int, ...] | None, interrupt: Interrupt
) -> Service:
    """`serve`, until `interrupt` says otherwise."""
    waiting = collections.deque(load.requests)
    served: dict[str, Served] = {}
    samples: list[Sample] = []
    under_way = ended = 0
    freed = 0.0  # when the client last got a place back
    fullest = 0  # most pages in use that a sample shows
    before, steps, traffic = engine.sample(0.0), engine.steps, engine.traffic()
    complete, began, last = True, time.perf_counter(), 0.0

    def now() -> float:
        return time.perf_counter() - began

    def sample() -> None:
        after = engine.sample(now())
        counted = {name: getattr(after, name) - getattr(before, name) for name in COUNTERS}
        samples.append(dataclasses.replace(after, **counted))

    def take(outputs: list[Output]) -> None:
        nonlocal under_way, ended, last, freed
        for output in outputs:
            one = served[output.request]
            known = output.time - began
            one.tokens += output.tokens
            one.token_times += [known] * len(output.tokens)
            if output.finished:
                one.reason = output.reason
                under_way, ended, last, freed = under_way - 1, ended + 1, known, known

    try:
        while (waiting or engine.busy) and interrupt.waiting is None:
            moment = now()
            while waiting and waiting[0].arrival <= moment and (max_concurrency is None or under_way < max_concurrency):
                request = waiting.popleft()
                start = request.arrival if max_concurrency is None else max(request.arrival, freed)
                one = served[str(request.index)] = Served(request, start, start - request.arrival)
                try:
                    engine.add(
                        str(request.index), request.prompt, max_tokens=request.max_tokens, seed=request.seed, sampling=request.sampling,
                        stop_tokens=stop_tokens,
                    )  # fmt: skip
                    under_way += 1
                except RequestRefused as refusal:
                    one.reason, one.refused, ended = str(refusal), True, ended + 1
            if engine.busy:
                take(engine.step())
            elif waiting:
                time.sleep(min(max(waiting[0].arrival - now(), 0.0), LONGEST_SLEEP))
            used = engine.scheduler.blocks.used_blocks
            if not samples or used > fullest or now() - samples[-1].time >= SAMPLE_EVERY:
                fullest = max(fullest, used)
                sample()
                progress(ended, under_way)
    except KeyboardInterrupt:
        if interrupt.waiting is not None:
            raise  # the second one, in the midst of anything
        interrupt.waiting = signal.SIGINT  # raised between steps, by what reports progress
    if interrupt.waiting is not None:
        complete, stopped = False, now()
        for name in engine.requests:
            if name in served:
                engine.abort(name)
        while engine.busy:
            take(engine.step())
        for one in served.values():
            one.reason = one.reason or "abort"
        last = stopped
    sample()
    progress(ended, under_way)
    return Service(tuple(served.values()), tuple(samples), last, engine.steps - steps, complete, engine.traffic() - traffic)
