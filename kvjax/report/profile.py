"""Profiler traces: writing one, and reading back how long each named scope took.

The profiler writes an XSpace protobuf. It holds the executed instructions with their times, and the compiled programs, whose instructions
carry the scope they were traced in (`jax.named_scope`). Joining the two gives time by scope on any backend, without a viewer. Only the
few fields that takes are declared here; protobuf skips the rest.
"""

import contextlib
import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import jax
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from kvjax.errors import InputError

SCOPES = ("prefill", "decode", "attend", "write", "evict", "lm_head")


@dataclasses.dataclass(frozen=True)
class ScopeTime:
    """Time spent in instructions traced under a scope.

    Attributes:
      seconds: summed over instructions; threads that work at the same time count each.
      events: executed instructions.
    """

    seconds: float
    events: int


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
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(f"no profiler trace (*.xplane.pb) under {directory}")
    space = _messages()["XSpace"]()
    space.ParseFromString(files[-1].read_bytes())
    scope_of = _instruction_scopes(space)
    seconds: dict[str, float] = defaultdict(float)
    events: dict[str, int] = defaultdict(int)
    for plane in space.planes:
        stat_names = {entry.key: entry.value.name for entry in plane.stat_metadata}
        names = {entry.key: entry.value.name for entry in plane.event_metadata}
        for line in plane.lines:
            for event in line.events:
                stats = {stat_names.get(s.metadata_id): s.str_value or stat_names.get(s.ref_value, "") for s in event.stats}
                if "hlo_module" not in stats:
                    continue
                instruction = stats.get("hlo_op") or names.get(event.metadata_id, "")
                path = scope_of.get((str(stats["hlo_module"]), str(instruction)), ())
                for depth in range(1, len(path) + 1):
                    scope = "/".join(path[:depth])
                    seconds[scope] += event.duration_ps * 1e-12
                    events[scope] += 1
    return {scope: ScopeTime(seconds[scope], events[scope]) for scope in sorted(seconds)}


def _instruction_scopes(space) -> dict[tuple[str, str], tuple[str, ...]]:
    """(module, instruction) -> the scopes of SCOPES it was traced in, outermost first."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
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
                        path = tuple(part for part in parts if part in SCOPES)
                        if path:
                            found[module.hlo_module.name, instruction.name] = path
    return found


_FIELDS = {
    "XSpace": [("planes", 1, "*XPlane")],
    "XPlane": [("name", 2, "string"), ("lines", 3, "*XLine"), ("event_metadata", 4, "*EventEntry"), ("stat_metadata", 5, "*StatEntry")],
    "XLine": [("events", 4, "*XEvent")],
    "XEvent": [("metadata_id", 1, "int64"), ("duration_ps", 3, "int64"), ("stats", 4, "*XStat")],
    "XStat": [("metadata_id", 1, "int64"), ("str_value", 5, "string"), ("bytes_value", 6, "bytes"), ("ref_value", 7, "uint64")],
    "EventEntry": [("key", 1, "int64"), ("value", 2, "EventMetadata")],
    "EventMetadata": [("name", 2, "string"), ("stats", 5, "*XStat")],
    "StatEntry": [("key", 1, "int64"), ("value", 2, "StatMetadata")],
    "StatMetadata": [("name", 2, "string")],
    "HloProto": [("hlo_module", 1, "HloModule")],
    "HloModule": [("name", 1, "string"), ("computations", 3, "*HloComputation")],
    "HloComputation": [("instructions", 2, "*HloInstruction")],
    "HloInstruction": [("name", 1, "string"), ("metadata", 7, "OpMetadata")],
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
