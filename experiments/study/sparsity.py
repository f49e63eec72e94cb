"""Speed, bytes and quality over the budget, from a twentieth of the prompt to all of it.

python -m experiments.study.sparsity --quick
"""

from collections.abc import Sequence

from experiments.study.frame import (
    DEVICE_BYTES,
    KLD,
    MOVED_BYTES,
    RECALL,
    TPOT,
    UNLIMITED,
    Experiment,
    Figure,
    curves,
    main,
    samples,
)  # fmt: skip
from kvjax.report.figures import Panel
from kvjax.report.statistics import paired
from kvjax.sweep import Cell, Record
from kvjax.sweep.measures import Offline

READ = Panel("kv_bytes_read_per_token", "cache read per token (KiB)", "linear", "less", factor=2**-10)
KEPT = 0.95
"""Of the full cache's recall: what counts as keeping it."""


def cells(
    model: str, strategies: Sequence[str], budgets: Sequence[float], repeats: int, num_prompts: int, batch_size: int, input_len: int,
    output_len: int, num_facts: int,
) -> list[Cell]:  # fmt: skip
    points: list[tuple[str, float | None]] = [(name, None) for name in strategies if name in UNLIMITED]
    points += [(name, budget) for budget in budgets for name in strategies if name not in UNLIMITED]
    return [
        Offline(
            name, model, budget, num_prompts=num_prompts, batch_size=batch_size, input_len=input_len, output_len=output_len,
            num_facts=num_facts, scratch=True if repeat == 0 else None, repeat=repeat,
        ).cell()
        for repeat in range(repeats) for name, budget in points
    ]  # fmt: skip


def findings(records: Sequence[Record]) -> list[str]:
    recall, kld, tpot = (curves(records, "budget", key) for key in ("task_recall", "fidelity_kld_mean", "mean_tpot_ms"))
    limited = [name for name in recall if name not in UNLIMITED]
    told = []
    full = recall.get("full", {}).get(None)
    if full:
        told.append(f"The full cache recalls {full:.1%} of the facts.")
        for name in limited:
            enough = [budget for budget, share in recall[name].items() if share >= KEPT * full]
            least = f"from a budget of {min(enough):.0%} on" if enough else "at no budget measured"
            told.append(f"{name} keeps {KEPT:.0%} of that {least}.")
    budgets = sorted({budget for name in limited for budget in kld[name]})
    if budgets and len(limited) > 1:
        least = budgets[0]
        order = sorted((name for name in limited if least in kld[name]), key=lambda name: kld[name][least])
        told.append(
            f"At {least:.0%}, divergence from the full cache is "
            + ", ".join(f"{kld[name][least]:.3g} ({name})" for name in order)
            + " nats."
        )
        first = [samples(records, "kld", strategy=name, budget=least) for name in order[:2]]
        if len(first) == 2 and len(first[0]) == len(first[1]) > 1:
            told.append(f"Prompt by prompt, divergence at {least:.0%}: {paired(*first).verdict((order[0], order[1]), 'less')} (nats).")
    if "full" in tpot and limited:
        fastest = min(((tpot[name][b], name, b) for name in limited for b in tpot[name]), default=None)
        if fastest is not None:
            told.append(
                f"The fastest is {fastest[1]} at {fastest[2]:.0%}, {fastest[0]:.2f} ms a token; the full cache takes "
                f"{tpot['full'][None]:.2f}."
            )
    return told


EXPERIMENT = Experiment(
    name="sparsity",
    title="Speed, bytes and quality over the budget",
    question="What does a smaller budget buy, and what does it lose?",
    quick=dict(
        model="kvjax-1m", strategies=("full", "streaming", "h2o", "infinigen"), budgets=(0.1, 0.4), repeats=1, num_prompts=4, batch_size=4,
        input_len=160, output_len=8, num_facts=4,
    ),
    full=dict(
        model="kvjax-4m", strategies=("full", "offload", "streaming", "h2o", "infinigen", "oracle_topk"),
        budgets=(0.05, 0.1, 0.2, 0.4, 0.7, 1.0), repeats=5, num_prompts=8, batch_size=8, input_len=480, output_len=48, num_facts=6,
    ),
    cells=cells,
    figures=(
        Figure(
            "sparsity", "Speed, bytes and quality over the budget",
            "The budget is what is kept, or read per step, as a share of the prompt; levels are strategies without one. infinigen's first "
            "two layers read everything. The cache on the device is without a step's scratch (kv_transient_bytes in the records). "
            "Divergence and recall are teacher-forced.",
            "budget", "budget (share of the prompt)", (TPOT, READ, DEVICE_BYTES, MOVED_BYTES, KLD, RECALL), "log",
        ),
    ),
    findings=findings,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
