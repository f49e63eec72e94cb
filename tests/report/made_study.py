"""A results directory as a study writes it, with figures made up by formulas: small, whole, and with the same bytes every time."""

import json
import pathlib
from typing import Any

Record = dict[str, Any]

EVIL = "evil:<script>window.owned=1</script>(keep=3)"
WHERE = {
    "schema_version": 1, "date": "20261123-145928", "device_kind": "cpu", "cpu_count": 2, "python_version": "3.12.1",
    "jax_version": "0.12.0.1", "git_commit": "0123456789ab", "model_id": "kvjax-4m", "dtype": "float32",
}  # fmt: skip
OFFLINE = {
    "full": (1.0, "full"),
    "offload": (1.0, "offload"),
    "streaming": (0.6, "streaming(sinks=4,window={b})"),
    "h2o": (0.8, "h2o(heavy={h},recent={h})"),
    "infinigen": (0.97, "infinigen(alpha=4.0,partial=0.3,budget={b})"),
    "oracle_topk": (0.99, "oracle_topk(k={b})"),
}


def write(directory: pathlib.Path) -> pathlib.Path:
    """All of it: four experiments, one of them without about.json, cells that failed or did not fit, names that try to be markup."""
    request_rate(directory)
    sparsity(directory)
    model_size(directory)
    records(directory / "retention", "retention", [offline("full", None), offline("h2o", 0.2)])
    (directory / "STUDY.md").write_text(STUDY)
    return directory


def request_rate(directory: pathlib.Path) -> pathlib.Path:
    found = []
    for strategy, room in (("full", 6), ("vllm", 8), ("h2o(heavy=0.1,recent=0.1)+paged", 14)):
        for rate in ("2", "4", "8", "12", "inf"):
            for repeat in (0, 1, 2):
                load = 20 if rate == "inf" else float(rate)
                wobble = 1 + 0.06 * ((repeat + len(strategy)) % 3 - 1)
                cell = dict(
                    measure="load", strategy=strategy, model="kvjax-4m", input_len=256, output_len=256, request_rate=rate, repeat=repeat
                )
                figures = dict(
                    max_num_seqs=room, request_rate=rate, mean_tpot_ms=wobble * (3 + load / 3), num_preemptions=int(max(0, load - room)),
                    mean_ttft_ms=wobble * (30 + 400 * max(0, load - room) ** 1.5),
                    p99_ttft_ms=wobble * 2 * (30 + 400 * max(0, load - room)), output_throughput=wobble * 250 * min(load, room),
                    request_goodput=wobble * min(load, room) * 0.9, kv_memory_bytes=2**24,
                )  # fmt: skip
                found.append(done("request_rate", strategy, cell, figures))
    folder = records(directory / "request_rate", "request_rate", found)
    panels = [
        dict(key="mean_ttft_ms", label="mean time to first token (ms)", scale="log", better="less", factor=1),
        dict(key="mean_tpot_ms", label="mean time per output token (ms)", scale="linear", better="less", factor=1),
        dict(key="output_throughput", label="output (tokens/s)", scale="linear", better="more", factor=1),
        dict(key="request_goodput", label="goodput (requests/s)", scale="linear", better="more", factor=1),
    ]
    question = "How do latency and goodput change with the offered load, up to saturation and past it?"
    findings = ["At 12 requests/s the full cache takes 5 s to a first token, h2o on pages 30 ms.", "vllm saturates at 8 requests/s."]
    about(folder, "Latency and throughput over the request rate", question, "request_rate", "offered load (requests/s)", panels, findings)
    return directory


def sparsity(directory: pathlib.Path) -> pathlib.Path:
    found = [offline(name, budget) for name in ("full", "offload") for budget in (None,)]
    found += [offline(name, budget) for name in ("streaming", "h2o", "infinigen", "oracle_topk") for budget in (0.05, 0.1, 0.2, 0.4)]
    folder = records(directory / "sparsity", "sparsity", found)
    panels = [
        dict(key="mean_tpot_ms", label="mean time per output token (ms)", scale="linear", better="less", factor=1),
        dict(
            key="kv_device_total_bytes", label="KV cache of the batch on the device (MiB)", scale="linear", better="less", factor=2.0**-20
        ),
        dict(key="fidelity_kld_mean", label="KLD to the full cache (nats)", scale="log", better="less", factor=1),
        dict(key="task_recall", label="facts recalled (%)", scale="linear", better="more", factor=100),
    ]
    question = "What does a smaller budget buy, and what does it lose?"
    findings = ["Infinigen keeps the full cache's recall down to a budget of 5 %.", "<img src=x onerror='window.owned=2'> stays text."]
    about(
        folder,
        "Speed, bytes and quality over the budget",
        question,
        "budget",
        "budget (share of the prompt)",
        panels,
        findings,
        "log",
        True,
    )
    return directory


def model_size(directory: pathlib.Path) -> pathlib.Path:
    found = []
    for rank, model in enumerate(("kvjax-1m", "kvjax-4m", "bench-32m")):
        for strategy in ("full", "h2o(heavy=0.1,recent=0.1)", EVIL):
            cell = dict(measure="offline", strategy=strategy, model=model, input_len=512, batch_size=4, repeat=0)
            if model == "bench-32m" and strategy != "h2o(heavy=0.1,recent=0.1)":
                outcome, error = (
                    ("infeasible", "needs 40 MiB of 16 MiB") if strategy == "full" else ("failed", "ValueError: <b>shape</b> & size")
                )
                found.append(lost("model_size", strategy, cell, outcome, error))
            else:
                found.append(
                    done("model_size", strategy, cell, dict(model_id=model, mean_tpot_ms=(rank + 1) * (2.0 if "h2o" in strategy else 3.0)))
                )
    folder = records(directory / "model_size", "model_size", found)
    panels = [dict(key="mean_tpot_ms", label="mean time per output token (ms)", scale="linear", better="less", factor=1)]
    about(folder, "Speed over model sizes", "Does what a strategy saves grow with the model?", "model", "model", panels, ["It does."])
    return directory


def offline(name: str, budget: float | None) -> Record:
    """A record of a whole batch: what is kept, its bytes and its quality follow from the budget."""
    best, pattern = OFFLINE[name]
    share = 1.0 if budget is None else budget
    strategy = pattern.format(b=budget, h=share / 2)
    host = name in ("offload", "infinigen")
    total = int(20 * 2**20 * (share if name in ("streaming", "h2o") else 1))
    where, other = ("host", "device") if host else ("device", "host")
    bytes_held = {
        f"kv_{tier}_{purpose}_bytes": 0 for tier in ("device", "host") for purpose in ("live", "metadata", "empty", "fragmentation")
    }
    bytes_held |= {
        f"kv_{where}_live_bytes": int(0.9 * total),
        f"kv_{where}_empty_bytes": total - int(0.9 * total),
        f"kv_{other}_metadata_bytes": 4096,
    }
    bytes_held |= {f"kv_{where}_total_bytes": total, f"kv_{other}_total_bytes": 4096}
    figures = dict(
        request_rate="inf", input_len=952, output_len=64, batch_size=8, mean_ttft_ms=900.0,
        mean_tpot_ms=(12.0 if name == "oracle_topk" else 2.0) + 4 * share, task_recall=best * (1 if total > 2e7 else share) ** 0.5,
        fidelity_kld_mean=0.0 if share == 1 else 2 * (1 - best) * (1 - share) / share,
        kept_fraction=share, kv_bytes_read_per_token=2.6e6 * share,
    )  # fmt: skip
    cell = dict(
        measure="offline", strategy=name, budget=budget, model="kvjax-4m", input_len=952, output_len=64, batch_size=8, seed=0, repeat=0
    )
    return done("sparsity", strategy, cell, figures | bytes_held)


def done(sweep: str, strategy: str, cell: Record, figures: Record) -> Record:
    samples = {"ttft_ms": [1.0, 2.0]}
    return {**_base(sweep, strategy, cell), **figures, "outcome": "done", "error": None, "seconds": 3.5, "samples": samples}


def lost(sweep: str, strategy: str, cell: Record, outcome: str, error: str) -> Record:
    return {**_base(sweep, strategy, cell), "outcome": outcome, "error": error, "seconds": 0.1, "samples": {}}


def _base(sweep: str, strategy: str, cell: Record) -> Record:
    return {**WHERE, "strategy": strategy, "sweep": sweep, "cell": cell, "cell_id": json.dumps(cell, sort_keys=True)}


def records(folder: pathlib.Path, sweep: str, found: list[Record]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record | {"sweep": sweep}) + "\n" for record in found))
    return folder


def about(folder, title: str, question: str, x: str, x_label: str, panels, findings, x_scale: str = "linear", quick: bool = False) -> None:
    command = f"python -m experiments.study.{folder.name} --output_dir=runs/study"
    figure = dict(file=f"{folder.name}.svg", png=f"{folder.name}.png", caption=f"{title}, as it was measured.", command=command)
    text = dict(
        name=folder.name, title=title, question=question, command=command, quick=quick, x=x, x_label=x_label, x_scale=x_scale,
        series="strategy", panels=panels, figures=[figure], findings=findings, setting={"device_kind": "cpu", "model_id": "kvjax-4m"},
    )  # fmt: skip
    (folder / "about.json").write_text(json.dumps(text))


STUDY = """# What came out

Paging alone *gains nothing* on a CPU; see [the rates](request_rate/records.csv) and [the paper](https://arxiv.org/abs/2604.05012).

## Claims

| claim | paper | here |
|---|---:|---:|
| H2O saves memory | 80 % | 81 % |
| <script>window.owned=3</script> | `a` | **b** |

## Figures

![Rates](request_rate/request_rate.png) ![gone](https://example.com/x.png) [bad](javascript:alert(1)) [file](notes.txt)
"""
