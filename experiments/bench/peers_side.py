"""The peers in the benchmark: their workers as entries that take turns with kvjax's."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from experiments.bench.peers.client import Worker, WorkerError, available, start
from experiments.bench.timing import Sample


class Decode:
    """`steps` greedy tokens after a prompt; a sample is seconds per step."""

    def __init__(self, worker: Worker, name: str, batch: int, context: int, steps: int):
        self.name, self.batch, self.context, self.steps = name, batch, context, steps
        self.pid, self._worker = worker.pid, worker

    def prepare(self) -> None:
        return

    def sample(self) -> Sample:
        reply = self._worker.call("decode", engine=self.name, batch=self.batch, context=self.context, steps=self.steps)
        rows = tuple((first, *row) for first, row in zip(reply["first"], reply["tokens"], strict=True))
        return Sample(reply["seconds"] / self.steps, rows)


class Prefill:
    """A prompt, to its next token; a sample is seconds."""

    def __init__(self, worker: Worker, name: str, batch: int, context: int):
        self.name, self.batch, self.context = name, batch, context
        self.pid, self._worker = worker.pid, worker

    def prepare(self) -> None:
        return

    def sample(self) -> Sample:
        reply = self._worker.call("prefill", engine=self.name, batch=self.batch, context=self.context)
        return Sample(reply["seconds"], tuple((first,) for first in reply["first"]))


@dataclasses.dataclass
class Peers:
    """The running workers.

    Attributes:
      workers: running, with the model loaded.
      variants: the engines asked for, in that order.
      notes: one line on everything that was asked for and is not there.
    """

    workers: Sequence[Worker]
    variants: Sequence[str]
    notes: list[str]

    @property
    def versions(self) -> dict[str, str]:
        return {name: version for worker in self.workers for name, version in worker.loaded["versions"].items()}

    def of(self, operation: str) -> Iterator[tuple[Worker, str]]:
        """Worker and variant of every engine asked for that does `operation` ("decode" or "prefill")."""
        for variant in self.variants:
            for worker in self.workers:
                if variant in worker.loaded[operation]:
                    yield worker, variant

    def release(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(WorkerError):  # one that died has been reported by the entry that found out
                worker.call("release")


@contextlib.contextmanager
def running(directory: pathlib.Path, variants: Sequence[str], threads: int) -> Iterator[Peers]:
    """Starts the workers that have any of `variants`; the others end again."""
    if not variants:
        yield Peers((), (), [])
        return
    found = available()
    with contextlib.ExitStack() as stack:
        if found.python is None:
            yield Peers((), (), ["no peers: KVJAX_PEERS_PYTHON is not set, so kvjax stands beside its floors alone"])
            return
        notes = [f"no {name}: {why}" for name, why in found.missing.items()]
        workers = []
        for name in found.workers:
            try:
                worker = start(found.python, name, model=str(directory.resolve()), threads=threads)
            except WorkerError as error:
                notes.append(str(error).splitlines()[0])
                continue
            stack.callback(worker.close)
            if set(variants) & {*worker.loaded["decode"], *worker.loaded["prefill"]}:
                workers.append(worker)
        offered = {variant for worker in workers for variant in (*worker.loaded["decode"], *worker.loaded["prefill"])}
        notes += [f"no {variant}: no running worker has it" for variant in variants if variant not in offered]
        yield Peers(workers, variants, notes)
