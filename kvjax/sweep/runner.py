"""Runs a grid: measures the cells that are missing, one after the other, and keeps what it has found whatever happens to it.

    records = run("sparsity", cells, directory, Bench())

The directory's records.jsonl holds one record a cell, on the disk as soon as the cell is done: a process that is killed loses the cell it
was at, and nothing else. The same call goes on from there. A cell that failed is recorded with its reason and the next one is measured; a
later run tries it again, once. Records of cells that the grid does not have (a smaller grid's, say) wait in other.jsonl until it does.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from jax.errors import JaxRuntimeError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvjax.errors import InputError, KvjaxError, MemoryLimitError
from kvjax.files import plain
from kvjax.lock import locked
from kvjax.sweep import log
from kvjax.sweep.cells import Cell, cell_id, checked, in_turns
from kvjax.sweep.log import Record

Measure = Callable[[Cell], Record]
"""Measures a cell: the keys of kvjax.report.record, and `samples`. Raises MemoryLimitError for a cell that cannot fit into its memory."""

RECORDS, OTHERS, TABLE = "records.jsonl", "other.jsonl", "records.csv"
INTERRUPTED = 130
LONGEST_ERROR = 300


def run(name: str, cells: Sequence[Cell], directory: pathlib.Path, measure: Measure, console: Console | None = None) -> list[Record]:
    """Measures what is missing, and returns a record for every cell, in declared order; those that failed are among them.

    Ctrl-C ends the process with exit code 130, after a line about what is done.

    Raises:
      SpecError: cells that are not flat, or declared twice.
      InputError: a directory that cannot be written, that another run is writing, or whose records are damaged.
    """
    console = console or Console(quiet=True)
    wanted = checked(cells)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            found = _kept(directory, wanted)
            missing = [cell for cell in in_turns(cells) if found.get(cell_id(cell), {}).get("outcome") not in ("done", "infeasible")]
            _measure_all(name, missing, len(wanted), directory / RECORDS, measure, found, console)
            records = [found[key] for key in wanted]
            log.write(directory / RECORDS, records)
            log.write_csv(directory / TABLE, records)
            return records
    except OSError as error:
        raise InputError(f"{directory}: cannot write there: {error.strerror or error}") from None


def _kept(directory: pathlib.Path, wanted: dict[str, Cell]) -> dict[str, Record]:
    """What earlier runs have left of the wanted cells. What they left of others is put aside, first there and only then no longer here."""
    here, aside = directory / RECORDS, directory / OTHERS
    log.mend(here)
    written = log.read(here)
    known = log.latest([*log.read(aside), *written])
    others = [record for key, record in known.items() if key not in wanted]
    mine = {key: record for key, record in known.items() if key in wanted}
    if others:
        log.write(aside, others)
    if [record["cell_id"] for record in written] != list(mine):
        log.write(here, mine.values())
    if not others:
        aside.unlink(missing_ok=True)
    return mine


def _measure_all(
    name: str, missing: Sequence[Cell], total: int, path: pathlib.Path, measure: Measure, found: dict[str, Record], console: Console
) -> None:
    """Measures cells in order, adds each to `found` and to the file."""
    if total > len(missing):
        console.print(f"{name}: {total - len(missing)} of {total} cells are there already", highlight=False)
    columns = (
        TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=len(missing), left="")
        for done, cell in enumerate(missing):
            progress.update(task, description=f"{name}: {title(cell)}", completed=done)
            try:
                record = _measured(name, cell, measure)
                found[record["cell_id"]] = record
                log.append(path, record)
            except KeyboardInterrupt:
                progress.stop()
                log.write(path, found.values())
                count = sum(record["outcome"] != "failed" for record in found.values())
                console.print(f"{name}: interrupted; {count} of {total} cells are done and kept, the same command goes on", highlight=False)
                sys.exit(INTERRUPTED)
            left = (time.perf_counter() - began) / (done + 1) * (len(missing) - done - 1)
            progress.update(task, completed=done + 1, left=f"about {duration(left)} left" if left else "")
            if record["outcome"] != "done" or not console.is_terminal:
                outcome = f"{record['outcome']}: {record['error']}" if record["error"] else f"{record['seconds']:.1f} s"
                console.print(f"{name}: {title(cell)}: {outcome} ({done + 1} of {len(missing)}, {duration(left)} left)", highlight=False)


def _measured(name: str, cell: Cell, measure: Measure) -> Record:
    """The record of a cell, whatever becomes of it."""
    began = time.perf_counter()
    outcome, error = "done", None
    metrics: Record = {}
    try:
        metrics = plain(measure(cell))
    except (MemoryLimitError, MemoryError) as problem:
        outcome, error = "infeasible", one_line(problem)
    except Exception as problem:  # whatever a cell dies of, the others are measured
        exhausted = isinstance(problem, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(problem)
        outcome, error = "infeasible" if exhausted else "failed", one_line(problem)
    return {
        "strategy": cell.get("strategy"),
        **metrics,
        "sweep": name,
        "cell": dict(cell),
        "cell_id": cell_id(cell),
        "outcome": outcome,
        "error": error,
        "seconds": time.perf_counter() - began,
        "samples": metrics.get("samples", {}),
    }


def one_line(problem: BaseException) -> str:
    """What went wrong, in a line; of an error that kvjax did not foresee, with its type."""
    text = " ".join(str(problem).split())[:LONGEST_ERROR]
    return text if isinstance(problem, KvjaxError) and text else f"{type(problem).__name__}: {text}"


def title(cell: Cell) -> str:
    """A cell in a few words, for progress: its strategy and what stands out."""
    shown = ("model", "budget", "request_rate", "input_len", "batch_size", "kv_memory", "limit", "case", "repeat")
    return " ".join([str(cell.get("strategy", "")), *(f"{name}={cell[name]}" for name in shown if cell.get(name) is not None)]).strip()


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
