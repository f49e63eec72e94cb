"""Whole decode steps on the card: every strategy at the shapes of OPT-6.7B, OPT-13B and Llama-3-8B, random weights, the user's own path.

Prompts go in whole; then tokens come one a call from `kvjax.stream`, each known to the host before the next call. Beside the time stands
what the step has to read (kvjax.plan.bounds) over the copy's bandwidth in the same run: no step can be faster than that by much.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import kvjax
from experiments.gpu import kernels
from experiments.gpu.book import Book, Record, table
from experiments.gpu.timing import busy_seconds, device_events
from kvjax.cache import ledger, parse_strategy
from kvjax.calibrate import Calibration, calibrate, calibrated
from kvjax.files import replace
from kvjax.models import Model
from kvjax.plan.bounds import decode_work
from kvjax.plan.programs import Setting
from kvjax.report import profile

STRATEGIES = (
    "full",
    "vllm",
    "streaming",
    "h2o",
    "h2o+paged",
    "oracle_topk",
    "offload",
    "infinigen",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """In the end every row holds `context` tokens."""

    model: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} c{self.context}"


CELLS = (Cell("opt-6.7b", 16, 2048), Cell("opt-13b", 16, 2048), Cell("llama-3-8b", 16, 8192))
TOYS = (Cell("kvjax-1m", 2, 64),)


@dataclasses.dataclass(frozen=True)
class Effort:
    """Samples of so many steps, after some that do not count; then steps under the profiler."""

    samples: int = 7
    steps: int = 8
    warm_up: int = 2
    traced: int = 4

    @property
    def tokens(self) -> int:
        """All that a row generates: the prompt's own next token, and the steps."""
        return 1 + self.steps * (self.samples + self.warm_up) + self.traced


def cells(dry_run: bool) -> tuple[Cell, ...]:
    return TOYS if dry_run else CELLS


def perform(book: Book, dry_run: bool) -> None:
    """Times every strategy in every cell, a model at a time, then writes decode.md."""
    strategies = STRATEGIES[:4] if dry_run else STRATEGIES
    effort = Effort(2, 2, 1, 1) if dry_run else Effort()
    book.drop(["copy", *(f"{cell} {spec}" for cell in cells(dry_run) for spec in strategies)])
    copy = book.run("copy", lambda: kernels.timed(kernels.copy_job(2**20 if dry_run else 2**30), book, dry_run))
    rate = None if copy is None else copy.get("bytes_per_second")
    for cell in cells(dry_run):
        held = _Held(cell.model)
        for spec in strategies:
            about = {"model_id": cell.model, "strategy": spec, "batch": cell.batch, "context": cell.context}
            book.run(f"{cell} {spec}", partial(_steps, held, cell, spec, effort, rate, book, dry_run), about)
            gc.collect()
    replace(book.directory / "decode.md", markdown(book))
    book.console.print(markdown(book), markup=False, highlight=False)


class _Held:
    """A model, and what InfiniGen's calibration says of it, made when first asked for."""

    def __init__(self, name: str):
        self.name = name
        self._model: Model | None = None
        self._calibration: Calibration | None = None

    def prepared(self, strategy: kvjax.Strategy) -> Model:
        if self._model is None:
            self._model = kvjax.load_model(self.name, random_weights=True)
        if strategy.policy.guesses and self._calibration is None:
            self._calibration = calibrate(self._model)
        return calibrated(self._model, strategy, self._calibration)


def _steps(held: _Held, cell: Cell, spec: str, effort: Effort, rate: float | None, book: Book, dry_run: bool) -> Record:
    strategy = parse_strategy(spec)
    model = held.prepared(strategy)
    prompt = cell.context - effort.tokens
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (cell.batch, prompt)).astype(np.int32)
    stream = kvjax.stream(model, tokens, strategy=strategy, max_new_tokens=effort.tokens, stop_tokens=())
    began = time.perf_counter()
    emitted = next(stream)
    first = time.perf_counter() - began

    def advance(steps: int) -> float:
        nonlocal emitted
        began = time.perf_counter()
        for _ in range(steps):
            emitted = next(stream)
        jax.block_until_ready(emitted.state)
        return (time.perf_counter() - began) / steps

    for _ in range(effort.warm_up):
        advance(effort.steps)
    samples = [advance(effort.steps) for _ in range(effort.samples)]
    trace_dir = book.directory / "trace"
    with profile.trace(trace_dir):
        advance(effort.traced)
    events = [] if dry_run else device_events(trace_dir)
    work = decode_work(Setting(model.config, strategy, cell.batch, cell.context, effort.tokens, str(model.dtype)))
    median = statistics.median(samples)
    record: dict[str, Any] = {
        "median_seconds": median,
        "samples_seconds": samples,
        "busy_seconds": busy_seconds(events) / effort.traced if events else None,
        "first_token_seconds": first,
        "scopes_seconds": {name: at.seconds / effort.traced for name, at in profile.scope_times(trace_dir).items()},
        "native": getattr(strategy, "native", None) and str(strategy.native),
        "read_bytes": work.read,
        "from_host_bytes": work.from_host,
        "tokens_per_second": cell.batch / median,
        "floor_seconds": None if rate is None else work.read / rate,
        "steps": effort.steps,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    books = ledger(strategy, emitted.state).record()
    return record | {key: value for key, value in books.items() if key.startswith("kv_")}


def markdown(book: Book) -> str:
    """A table a cell, transformers' generate beside it where it was run."""
    lines = ["# Whole decode steps", ""]
    if book.dry_run:
        lines += ["A dry run on a CPU: the times mean nothing.", ""]
    records = [r for r in book.found if "strategy" in r]
    peers = Book(book.directory, "peers", 0, book.console).records
    for where in dict.fromkeys((r["model_id"], r["batch"], r["context"]) for r in records):
        mine = [r for r in records if (r["model_id"], r["batch"], r["context"]) == where]
        lines += [f"## {Cell(*where)}, {mine[0]['device_kind']}", ""]
        lines += [table(["strategy", "step (ms)", "device at work (ms)", "floor (ms)", "tokens/s", "KV on the device (GiB)"], _rows(mine))]
        peer = peers.get(f"generate {Cell(*where)}")
        if peer and "failure" not in peer:
            seconds = peer["median_seconds"]
            lines += ["", f"transformers' generate: {1e3 * seconds:.2f} ms a step, {where[1] / seconds:.0f} tokens/s."]
        lines += [""]
    lines += [f"- {r['case']}: {r['failure']}" for r in book.records.values() if "failure" in r]
    return "\n".join(lines).rstrip() + "\n"


def _rows(records: list[Record]) -> Iterator[list[str]]:
    for r in records:
        times = (r["median_seconds"], r["busy_seconds"], r["floor_seconds"])
        cells = ["-" if t is None else f"{1e3 * t:.2f}" for t in times]
        yield [r["strategy"], *cells, f"{r['tokens_per_second']:.0f}", f"{(r.get('kv_device_total_bytes') or 0) / 2**30:.2f}"]
