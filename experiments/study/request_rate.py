"""Latency and goodput over the request rate, up to saturation and past it: one scheduler, one memory limit, the same requests.

python -m experiments.study.request_rate --quick
"""

from collections.abc import Sequence

from experiments.study.frame import THROUGHPUT, TPOT, TTFT, Experiment, Figure, budgeted, curves, main, sortable, times
from kvjax.report.figures import Panel
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Load

GOODPUT = Panel("request_goodput", "goodput (requests/s)", "linear", "more")
HELD = 0.9
"""A rate is sustained while so much of what is offered is served within the objectives."""


def cells(
    model: str, strategies: Sequence[str], rates: Sequence[float | str], repeats: int, num_prompts: int, input_len: int, output_len: int,
    kv_memory: str, max_num_seqs: int, prefill_chunk: int, goodput: str, budget: float, max_model_len: int | None = None,
) -> list[Cell]:  # fmt: skip
    return [
        Load(
            strategy, model, budgeted(strategy, budget), request_rate=rate, num_prompts=num_prompts, input_len=input_len,
            output_len=output_len, kv_memory=kv_memory, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
            prefill_chunk=prefill_chunk, goodput=goodput,
            repeat=repeat,
        ).cell()
        for repeat in range(repeats) for rate in rates for strategy in strategies
    ]  # fmt: skip


def findings(records: Sequence[Record]) -> list[str]:
    good, out, ttft = (curves(records, "request_rate", key) for key in ("request_goodput", "output_throughput", "mean_ttft_ms"))
    told = []
    held = {name: [rate for rate, value in points.items() if rate != "inf" and value >= HELD * rate] for name, points in good.items()}
    best = {name: max(rates, default=0.0) for name, rates in held.items()}
    told.append(
        f"At least {HELD:.0%} of the offered requests are served within the objectives up to "
        + ", ".join(f"{rate:g} requests/s under {name}" if rate else f"no measured rate under {name}" for name, rate in best.items())
        + "."
    )
    peaks = {name: max(points.values()) for name, points in out.items()}
    top = max(peaks, key=lambda name: peaks[name])
    if "full" in peaks and top != "full":
        told.append(
            f"Past saturation {top} delivers the most, {peaks[top]:.0f} tokens/s, {times(peaks[top] / peaks['full'])} the full cache."
        )
    else:
        told.append(f"Past saturation {top} delivers the most, {peaks[top]:.0f} tokens/s.")
    finite = sorted({rate for points in ttft.values() for rate in points if rate != "inf"}, key=sortable)
    if finite:
        last = finite[-1]
        there = {name: points[last] for name, points in ttft.items() if last in points}
        least, most = min(there, key=lambda n: there[n]), max(there, key=lambda n: there[n])
        told.append(
            f"At {last:g} requests/s the mean time to first token is {there[least]:.0f} ms under {least} and {there[most]:.0f} ms under "
            f"{most}."
        )
    return told


EXPERIMENT = Experiment(
    name="request_rate",
    title="Latency and goodput over the request rate",
    question="How much load does a strategy bear in the same memory, and what do requests feel on the way there?",
    quick=dict(
        model="kvjax-1m", strategies=("vllm", "h2o+paged"), rates=(10, 40, "inf"), repeats=1, num_prompts=16, input_len=96, output_len=24,
        kv_memory="2MiB", max_num_seqs=4, prefill_chunk=32, goodput="ttft:200,tpot:20", budget=0.2, max_model_len=128,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "vllm", "h2o", "h2o+paged", "infinigen"), rates=(4, 8, 12, 16, "inf"), repeats=5,
        num_prompts=32, input_len=256, output_len=128, kv_memory="16MiB", max_num_seqs=32, prefill_chunk=256,
        goodput="ttft:500,tpot:20", budget=0.2,
    ),
    cells=cells,
    figures=(
        Figure(
            "request_rate", "Latency, throughput and goodput over the offered load",
            "Every strategy serves the same requests at the same moments in the same memory; all at once at the right. Goodput counts the "
            "requests that meet both latency objectives.",
            "request_rate", "offered load (requests/s)", (TTFT, TPOT, THROUGHPUT, GOODPUT), "log",
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
