"""One flat JSON record a run: settings, latency under the keys of `vllm bench serve`, `kv_*` bytes, and quality.

Quality comes as `fidelity_*`, `task_*` and, of policies that speculate, `speculation_*`.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from kvjax.cache import Strategy
from kvjax.cache.identity import Identity
from kvjax.engine.engine import Engine
from kvjax.engine.load import Load
from kvjax.engine.metrics import TPOT_DEFINITION, Goodput
from kvjax.engine.offline import Measurement, Workload
from kvjax.engine.serve import Service
from kvjax.errors import InputError
from kvjax.files import dumps, json_lines, replace_all
from kvjax.models import Model

SCHEMA_VERSION = 1

RECORD, RECORDS, REQUESTS, SERIES, SAMPLES = "record.json", "records.jsonl", "requests.jsonl", "series.jsonl", "samples.txt"
FIGURES = ("overview.png", "load.png")
FILES = (RECORD, RECORDS, REQUESTS, SERIES, SAMPLES, *FIGURES)
"""What a run can write into its directory."""

OF_A_SWEEP = ("records.csv", "other.jsonl", "about.json")
"""What a directory has in which a sweep keeps its records."""


def setting() -> dict[str, Any]:
    """Where a measurement was made: device, versions, commit."""
    versions = {f"{name}_version": importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "kvjax",
        "device_kind": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu_count": os.cpu_count(),
        "python_version": platform.python_version(),
        **versions,
        "git_commit": _commit(),
        "tpot_definition": TPOT_DEFINITION,
    }


def model_fields(model: Model) -> dict[str, Any]:
    """Which model it was, how its weights were stored before they became `dtype`, and on what terms they come."""
    return {
        "model_id": model.config.name,
        "model_weights": None if model.source is None else model.source.weights,
        "model_license": None if model.source is None else model.source.license,
        "dtype": str(model.dtype),
    }


def record(measurement: Measurement, model: Model, workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """The flat record of one strategy's run. `options` are the settings the run was asked for."""
    quality: dict[str, Any] = {}
    for name, estimate in measurement.fidelity.items():
        quality[f"fidelity_{name}"] = estimate.value
        quality[f"fidelity_{name}_se"] = estimate.error
    if measurement.recall:
        quality["task_recall"] = measurement.recall_mean
        quality |= {f"task_recall_depth_{depth:g}": share for depth, share in measurement.recall.items()}
        quality["task_questions_per_depth"] = len(workload.tests)
    if measurement.speculation is not None:
        quality |= measurement.speculation.record()
    return {
        **setting(),
        **model_fields(model),
        **strategy_fields(measurement.identity),
        "workload": workload.kind,
        "num_prompts": len(workload.prompts),
        "request_rate": "inf",
        **options,
        "failed": 0,
        **measurement.latency,
        **measurement.ledger.record(),
        **_transfer(measurement, options),
        **quality,
    }


def strategy_fields(identity: Identity) -> dict[str, Any]:
    """The keys of a record that say which strategy it is of."""
    return {"strategy": identity.label, "store": identity.store, "strategy_identity": identity.record()}


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def untimed(strategy: Strategy, model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """The flat record of a strategy that was only put tasks to. `options` are the settings the run was asked for."""
    return {
        **setting(),
        **model_fields(model),
        **strategy_fields(strategy.identity()),
        "workload": "tasks",
        **options,
    }


def _transfer(measurement: Measurement, options: dict[str, Any]) -> dict[str, Any]:
    """How tokens come from a host store, and what a link of a stated speed would take: the bytes are counted, that time is modelled."""
    transfer = measurement.identity.options.get("transfer")
    if transfer is None:
        return {}
    found: dict[str, Any] = {"transfer": transfer}
    if (speed := options.get("link_gbps")) is not None:
        moved = measurement.ledger.bytes_moved_per_token * options["batch_size"]
        found["modelled_link_ms_per_step"] = moved / (speed * 1e9) * 1e3
    return found


def load_record(
    service: Service, engine: Engine, model: Model, load: Load, options: dict[str, Any], goodput: Goodput | None, closed_loop: bool
) -> dict[str, Any]:
    """The flat record of a load served under one strategy. `options` are the settings the run was asked for."""
    return {
        **setting(),
        "label": engine.strategy.describe(),
        **model_fields(model),
        **strategy_fields(engine.strategy.identity()),
        "workload": load.kind,
        "num_prompts": len(load.requests),
        **options,
        "max_num_seqs": engine.limits.max_num_seqs,
        "max_num_batched_tokens": engine.limits.max_num_batched_tokens,
        "max_model_len": engine.limits.max_model_len,
        **service.record(engine, goodput, closed_loop),
    }


def earlier(directory: pathlib.Path) -> list[str]:
    """The files in `directory` that an earlier run has left. Raises InputError for one that belongs to a sweep."""
    if mine := [name for name in OF_A_SWEEP if (directory / name).exists()]:
        raise InputError(f"{directory} is the directory of a sweep (it holds {mine[0]}); choose another one for a run")
    return [name for name in FILES if (directory / name).exists()]


def write_load(directory: pathlib.Path, records: list[dict[str, Any]], services: list[Service], several: bool) -> list[str]:
    """Writes the records, requests.jsonl and series.jsonl into `directory`; returns the names (see `_write`)."""
    requests, series = [], []
    for record, service in zip(records, services, strict=True):
        for one in service.served:
            gaps = [b - a for a, b in itertools.pairwise(one.token_times)]
            requests.append(
                {
                    "strategy": record["strategy"],
                    "request": one.request.index,
                    "input_len": len(one.request.prompt),
                    "output_len": len(one.tokens),
                    "start_time": one.start,
                    "queue_time": one.queue,
                    "ttft": one.token_times[0] - one.start if one.token_times else None,
                    "itls": gaps,
                    "latency": one.token_times[-1] - one.start if one.token_times else None,
                    "output_tokens": one.tokens,
                    "finish_reason": one.reason,
                }
            )
        series += [{"strategy": record["strategy"], **dataclasses.asdict(s)} for s in service.samples]
    return _write(directory, records, several, {REQUESTS: json_lines(requests), SERIES: json_lines(series)})


def write(
    directory: pathlib.Path, records: list[dict[str, Any]], measurements: list[Measurement], workload: Workload, model: Model, several: bool
) -> list[str]:
    """Writes the records, requests.jsonl and samples.txt into `directory`; returns the names (see `_write`)."""
    requests = [
        {
            "strategy": measurement.strategy,
            "request": index,
            "input_len": timeline.input_tokens,
            "output_len": len(tokens),
            "ttft": timeline.ttft,
            "itls": timeline.itls,
            "latency": timeline.e2el,
            "output_tokens": tokens,
        }
        for measurement in measurements
        for index, (timeline, tokens) in enumerate(zip(measurement.timelines, measurement.samples, strict=True))
    ]
    texts = {REQUESTS: json_lines(requests)} if measurements else {}
    if model.tokenizer is not None and measurements:
        text = []
        for measurement in measurements:
            for index, tokens in enumerate(measurement.samples[:4]):
                prompt = model.tokenizer.decode(workload.prompts[index][-200:])
                text.append(
                    f"=== {measurement.strategy}, request {index}\n...{prompt}\n--- generated\n{model.tokenizer.decode(tokens)}\n\n"
                )
        texts[SAMPLES] = "".join(text)
    return _write(directory, records, several, texts)


def _write(directory: pathlib.Path, records: list[dict[str, Any]], several: bool, texts: dict[str, str]) -> list[str]:
    """Writes all files of a run or none, and takes away what an earlier run had left; returns the names that are there now.

    `several`: of a comparison, whose records are JSON lines in records.jsonl; otherwise there is one, in record.json.
    """
    first = {RECORDS: json_lines(records)} if several else {RECORD: dumps(records[0]) + "\n"}
    directory.mkdir(parents=True, exist_ok=True)
    replace_all({directory / name: text for name, text in (first | texts).items()})
    for name in FILES:
        if name not in first and name not in texts:
            (directory / name).unlink(missing_ok=True)
    return [*first, *texts]


@functools.cache
def _commit() -> str | None:
    """The git commit of the source tree kvjax runs from, `-dirty` when it has changes; None outside a checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            start_new_session=True,  # where Ctrl-C does not reach it
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
