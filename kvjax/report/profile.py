"""Profiler traces: writing one, and reading back how long each named scope took and how much of that ran beside other work.

The profiler writes an XSpace protobuf. It holds the executed instructions with their times, and the compiled programs, whose instructions
carry the scope they were traced in (`jax.named_scope`). Joining the two gives time by scope on any backend, without a viewer. Only the
few fields that takes are declared here; protobuf skips the rest.
"""

import bisect
import contextlib
import dataclasses
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import jax
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from kvjax.errors import InputError

SCOPES = ("prefill", "decode", "select", "fetch", "attend", "write", "evict", "lm_head")

CONTAINERS = ("while", "conditional", "call")
"""Operations whose time is that of the instructions inside them, which have events of their own."""

Interval = tuple[int, int]
"""Begin and end, in picoseconds."""


@dataclasses.dataclass(frozen=True)
class ScopeTime:
    """Time spent in instructions traced under a scope.

    Attributes:
      seconds: summed over instructions; threads that work at the same time count each, loops and branches only what is inside them.
      events: executed instructions.
    """

    seconds: float
    events: int


@dataclasses.dataclass(frozen=True)
class Hidden:
    """How much of a scope's time other work covered.

    Attributes:
      seconds: wall-clock time in which the scope was under way, on any thread or stream; what runs at the same time counts once.
      hidden_seconds: the part of it in which an instruction outside the scope ran too.
    """

    seconds: float
    hidden_seconds: float

    @property
    def fraction(self) -> float | None:
        """None where the scope took no time."""
        return self.hidden_seconds / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """Of a compiled program: its operation, and the scopes of SCOPES it was traced in, outermost first."""

    operation: str
    scopes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Event:
    """Something a line (a thread, or a stream of a device) did.

    Attributes:
      span: on that line; inside it lie the spans of what was called.
      finished: when it was done; later than the span where the line only set it off.
      instruction: what was executed; None for anything else, such as an annotation or a whole program.
    """

    plane: str
    name: str
    span: Interval
    finished: int
    instruction: _Instruction | None


@contextlib.contextmanager
def trace(directory: pathlib.Path) -> Iterator[None]:
    """Profiles the block; the trace goes to `directory` in the layout TensorBoard, XProf and Perfetto read."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        yield


def scope_times(directory: pathlib.Path) -> dict[str, ScopeTime]:
    """Time by scope path (such as `decode/evict`) in the newest trace under `directory`.

    An instruction counts for each scope it stands in: `decode` includes `decode/attend`. Raises InputError when there is no trace.
    """
    seconds: dict[str, float] = defaultdict(float)
    events: dict[str, int] = defaultdict(int)
    for event in (event for line in _lines(_newest(directory)) for event in line):
        if event.instruction is None or event.instruction.operation in CONTAINERS:
            continue
        for depth in range(1, len(event.instruction.scopes) + 1):
            scope = "/".join(event.instruction.scopes[:depth])
            seconds[scope] += (event.span[1] - event.span[0]) * 1e-12
            events[scope] += 1
    return {scope: ScopeTime(seconds[scope], events[scope]) for scope in sorted(seconds)}


def hidden_fraction(directory: pathlib.Path, scope: str = "fetch") -> Hidden:
    """How much of the time in `scope` other work covered, in the newest trace under `directory`.

    Time in the scope is: instructions traced in it; what a host thread did inside an annotation of that name
    (`jax.profiler.TraceAnnotation`); and, for `fetch`, every copy from host memory on a device's streams, which programs that hand arrays
    over leave without a scope. Other work is every other instruction, on whatever thread or stream.

    Only leaves count. A loop, a branch or a call spans its children, and so does a whole program: the former are told by their operation
    in the compiled program, the latter is no instruction of one, and any other event with an instruction inside it on the same line is
    left out as well. So one thread never hides its own work.

    It is measured, not modelled. On a CPU the transfer is a copy in memory that competes with the other work for the same cores.
    Raises InputError when there is no trace.
    """
    inside: list[Interval] = []
    outside: list[Interval] = []
    for line in _lines(_newest(directory)):
        annotated = _union(event.span for event in line if event.instruction is None and _is_scope(event, scope))
        inside += annotated
        for event in _leaves(line):
            assert event.instruction is not None
            mine = scope in event.instruction.scopes or _covers(annotated, event.span) or _is_scope(event, scope)
            (inside if mine else outside).append((event.span[0], event.finished))
    within = _union(inside)
    return Hidden(_length(within) * 1e-12, _overlap(within, _union(outside)) * 1e-12)


def _newest(directory: pathlib.Path) -> Any:
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(f"no profiler trace (*.xplane.pb) under {directory}")
    space = _messages()["XSpace"]()
    space.ParseFromString(files[-1].read_bytes())
    return space


def _lines(space) -> Iterator[list[_Event]]:
    """The events of every line."""
    instructions = _instructions(space)
    marks = _end_marks(space)
    for plane in space.planes:
        stat_names = {entry.key: entry.value.name for entry in plane.stat_metadata}
        names = {entry.key: entry.value.name for entry in plane.event_metadata}
        for line in plane.lines:
            found = []
            for event in line.events:
                stats = {stat_names.get(s.metadata_id): s for s in event.stats}
                name = names.get(event.metadata_id, "")
                begin = line.timestamp_ns * 1000 + event.offset_ps
                span = (begin, begin + event.duration_ps)
                instruction = None
                if "hlo_module" in stats:
                    text = {
                        key: stats[key].str_value or stat_names.get(stats[key].ref_value, "")
                        for key in ("hlo_module", "hlo_op")
                        if key in stats
                    }
                    instruction = instructions.get((text["hlo_module"], text.get("hlo_op") or name))
                finished = max(span[1], marks.get(stats["_p"].int64_value, 0)) if instruction and "_p" in stats else span[1]
                found.append(_Event(plane.name, name, span, finished, instruction))
            yield found


def _end_marks(space) -> dict[int, int]:
    """When instructions that may go on after their event were done: the mark `end: <instruction>` says so, linked to it by an id."""
    marks: dict[int, int] = {}
    for plane in space.planes:
        stat_names = {entry.key: entry.value.name for entry in plane.stat_metadata}
        ends = {entry.key for entry in plane.event_metadata if entry.value.name.startswith("end: ")}
        for line in plane.lines:
            for event in line.events:
                if event.metadata_id in ends:
                    for stat in event.stats:
                        if stat_names.get(stat.metadata_id) == "_c":
                            marks[stat.int64_value] = line.timestamp_ns * 1000 + event.offset_ps
    return marks


def _instructions(space) -> dict[tuple[str, str], _Instruction]:
    """By (module, instruction): those of every program in the trace."""
    found: dict[tuple[str, str], _Instruction] = {}
    for plane in space.planes:
        for entry in plane.event_metadata:
            for stat in entry.value.stats:
                if not stat.bytes_value:
                    continue
                module = _messages()["HloProto"]()
                module.ParseFromString(stat.bytes_value)
                for computation in module.hlo_module.computations:
                    for instruction in computation.instructions:
                        parts = instruction.metadata.op_name.split("/")
                        scopes = tuple(dict.fromkeys(part for part in parts if part in SCOPES))
                        found[module.hlo_module.name, instruction.name] = _Instruction(instruction.opcode, scopes)
    return found


def _is_scope(event: _Event, scope: str) -> bool:
    """An annotation of that name on a host thread, or for `fetch` a copy from the host on a device."""
    if event.plane.startswith("/device:"):
        return scope == "fetch" and event.name.startswith("MemcpyH2D")
    return event.name.split("#")[0] == scope


def _leaves(line: list[_Event]) -> Iterator[_Event]:
    """The executed instructions of a line that no other lies in."""
    executed = [event for event in line if event.instruction is not None]
    executed.sort(key=lambda event: (event.span[0], -event.span[1]))
    for event, following in itertools.zip_longest(executed, executed[1:]):
        nested = following is not None and following.span[0] < event.span[1] and following.span[1] <= event.span[1]
        assert event.instruction is not None
        if not nested and event.instruction.operation not in CONTAINERS:
            yield event


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that lie apart, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _length(apart: list[Interval]) -> int:
    return sum(end - begin for begin, end in apart)


def _overlap(first: list[Interval], second: list[Interval]) -> int:
    """Time in both."""
    return _length(first) + _length(second) - _length(_union([*first, *second]))


def _covers(apart: list[Interval], span: Interval) -> bool:
    where = bisect.bisect_right(apart, span[0], key=lambda interval: interval[0]) - 1
    return where >= 0 and span[1] <= apart[where][1]


_FIELDS = {
    "XSpace": [("planes", 1, "*XPlane")],
    "XPlane": [("name", 2, "string"), ("lines", 3, "*XLine"), ("event_metadata", 4, "*EventEntry"), ("stat_metadata", 5, "*StatEntry")],
    "XLine": [("timestamp_ns", 3, "int64"), ("events", 4, "*XEvent")],
    "XEvent": [("metadata_id", 1, "int64"), ("offset_ps", 2, "int64"), ("duration_ps", 3, "int64"), ("stats", 4, "*XStat")],
    "XStat": [
        ("metadata_id", 1, "int64"),
        ("int64_value", 4, "int64"),
        ("str_value", 5, "string"),
        ("bytes_value", 6, "bytes"),
        ("ref_value", 7, "uint64"),
    ],
    "EventEntry": [("key", 1, "int64"), ("value", 2, "EventMetadata")],
    "EventMetadata": [("name", 2, "string"), ("stats", 5, "*XStat")],
    "StatEntry": [("key", 1, "int64"), ("value", 2, "StatMetadata")],
    "StatMetadata": [("name", 2, "string")],
    "HloProto": [("hlo_module", 1, "HloModule")],
    "HloModule": [("name", 1, "string"), ("computations", 3, "*HloComputation")],
    "HloComputation": [("instructions", 2, "*HloInstruction")],
    "HloInstruction": [("name", 1, "string"), ("opcode", 2, "string"), ("metadata", 7, "OpMetadata")],
    "OpMetadata": [("op_name", 2, "string")],
}
"""Message -> (field, number, type); a star repeats."""


@cache
def _messages() -> dict:
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"int64": kinds.TYPE_INT64, "uint64": kinds.TYPE_UINT64, "string": kinds.TYPE_STRING, "bytes": kinds.TYPE_BYTES}
    file = descriptor_pb2.FileDescriptorProto(name="kvjax_trace.proto", package="kvjax_trace", syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            added = message.field.add(name=field, number=number)
            added.label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in scalars:
                added.type = scalars[kind]
            else:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".kvjax_trace.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"kvjax_trace.{name}")) for name in _FIELDS}
