"""Ablation: how many columns of a head guess, at two budgets, which are always used up (alpha=inf; see skew)."""

import math

from experiments.infinigen.study import Case, Points, Study, main
from kvjax.cache import InfiniGenPaper

PARTIAL = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BUDGETS = (0.05, 0.2)


def findings(points: Points) -> list[str]:
    told = []
    for budget in BUDGETS:
        mine = {x: points[f"budget={budget:g}", x]["fidelity_kld_mean"] for x in PARTIAL}
        enough = next((x for x in PARTIAL if mine[x] <= 1.1 * mine[1.0]), 1.0)
        told.append(
            f"With budget={budget:g}, the divergence is {mine[0.1]:.4f} at a tenth of the columns, {mine[0.3]:.4f} at the default of "
            f"0.3 and {mine[1.0]:.4f} with all of them; {enough:g} of the columns come within 10 % of all."
        )
    told.append("What all columns leave is not the columns' doing: the queries are the guess of the layer below, and the budget cuts.")
    return told


STUDY = Study(
    name="partial",
    title="InfiniGen (alpha=inf) by the share of a head's columns that guess",
    axis="columns that guess (share)",
    legend="reads",
    cases=tuple(
        Case(f"budget={budget:g}", partial, InfiniGenPaper(alpha=math.inf, partial=partial, budget=budget))
        for budget in BUDGETS
        for partial in PARTIAL
    ),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
