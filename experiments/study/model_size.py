"""Speed and bytes over model sizes: the bundled models, and published shapes cut to a few layers, with random weights.

    python -m experiments.study.model_size --quick

A random model answers nothing, so quality is measured of the bundled ones alone.
"""

from collections.abc import Sequence

from experiments.study.frame import DEVICE_BYTES, KLD, THROUGHPUT, TPOT, TTFT, Experiment, Figure, budgeted, curves, main, mib, times
from kvjax.models.config import BUNDLED
from kvjax.report.figures import Panel
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Offline

SCRATCH = Panel("kv_transient_bytes", "scratch of a decode step (MiB)", "log", "less", factor=2**-20)


def cells(
    models: Sequence[tuple[str, int | None]], strategies: Sequence[str], repeats: int, num_prompts: int, batch_size: int, input_len: int,
    output_len: int, num_facts: int, budget: float, scratch: bool | None = None,
) -> list[Cell]:  # fmt: skip
    found = []
    for model, layers in models:
        bundled = model in BUNDLED
        found += [
            Offline(
                strategy, model, budgeted(strategy, budget), num_layers=layers, random_weights=None if bundled else True,
                num_prompts=num_prompts, batch_size=batch_size, input_len=input_len, output_len=output_len, num_facts=num_facts,
                quality=bundled, scratch=scratch, repeat=repeat,
            ).cell()
            for repeat in range(repeats) for strategy in strategies
        ]  # fmt: skip
    return found


def findings(records: Sequence[Record]) -> list[str]:
    names = {record["parameter_count"]: record["model_id"] for record in records}
    tpot, size = (curves(records, "parameter_count", key) for key in ("mean_tpot_ms", "kv_device_total_bytes"))
    told = []
    for count, name in sorted(names.items()):
        here = {strategy: points[count] for strategy, points in tpot.items() if count in points}
        if "full" not in here or len(here) < 2:
            continue
        fastest = min((s for s in here if s != "full"), key=lambda s: here[s])
        told.append(
            f"{name} ({count / 1e6:.1f} M parameters): {here['full']:.2f} ms a token with the full cache, of {mib(size['full'][count])}; "
            f"fastest of the others is {fastest} with {here[fastest]:.2f} ms, {times(here['full'] / here[fastest])} the speed."
        )
    return told


EXPERIMENT = Experiment(
    name="model_size",
    title="Speed and bytes over model sizes",
    question="Does what a strategy saves grow with the model, or do the weights drown it?",
    quick=dict(
        models=(("kvjax-1m", None), ("kvjax-4m", None)), strategies=("full", "h2o"), repeats=1, num_prompts=2, batch_size=2,
        input_len=160, output_len=8, num_facts=4, budget=0.2,
    ),
    full=dict(
        models=(("kvjax-1m", None), ("kvjax-4m", None), ("bench-32m", 4), ("bench-32m", None), ("opt-125m", 4)),
        strategies=("full", "vllm", "streaming", "h2o", "infinigen"), repeats=5, num_prompts=4, batch_size=4, input_len=512, output_len=48,
        num_facts=4, budget=0.2, scratch=True,
    ),
    cells=cells,
    figures=(
        Figure(
            "model_size", "Speed and bytes over the size of the model",
            "Whole batches offline. Presets have random weights: their speed and bytes are real, their answers are not measured.",
            "parameter_count", "parameters", (TTFT, TPOT, THROUGHPUT, DEVICE_BYTES, SCRATCH, KLD), "log",
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
