"""What a run shows: the same tables for the terminal and, as markdown, for BUILD_NOTES.md."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.bench.bars import Bar, Record, evaluate


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table before it has a form; the first column is text, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_TITLES = {
    "decode": "Decode, ms per step (fraction of the engine's own byte floor; times kvjax's)",
    "prefill": "Prefill, ms (fraction of the flop floor; times kvjax's)",
    "flat": "Decode with H2O at equal slots, ms per step (fraction of the byte floor)",
}


def grids(records: Sequence[Record]) -> list[Grid]:
    """One grid a phase: engines down, cells across, floors first."""
    made = []
    for phase, title in _TITLES.items():
        mine = [r for r in records if r["phase"] == phase]
        if not mine:
            continue
        cells = list(dict.fromkeys((r["batch"], r["context"]) for r in mine))
        found = {(r["engine"], r["batch"], r["context"]): r for r in mine}
        rows = [("floor, full cache" if phase != "flat" else "floor", *(_floor(found, *cell) for cell in cells))]
        for engine in dict.fromkeys(r["engine"] for r in mine):
            rows.append((engine, *(_figure(found, engine, *cell) for cell in cells)))
        made.append(Grid(title, ("engine", *(f"b{batch} c{context}" for batch, context in cells)), tuple(rows)))
    return made


def bar_grid(bars: Sequence[Bar]) -> Grid:
    rows = [(bar.name, "-" if bar.value is None else f"{bar.value:.3f}", bar.wanted, bar.verdict, bar.remark) for bar in bars]
    return Grid("Bars", ("bar", "ratio", "wanted", "verdict", "remark"), tuple(rows))


def facts(records: Sequence[Record], notes: Sequence[str]) -> list[str]:
    """What the figures hang on, one line each."""
    if not records:
        return list(notes)
    first = records[0]
    engines = ", ".join(f"{name} {version}" for name, version in {**first["versions"], **first["peer_versions"]}.items())
    low, high = (f(r["copy_bytes_per_second"] for r in records) / 1e9 for f in (min, max))
    slow, fast = (f(r["matmul_flops_per_second"] for r in records) / 1e9 for f in (min, max))
    discarded = sum(r["discarded"] for r in records)
    disturbed = sum(r["disturbed"] for r in records)
    return [
        f"{first['device_kind']}; {engines}; commit {first['git_commit']}",
        f"{first['model_id']} float32, batch b and context c as in the column heads, {first['steps']} decode steps a sample; "
        f"medians of {first['reps']} interleaved samples after {first['warm_up']} warm-ups",
        f"floors from a copy at {low:.1f} to {high:.1f} GB/s (read and written) and a matrix product at {slow:.0f} to {fast:.0f} GFLOP/s, "
        "measured before every cell",
        f"{discarded} samples discarded because another process used more than 15 % of a core, {disturbed} kept in spite of that"
        + (" (in the figures marked *)" if disturbed else ""),
        *notes,
    ]


def markdown(records: Sequence[Record], notes: Sequence[str], command: str) -> str:
    """The whole result as markdown."""
    parts = [f"`{command}`", "\n".join(f"- {fact}" for fact in facts(records, notes))]
    parts += [_markdown(grid) for grid in (*grids(records), bar_grid(evaluate(records)))]
    return "\n\n".join(parts) + "\n"


def show(records: Sequence[Record], notes: Sequence[str], console: Console) -> None:
    """The whole result on the terminal."""
    for grid in (*grids(records), bar_grid(evaluate(records))):
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        for i, head in enumerate(grid.header):
            table.add_column(head, justify="left" if i == 0 or head == "remark" else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*(_coloured(text) for text in row))
        console.print(f"\n[bold]{grid.title}[/bold]", highlight=False)
        console.print(table)
    console.print()
    for fact in facts(records, notes):
        console.print(f"- {fact}", highlight=False, markup=False)


def _markdown(grid: Grid) -> str:
    rule = ("---", *("---:" for _ in grid.header[1:]))
    lines = [grid.header, rule, *grid.rows]
    return f"{grid.title}:\n\n" + "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _floor(found, batch: int, context: int) -> str:
    record = found.get(("kvjax", batch, context)) or found.get(("kvjax-h2o-256", batch, context))
    return "-" if record is None else _milliseconds(record["floor_seconds"])


def _figure(found, engine: str, batch: int, context: int) -> str:
    record, ours = found.get((engine, batch, context)), found.get(("kvjax", batch, context))
    if record is None:
        return "-"
    inside = f"{100 * record['floor_fraction']:.0f} %"
    if ours is not None and record is not ours:
        inside += f", x{record['median_seconds'] / ours['median_seconds']:.2f}"
    return f"{_milliseconds(record['median_seconds'])} ({inside}){'*' if record['disturbed'] else ''}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _coloured(text: str) -> str:
    colour = {"PASS": "green", "FAIL": "bold red", "not measured": "yellow"}.get(text)
    return f"[{colour}]{text}[/]" if colour else escape(text)
