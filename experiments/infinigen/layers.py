"""Ablation: the layers at the bottom that read everything. The paper takes two; in a small model they are much of all that is read."""

from experiments.infinigen.study import Case, Points, Study, main, percent
from kvjax.cache import InfiniGenPaper

FULL_LAYERS = (1, 2, 3, 4)
BUDGETS = (0.05, 0.2)


def findings(points: Points) -> list[str]:
    told = []
    for budget in BUDGETS:
        mine = {x: points[f"budget={budget:g}", x] for x in FULL_LAYERS}
        each = ", ".join(
            f"{percent(r['task_recall'])} recalled, {r['fidelity_kld_mean']:.4f} nats and {percent(r['read_fraction'])} read with {x}"
            for x, r in mine.items()
        )
        told.append(f"With budget={budget:g}: {each} full layers.")
    return told


STUDY = Study(
    name="layers",
    title="InfiniGen by the layers at the bottom that read everything",
    axis="full layers",
    legend="reads at most",
    cases=tuple(
        Case(f"budget={budget:g}", full, InfiniGenPaper(budget=budget, full_layers=full)) for budget in BUDGETS for full in FULL_LAYERS
    ),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
