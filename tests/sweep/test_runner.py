"""A grid is measured once, cell by cell, whatever happens to the process."""

import csv
import errno
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from rich.console import Console

from kvjax.errors import InputError, MemoryLimitError, SpecError
from kvjax.lock import NAME, locked
from kvjax.sweep import cell_id, log, run
from kvjax.sweep.runner import OTHERS, RECORDS, TABLE, duration, plain

GRID = [{"strategy": name, "x": x, "repeat": repeat} for repeat in (0, 1) for x in (1, 2) for name in ("full", "h2o")]


class Counting:
    """Measures nothing, and says in which order."""

    def __init__(self, fails=()):
        self.cells: list[dict] = []
        self.fails = fails

    def __call__(self, cell):
        self.cells.append(dict(cell))
        for wanted, problem in self.fails:
            if wanted.items() <= cell.items():
                raise problem
        return {"strategy": cell["strategy"], "value": 10 * cell["x"], "samples": {"kld": [0.5, float("nan")]}}


def lines(directory):
    return [json.loads(line) for line in (directory / RECORDS).read_text().splitlines()]


def test_every_cell_is_measured_once_and_in_turns(tmp_path):
    measure = Counting()
    records = run("grid", GRID, tmp_path, measure)
    assert [r["cell"] for r in records] == GRID == lines_of_cells(tmp_path)
    assert [c["repeat"] for c in measure.cells] == [0] * 4 + [1] * 4
    assert all((r["sweep"], r["outcome"], r["error"], r["cell_id"]) == ("grid", "done", None, cell_id(r["cell"])) for r in records)
    assert records[0]["samples"] == {"kld": [0.5, None]}
    assert records[0]["seconds"] >= 0
    again = run("grid", list(reversed(GRID)), tmp_path, measure)
    assert len(measure.cells) == len(GRID)
    assert [r["cell"] for r in again] == list(reversed(GRID))
    with (tmp_path / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cell.x"] for row in rows] == [str(c["x"]) for c in reversed(GRID)]
    assert {row["value"] for row in rows} == {"10", "20"}
    assert "samples" not in rows[0]


def lines_of_cells(directory):
    return [r["cell"] for r in lines(directory)]


def test_a_cell_that_fails_is_recorded_and_tried_again_by_a_later_run_once(tmp_path):
    broken = {"strategy": "h2o", "x": 2, "repeat": 0}
    measure = Counting([(broken, ValueError("no\nsuch thing"))])
    records = run("grid", GRID, tmp_path, measure)
    assert len(measure.cells) == len(GRID)
    assert [(r["outcome"], r["error"]) for r in records if r["outcome"] != "done"] == [("failed", "ValueError: no such thing")]
    assert records[3]["strategy"] == "h2o"
    again = Counting([(broken, SpecError("still not"))])
    records = run("grid", GRID, tmp_path, again)
    assert again.cells == [broken]
    assert records[3]["error"] == "still not"
    mended = Counting()
    run("grid", GRID, tmp_path, mended)
    assert mended.cells == [broken]
    assert [r["outcome"] for r in lines(tmp_path)] == ["done"] * len(GRID)


def test_a_cell_that_cannot_fit_is_infeasible_and_not_tried_again(tmp_path):
    large = {"x": 2}
    measure = Counting([(large, MemoryLimitError("too small for that"))])
    records = run("grid", GRID, tmp_path, measure)
    assert [r["outcome"] for r in records] == ["done", "done", "infeasible", "infeasible"] * 2
    assert records[2]["error"] == "too small for that"
    again = Counting()
    run("grid", GRID, tmp_path, again)
    assert again.cells == []


def test_what_xla_cannot_allocate_is_infeasible(tmp_path):
    from jax.errors import JaxRuntimeError

    out_of_memory = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    records = run("grid", GRID[:2], tmp_path, Counting([({"strategy": "full"}, out_of_memory), ({}, JaxRuntimeError("INTERNAL: oh"))]))
    assert [r["outcome"] for r in records] == ["infeasible", "failed"]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_dropped_or_completed(tmp_path, cut):
    """All that a killed writer can leave: the beginning of a line. Without its newline alone, the record is whole."""
    run("grid", GRID, tmp_path, Counting())
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(log.read(path)) == len(GRID) - (cut > 1)
    measure = Counting()
    records = run("grid", GRID, tmp_path, measure)
    assert measure.cells == ([] if cut == 1 else [GRID[-1]])
    assert lines(tmp_path) == records


def test_damage_elsewhere_is_reported_and_nothing_is_overwritten(tmp_path):
    run("grid", GRID, tmp_path, Counting())
    path = tmp_path / RECORDS
    damaged = path.read_bytes().replace(b'"cell_id"', b'"cell_', 1)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"records\.jsonl:1: not a record"):
        run("grid", GRID, tmp_path, Counting())
    assert path.read_bytes() == damaged


def test_records_of_another_grid_wait_until_it_is_asked_for(tmp_path):
    run("grid", GRID, tmp_path, Counting())
    larger = [*GRID[:2], {"strategy": "full", "x": 3}]
    measure = Counting()
    run("grid", larger, tmp_path, measure)
    assert measure.cells == [larger[-1]]
    assert lines_of_cells(tmp_path) == larger
    back = Counting()
    run("grid", GRID, tmp_path, back)
    assert back.cells == []
    assert lines_of_cells(tmp_path) == GRID
    assert [r["cell"] for r in log.read(tmp_path / OTHERS)] == larger[-1:]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    run("grid", GRID[:3], tmp_path, Counting())
    before, write = (tmp_path / RECORDS).read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)):
        run("grid", GRID, tmp_path, Counting())
    monkeypatch.undo()
    assert (tmp_path / RECORDS).read_bytes() == before
    assert len(run("grid", GRID, tmp_path, Counting())) == len(GRID)


def test_ctrl_c_says_what_is_done_and_leaves_130(tmp_path, capsys):
    measure = Counting([({"strategy": "full", "x": 1, "repeat": 1}, KeyboardInterrupt())])
    with pytest.raises(SystemExit) as stop:
        run("grid", GRID, tmp_path, measure, Console(width=200))
    assert stop.value.code == 130
    assert "grid: interrupted; 4 of 8 cells are done and kept" in capsys.readouterr().out
    assert not (tmp_path / NAME).exists()
    assert len(lines(tmp_path)) == 4


def test_one_run_at_a_time_writes_a_directory(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "):
        run("grid", GRID, tmp_path, Counting())
    (tmp_path / NAME).write_text('{"pid": 1, "host": "gone"')  # left behind by a run that was killed: nobody holds it
    run("grid", GRID, tmp_path, Counting())
    assert not (tmp_path / NAME).exists()


def test_a_directory_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/results: cannot write there: Not a directory"):
        run("grid", GRID, tmp_path / "file" / "results", Counting())


def test_records_are_plain_json():
    assert plain({"a": np.float32(1.5), "b": np.array([1, 2]), 3: (float("inf"), float("nan"))}) == {
        "a": 1.5,
        "b": [1, 2],
        "3": ["inf", None],
    }
    assert [duration(s) for s in (3.4, 90, 3700)] == ["3 s", "1 min 30 s", "1 h 01 min"]


KILLED = """
    import json, os, pathlib, random, signal, sys, time
    from kvjax.sweep import run
    directory, kills, cells = pathlib.Path(sys.argv[1]), int(sys.argv[2]), [{"strategy": "full", "x": x} for x in range(24)]

    def measure(cell):
        with (directory / "measured").open("a") as file:
            file.write(f"{cell['x']}\\n")
        time.sleep(0.002)
        if cell["x"] == 7 and not (directory / "mended").exists():
            raise ValueError("not yet")
        return {"strategy": "full", "value": cell["x"] ** 2, "samples": {"long": [0.1] * 20000}}

    chance, ended = random.Random(0), 0
    while ended < 2:
        child = os.fork()
        if not child:
            run("killed", cells, directory, measure)
            os._exit(0)
        if kills:
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            kills -= 1
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            kills, ended = 0, ended + 1
            (directory / "mended").touch()
"""


def test_a_process_that_is_killed_at_any_point_loses_nothing_and_doubles_nothing(tmp_path):
    """Forty children are killed (kill -9) some 0 to 30 ms into their run; a cell takes 2 ms and its record is 100 KB."""
    code, root = textwrap.dedent(KILLED), pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path), "40"], check=True, cwd=root, timeout=120)
    records = lines(tmp_path)
    assert [r["cell"]["x"] for r in records] == list(range(24))
    assert [r["value"] for r in records] == [x**2 for x in range(24)]
    assert {r["outcome"] for r in records} == {"done"}
    assert not (tmp_path / NAME).exists()
    measured = [int(line) for line in (tmp_path / "measured").read_text().splitlines()]
    assert len(measured) <= 24 + 1 + 41  # a kill costs the cell it hits, and the one that failed was tried again, by every later run
