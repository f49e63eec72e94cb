"""Tasks in tables: a row a task and way of asking, with what the strategies lose beside the full cache."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
NOT_RANKED = "below the gate, not ranked"


def rows(records: Sequence[Sequence[Record]]) -> list[tuple[str, list[str]]]:
    """Labels and cells, one a strategy. `records`: by strategy, those of kvjax.quality.asked, in one order."""
    made: list[tuple[str, list[str]]] = []
    for several in zip(*records, strict=True):
        first = several[0]
        where = f"{first['task']}, {first['task_length']} tokens"
        if first.get("task_full_score") is None:
            made += _fed(where, several)
            continue
        label = f"{where}, asked {first['task_query']}"
        full = f"full cache {100 * first['task_full_score']:.0f} %"
        if first["task_ranked"]:
            made.append((f"{label} ({full})", [share(record, "task_score") for record in several]))
            made.append(("  minus full cache", [loss(record) for record in several]))
            if len(several) > 1 and first["strategy"] != "full":
                made.append(("  minus " + first["strategy"], ["", *(gain(record) for record in several[1:])]))
        else:
            made.append((f"{label} ({full}: {NOT_RANKED})", [f"({share(record, 'task_score')})" for record in several]))
        if any("fidelity_kld_mean" in record for record in several):
            made += _fed(where, several)
    return made


def _fed(where: str, several: Sequence[Record]) -> list[tuple[str, list[str]]]:
    return [
        (f"{where}: perplexity", [f"{record['task_perplexity']:.2f}" for record in several]),
        ("  KLD mean (nats)", [f"{max(record['fidelity_kld_mean'], 0.0):.4f}" for record in several]),
        ("  same top token (%)", [f"{100 * record['fidelity_same_top1']:.1f}" for record in several]),
    ]


def share(record: Record, key: str) -> str:
    """A score as per cent, with its interval: `93 [86, 98]`."""
    return whole(record[key]) + _interval(record, key)


def loss(record: Record) -> str:
    """Points beside the full cache, negative where the strategy is worse."""
    if record["strategy"] == "full":
        return ""
    low, high = record["task_loss_low"], record["task_loss_high"]
    turned = {"less": -record["task_loss"], "less_low": high and -high, "less_high": low and -low}
    return signed(turned["less"]) + _interval(turned, "less")


def gain(record: Record) -> str:
    """Points beside the first strategy."""
    return signed(record["task_gain_over_first"]) + _interval(record, "task_gain_over_first")


def whole(share: float) -> str:
    """Per cent: 0.934 -> '93'."""
    return str(round(100 * share))


def signed(share: float) -> str:
    """Points: -0.066 -> '-7'."""
    return f"{round(100 * share):+d}"


def _interval(record: Record, key: str) -> str:
    low, high = record[f"{key}_low"], record[f"{key}_high"]
    return "" if low is None or high is None else f" [{whole(low)}, {whole(high)}]"
