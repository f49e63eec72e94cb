"""What serving costs over computing: the engine at saturation against the bare decode loop, at the same batch, in one run.

    python -m experiments.load.overhead

Three things take turns, round by round: the bare loop (kvjax.generation.decode_steps, one token per call, tokens fetched every step) in the
dense store and in the paged store, and the engine with the same number of requests decoding. All rows have the same context. Reported per
step: medians, tokens/s, the engine's share of the bare loops, and the time the host spends in the engine outside of waiting for the device.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console

import kvjax
from kvjax.engine import programs
from kvjax.engine.engine import Engine
from kvjax.files import dumps
from kvjax.generation import as_strategy, decode_steps, run_prefill
from kvjax.report.record import setting

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("model", "kvjax-4m", "The model.")
    flags.DEFINE_list("strategies", ["full", "h2o"], "Policies; each runs in both stores.")
    flags.DEFINE_integer("batch_size", 64, "Requests decoding.", lower_bound=1)
    flags.DEFINE_integer("context", 256, "Tokens of every prompt.", lower_bound=1)
    flags.DEFINE_integer("steps", 32, "Steps per sample.", lower_bound=1)
    flags.DEFINE_integer("rounds", 9, "Samples of each.", lower_bound=1)
    flags.DEFINE_string("output_dir", "experiments/results/overhead_cpu", "Where the records go.")


def bare(model: kvjax.Model, spec: str, prompts: np.ndarray) -> Callable[[], list[float]]:
    """A sampler of the bare decode loop: seconds of every step."""
    strategy = as_strategy(spec)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    reserve = FLAGS.steps * (FLAGS.rounds + 2)
    logits, kv = run_prefill(model, strategy, prompts, lengths, reserve)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    remaining = jnp.full(len(prompts), reserve + 1, jnp.int32)
    state: list[Any] = [kv, token, remaining]

    def sample() -> list[float]:
        times = []
        for _ in range(FLAGS.steps):
            start = time.perf_counter()
            kv, token, remaining, out = decode_steps(model.decoder, strategy, (), 1, model.params, *state)
            state[:] = kv, token, remaining
            np.asarray(out)
            times.append(time.perf_counter() - start)
        return times

    return sample


def engine(model: kvjax.Model, spec: str, prompts: np.ndarray) -> tuple[Callable[[], list[float]], list[float]]:
    """A sampler of the engine with all rows decoding; and the host's processor seconds per step, without the dispatch of the program (in
    which the device already begins to work) and the wait for tokens. Processor time, because by the clock it also waits for a core."""
    longest = prompts.shape[1] + FLAGS.steps * (FLAGS.rounds + 2) + 8
    serving = Engine(model, spec, kv_memory=filled(model, spec, len(prompts), longest), max_num_seqs=len(prompts), max_model_len=longest)
    for i, prompt in enumerate(prompts):
        serving.add(str(i), prompt, max_tokens=longest - prompts.shape[1])
    while len(serving.scheduler.running) < len(prompts):
        serving.step()
    waiting, dispatch = [0.0], programs.decode
    read = serving._read

    def timed(pending) -> None:
        start = time.thread_time()
        jax.block_until_ready(pending.tokens)
        waiting[0] += time.thread_time() - start
        read(pending)

    def dispatched(*arguments):
        start = time.thread_time()
        result = dispatch(*arguments)
        waiting[0] += time.thread_time() - start
        return result

    serving._read = timed  # type: ignore[method-assign]
    host: list[float] = []

    def sample() -> list[float]:
        times = []
        for _ in range(FLAGS.steps):
            waiting[0], busy = 0.0, time.thread_time()
            start = time.perf_counter()
            with mock.patch.object(programs, "decode", dispatched):
                serving.step()
            times.append(time.perf_counter() - start)
            host.append(time.thread_time() - busy - waiting[0])
        return times

    return sample, host


def filled(model: kvjax.Model, spec: str, requests: int, longest: int) -> int:
    """Bytes that so many requests of the greatest length fill."""
    least = Engine(model, spec, kv_memory="1GiB", max_num_seqs=requests, max_model_len=longest)
    need = least.scheduler.need
    return least.budget.staging + requests * (least.budget.row + need.pages(need.capacity) * least.budget.page)


def run(console: Console) -> None:
    """Measures and prints."""
    model = kvjax.load_model(FLAGS.model)
    rng = np.random.default_rng(0)
    prompts = rng.integers(32, 120, (FLAGS.batch_size, FLAGS.context)).astype(np.int32)
    for policy in FLAGS.strategies:
        samplers = {f"bare, {policy}": bare(model, policy, prompts), f"bare, {policy}+paged": bare(model, f"{policy}+paged", prompts)}
        samplers[f"engine, {policy}+paged"], host = engine(model, f"{policy}+paged", prompts)
        times: dict[str, list[float]] = {name: [] for name in samplers}
        for round_ in range(FLAGS.rounds + 1):
            for name, sample in samplers.items():
                found = sample()
                if round_:
                    times[name].append(statistics.median(found))
            if not round_:
                host.clear()
        medians = {name: statistics.median(found) for name, found in times.items()}
        served = medians[f"engine, {policy}+paged"]
        for name, seconds in medians.items():
            rate = FLAGS.batch_size / seconds
            console.print(
                f"{name:<28}{1e3 * seconds:>9.2f} ms/step{rate:>10.0f} tok/s  engine at {seconds / served:.3f} of it", highlight=False
            )
        books = statistics.median(host)
        console.print(
            f"{'scheduler and bookkeeping':<28}{1e3 * books:>9.3f} ms/step   {100 * books / served:.1f} % of a step\n", highlight=False
        )
        directory = pathlib.Path(FLAGS.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        record = {
            **setting(), "policy": policy, "model_id": FLAGS.model, "batch_size": FLAGS.batch_size, "context": FLAGS.context,
            "step_ms": {name: 1e3 * seconds for name, seconds in medians.items()}, "bookkeeping_ms": 1e3 * books,
        }  # fmt: skip
        with (directory / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")


def main(argv: list[str]) -> None:
    del argv
    run(Console(width=120))


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
