"""A soak: thousands of short requests at twice the rate the engine can sustain, with cancellations and preemptions mixed in.

    make soak

First measures what the engine sustains (all requests at once, a few hundred of them), then offers twice that. A share of the requests is
aborted at a random moment, some running ones are preempted by force, many more by lack of pages, and some could never be served. Checked at
the end, and along the way: every request ends exactly once, each with the tokens it asked for if it finished; the pages' bookkeeping
holds; no page and no row is in use; the process has not grown. Exits with 1 when anything fails.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import collections
import gc
import math
import pathlib
import time
from typing import Any

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import kvjax
from kvjax.engine.engine import Engine, RequestRefused
from kvjax.engine.load import Uniform, arrivals, make_load
from kvjax.engine.serve import serve
from kvjax.files import dumps
from kvjax.report.record import setting

FLAGS = flags.FLAGS
CHECK_EVERY = 500
"""Steps between checks of the bookkeeping and of the process's memory."""


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("model", "kvjax-1m", "The model.")
    flags.DEFINE_list("strategies", ["vllm", "h2o+paged"], "Engines to soak, one after the other.")
    flags.DEFINE_integer("num_requests", 10_000, "Requests per engine.", lower_bound=1)
    flags.DEFINE_float("abort", 0.1, "Share of requests that are cancelled.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("preempt", 0.02, "Chance per step that a running request is preempted by force.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("impossible", 0.01, "Share of requests that could never be served.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_string("output_dir", "experiments/results/soak_cpu", "Where the record goes.")


def resident() -> int:
    """Bytes of this process in memory."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS: this soak reads /proc and runs on Linux")


def soak(model: kvjax.Model, spec: str, console: Console) -> dict:
    """Soaks one engine; returns the record. Raises AssertionError with what went wrong."""
    rng = np.random.default_rng(FLAGS.seed)
    caching = kvjax.parse_strategy(spec).policy.exact
    engine = Engine(model, spec, kv_memory="3MiB", max_num_seqs=32, max_model_len=192, prefix_caching=caching, prefill_chunk=64)
    lengths: dict[str, Any] = dict(input_len=Uniform(4, 96), output_len=Uniform(1, 48))
    engine.warm_up()
    probe = make_load(model, num_requests=min(300, FLAGS.num_requests), seed=FLAGS.seed + 1, **lengths)
    serve(engine, probe)
    sustained = len(probe.requests) / serve(engine, probe).duration
    load = make_load(model, num_requests=FLAGS.num_requests, seed=FLAGS.seed, **lengths)
    times = arrivals(rng, FLAGS.num_requests, 2 * sustained)
    cancelled = {i: t + rng.exponential(1.0) for i, t in enumerate(times) if rng.random() < FLAGS.abort}
    aborts = collections.deque(sorted((t, i) for i, t in cancelled.items()))
    ends: collections.Counter[str] = collections.Counter()
    produced: collections.Counter[str] = collections.Counter()
    wanted = {str(r.index): r.max_tokens for r in load.requests}
    reasons: collections.Counter[str] = collections.Counter()
    preemptions, hits = engine.scheduler.preemptions, engine.scheduler.blocks.prefix_hit_tokens
    forced = steps = 0
    memory = []
    queue = collections.deque(zip(times, load.requests, strict=True))
    live: set[str] = set()
    began = time.perf_counter()
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{spec}: 2 x {sustained:.0f} requests/s", total=FLAGS.num_requests)
        while queue or engine.busy:
            now = time.perf_counter() - began
            while queue and queue[0][0] <= now:
                _, request = queue.popleft()
                name = str(request.index)
                too_long = rng.random() < FLAGS.impossible
                try:
                    engine.add(
                        name, request.prompt, max_tokens=10_000 if too_long else request.max_tokens, seed=request.seed, stop_tokens=()
                    )
                    live.add(name)
                    assert not too_long, f"request {name} cannot be served and was taken"
                except RequestRefused:
                    assert too_long, f"request {name} was refused"
                    ends[name] += 1
                    reasons["refused"] += 1
            while aborts and aborts[0][0] <= now:
                name = str(aborts.popleft()[1])
                if name in live:
                    engine.abort(name)
                    live.discard(name)
            if live and rng.random() < FLAGS.preempt:
                engine.preempt(str(rng.choice(sorted(live))))
                forced += 1
            if not engine.busy:
                time.sleep(max(queue[0][0] - (time.perf_counter() - began), 0.0))
                continue
            for output in engine.step():
                produced[output.request] += len(output.tokens)
                if output.finished:
                    ends[output.request] += 1
                    reasons[output.reason or "none"] += 1
                    live.discard(output.request)
                    done = produced[output.request]
                    assert output.reason == "abort" or done == wanted[output.request], f"request {output.request} ended with {done} tokens"
            steps += 1
            if steps % CHECK_EVERY == 0:
                engine.scheduler.blocks.check()
                gc.collect()
                memory.append(resident())
                progress.update(task, completed=len(ends))
    duration = time.perf_counter() - began
    blocks = engine.scheduler.blocks
    blocks.check()
    assert set(ends) == set(wanted), f"{len(wanted) - len(ends)} requests never ended"
    assert set(ends.values()) == {1}, f"{sum(n > 1 for n in ends.values())} requests ended more than once"
    assert blocks.used_blocks == 0, f"{blocks.used_blocks} pages are still in use"
    assert not live, f"{len(live)} requests are still being served"
    settled = memory[len(memory) // 4 :] or [resident()]
    growth = max(settled[len(settled) // 2 :]) - max(settled[: max(len(settled) // 2, 1)])
    assert growth < 32 * 2**20, f"the process grew by {growth / 2**20:.0f} MiB"
    return {
        **setting(), "strategy": kvjax.parse_strategy(spec).describe(), "model_id": FLAGS.model, "num_requests": FLAGS.num_requests,
        "offered_rate": 2 * sustained, "sustained_rate": sustained, "duration": duration, "steps": steps, "ended": dict(reasons),
        "output_tokens": sum(produced.values()), "preemptions": engine.scheduler.preemptions - preemptions, "forced_preemptions": forced,
        "prefix_hit_tokens": blocks.prefix_hit_tokens - hits, "resident_growth_bytes": growth, "resident_bytes": settled[-1],
    }  # fmt: skip


def main(argv: list[str]) -> None:
    del argv
    console = Console(width=140)
    model = kvjax.load_model(FLAGS.model)
    directory = pathlib.Path(FLAGS.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for spec in FLAGS.strategies:
        try:
            record = soak(model, spec, console)
        except AssertionError as failure:
            console.print(f"{spec}: {failure}", style="bold red", highlight=False)
            raise SystemExit(1) from failure
        with (directory / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")
        shown = {k: round(v, 1) if isinstance(v, float) and math.isfinite(v) else v for k, v in record.items() if k not in setting()}
        console.print(f"{spec}: passed", style="bold green", highlight=False)
        console.print(shown, highlight=False)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
