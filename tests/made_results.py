"""Records with planted figures, as a study writes them: every metric is what a test says, every sample is drawn around it."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

Record = dict[str, Any]

FULL, VLLM, H2O, STREAMING = "full", "vllm", "h2o(heavy=0.1,recent=0.1)", "streaming(sinks=4,window=0.2)"
INFINIGEN, OFFLOAD, ORACLE = "infinigen(alpha=4.0,partial=0.3,budget=0.2)", "offload", "oracle_topk(k=0.2)"

PLACE = {"model_id": "kvjax-4m", "dtype": "float32", "device_kind": "cpu", "platform": "cpu", "cpu_count": 2}


def _record(sweep: str, strategy: str, cell: Record, figures: Record, samples: dict[str, list[float]], outcome: str = "done") -> Record:
    name = json.dumps([sweep, strategy, cell], sort_keys=True)
    declared = {"strategy": strategy.split("(")[0].split("+")[0], "model": PLACE["model_id"], "seed": 0, "repeat": 0} | cell
    return {
        **PLACE, **{k: v for k, v in declared.items() if k not in ("strategy", "repeat", "seed", "model", "max_num_seqs")}, **figures,
        "strategy": strategy, "sweep": sweep, "cell": declared, "cell_id": name, "outcome": outcome, "error": None, "seconds": 1.0,
        "samples": samples,
    }  # fmt: skip


def _around(rng: np.random.Generator, mean: float, noise: float, count: int) -> list[float]:
    """Samples whose mean is `mean` exactly."""
    drawn = rng.normal(0, 1, count)
    return (mean * (1 + noise * (drawn - drawn.mean()))).tolist()


def load(
    strategy: str,
    rate: float | str,
    *,
    ttft: float,
    tpot: float,
    repeat: int = 0,
    count: int = 36,
    noise: float = 0.01,
    throughput: float | None = None,
    used: int = 4 * 2**20,
    kv_memory: str = "16MiB",
    input_len: int = 256,
    sweep: str = "request_rate",
    preemptions: int = 0,
    seed: int = 0,
    **more: Any,
) -> Record:
    """Under load. `seed`: of the noise; requests of one repeat share none of it, so pairs differ by more than their means."""
    rng = np.random.default_rng([seed, repeat, *strategy.encode()])
    out = 64
    first, each = _around(rng, ttft, noise, count), _around(rng, tpot, noise, count)
    whole = [a + b * (out - 1) for a, b in zip(first, each, strict=True)]
    duration = count / float(rate if rate != "inf" else 10)
    figures = {
        "max_num_seqs": len(strategy), "duration": duration, "completed": count, "failed": 0, "num_prompts": count,
        "mean_ttft_ms": float(np.mean(first)), "mean_tpot_ms": float(np.mean(each)), "mean_e2el_ms": float(np.mean(whole)),
        "p99_ttft_ms": max(first), "output_throughput": throughput or out * count / duration, "request_throughput": count / duration,
        "request_goodput": None, "num_preemptions": preemptions, "peak_waiting": 0, "kv_memory_bytes": 15 * 2**20,
        "kv_peak_used_bytes": used, "kv_metadata_bytes": 0, "kv_staging_bytes": 0,
    }  # fmt: skip
    cell = {"measure": "load", "request_rate": rate, "kv_memory": kv_memory, "input_len": input_len, "output_len": out, "repeat": repeat}
    cell |= {"max_num_seqs": 64}  # asked for; the record has what the memory had room for
    return _record(sweep, strategy, cell, figures | more, {"ttft_ms": first, "tpot_ms": each, "e2el_ms": whole})


def offline(
    strategy: str,
    *,
    tpot: float = 4.0,
    ttft: float = 100.0,
    size: int = 16 * 2**20,
    recall: float | None = None,
    kld: float | None = None,
    early: float | None = None,
    input_len: int = 952,
    batch_size: int = 8,
    repeat: int = 0,
    count: int = 32,
    noise: float = 0.01,
    sweep: str = "sparsity",
    host: int = 0,
    moved: float = 0.0,
    seed: int = 0,
    **more: Any,
) -> Record:
    """Offline, with quality where it is given. `early`: recall of the first two of eight depths, else that of all."""
    rng = np.random.default_rng([seed, repeat, *strategy.encode()])
    first, each = _around(rng, ttft, noise, count), _around(rng, tpot, noise, count)
    whole = [a + 63 * b for a, b in zip(first, each, strict=True)]
    samples: dict[str, list[float]] = {"ttft_ms": first, "tpot_ms": each, "e2el_ms": whole}
    quality: Record = {}
    if recall is not None:
        hits = np.zeros(8 * count)
        hits[: round(recall * 8 * count)] = 1
        samples["recall"] = rng.permutation(hits).reshape(count, 8).mean(1).tolist()
        quality |= {"task_recall": float(hits.mean()), "task_questions_per_depth": count}
        quality |= {f"task_recall_depth_{i / 8:g}": recall if early is None or i > 1 else early for i in range(8)}
    if kld is not None:
        samples["kld"] = np.abs(_around(rng, kld, 0.1, count)).tolist()
        quality |= {"fidelity_kld_mean": kld}
    figures = {
        "output_len": 64, "num_prompts": count, "mean_ttft_ms": float(np.mean(first)), "mean_tpot_ms": float(np.mean(each)),
        "mean_e2el_ms": float(np.mean(whole)), "output_throughput": 1e3 * 64 * batch_size / float(np.mean(whole)),
        "kv_device_total_bytes": size, "kv_transient_bytes": 0, "kv_host_total_bytes": host, "kv_bytes_moved_per_token": moved,
        "kv_bytes_read_per_token": size / batch_size,
    }  # fmt: skip
    cell = {"measure": "offline", "request_rate": "inf", "input_len": input_len, "output_len": 64, "batch_size": batch_size}
    return _record(sweep, strategy, cell | {"repeat": repeat}, figures | quality | more, samples)


def rates(
    of: dict[str, Callable[[float], dict[str, Any]]], at: tuple[float, ...] = (2, 4, 8), repeats: int = 3, **more: Any
) -> list[Record]:
    """A sweep over the request rate: by strategy, what its figures are at a rate."""
    return [load(s, rate, repeat=i, **(figures(rate) | more)) for rate in at for i in range(repeats) for s, figures in of.items()]


def written(directory: pathlib.Path, records: list[Record]) -> pathlib.Path:
    """The records as a results directory."""
    for record in records:
        folder = directory / record["sweep"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    return directory
