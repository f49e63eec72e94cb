"""Prefill of two checkouts in turns, each in a process of its own: what a change of attention does to speed and to compile time.

    git worktree add ../before REVISION
    python -m experiments.bench.prefill --before=../before --cases="smollm2-135m,full,1,1024;kvjax-4m,h2o,8,2000"

A case is a model, a strategy, rows and tokens of a row. Compile time is the first call less the median of the others, without a cache.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS

WORKER = """
import json, sys, time
import jax, numpy as np
import kvjax
from kvjax.generation import as_strategy, run_prefill
models = {}
for line in sys.stdin:
    name, spec, rows, length = json.loads(line)
    model = models.setdefault(name, None) or kvjax.load_model(name)
    models[name] = model
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
    began = time.perf_counter()
    jax.block_until_ready(run_prefill(model, as_strategy(spec), tokens, np.full(rows, length, np.int32), 16))
    print(time.perf_counter() - began, flush=True)
"""


def start(root: pathlib.Path) -> subprocess.Popen[str]:
    """A worker over a checkout."""
    paths = {"PYTHONPATH": str(root.resolve()), "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | paths, cwd=root)


def ask(worker: subprocess.Popen[str], case: list[Any]) -> float:
    """Seconds of one prefill."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(case) + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main(argv: list[str]) -> None:
    del argv
    workers = {"before": start(pathlib.Path(FLAGS.before)), "after": start(pathlib.Path.cwd())}
    for text in FLAGS.cases.split(";"):
        model, rest = text.split(",", 1)
        spec, rows, length = rest.rsplit(",", 2)
        case = [model, spec, int(rows), int(length)]
        first = {name: ask(worker, case) for name, worker in workers.items()}
        times: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(FLAGS.turns):
            for name in list(workers)[:: -1 if turn % 2 else 1]:
                times[name].append(ask(workers[name], case))
        medians = {name: statistics.median(values) for name, values in times.items()}
        told = ", ".join(f"{name} {1e3 * value:.0f} ms (compile {first[name] - value:.1f} s)" for name, value in medians.items())
        print(f"{text}: {told}; {medians['before'] / medians['after']:.3f} times as fast", flush=True)
    for worker in workers.values():
        worker.terminate()


if __name__ == "__main__":
    flags.DEFINE_string("before", None, "The other checkout.", required=True)
    flags.DEFINE_string("cases", "smollm2-135m,full,4,1024;smollm2-135m,full,1,1024;kvjax-4m,h2o,8,2000", "Cases, between semicolons.")
    flags.DEFINE_integer("turns", 5, "Prefills of a case, timed, by each checkout.", lower_bound=1)
    app.run(main)
