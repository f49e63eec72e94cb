"""The file of a sweep's records: JSON lines, appended one at a time, that survive a process which is killed while it writes.

A record goes to the file in one write, which is flushed to the disk before the next cell begins. What a killed process can leave behind is
a last line without its end; `mend` drops it (or gives it the newline that alone was missing), and the cell is measured again.
"""

import csv
import errno
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.errors import InputError
from kvjax.files import dumps, json_lines, replace

Record = dict[str, Any]


def mend(path: pathlib.Path) -> None:
    """Makes the file end where its last whole record does."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        end = text.rfind(b"\n") + 1
        if end == len(text):
            return
        if _parsed(text[end:]) is None:
            file.truncate(end)
        else:
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: pathlib.Path) -> list[Record]:
    """All records, in the order they were written; a last line without its end is left out. Raises InputError for a damaged file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is not None:
            found.append(record)
        elif line.strip() and number < len(lines):
            raise InputError(f"{path}:{number}: not a record of a sweep; take this line out, or the file away, and run again")
    return found


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "cell_id" in record else None


def append(path: pathlib.Path, record: Record) -> None:
    """Adds one record: one write, on the disk when this returns. Where it does not fit on the disk, the file stays as it was."""
    line = (dumps(record) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, line) != len(line):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Replaces the file, whole or not at all."""
    replace(path, json_lines(records))


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The last record of every cell, by id, in the order in which cells came first."""
    found: dict[str, Record] = {}
    for record in records:
        found[record["cell_id"]] = record
    return found


def write_csv(path: pathlib.Path, records: Sequence[Record]) -> None:
    """The records as a table, a row each, without samples; what the cell declares stands under `cell.<name>`."""
    rows = [flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    replace(path, table.getvalue())


def flat(record: Record) -> Record:
    """Scalars alone: without `samples`, `cell` spread out."""
    row = {name: value for name, value in record.items() if not isinstance(value, dict | list)}
    return row | {f"cell.{name}": value for name, value in record.get("cell", {}).items()}
