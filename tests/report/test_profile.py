"""The part of a transfer that is hidden, from traces made by hand; times in microseconds."""

import pathlib

import pytest

from kvjax.report import profile

PROGRAM = {
    "gather.1": ("gather", "jit(step)/layer_1/decode/fetch/cond/branch_1_fun/gather"),
    "gather.2": ("gather", "jit(step)/layer_2/decode/fetch/cond/branch_1_fun/gather"),
    "choice.1": ("conditional", "jit(step)/layer_1/decode/fetch/cond"),
    "loop": ("while", "jit(step)/while"),
    "outlined": ("call", "jit(step)/decode/attend/exp"),
    "dot.1": ("dot", "jit(step)/decode/attend/dot_general"),
    "dot.2": ("dot", "jit(step)/decode/mlp/dot_general"),
    "fusion.1": ("fusion", "jit(step)/decode/mlp/add"),
}
STATS = {1: "hlo_module", 2: "hlo_op", 3: "program", 4: "_p", 5: "_c"}
HOST, DEVICE = "/host:CPU", "/device:GPU:0"


def written(directory: pathlib.Path, *lines: tuple, plane: str = HOST, begins: tuple[int, ...] = ()) -> pathlib.Path:
    """A trace of these lines of (name, begin, duration, id that joins an event with its end mark); `begins`: of each line's clock."""
    messages = profile._messages()
    program = messages["HloProto"]()
    program.hlo_module.name = "jit_step"
    computation = program.hlo_module.computations.add()
    for name, (operation, op_name) in PROGRAM.items():
        instruction = computation.instructions.add(name=name, opcode=operation)
        instruction.metadata.op_name = op_name
    space = messages["XSpace"]()
    metadata = space.planes.add(name="/host:metadata")
    metadata.event_metadata.add(key=1).value.stats.add(metadata_id=3, bytes_value=program.SerializeToString())

    found = space.planes.add(name=plane)
    for key, name in STATS.items():
        found.stat_metadata.add(key=key).value.name = name
    names: dict[str, int] = {}
    for index, events in enumerate(lines):
        clock = begins[index] if begins else 0
        line = found.lines.add(timestamp_ns=clock * 1000)
        for name, begin, duration, *joined in events:
            key = names.setdefault(name, len(names) + 1)
            event = line.events.add(metadata_id=key, offset_ps=(begin - clock) * 10**6, duration_ps=duration * 10**6)
            if name in PROGRAM or name == "jit_step":
                event.stats.add(metadata_id=1, str_value="jit_step")
            if name in PROGRAM:
                event.stats.add(metadata_id=2, str_value=name)
            if joined:
                event.stats.add(metadata_id=5 if name.startswith("end: ") else 4, int64_value=joined[0])
    for name, key in names.items():
        found.event_metadata.add(key=key).value.name = name
    (directory / "made.xplane.pb").write_bytes(space.SerializeToString())
    return directory


def hidden(directory: pathlib.Path, *lines: tuple, **where) -> tuple[float, float]:
    """Microseconds of fetching, and those of them that were hidden."""
    found = profile.hidden_fraction(written(directory, *lines, **where))
    return round(found.seconds * 1e6, 6), round(found.hidden_seconds * 1e6, 6)


def test_nothing_at_the_same_time(tmp_path):
    assert hidden(tmp_path, [("gather.1", 0, 10)], [("dot.1", 10, 10), ("dot.2", 30, 5)]) == (10, 0)


def test_half_of_it(tmp_path):
    assert hidden(tmp_path, [("gather.1", 0, 10)], [("dot.1", 5, 10)]) == (10, 5)
    assert profile.hidden_fraction(tmp_path).fraction == pytest.approx(0.5)


def test_each_moment_counts_once(tmp_path):
    """Two fetches at a time, and three threads that compute."""
    fetches = ([("gather.1", 0, 10)], [("gather.2", 5, 10)])
    assert hidden(tmp_path, *fetches, [("dot.1", 2, 6)], [("dot.2", 4, 6)], [("fusion.1", 14, 6)]) == (15, 9)


def test_a_fetch_does_not_hide_a_fetch(tmp_path):
    assert hidden(tmp_path, [("gather.1", 0, 10)], [("gather.2", 0, 10)]) == (10, 0)


def test_containers_hide_nothing(tmp_path):
    """Neither by their operation, wherever their children run, nor a whole program, nor what surrounds a fetch on its own thread."""
    other = [("jit_step", 0, 50), ("loop", 0, 50), ("outlined", 0, 50)]
    assert hidden(tmp_path, [("fusion.1", 0, 20), ("gather.1", 5, 10)], other) == (10, 0)
    assert hidden(tmp_path, [("loop", 0, 40), ("choice.1", 5, 20), ("gather.1", 5, 10), ("dot.1", 30, 5)], [("dot.2", 5, 4)]) == (10, 4)


def test_an_instruction_that_is_set_off(tmp_path):
    """Its event ends before it does; the mark on another thread tells when that was."""
    lines = [("gather.1", 0, 1, 7), ("dot.1", 2, 3, 8), ("end: dot.1", 5, 0, 8)], [("end: gather.1", 10, 0, 7)]
    assert hidden(tmp_path, *lines) == (10, 3)


def test_annotation_of_a_host_thread(tmp_path):
    """What runs inside it on that thread is the fetch; another thread hides it. Every line has its own clock."""
    host = [("fetch", 100, 20), ("dot.1", 102, 4), ("PjitFunction(step)", 101, 10)]
    assert hidden(tmp_path, host, [("dot.2", 115, 10)], begins=(100, 90)) == (20, 5)


def test_copies_to_a_device(tmp_path):
    streams = [("MemcpyH2D", 0, 10), ("MemcpyD2D", 20, 5)], [("dot.1", 4, 2), ("gather.1", 30, 5)], [("fetch", 0, 100)]
    assert hidden(tmp_path, *streams, plane=DEVICE) == (15, 2), "a scope's line on a device is no annotation"


def test_no_fetch(tmp_path):
    assert hidden(tmp_path, [("dot.1", 0, 10)]) == (0, 0)
    assert profile.hidden_fraction(tmp_path).fraction is None


def test_another_scope(tmp_path):
    found = profile.hidden_fraction(written(tmp_path, [("dot.1", 0, 10)], [("gather.1", 8, 10)]), "attend")
    assert (found.seconds, found.hidden_seconds) == pytest.approx((10e-6, 2e-6))


def test_scopes_count_instructions_and_not_what_contains_them(tmp_path):
    times = profile.scope_times(written(tmp_path, [("choice.1", 0, 20), ("gather.1", 0, 10), ("gather.2", 12, 3)], [("dot.1", 0, 4)]))
    assert {scope: (round(spent.seconds * 1e6, 6), spent.events) for scope, spent in times.items()} == {
        "decode": (17, 3), "decode/attend": (4, 1), "decode/fetch": (13, 2),
    }  # fmt: skip
