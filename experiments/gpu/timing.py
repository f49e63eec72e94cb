"""How long a call takes on a device, and how long its kernels do.

Two ways, neither of which counts dispatch:

    slope    one program makes the call n times in a row, another one many times more; what the longer one takes longer, on the host's
             clock, per call. Launches and gaps between kernels are in it.
    trace    the longer program under JAX's profiler; the time in which a stream of the device was at work, per call. Only what runs.

Calls in a program take turns on several sets of arguments, which together are larger than the caches of a card, so that nothing is found in
them. What a step gives is part of the next one's arguments, or a state of its own that it changes in place: no call can be left out, or
taken for one before it.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.report import profile

CACHE_BYTES = 256 << 20
"""What the sets of arguments exceed together: several times the L2 of an H200 (60 MB)."""

Step = Callable[[Any, Any], tuple[Any, Any]]
"""(carry, arguments) -> (carry, extra): the carry goes into the next call, whatever its arguments are; extra is kept."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """Of one call, in seconds.

    Attributes:
      seconds: the median of the slopes.
      slopes: one a repetition.
      kernel_seconds: the median over repetitions of what a trace shows; None where it shows no device (a CPU).
      kernels: names of the kernels, or copies, and the seconds of each in a call; those that take longest.
      calls: of the shorter and the longer program.
      sets: of arguments.
    """

    seconds: float
    slopes: tuple[float, ...]
    kernel_seconds: float | None
    kernels: dict[str, float]
    calls: tuple[int, int]
    sets: int

    @property
    def best(self) -> float:
        """What a bar is judged by: the kernels alone, where they were seen."""
        return self.seconds if self.kernel_seconds is None else self.kernel_seconds

    def record(self) -> dict[str, Any]:
        return {
            "median_seconds": self.seconds,
            "samples_seconds": list(self.slopes),
            "kernel_seconds": self.kernel_seconds,
            "kernels": self.kernels,
            "calls": list(self.calls),
            "argument_sets": self.sets,
        }


def sets_for(tree: Any, most: int = 16) -> int:
    """How many sets of arguments of this size exceed the caches; at least two."""
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    return min(max(2, -(-CACHE_BYTES // max(size, 1))), most)


def measure(
    step: Step,
    carries: Sequence[Any],
    arguments: Sequence[Any],
    *,
    calls: tuple[int, int] = (4, 20),
    repetitions: int = 7,
    trace_dir: pathlib.Path | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Timed:
    """Times `step`.

    Args:
      carries: one, handed from call to call, or one a set, each handed to the next call on its set. They are donated and given back, so a
        step may change them in place.
      arguments: the sets.
      calls: of the shorter and the longer program.
      trace_dir: for the profiler's files; None: no trace.
      compiler_options: for both programs.
    """
    own = len(carries) == len(arguments)
    call = jax.jit(step)  # lowered once, however often it is called

    def program(count: int):
        def run(carries, arguments):
            carries, extras = list(carries), []
            for i in range(count):
                which = i % len(arguments)
                at = which if own else 0
                carries[at], extra = call(carries[at], arguments[which])
                extras.append(extra)
            return tuple(carries), extras

        return jax.jit(run, donate_argnums=0, compiler_options=compiler_options)

    short, long = (program(count) for count in calls)
    held: Any = jax.tree.map(jnp.copy, tuple(carries))

    def once(run) -> float:
        nonlocal held
        began = time.perf_counter()
        held, extras = run(held, tuple(arguments))
        jax.block_until_ready((held, extras))
        return time.perf_counter() - began

    for run in (short, long, short, long):  # compile, then find everything in its place
        once(run)
    slopes = []
    for _ in range(repetitions):
        few, many = once(short), once(long)
        slopes.append((many - few) / (calls[1] - calls[0]))
    busy: list[float] = []
    kernels: dict[str, float] = {}
    if trace_dir is not None:
        with profile.trace(trace_dir):
            for _ in range(repetitions):
                once(long)
        busy, kernels = _device_time(trace_dir, repetitions, calls[1])
    found, slope = statistics.median(busy) if busy else None, statistics.median(slopes)
    if slope <= 0 and trace_dir is not None:
        raise RuntimeError(f"{calls[1]} calls took no longer than {calls[0]}: somebody else is using the card, or the host")
    return Timed(slope, tuple(slopes), found, kernels, calls, len(arguments))


def after(small: jax.Array, done: jax.Array) -> jax.Array:
    """The small whole numbers again, as something that cannot be known before `done` (floats) is."""
    first = done.reshape(-1)[0].astype(jnp.float32)
    return small + jnp.where(first == jnp.inf, 1, 0).astype(small.dtype)


def _device_time(directory: pathlib.Path, repetitions: int, calls: int) -> tuple[list[float], dict[str, float]]:
    """Seconds a call in which a stream was at work, by repetition (one figure for all where they cannot be told apart), and by name."""
    events = device_events(directory)
    if not events:
        return [], {}
    names: dict[str, float] = {}
    for name, begin, end in events:
        names[name] = names.get(name, 0.0) + (end - begin) * 1e-9 / (repetitions * calls)
    longest = dict(sorted(names.items(), key=lambda item: -item[1])[:8])
    each, left = divmod(len(events), repetitions)
    if left:
        return [busy_seconds(events) / (repetitions * calls)], longest
    return [busy_seconds(events[i * each : (i + 1) * each]) / calls for i in range(repetitions)], longest


def device_events(directory: pathlib.Path) -> list[tuple[str, float, float]]:
    """What the streams of devices did in the newest trace: name, begin and end in nanoseconds, by begin."""
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                found += [(event.name, event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    return sorted(found, key=lambda event: event[1])


def busy_seconds(events: Sequence[tuple[str, float, float]]) -> float:
    """Time in which at least one event, of several sorted by begin, was under way."""
    total, until = 0.0, -float("inf")
    for _, begin, end in events:
        if end > until:
            total += end - max(begin, until)
            until = end
    return total * 1e-9
