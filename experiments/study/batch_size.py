"""Throughput over the batch, and in equal memory: offline at equal bytes of cache, and served within one memory limit.

    python -m experiments.study.batch_size --quick

Three kinds of cells. `batch`: one budget, growing batches. `equal bytes`: growing batches that may take no more bytes on the device than
the full cache of the smallest one; every strategy's budget is solved for that (kvjax.matching), and where none is small enough the cell is
infeasible. `memory limit`: an engine with all requests at once, which admits what fits.
"""

from collections.abc import Sequence

from experiments.study.frame import (
    DEVICE_BYTES,
    KLD,
    RECALL,
    THROUGHPUT,
    TPOT,
    TTFT,
    Experiment,
    Figure,
    budgeted,
    curves,
    main,
    mib,
    times,
    unique,
)  # fmt: skip
from kvjax.cache import Full, Strategy
from kvjax.engine.memory import parse_memory
from kvjax.matching import Sizes, cost
from kvjax.models.config import preset
from kvjax.report.figures import Panel
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Load, Offline, shape_of

BATCH, EQUAL, LIMIT = "batch", "equal bytes", "memory limit"
KNOB = Panel("matched_knob", "budget that fits (tokens)", "log")
PEAK = Panel("peak_running", "requests computed at a time, at most", "linear", "more")


def cells(
    model: str, strategies: Sequence[str], batches: Sequence[int], equal: Sequence[str], served: Sequence[str], memory: Sequence[str],
    repeats: int, input_len: int, output_len: int, num_facts: int, budget: float, serve_input: int, serve_output: int, num_requests: int,
    max_num_seqs: int, prefill_chunk: int, max_model_len: int | None = None,
) -> list[Cell]:  # fmt: skip
    reserve = num_facts * 8
    target = cost(Strategy(Full()), "device_bytes", Sizes(shape_of(preset(model)), min(batches), input_len, output_len, reserve))
    found: list[Cell] = []
    for repeat in range(repeats):
        scratch = True if repeat == 0 else None
        found += [
            Offline(
                name, model, budgeted(name, budget), num_prompts=batch, batch_size=batch, input_len=input_len, output_len=output_len,
                num_facts=num_facts, scratch=scratch, case=BATCH, repeat=repeat,
            ).cell()
            for batch in batches for name in strategies
        ]  # fmt: skip
        found += [
            Offline(
                name, model, num_prompts=batch, batch_size=batch, input_len=input_len, output_len=output_len, num_facts=num_facts,
                currency="device_bytes", target=int(target), scratch=scratch, case=EQUAL, repeat=repeat,
            ).cell()
            for batch in batches for name in equal
        ]  # fmt: skip
        found += [
            Load(
                name, model, budgeted(name, budget), num_prompts=num_requests, input_len=serve_input, output_len=serve_output,
                kv_memory=limit, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
                prefill_chunk=prefill_chunk, case=LIMIT, repeat=repeat,
            ).cell()
            for limit in memory for name in served
        ]  # fmt: skip
    return found


def of(case: str):
    """The records of one kind of cells; those of a memory limit with the limit as a number."""

    def rows(records: Sequence[Record]) -> list[Record]:
        mine = [record for record in records if record["cell"]["case"] == case]
        return [r | {"limit_bytes": parse_memory(r["cell"]["kv_memory"]) / 2**20} for r in mine] if case == LIMIT else mine

    return rows


def findings(records: Sequence[Record]) -> list[str]:
    told = []
    out = curves(of(BATCH)(records), "batch_size", "output_throughput")
    for name, points in out.items():
        small, large = min(points), max(points)
        told.append(
            f"{name}: a batch of {large} delivers {times(points[large] / points[small])} the tokens of a batch of {small} "
            f"({points[small]:.0f} to {points[large]:.0f} tokens/s)."
        )
    equal = of(EQUAL)(records)
    if equal:
        out, kld = (curves(equal, "batch_size", key) for key in ("output_throughput", "fidelity_kld_mean"))
        for name, points in out.items():
            best = max(points, key=lambda batch: points[batch])
            told.append(
                f"Within {mib(equal[0]['cell']['target'])} of cache, {name} delivers up to {points[best]:.0f} tokens/s (batch {best}), at "
                f"a divergence of {kld[name][best]:.3g} nats; its largest batch measured is {max(points)}."
            )
    served = of(LIMIT)(records)
    if served:
        out, peak = (curves(served, "limit_bytes", key) for key in ("output_throughput", "peak_running"))
        limits = sorted({limit for points in out.values() for limit in points})
        for limit in unique((limits[0], limits[-1])):
            there = {name: points[limit] for name, points in out.items() if limit in points}
            best = max(there, key=lambda name: there[name])
            told.append(
                f"Served within {limit:g} MiB, {best} delivers the most, {there[best]:.0f} tokens/s with up to {peak[best][limit]:.0f} "
                f"requests at a time; "
                + ", ".join(f"{name} {there[name]:.0f} ({peak[name][limit]:.0f})" for name in there if name != best)
                + "."
            )
    return told


EXPERIMENT = Experiment(
    name="batch_size",
    title="Throughput over the batch, and in equal memory",
    question="How many rows pay, and which strategy makes the most of the same memory?",
    quick=dict(
        model="kvjax-1m", strategies=("full", "h2o"), batches=(2, 8), equal=("full", "h2o"), served=("vllm", "h2o+paged"),
        memory=("2MiB",), repeats=1, input_len=128, output_len=8, num_facts=4, budget=0.2, serve_input=96, serve_output=24,
        num_requests=8, max_num_seqs=4, prefill_chunk=32, max_model_len=128,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "vllm", "h2o", "infinigen"), batches=(2, 8, 32),
        equal=("full", "streaming", "h2o", "h2o+paged", "infinigen"), served=("full", "vllm", "h2o+paged"),
        memory=("4MiB", "16MiB"), repeats=5, input_len=256, output_len=48, num_facts=6, budget=0.2, serve_input=256, serve_output=128,
        num_requests=32, max_num_seqs=32, prefill_chunk=256,
    ),
    cells=cells,
    figures=(
        Figure(
            "batch_size", "Throughput and latency over the batch",
            "Whole batches offline, at one budget.",
            "batch_size", "rows of the batch", (THROUGHPUT, TPOT, TTFT, DEVICE_BYTES), "log", of(BATCH),
        ),
        Figure(
            "equal_bytes", "Growing batches within the same bytes of cache",
            "Every strategy has the largest budget whose cache takes no more bytes on the device, metadata included, than the full cache "
            "of the smallest batch. infinigen keeps everything in host memory and pays for partial keys alone. Crosses do not fit.",
            "batch_size", "rows of the batch", (THROUGHPUT, KNOB, KLD, RECALL), "log", of(EQUAL),
        ),
        Figure(
            "memory_limit", "All requests at once within one memory limit",
            "The engine admits what fits: pages, metadata, partial keys and staging together.",
            "limit_bytes", "memory of the cache (MiB)", (THROUGHPUT, PEAK, TTFT, TPOT), "log", of(LIMIT),
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
