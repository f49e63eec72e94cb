"""What was found, case by case, in a file a part: what is there is not measured again, and nothing is lost when a part is cut short."""

import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from kvjax.files import json_lines, replace
from kvjax.report.record import setting

Record = dict[str, Any]


class Book:
    """Records of one part, by the name of their case.

    Attributes:
      device: the card, by name; empty: what JAX sees.
      records: what is there, those that failed included.
      unfinished: cases that there was no time for.

    Cases that the regular expression `match` does not find are passed over.
    """

    def __init__(
        self, directory: pathlib.Path, part: str, minutes: float, console: Console, dry_run: bool = False, device: str = "", match: str = ""
    ):  # fmt: skip
        self.directory, self.part, self.console, self.dry_run, self.device = directory, part, console, dry_run, device
        self.records: dict[str, Record] = {}
        self.unfinished: list[str] = []
        self._match = re.compile(match)
        self._path = directory / f"{part}.jsonl"
        self._until = time.monotonic() + 60 * minutes
        if self._path.exists():
            for line in self._path.read_text("utf-8").splitlines():
                record = json.loads(line)
                self.records[record["case"]] = record

    @property
    def found(self) -> list[Record]:
        """Those that did not fail."""
        return [record for record in self.records.values() if "failure" not in record]

    def run(self, case: str, measure: Callable[[], Record], about: Record | None = None) -> Record | None:
        """Measures a case, unless that is done or the time is over. An exception becomes its `failure`, and the next run tries again.

        Args:
          about: goes into the record too, before and without what is measured.
        """
        if "failure" not in self.records.get(case, {"failure": "not measured"}):
            return self.records[case]
        if not self._match.search(case):
            return None
        if time.monotonic() > self._until:
            self.unfinished.append(case)
            return None
        began = time.monotonic()
        record: Record = {"case": case, "part": self.part, "dry_run": self.dry_run, **(about or {})}
        try:
            record |= measure()
        except Exception as error:  # any refusal, of any compiler or card, is a result
            record["failure"] = one_line(error)
        record |= {"took_seconds": round(time.monotonic() - began, 2)} | setting()
        if self.device:  # a part that leaves the card to other processes does not see it
            record["device_kind"] = self.device
        self.records[case] = record
        self.save()
        self.console.print(f"{self.part:12} {case:64} {told(record)}", markup=False, highlight=False)
        return record

    def save(self) -> None:
        """Writes the file whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        replace(self._path, json_lines(self.records.values()))

    def drop(self, cases: Sequence[str]) -> None:
        """Keeps records of these cases only: what is no longer listed goes."""
        self.records = {case: record for case, record in self.records.items() if case in cases}


def told(record: Record) -> str:
    """A record in a few words."""
    if "failure" in record:
        return f"FAILED: {record['failure'][:200]}"
    if "answer" in record:
        return str(record["answer"])
    parts = []
    for key, scale, unit in (("kernel_seconds", 1e6, "us kernels"), ("median_seconds", 1e6, "us"), ("bytes_per_second", 1e-9, "GB/s")):
        if record.get(key) is not None:
            parts.append(f"{scale * record[key]:.1f} {unit}")
    return ", ".join(parts) or "ok"


def one_line(error: BaseException) -> str:
    """What an exception says, without its line breaks, and not too much of it."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:600]}"


def table(headings: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [f"| {' | '.join(headings)} |", "|---|" + "--:|" * (len(headings) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
