"""Records as a table of a page: the columns in which they differ, with units, one row a cell of the study."""

import dataclasses
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from kvjax.report.fields import Record, finished, identity_of, number, value
from kvjax.report.figures import FAMILIES, MIB
from kvjax.report.html_data import Experiment


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a record: `factor` times its value, written with `pattern`."""

    key: str
    label: str
    unit: str = ""
    pattern: str = "{:,.4g}"
    factor: float = 1.0


COLUMNS = (
    Column("mean_ttft_ms", "mean TTFT", "ms", "{:,.1f}"),
    Column("p99_ttft_ms", "P99 TTFT", "ms", "{:,.1f}"),
    Column("mean_tpot_ms", "mean TPOT", "ms", "{:,.2f}"),
    Column("p99_tpot_ms", "P99 TPOT", "ms", "{:,.2f}"),
    Column("p99_itl_ms", "P99 ITL", "ms", "{:,.1f}"),
    Column("output_throughput", "output", "tok/s", "{:,.0f}"),
    Column("request_throughput", "requests", "1/s", "{:,.2f}"),
    Column("request_goodput", "goodput", "1/s", "{:,.2f}"),
    Column("task_recall", "facts recalled", "%", "{:.1f}", 100),
    Column("fidelity_kld_mean", "KLD mean", "nats", "{:.3g}"),
    Column("fidelity_same_top1", "same top token", "%", "{:.1f}", 100),
    Column("fidelity_nll_delta", "NLL delta", "nats", "{:+.3g}"),
    Column("kept_fraction", "kept", "%", "{:.1f}", 100),
    Column("kv_device_total_bytes", "cache, device", "MiB", "{:,.2f}", 1 / MIB),
    Column("kv_host_total_bytes", "cache, host", "MiB", "{:,.2f}", 1 / MIB),
    Column("kv_transient_bytes", "decode scratch", "MiB", "{:,.2f}", 1 / MIB),
    Column("kv_memory_bytes", "KV memory", "MiB", "{:,.2f}", 1 / MIB),
    Column("kv_peak_used_bytes", "peak in use", "MiB", "{:,.2f}", 1 / MIB),
    Column("kv_usage_mean", "pages in use, mean", "%", "{:.1f}", 100),
    Column("kv_fragmentation_mean", "fragmentation", "%", "{:.1f}", 100),
    Column("kv_bytes_read_per_token", "read per token", "KiB", "{:,.1f}", 1 / 1024),
    Column("kv_bytes_moved_per_token", "moved per token", "KiB", "{:,.1f}", 1 / 1024),
    Column("fetch_hidden_fraction", "fetch hidden", "%", "{:.1f}", 100),
    Column("modelled_link_ms_per_step", "link per step, modelled", "ms", "{:,.3f}"),
    Column("prefix_cache_hit_rate", "prefix hits", "%", "{:.1f}", 100),
    Column("peak_running", "running, peak", "", "{:,.0f}"),
    Column("num_preemptions", "preemptions", "", "{:,.0f}"),
    Column("seconds", "cell took", "s", "{:,.1f}"),
)

NAMES = {
    "model": "model", "input_len": "prompt", "output_len": "output", "request_rate": "offered", "batch_size": "batch",
    "num_prompts": "prompts", "kv_memory": "limit", "measure": "measured",
}  # fmt: skip
UNITS = {"input_len": "tokens", "output_len": "tokens", "request_rate": "1/s"}

OUTCOMES = {
    "done": ("done", "good"),
    "infeasible": ("does not fit", "warn"),
    "failed": ("failed", "bad"),
    "incomplete": ("incomplete", "bad"),
}


def outcome(record: Record) -> str:
    """done, infeasible, failed, or incomplete: served in part."""
    if finished(record):
        return "done"
    found = str(record.get("outcome", "failed"))
    return "incomplete" if found == "done" else found


def table(experiment: Experiment, name: str) -> str:
    """The table of an experiment's records, with its filter, and what became of the cells without figures."""
    records = experiment.records
    if not records:
        return "<p class=empty>No record yet.</p>"
    declared = list(dict.fromkeys(key for r in records for key in r.get("cell", {}) if key != "strategy"))
    varying = [key for key in declared if len({_json(r.get("cell", {}).get(key)) for r in records}) > 1]
    constant = [key for key in declared if key not in varying]
    known = [*COLUMNS, *_own(experiment)]
    metrics = [c for c in known if c.key not in varying and _informative(records, c)]
    whole = all(outcome(r) == "done" for r in records)
    heads = [_head("strategy", "", False)]
    heads += [_head(NAMES.get(key, key.replace("_", " ")), UNITS.get(key, ""), _numeric(records, key)) for key in varying]
    heads += [] if whole else [_head("outcome", "", False)]
    heads += [_head(c.label, c.unit, True) for c in metrics]
    rows = []
    for record in records:
        family = identity_of(record).family
        cells = [f"<th scope=row>{swatch(str(record['strategy']), family)}"]
        cells += [_cell(_declared(record, key), _numeric(records, key)) for key in varying]
        cells += [] if whole else [_badge(record)]
        cells += [_cell(_measured(record, c), True) for c in metrics]
        lost = "" if outcome(record) == "done" else " class=lost"
        rows.append(f'<tr data-s="{escape(family)}"{lost}>{"".join(cells)}')
    same = _same(records, constant)
    return (
        f'<div class="records" id="{name}-records">{_filter(records, name)}'
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="Records"><table class="sortable">'
        f"<thead><tr>{''.join(heads)}</thead><tbody>\n" + "\n".join(rows) + f"\n</tbody></table></div>{same}{_lost(records)}</div>"
    )


def swatch(strategy: str, family: str) -> str:
    """A strategy's name behind the colour of its family."""
    return f'<i class="dot c-{family if family in FAMILIES else "other"}"></i><code>{escape(strategy)}</code>'


def _own(experiment: Experiment) -> list[Column]:
    """Of panels whose key the list above lacks."""
    known = {c.key for c in COLUMNS}
    cell = {key for r in experiment.records for key in r.get("cell", {})}
    return [Column(p.key, p.label, "", factor=p.factor) for p in experiment.panels if p.key not in known | cell]


def _informative(records: Sequence[Record], column: Column) -> bool:
    """Whether at least two records tell something else of it; of a single record, whether it has it."""
    found = {_measured(r, column) for r in records if finished(r)}
    return found != {""} and (len(found) > 1 or sum(map(finished, records)) == 1)


def _numeric(records: Sequence[Record], key: str) -> bool:
    found = [v for r in records if (v := value(r, key)) is not None]
    return bool(found) and all(number(v) is not None for v in found)


def _measured(record: Record, column: Column) -> str:
    found = number(record.get(column.key)) if finished(record) else None
    return "" if found is None or not math.isfinite(found) else column.pattern.format(column.factor * found)


def _declared(record: Record, key: str) -> str:
    found = record.get("cell", {}).get(key)
    if found is None:
        return ""
    parsed = number(found)
    if parsed is None:
        return found if isinstance(found, str) else json.dumps(found)
    return "∞" if math.isinf(parsed) else f"{parsed:,.10g}"


def _head(label: str, unit: str, numeric: bool) -> str:
    of = f"<small>{escape(unit)}</small>" if unit else ""
    return f'<th scope="col"{" class=n" if numeric else ""}><button type="button">{escape(label)}{of}</button>'


def _cell(text: str, numeric: bool) -> str:
    kind = " class=n" if numeric else ""
    return f"<td{kind}>{escape(text)}" if text else f"<td{kind}><span class=none>–</span>"


def _badge(record: Record) -> str:
    text, kind = OUTCOMES.get(outcome(record), (outcome(record), "bad"))
    return f'<td><span class="badge {kind}">{escape(text)}</span>'


def _filter(records: Sequence[Record], name: str) -> str:
    families = list(dict.fromkeys(identity_of(r).family for r in records))
    chips = "".join(
        f'<button type="button" class="chip" aria-pressed="true" data-s="{escape(f)}">'
        f'<i class="dot c-{f if f in FAMILIES else "other"}"></i>{escape(f)}</button>'
        for f in families
    )
    return (
        f'<div class="filter"><input type="search" placeholder="filter rows" aria-label="Filter the records" id="{name}-filter">'
        f'<span class="chips">{chips if len(families) > 1 else ""}</span>'
        f'<output for="{name}-filter">{_count(len(records))}</output></div>'
    )


def _count(count: int) -> str:
    return f"{count} cell{'s' if count != 1 else ''}"


def _same(records: Sequence[Record], constant: Sequence[str]) -> str:
    parts = [
        f"{escape(NAMES.get(key, key.replace('_', ' ')))} <b>{escape(text)}</b>{' ' + UNITS[key] if key in UNITS else ''}"
        for key in constant
        if (text := _declared(records[0], key))
    ]
    return f'<p class="same">The same in every row: {", ".join(parts)}.</p>' if parts else ""


def _lost(records: Sequence[Record]) -> str:
    """Why cells have no figures, each reason with the cells it holds for."""
    reasons: dict[tuple[str, str, str, str], int] = {}
    for record in records:
        if (kind := outcome(record)) != "done":
            told = (kind, str(record["strategy"]), identity_of(record).family, str(record.get("error") or "no reason was recorded"))
            reasons[told] = reasons.get(told, 0) + 1
    if not reasons:
        return ""
    items = ""
    for (kind, strategy, family, error), count in reasons.items():
        badge, look = OUTCOMES.get(kind, (kind, "bad"))
        items += f'<li>{swatch(strategy, family)} <span class="badge {look}">{escape(badge)}</span> {_count(count)}: {escape(error)}'
    return f'<div class="whylost"><h4>Cells without figures</h4><ul>{items}</ul></div>'


def _json(found: Any) -> str:
    return json.dumps(found, sort_keys=True)
