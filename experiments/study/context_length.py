"""Speed, bytes and quality over the length of the prompt, at one budget.

python -m experiments.study.context_length --quick
"""

from collections.abc import Sequence

from experiments.study.frame import DEVICE_BYTES, KLD, RECALL, THROUGHPUT, TPOT, TTFT, Experiment, Figure, budgeted, curves, main, times
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Offline


def cells(
    model: str, strategies: Sequence[str], lengths: Sequence[int], repeats: int, num_prompts: int, batch_size: int, output_len: int,
    num_facts: int, budget: float,
) -> list[Cell]:  # fmt: skip
    return [
        Offline(
            strategy, model, budgeted(strategy, budget), num_prompts=num_prompts, batch_size=batch_size, input_len=length,
            output_len=output_len, num_facts=num_facts, scratch=True if repeat == 0 else None, repeat=repeat,
        ).cell()
        for repeat in range(repeats) for length in lengths for strategy in strategies
    ]  # fmt: skip


def findings(records: Sequence[Record]) -> list[str]:
    tpot, recall, ttft = (curves(records, "input_len", key) for key in ("mean_tpot_ms", "task_recall", "mean_ttft_ms"))
    told = []
    for name, points in tpot.items():
        short, long = min(points), max(points)
        told.append(
            f"From {short} to {long} tokens, a token of {name} takes {times(points[long] / points[short])} as long "
            f"({points[short]:.2f} to {points[long]:.2f} ms), its first one {times(ttft[name][long] / ttft[name][short])}; "
            f"recall goes from {recall[name][short]:.0%} to {recall[name][long]:.0%}."
        )
    return told


EXPERIMENT = Experiment(
    name="context_length",
    title="Speed, bytes and quality over the context",
    question="From which context on does a strategy pay, and does it forget more of a longer one?",
    quick=dict(
        model="kvjax-1m", strategies=("full", "h2o"), lengths=(96, 192), repeats=1, num_prompts=2, batch_size=2, output_len=8,
        num_facts=4, budget=0.2,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "vllm", "h2o", "h2o+paged", "infinigen"), lengths=(128, 256, 512, 1024, 1920), repeats=5,
        num_prompts=4, batch_size=4, output_len=48, num_facts=6, budget=0.2,
    ),
    cells=cells,
    figures=(
        Figure(
            "context_length", "Speed, bytes and quality over the length of the prompt",
            "Whole batches offline; budgets are a share of the prompt. Divergence and recall are teacher-forced.",
            "input_len", "tokens of the prompt", (TTFT, TPOT, THROUGHPUT, DEVICE_BYTES, KLD, RECALL), "log",
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
