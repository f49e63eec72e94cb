"""The table a run prints: one column a strategy, one row a figure."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvjax.models.source import model_title
from kvjax.report import tasks

Record = dict[str, Any]


def show(records: Sequence[Record], console: Console) -> None:
    """Prints records side by side."""
    first = records[0]
    what = f"{first['num_prompts']} prompts of {first['input_len']} tokens, {first['output_len']} generated"
    if "kv_memory_bytes" in first:
        lengths = (
            f"{first['total_input_tokens'] + first['total_output_tokens']} tokens" if first["workload"] in ("trace", "prompts") else what
        )
        how = "closed loop" if first["max_concurrency"] else f"{first['request_rate']} requests/s"
        what = f"{lengths}, {how}, {first['kv_memory']} of KV memory"
    else:
        what += f", batch {first['batch_size']}"
    title = f"{model_title(first)} ({first['dtype']}) on {first['device_kind']}: {what}, seed {first['seed']}"
    console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for record in records:
        table.add_column(record["strategy"].replace("(", "\n("), justify="right", overflow="fold")
    for heading, rows in _SECTIONS:
        shown = [(label, cells) for label, make in rows if any(cells := [make(r) for r in records])]
        if not shown:
            continue
        table.add_section()
        table.add_row(f"[bold cyan]{heading}[/bold cyan]")
        for label, cells in shown:
            table.add_row("  " + label, *(cell or "-" for cell in cells))
    if "tasks" in first:
        table.add_section()
        table.add_row("[bold cyan]tasks (%, 95 % intervals, paired)[/bold cyan]")
        for label, cells in tasks.rows([record["tasks"] for record in records]):
            table.add_row("  " + label, *(cell or "-" for cell in cells))
    depths = sorted({float(key.rsplit("_", 1)[1]) for r in records for key in r if key.startswith("task_recall_depth_")})
    if depths:
        table.add_section()
        table.add_row(f"[bold cyan]recall by depth of the fact[/bold cyan] ({first['task_questions_per_depth']} each)")
        for depth in depths:
            table.add_row(f"  {depth:.2f}", *(_percent(f"task_recall_depth_{depth:g}")(r) or "-" for r in records))
        table.add_row("  all", *(_percent("task_recall")(r) or "-" for r in records), style="bold")
    console.print(table)


def _number(key: str, pattern: str) -> Callable[[Record], str]:
    return lambda record: "" if record.get(key) is None else _formatted(pattern, record[key])


def _formatted(pattern: str, value: Any) -> str:
    """A number by its pattern; "inf", as records have it, as it stands."""
    return value if isinstance(value, str) else pattern.format(value)


def _percent(key: str) -> Callable[[Record], str]:
    return lambda record: "" if record.get(key) is None else f"{100 * record[key]:.1f} %"


def _bytes(key: str) -> Callable[[Record], str]:
    return lambda record: "" if record.get(key) is None else human_bytes(record[key])


def _estimate(key: str, pattern: str, scale: float = 1.0) -> Callable[[Record], str]:
    def make(record: Record) -> str:
        if record.get(key) is None:
            return ""
        error = record[f"{key}_se"]
        if isinstance(record[key], str) or isinstance(error, str):
            return f"{record[key]} ± {error}"
        plain = pattern.replace("+", "")
        return pattern.format(scale * record[key]) + ("" if error is None else f" ± {plain.format(scale * error)}")

    return make


def human_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


_SECTIONS: list[tuple[str, list[tuple[str, Callable[[Record], str]]]]] = [
    (
        "speed",
        [
            ("output throughput (tok/s)", _number("output_throughput", "{:.0f}")),
            ("total throughput (tok/s)", _number("total_token_throughput", "{:.0f}")),
            ("request throughput (req/s)", _number("request_throughput", "{:.2f}")),
            ("goodput (req/s)", _number("request_goodput", "{:.2f}")),
            ("mean TTFT (ms)", _number("mean_ttft_ms", "{:.1f}")),
            ("P99 TTFT (ms)", lambda r: _number("p99_ttft_ms", "{:.1f}")(r) if "steps" in r else ""),
            ("mean TPOT (ms)", _number("mean_tpot_ms", "{:.2f}")),
            ("P99 TPOT (ms)", lambda r: _number("p99_tpot_ms", "{:.2f}")(r) if "steps" in r else ""),
            ("median ITL (ms)", _number("median_itl_ms", "{:.2f}")),
            ("P99 ITL (ms)", _number("p99_itl_ms", "{:.2f}")),
            ("mean E2EL (ms)", lambda r: _number("mean_e2el_ms", "{:.1f}")(r) if "steps" in r else ""),
            ("mean client queue (ms)", _number("mean_client_queue_time_ms", "{:.1f}")),
        ],
    ),
    (
        "requests",
        [
            ("completed", lambda r: _number("completed", "{:d}")(r) if "steps" in r else ""),
            ("failed or refused", lambda r: _number("failed", "{:d}")(r) if "steps" in r else ""),
            ("peak running", _number("peak_running", "{:d}")),
            ("peak waiting", _number("peak_waiting", "{:d}")),
            ("preemptions", _number("num_preemptions", "{:d}")),
            ("prefix cache hits", _percent("prefix_cache_hit_rate")),
        ],
    ),
    (
        "KV memory of the engine",
        [
            ("allocated", _bytes("kv_memory_bytes")),
            ("  pages", _bytes("kv_pool_bytes")),
            ("  metadata", lambda r: _bytes("kv_metadata_bytes")(r) if r.get("kv_metadata_bytes") else ""),
            ("  staging", lambda r: _bytes("kv_staging_bytes")(r) if r.get("kv_staging_bytes") else ""),
            ("peak usage of pages", _percent("kv_usage_peak")),
            ("mean usage of pages", _percent("kv_usage_mean")),
            ("page fragmentation", _percent("kv_fragmentation_mean")),
            ("held per token of context", _bytes("kv_bytes_per_token")),
            ("host pool", lambda r: _bytes("kv_host_total_bytes")(r) if "steps" in r else ""),
            ("moved from host per token", lambda r: _bytes("kv_bytes_moved_per_token")(r) if "steps" in r else ""),
            ("  of what is held", lambda r: _percent("kv_fetched_fraction")(r) if "steps" in r else ""),
        ],
    ),
    (
        "KV cache of a batch",
        [
            ("device, allocated", _bytes("kv_device_total_bytes")),
            ("  live keys and values", _bytes("kv_device_live_bytes")),
            ("  metadata", _bytes("kv_device_metadata_bytes")),
            ("  empty", _bytes("kv_device_empty_bytes")),
            (
                "  page fragmentation",
                lambda r: _bytes("kv_device_fragmentation_bytes")(r) if r.get("kv_device_fragmentation_bytes") else "",
            ),
            ("host", lambda r: _bytes("kv_host_total_bytes")(r) if r.get("kv_host_total_bytes") and "steps" not in r else ""),
            ("  live keys and values", lambda r: _bytes("kv_host_live_bytes")(r) if r.get("kv_host_total_bytes") else ""),
            ("decode scratch", _bytes("kv_transient_bytes")),
            ("full cache would need", _bytes("kv_logical_bytes")),
            ("tokens kept", _percent("kept_fraction")),
            ("read per token", _bytes("kv_bytes_read_per_token")),
            (
                "moved from host per token",
                lambda r: _bytes("kv_bytes_moved_per_token")(r) if r.get("kv_host_total_bytes") and "steps" not in r else "",
            ),
            ("  of what is held", lambda r: _percent("kv_fetched_fraction")(r) if "steps" not in r else ""),
            ("  wanted", lambda r: _percent("kv_wanted_fraction")(r) if "steps" not in r else ""),
            ("fetch, hidden behind other work", _percent("fetch_hidden_fraction")),
            ("modelled link time per step (ms)", _number("modelled_link_ms_per_step", "{:.3f}")),
        ],
    ),
    (
        "fidelity to the full cache (± standard error)",
        [
            ("KLD mean (nats)", _estimate("fidelity_kld_mean", "{:.4f}")),
            ("KLD median", _estimate("fidelity_kld_median", "{:.4f}")),
            ("KLD 99.9 %", _estimate("fidelity_kld_p99.9", "{:.2f}")),
            ("same top token (%)", _estimate("fidelity_same_top1", "{:.1f}", 100)),
            ("NLL delta (nats)", _estimate("fidelity_nll_delta", "{:+.4f}")),
            ("first divergence (step)", _estimate("fidelity_first_divergence_step", "{:.1f}")),
        ],
    ),
    (
        "speculation (guess against the truth)",
        [
            ("precision (%)", _estimate("speculation_precision", "{:.1f}", 100)),
            ("recall (%)", _estimate("speculation_recall", "{:.1f}", 100)),
            ("attention mass covered (%)", _estimate("speculation_mass_covered", "{:.1f}", 100)),
            ("tokens fetched", _estimate("speculation_fetched", "{:.1f}")),
            ("tokens within reach of the true maximum", _estimate("speculation_near", "{:.1f}")),
        ],
    ),
]
