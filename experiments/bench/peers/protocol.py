"""The worker's half of the protocol: one JSON object a line, a request on stdin, its reply on stdout.

    {"op": "load", "model": DIR, "threads": 2}
        -> {"engine": str, "versions": {package: version}, "decode": [variant], "prefill": [variant], "vocab_size": int}
    {"op": "decode", "engine": VARIANT, "batch": B, "context": C, "steps": 32, "tokens": [[id]]}
        -> {"seconds": float, "cpu_seconds": float, "first": [id], "tokens": [[id]]}
    {"op": "prefill", "engine": VARIANT, "batch": 1, "context": C, "tokens": [[id]]}
        -> {"seconds": float, "cpu_seconds": float, "first": [id]}
    {"op": "release"} -> {}        drops every cached prompt state
    {"op": "quit"}    -> {}        and the process ends

`tokens` of a request may be left out: it is then `prompts.prompt(batch, context, vocab_size)`. `first` holds the token that the prompt
alone gives, one per row; `tokens` of a reply holds the `steps` tokens that the timed steps give (step i is fed token i - 1, step 0 is
fed `first`). `seconds` is wall time of the timed part only, `cpu_seconds` the processor time of all threads of the worker in it.
A request that fails is answered {"error": message} and the worker goes on.

Standard library only: this module is imported before, and whether or not, an engine can be.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Operation = Callable[..., dict[str, Any]]


class RequestError(ValueError):
    """A request that makes no sense to this worker: answered with its message alone, without a traceback."""


class Stopwatch:
    """Wall and processor time of a `with` block.

    Attributes:
        seconds: wall time.
        cpu_seconds: processor time summed over all threads of this process.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> "Stopwatch":
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def reply(self, **fields: Any) -> dict[str, Any]:
        """The reply to a timed request."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, **fields}


def check_prompt(tokens: list[list[int]], batch: int, context: int, vocab_size: int) -> None:
    """Raises RequestError unless `tokens` is `batch` rows of `context` ids below `vocab_size`."""
    if len(tokens) != batch or any(len(row) != context for row in tokens):
        lengths = sorted({len(row) for row in tokens})
        raise RequestError(f"tokens: {len(tokens)} rows of lengths {lengths} do not make batch {batch} of context {context}")
    if not all(0 <= token < vocab_size for row in tokens for token in row):
        raise RequestError(f"tokens: ids must lie in [0, {vocab_size})")


def choose(variants: Mapping[str, Any], name: str) -> Any:
    """The named variant. Raises RequestError with the list of names."""
    if name not in variants:
        raise RequestError(f"unknown engine {name!r}; this worker has: {', '.join(variants)}")
    return variants[name]


def serve(operations: Mapping[str, Operation]) -> None:
    """Answers requests until "quit" or the end of stdin.

    Whatever else writes to stdout, in Python or in C, goes to stderr from here on, so that replies stay alone on their stream.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        if not line.strip():
            continue
        reply, go_on = _answer(operations, line)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if not go_on:
            return


def _answer(operations: Mapping[str, Operation], line: str) -> tuple[dict[str, Any], bool]:
    try:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            return {}, False
        if op not in operations:
            raise RequestError(f"unknown op {op!r}; this worker has: {', '.join([*operations, 'quit'])}")
        return operations[op](**request), True
    except RequestError as error:
        return {"error": str(error)}, True
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}, True
