"""Mixes of requests: short, long, of all lengths, and with a prefix in common, served with and without prefix caching.

python -m experiments.study.request_mix --quick
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.frame import THROUGHPUT, TPOT, TTFT, Experiment, Figure, budgeted, curves, main, unique
from kvjax.report.figures import Panel
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Load

P99_TTFT = Panel("p99_ttft_ms", "P99 time to first token (ms)", "log", "less")
HITS = Panel("prefix_cache_hit_rate", "prompt tokens found in the prefix cache (%)", "linear", "more", factor=100)
FRAGMENTATION = Panel("kv_fragmentation_mean", "page fragmentation (%)", "linear", "less", factor=100)
CACHED = ", prefix cached"


def cells(
    model: str, strategies: Sequence[str], mixes: Mapping[str, Mapping[str, Any]], repeats: int, num_prompts: int, request_rate: float,
    kv_memory: str, max_num_seqs: int, prefill_chunk: int, budget: float, max_model_len: int | None = None,
) -> list[Cell]:  # fmt: skip
    found = []
    for repeat in range(repeats):
        for mix, sizes in mixes.items():
            for strategy in strategies:
                for cached in (None, True) if "shared_prefix" in sizes and strategy == "vllm" else (None,):
                    found.append(
                        Load(
                            strategy, model, budgeted(strategy, budget), request_rate=request_rate, num_prompts=num_prompts,
                            kv_memory=kv_memory, max_num_seqs=max_num_seqs,
                            max_model_len=max_model_len, prefill_chunk=prefill_chunk, prefix_caching=cached,
                            case=mix + (CACHED if cached else ""), repeat=repeat, **sizes,
                        ).cell()
                    )  # fmt: skip
    return found


def findings(records: Sequence[Record]) -> list[str]:
    ttft, out = (curves(records, "case", key) for key in ("mean_ttft_ms", "output_throughput"))
    told = []
    for case in dict.fromkeys(record["cell"]["case"] for record in records):
        there = {name: points[case] for name, points in ttft.items() if case in points}
        if len(there) > 1:
            best = min(there, key=lambda name: there[name])
            told.append(
                f"{case}: the first token comes soonest under {best}, after {there[best]:.0f} ms; "
                + ", ".join(f"{there[name]:.0f} ms under {name} ({out[name][case]:.0f} tokens/s)" for name in there if name != best) + "."
            )  # fmt: skip
    for case in unique(case for points in ttft.values() for case in points if case.endswith(CACHED)):
        plain = ttft["vllm"].get(case.removesuffix(CACHED))
        hits = curves(records, "case", "prefix_cache_hit_rate").get("vllm", {}).get(case)
        if plain and hits is not None:
            told.append(
                f"Prefix caching finds {hits:.0%} of the prompt tokens and takes the first token of vllm from {plain:.0f} to "
                f"{ttft['vllm'][case]:.0f} ms."
            )
    return told


EXPERIMENT = Experiment(
    name="request_mix",
    title="Mixes of requests",
    question="Which requests does a strategy serve well: short, long, of all lengths, or with a prefix in common?",
    quick=dict(
        model="kvjax-1m", strategies=("vllm", "h2o+paged"),
        mixes={
            "mixed": dict(input_len="uniform(24,96)", output_len="uniform(8,24)"),
            "shared prefix": dict(input_len=104, output_len=16, shared_prefix=96),
        },
        repeats=1, num_prompts=12, request_rate=40, kv_memory="2MiB", max_num_seqs=4, prefill_chunk=32, budget=0.2, max_model_len=128,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "vllm", "h2o+paged"),
        mixes={
            "short": dict(input_len="uniform(32,128)", output_len="uniform(32,128)"),
            "long": dict(input_len="uniform(512,896)", output_len="uniform(32,128)"),
            "mixed": dict(input_len="uniform(32,896)", output_len="uniform(32,128)"),
            "shared prefix": dict(input_len="uniform(544,640)", output_len="uniform(32,128)", shared_prefix=512),
        },
        repeats=5, num_prompts=32, request_rate=8, kv_memory="16MiB", max_num_seqs=32, prefill_chunk=256, budget=0.2, max_model_len=1024,
    ),
    cells=cells,
    figures=(
        Figure(
            "request_mix", "Mixes of requests under one load",
            "The same rate and memory for every mix, and an engine that takes the longest request of any. "
            "Points of a mix stand above each other. Prefix caching is vllm's alone, because "
            "the pages of an evicting strategy depend on what comes after.",
            "case", "mix", (TTFT, P99_TTFT, TPOT, THROUGHPUT, FRAGMENTATION, HITS),
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
