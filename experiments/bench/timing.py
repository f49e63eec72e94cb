"""Interleaved sampling: engines take turns, and a turn during which someone else used the machine does not count."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

_SETTLE_SECONDS = 0.03  # thread pools spin for some milliseconds after their work
_DISTURBED_PAUSE_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Sample:
    """One turn.

    Attributes:
      seconds: per unit of work (decode step, prompt, byte, operation).
      tokens: rows of greedy tokens, the prompt's own next token first; empty for what makes none.
    """

    seconds: float
    tokens: tuple[tuple[int, ...], ...] = ()


class Entry(Protocol):
    """Something that can be timed again and again. `prepare` runs before every turn and is not part of it."""

    name: str

    @property
    def pid(self) -> int: ...

    def prepare(self) -> None: ...

    def sample(self) -> Sample: ...


class Watching(Protocol):
    """What `experiments.bench.machine.Watch` offers."""

    cores: float
    disturbance: str | None


@dataclasses.dataclass
class Timing:
    """All turns of one entry.

    Attributes:
      seconds: of the turns that count.
      cores: processor time of the timed process over wall time, per turn that counts.
      tokens: of the last turn.
      repeatable: every turn gave the same tokens.
      discarded: turns that did not count, with who disturbed them.
      disturbed: turns that count although they were disturbed, because the limit of discards was reached.
      failure: why there is no timing, or None.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    cores: list[float] = dataclasses.field(default_factory=list)
    tokens: tuple[tuple[int, ...], ...] = ()
    repeatable: bool = True
    discarded: list[str] = dataclasses.field(default_factory=list)
    disturbed: int = 0
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    entries: Sequence[Entry],
    watch: Callable[[int], AbstractContextManager[Watching]],
    *,
    reps: int,
    warm_up: int,
    retries: int,
    errors: tuple[type[Exception], ...] = (),
    settle: float = _SETTLE_SECONDS,
) -> list[Timing]:
    """Round after round, one turn of each entry, until each has `reps` that count.

    Args:
      watch: makes the context manager that watches a turn of the process with the given id.
      warm_up: turns of each entry before the first that counts.
      retries: discards per entry; after that its disturbed turns count, and are counted.
      errors: what an entry may raise: it then drops out and the others go on.
      settle: seconds of quiet before each turn.
    """
    timings = [Timing() for _ in entries]

    def turn(entry: Entry, timing: Timing, counts: bool) -> None:
        try:
            entry.prepare()
            time.sleep(settle)
            with watch(entry.pid) as seen:
                sample = entry.sample()
        except errors as error:
            timing.failure = str(error).splitlines()[0]
            return
        timing.repeatable &= not timing.tokens or timing.tokens == sample.tokens
        timing.tokens = sample.tokens
        if not counts:
            return
        if seen.disturbance and len(timing.discarded) < retries:
            timing.discarded.append(seen.disturbance)
            time.sleep(_DISTURBED_PAUSE_SECONDS)
            return
        timing.disturbed += bool(seen.disturbance)
        timing.seconds.append(sample.seconds)
        timing.cores.append(seen.cores)

    for _ in range(warm_up):
        for entry, timing in zip(entries, timings, strict=True):
            if timing.failure is None:
                turn(entry, timing, False)
    while waiting := [(e, t) for e, t in zip(entries, timings, strict=True) if t.failure is None and len(t.seconds) < reps]:
        for entry, timing in waiting:
            turn(entry, timing, True)
    return timings
