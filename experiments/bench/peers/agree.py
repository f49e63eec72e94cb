"""Checks that all peer variants continue the same prompts with the same greedy tokens.

    python -m experiments.bench.peers.agree DIR --cells 1x64,2x512,8x64 --steps 32

Every variant decodes every cell twice, which also shows that a second sample restarts from the same prompt, and prefills it where it
can. One line a cell and variant; exit status 1 on any difference from the first variant. llama.cpp's flash attention works in float16
(see llama_cpp_worker): its differences are shown, but only ones in the prompt's token or between its own two samples count.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.bench.peers.client import PYTHON_VARIABLE, WORKERS, Worker, start

FLOAT16_VARIANTS = ("llama.cpp-f32-fa",)


def continuations(worker: Worker, variant: str, batch: int, context: int, steps: int) -> Iterator[tuple[str, list[list[int]]]]:
    """(what was run, rows of tokens): two decodes of first token and `steps` more, and the first token from the prefill."""
    for sample in ("decode", "decode again"):
        reply = worker.call("decode", engine=variant, batch=batch, context=context, steps=steps)
        yield sample, [[first, *row] for first, row in zip(reply["first"], reply["tokens"], strict=True)]
    if variant in worker.loaded["prefill"]:
        yield "prefill", [[first] for first in worker.call("prefill", engine=variant, batch=batch, context=context)["first"]]


def equal_tokens(rows: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """How many tokens of `rows` come before their row's first difference from `expected`, over all rows."""
    total = 0
    for row, want in zip(rows, expected, strict=True):
        same = [a == b for a, b in zip(row, want, strict=False)]
        total += same.index(False) if False in same else len(same)
    return total


def compare(workers: Sequence[Worker], cells: Sequence[tuple[int, int]], steps: int, variants: Sequence[str] | None = None) -> bool:
    """Runs all cells (batch, context) on all variants, or those named, and prints a line for each. True where all agree."""
    good = True
    for batch, context in cells:
        expected: list[list[int]] | None = None
        for worker in workers:
            for variant in [v for v in worker.loaded["decode"] if not variants or v in variants]:
                own: list[list[int]] | None = None
                for what, rows in continuations(worker, variant, batch, context, steps):
                    expected, own = expected or rows, own or rows
                    same, total = equal_tokens(rows, expected), sum(map(len, rows))
                    if variant in FLOAT16_VARIANTS:
                        good &= equal_tokens(rows, own) == total and [row[0] for row in rows] == [row[0] for row in expected]
                    else:
                        good &= same == total
                    distinct = len({token for row in rows for token in row})
                    print(f"batch {batch} context {context:5} {variant:18} {what:13} {same}/{total} equal, {distinct} distinct", flush=True)
            worker.call("release")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cells", default="1x64,2x512,8x64", help="batch x context, comma-separated")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default="", help="comma-separated; all by default")
    arguments = parser.parse_args()
    python = os.environ.get(PYTHON_VARIABLE) or sys.exit(f"{PYTHON_VARIABLE} is not set")
    cells = [(int(batch), int(context)) for batch, context in (cell.split("x") for cell in arguments.cells.split(","))]
    workers = [start(python, name, model=str(arguments.directory.resolve()), threads=arguments.threads) for name in WORKERS]
    try:
        good = compare(workers, cells, arguments.steps, [v for v in arguments.variants.split(",") if v])
    finally:
        for worker in workers:
            worker.close()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
