"""Measures kvjax on a real card, in parts of under ten minutes each that go on where they stopped.

    python -m experiments.gpu_suite --part=correctness    every kernel's cases against the references
    python -m experiments.gpu_suite --part=kernels        their times beside a copy, XLA and cuDNN, and the bars
    python -m experiments.gpu_suite --part=peers          PyTorch's attention and transformers' generate, where they are installed
    python -m experiments.gpu_suite --part=decode         whole decode steps of every strategy at the shapes of real models
    python -m experiments.gpu_suite --part=offload        InfiniGen beside the full offload: OPT-13B, batch 8, context 2048
    python -m experiments.gpu_suite --part=probes         small questions that only a card answers
    python -m experiments.gpu_suite --part=tune           block sizes; --install then puts them beside the kernels
    python -m experiments.gpu_suite --part=all            all of these, one process each
    python -m experiments.gpu_suite --part=all --dry_run  the same code on this machine's CPU at toy sizes, in XLA and interpreters

Records go to experiments/results/gpu_<device>/<part>.jsonl as cases finish, and a page a part beside them. What is recorded is not measured
again, what failed is tried again, and a part that has used up --minutes stops and says so (exit code 3): start it again.

Without a card a part is refused in one line, exit code 2.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from rich.console import Console

FLAGS = flags.FLAGS

PARTS = ("correctness", "kernels", "peers", "decode", "offload", "probes", "tune")
ELSEWHERE = ("peers", "offload")
"""Parts whose work is done by processes of their own: this one must not take the card's memory."""

ASK = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_enum("part", None, (*PARTS, "all"), "What to measure.")
    flags.DEFINE_bool("dry_run", False, "Toy sizes on a CPU: whether everything runs, and nothing more.")
    flags.DEFINE_float("minutes", 9.0, "After so many no further case is begun.", lower_bound=0.0)
    flags.DEFINE_string("match", "", "Only cases whose name this regular expression finds.")
    flags.DEFINE_bool("again", False, "Forget what is recorded of the part.")
    flags.DEFINE_bool("install", False, "With --part=tune: put what was found into the tables beside the kernels, and measure nothing.")
    flags.DEFINE_string("output_dir", None, "Where records go; default: experiments/results/gpu_<device>, in a dry run runs/gpu_dry_run.")


def device(dry_run: bool) -> str:
    """The card's name, asked for by a process of its own. Ends the program where there is none."""
    if dry_run:
        return "cpu"
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    platform, kind = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ("nothing", done.stderr.strip()[-200:])
    if platform != "gpu":
        fail(f"--part={FLAGS.part} needs an NVIDIA GPU, and JAX finds {platform} here; --dry_run goes through the code without one")
    return str(kind)


def directory(kind: str) -> pathlib.Path:
    if FLAGS.output_dir is not None:
        return pathlib.Path(FLAGS.output_dir)
    if FLAGS.dry_run:
        return pathlib.Path("runs/gpu_dry_run")
    return pathlib.Path("experiments/results") / f"gpu_{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}"


def run_part(part: str, where: pathlib.Path, kind: str, console: Console) -> int:
    """Performs one part in this process. Returns the exit code."""
    if FLAGS.dry_run or part in ELSEWHERE:
        os.environ["JAX_PLATFORMS"] = "cpu"  # of this process; those it starts are told otherwise
    from experiments.gpu import correctness, decode, kernels, offload, peers, probes, tune
    from experiments.gpu.book import Book

    performers: dict[str, Callable[[Book, bool], None]] = {
        "correctness": correctness.perform,
        "kernels": kernels.perform,
        "peers": peers.perform,
        "decode": decode.perform,
        "offload": offload.perform,
        "probes": probes.perform,
        "tune": tune.perform,
    }
    book = Book(where, part, FLAGS.minutes, console, FLAGS.dry_run, kind, FLAGS.match)
    if FLAGS.install:
        tune.install(book)
        return 0
    if FLAGS.again:
        book.drop([])
    performers[part](book, FLAGS.dry_run)
    failed = sum("failure" in record for record in book.records.values())
    console.print(f"{part}: {len(book.records)} cases recorded in {where}, {failed} failed, {len(book.unfinished)} left", highlight=False)
    if book.unfinished:
        console.print(f"the time is over ({FLAGS.minutes:g} minutes): start the same command again for the rest", highlight=False)
        return 3
    return 1 if failed else 0


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
    if FLAGS.part is None:
        fail(f"--part is missing; choose from {', '.join(PARTS)}, all")
    if FLAGS.install and FLAGS.part != "tune":
        fail("--install goes with --part=tune alone")
    if FLAGS.part == "all":
        others = [argument for argument in sys.argv[1:] if not argument.startswith(("--part", "-part"))]
        codes = [
            subprocess.run([sys.executable, "-m", "experiments.gpu_suite", f"--part={p}", *others], check=False).returncode for p in PARTS
        ]
        sys.exit(2 if 2 in codes else max(codes))
    if FLAGS.install and FLAGS.output_dir is None:
        fail("--install needs --output_dir, the folder with the tune.jsonl of a card")
    kind = "" if FLAGS.install else device(FLAGS.dry_run)
    sys.exit(run_part(FLAGS.part, directory(kind), kind, Console(width=None if sys.stdout.isatty() else 200)))


def parse_flags(argv: list[str]) -> list[str]:
    """Sets FLAGS and returns what is no flag. A flag that is unknown or out of range ends the program like any other bad input."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()) + "; see --help")


def fail(message: object) -> NoReturn:
    print(f"kvjax: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse_flags)
