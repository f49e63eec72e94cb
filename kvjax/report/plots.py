"""Figures of a run, from its records."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvjax.engine.serve import Service
from kvjax.files import replace
from kvjax.models.source import model_title

_PURPOSES = (("live", "keys and values", "tab:blue"), ("metadata", "metadata", "tab:orange"), ("empty", "empty", "lightgrey"))
_DEPTH = "task_recall_depth_"


def overview(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws what strategies remember beside what they allocate: recall by depth (where it was measured) and cache bytes by purpose."""
    asked = any(key.startswith(_DEPTH) for record in records for key in record)
    figure, axes = plt.subplots(1, 2 if asked else 1, figsize=(10 if asked else 5.5, 3.6), layout="constrained", squeeze=False)
    if asked:
        _recall(records, axes[0, 0])
    _bytes(records, axes[0, -1])
    figure.suptitle(f"{model_title(records[0])}, {records[0]['input_len']} tokens of prompt, batch {records[0]['batch_size']}", fontsize=10)
    _save(figure, path)


def under_load(records: Sequence[dict[str, Any]], services: Sequence[Service], path: pathlib.Path) -> None:
    """Draws a load as it was served: requests running and waiting and pages in use over time, and the latencies requests met."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    (running, usage), (ttft, tpot) = axes
    for record, service in zip(records, services, strict=True):
        times = [s.time for s in service.samples]
        (line,) = running.plot(times, [s.running for s in service.samples], linewidth=1.2, label=record["strategy"])
        running.plot(times, [s.waiting for s in service.samples], linewidth=0.9, linestyle=":", color=line.get_color())
        usage.plot(times, [100 * s.kv_usage for s in service.samples], linewidth=1.2, color=line.get_color())
        timelines = [s.timeline for s in service.served if s.completed]
        for axis, values in ((ttft, [t.ttft for t in timelines]), (tpot, [t.tpot for t in timelines if t.tpot is not None])):
            ordered = sorted(1e3 * value for value in values)
            axis.plot(ordered, [100 * (i + 1) / len(ordered) for i in range(len(ordered))], linewidth=1.4, color=line.get_color())
    running.set(xlabel="seconds", ylabel="requests (dotted: waiting)", ylim=(0, None))
    usage.set(xlabel="seconds", ylabel="pages in use (%)", ylim=(0, 104))
    ttft.set(xlabel="time to first token (ms)", ylabel="requests (%)", ylim=(0, 104), xlim=(0, None))
    tpot.set(xlabel="time per output token (ms)", ylabel="requests (%)", ylim=(0, 104), xlim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    running.legend(fontsize=8)
    first = records[0]
    figure.suptitle(
        f"{model_title(first)}, {first['num_prompts']} requests, {first['request_rate']} requests/s, {first['kv_memory']}", fontsize=10
    )
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    """Writes the figure whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    replace(path, image.getvalue())


def _recall(records, axis) -> None:
    for record, marker in zip(records, "osD^vP*X" * len(records), strict=False):
        depths = sorted(float(key.removeprefix(_DEPTH)) for key in record if key.startswith(_DEPTH))
        shares = [100 * record[f"{_DEPTH}{depth:g}"] for depth in depths]
        axis.plot(depths, shares, marker=marker, markersize=5, linewidth=1.4, label=record["strategy"], alpha=0.85)
    axis.set(xlabel="depth of the fact in the prompt (0: start)", ylabel="questions answered (%)", ylim=(-4, 104))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _bytes(records, axis) -> None:
    names = [record["strategy"].replace("(", "\n(") for record in records]
    left = [0.0] * len(records)
    for purpose, label, colour in _PURPOSES:
        sizes = [record[f"kv_device_{purpose}_bytes"] / 2**20 for record in records]
        axis.barh(names, sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlabel="KV cache of a batch, allocated (MiB)")
    axis.legend(fontsize=8, loc="lower right")
