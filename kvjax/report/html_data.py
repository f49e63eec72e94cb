"""A results directory, read for the page: experiments, their records, what is said about them, and what was left out and why."""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.errors import InputError
from kvjax.files import json_lines
from kvjax.report.figures import Panel, Scale

Record = dict[str, Any]

ORDER = ("request_rate", "model_size", "sparsity", "context_length", "batch_size", "retention", "request_mix")
"""Of the experiments on a page; others follow by name."""

WRITES = "`python -m experiments.study`"

TEXTS = ("name", "title", "question", "command", "x", "x_label", "x_scale", "series")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure an experiment has: a file name, or None where it is yet to be drawn from the records."""

    file: str | None
    caption: str
    command: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What one folder of a results directory holds.

    Attributes:
      about: of about.json; its absence leaves fields empty.
      notes: what was left out, in a sentence each.
    """

    name: str
    directory: pathlib.Path
    title: str
    question: str
    command: str
    quick: bool
    x: str
    x_label: str
    x_scale: Scale
    series: str
    panels: tuple[Panel, ...]
    figures: tuple[Figure, ...]
    findings: tuple[str, ...]
    setting: dict[str, Any]
    records: tuple[Record, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """A whole results directory; `study` is the text of STUDY.md."""

    directory: pathlib.Path
    experiments: tuple[Experiment, ...]
    study: str | None

    @property
    def records(self) -> list[Record]:
        return [record for experiment in self.experiments for record in experiment.records]

    @property
    def notes(self) -> list[str]:
        return [note for experiment in self.experiments for note in experiment.notes]


def read(directory: pathlib.Path) -> Results:
    """Reads a results directory. Raises InputError where there is none, where it holds no record, and for JSON that is none of a study."""
    if not directory.exists():
        raise InputError(f"no such directory: {directory}; give the one that {WRITES} wrote")
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory; give the one that holds <experiment>/records.jsonl")
    names = sorted((path.parent.name for path in directory.glob("*/records.jsonl")), key=lambda name: (_rank(name), name))
    if not names:
        raise InputError(f"nothing to report in {directory}; it should hold <experiment>/records.jsonl, as {WRITES} writes")
    experiments = tuple(_experiment(directory / name) for name in names)
    if not any(experiment.records for experiment in experiments):
        raise InputError(f"no whole record in {directory}: every line of its records.jsonl is torn or blank; run the study again")
    study = directory / "STUDY.md"
    return Results(directory, experiments, study.read_text("utf-8", errors="replace") if study.is_file() else None)


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _experiment(directory: pathlib.Path) -> Experiment:
    records, notes = _records(directory / "records.jsonl")
    about: Record = {}
    path = directory / "about.json"
    if path.is_file():
        about = _about(path)
    else:
        notes.append(f"{directory.name}: no about.json, so its question, figures and findings are missing.")
    quick = about.get("quick") is True
    return Experiment(
        name=directory.name,
        directory=directory,
        title=about.get("title") or directory.name.replace("_", " ").capitalize(),
        question=about.get("question") or "",
        command=about.get("command") or "",
        quick=quick,
        x=about.get("x") or "",
        x_label=about.get("x_label") or about.get("x") or "",
        x_scale="log" if about.get("x_scale") == "log" else "linear",
        series=about.get("series") or "strategy",
        panels=tuple(_panel(panel) for panel in about.get("panels") or ()),
        figures=_figures(directory, about, notes),
        findings=tuple(about.get("findings") or ()),
        setting=about.get("setting") or {},
        records=tuple(records),
        notes=tuple(notes),
    )


def _records(path: pathlib.Path) -> tuple[list[Record], list[str]]:
    """The records of a file, of a cell measured again the last; torn lines are told, not kept."""
    found: dict[Any, Record] = {}
    notes: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            where = f"{path.parent.name}/{path.name}, line {number}"
            notes.append(f"{where}, is torn (no JSON) and was skipped; its cell is measured again when the study goes on.")
            continue
        if problem := _foreign(record):
            raise InputError(f"{path}, line {number}, is no record of a study: {problem}; expected what {WRITES} writes")
        found[json.dumps(record["cell"], sort_keys=True) if "cell" in record else number] = record
    return list(found.values()), notes


def _foreign(record: Any) -> str | None:
    """What makes a JSON value no record of a study; None for a record."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object"
    if not isinstance(record.get("strategy"), str):
        return 'no "strategy"'
    if not isinstance(record.get("cell", {}), dict):
        return '"cell" is no object'
    if not isinstance(record.get("cell_id", ""), str | int):
        return '"cell_id" is no text'
    return None


def _about(path: pathlib.Path) -> Record:
    where = f"{path.parent.name}/{path.name}"
    try:
        about = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise InputError(f"{where} is no JSON; run its experiment again, it is written at the end") from None
    if not isinstance(about, dict):
        raise InputError(f"{where} is a {type(about).__name__}, not an object; expected what {WRITES} writes")
    for key in TEXTS:
        if not isinstance(about.get(key, ""), str | None):
            raise InputError(f'{where}: "{key}" should be text')
    if not isinstance(about.get("setting", {}), dict | None):
        raise InputError(f'{where}: "setting" should be an object')
    for key, what in (("findings", "sentences"), ("panels", 'objects with "key" and "label"'), ("figures", 'objects with "file"')):
        entries = about.get(key) or []
        needs = {"panels": ("key", "label"), "figures": ("file",)}.get(key)
        fits = isinstance(entries, list) and all(
            isinstance(e, str) if needs is None else isinstance(e, dict) and all(isinstance(e.get(n), str) for n in needs) for e in entries
        )
        if not fits:
            raise InputError(f'{where}: "{key}" should be a list of {what}')
    return about


def _panel(entry: Record) -> Panel:
    factor = entry.get("factor")
    return Panel(
        entry["key"],
        entry["label"],
        "log" if entry.get("scale") == "log" else "linear",
        entry.get("better") if entry.get("better") in ("less", "more") else None,
        float(factor) if isinstance(factor, int | float) and not isinstance(factor, bool) else 1.0,
    )


def _figures(directory: pathlib.Path, about: Record, notes: list[str]) -> tuple[Figure, ...]:
    """Those whose SVG is there. Where none is and panels are declared, one to be drawn."""
    command = about.get("command") or ""
    entries = about.get("figures") or []
    found = []
    for entry in entries:
        caption, name = str(entry.get("caption") or ""), entry["file"]
        if pathlib.PurePath(name).name == name and (directory / name).is_file():
            found.append(Figure(name, caption, str(entry.get("command") or command)))
        elif not (about.get("panels") and len(entries) == 1):
            notes.append(f"{directory.name}: its figure {name} is not there; the command of the experiment draws it.")
    if not found and about.get("panels"):
        caption = str(entries[0].get("caption") or "") if entries else ""
        found.append(Figure(None, caption, command))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------------------- downloads


def as_csv(records: Sequence[Record]) -> str:
    """Records as CSV: a column a key, `cell.<key>` for what the cell declares; without samples. Lists and objects are JSON."""
    flat = [_flat(record) for record in records]
    keys = list(dict.fromkeys(key for record in flat for key in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for record in flat:
        writer.writerow([_field(record.get(key)) for key in keys])
    return text.getvalue()


def as_jsonl(records: Iterable[Record]) -> str:
    """A record a line, without samples."""
    return json_lines({k: v for k, v in record.items() if k != "samples"} for record in records)


def _flat(record: Record) -> Record:
    plain = {key: value for key, value in record.items() if key not in ("samples", "cell")}
    return plain | {f"cell.{key}": value for key, value in record.get("cell", {}).items()}


def _field(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
