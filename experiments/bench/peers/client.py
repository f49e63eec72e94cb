"""The benchmark's half of the protocol: starts peer workers and calls them. Standard library only.

For example::

    with start(python, "transformers", model=directory, threads=2) as worker:
        worker.call("decode", engine="hf-static-eager", batch=1, context=512, steps=32)["seconds"]
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import threading
from pathlib import Path
from typing import Any

PYTHON_VARIABLE = "KVJAX_PEERS_PYTHON"
"""Environment variable: the interpreter of a Python 3.11 environment with torch, transformers, gguf, llama-cpp-python."""

WORKERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformers": ("experiments.bench.peers.transformers_worker", ("torch", "transformers")),
    "llama.cpp": ("experiments.bench.peers.llama_cpp_worker", ("llama_cpp", "gguf", "safetensors")),
}
"""Worker name to its module and the packages that it imports."""

_ROOT = Path(__file__).resolve().parents[3]
_STDERR_LINES = 40
_IMPORT_TIMEOUT_SECONDS = 180.0
_QUIT_TIMEOUT_SECONDS = 10.0


class WorkerError(RuntimeError):
    """A worker refused a request, died, or did not answer in time."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """What `available` found.

    Attributes:
        python: the interpreter, or None where the environment variable is unset or names nothing that runs.
        workers: names of the workers whose packages import.
        missing: for every other worker one line saying why not.
    """

    python: str | None
    workers: tuple[str, ...]
    missing: dict[str, str]


class Worker:
    """A running worker process; not for use from several threads at once.

    Attributes:
        name: a key of WORKERS.
        loaded: the reply to the load request (versions, variants, vocab_size).
    """

    def __init__(self, python: str, name: str):
        self.name = name
        self.loaded: dict[str, Any] = {}
        self._stderr: collections.deque[str] = collections.deque(maxlen=_STDERR_LINES)
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [python, "-m", WORKERS[name][0]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                cwd=_ROOT,
                env=_environment(),
            )
        except OSError as error:
            raise WorkerError(f"peer worker {name}: {python} does not start: {error}") from error
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_stdout, self._read_stderr)]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The worker's process id, also after it has ended."""
        return self._process.pid

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, op: str, *, timeout_seconds: float = 1800.0, **fields: Any) -> dict[str, Any]:
        """Sends one request and waits for its reply.

        Raises WorkerError with the worker's own message where it refuses, and with the end of its stderr where it has died or has not
        answered after `timeout_seconds` (it is then killed, as a late reply would be taken for the next one's).
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=timeout_seconds)
        except (OSError, ValueError) as error:  # a closed or broken pipe
            raise self._died(op) from error
        except queue.Empty as error:
            self._process.kill()
            raise WorkerError(f"peer worker {self.name}: no reply to {op!r} in {timeout_seconds:g} s{self._tail()}") from error
        if not line:
            raise self._died(op)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"peer worker {self.name}: {op}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Asks the worker to end, kills it where it does not, and closes its pipes."""
        if self._process.poll() is None:
            with contextlib.suppress(WorkerError):
                self.call("quit", timeout_seconds=_QUIT_TIMEOUT_SECONDS)
            try:
                self._process.wait(_QUIT_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for reader in self._readers:
            reader.join(_QUIT_TIMEOUT_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")  # the end of the stream

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr.append(line.rstrip())

    def _died(self, op: str) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_TIMEOUT_SECONDS)
        self._readers[1].join(_QUIT_TIMEOUT_SECONDS)
        return WorkerError(f"peer worker {self.name}: ended with status {self._process.returncode} during {op!r}{self._tail()}")

    def _tail(self) -> str:
        return "; the end of its stderr:\n" + "\n".join(self._stderr) if self._stderr else "; its stderr is empty"


def start(python: str, worker: str, **load: Any) -> Worker:
    """Starts the named worker under the interpreter `python` and sends it a load request of the fields `load`."""
    if worker not in WORKERS:
        raise WorkerError(f"unknown peer worker {worker!r}; there are: {', '.join(WORKERS)}")
    running = Worker(python, worker)
    try:
        running.loaded = running.call("load", **load)
    except BaseException:
        running.close()
        raise
    return running


def available() -> Peers:
    """Which peers can run here: imports every worker's packages once, in the environment that KVJAX_PEERS_PYTHON names."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        return Peers(None, (), dict.fromkeys(WORKERS, f"{PYTHON_VARIABLE} is not set"))
    missing = {name: why for name, (_, packages) in WORKERS.items() if (why := _why_not(python, packages))}
    return Peers(python, tuple(name for name in WORKERS if name not in missing), missing)


def _why_not(python: str, packages: tuple[str, ...]) -> str | None:
    """One line on why `python` cannot import `packages`, or None where it can."""
    command = [python, "-c", f"import {', '.join(packages)}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_TIMEOUT_SECONDS, env=_environment(), check=False
        )
    except OSError as error:
        return f"{PYTHON_VARIABLE}={python} does not start: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"importing {', '.join(packages)} took more than {_IMPORT_TIMEOUT_SECONDS:g} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return None


def _environment() -> dict[str, str]:
    """This process's environment without what would lead the other interpreter to this one's packages, and off the network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
