"""Ablation: the budget, with the paper's alpha and with none, when the budget is always used up."""

import math

from experiments.infinigen.study import Case, Points, Study, main, percent
from kvjax.cache import InfiniGenPaper

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0)
ALPHAS = (4.0, math.inf)


def findings(points: Points) -> list[str]:
    told = []
    for alpha in ALPHAS:
        mine = {x: points[f"alpha={alpha:g}", x] for x in BUDGETS}
        recalls = ", ".join(f"{percent(r['task_recall'])} at {x:g}" for x, r in mine.items())
        told.append(f"With alpha={alpha:g}, recall by budget is {recalls}.")
    last = points["alpha=4", 1.0]
    told.append(
        f"With alpha=4 and nothing else to limit them, the guessing layers want {percent(last['kv_wanted_fraction_speculating'])} of the "
        f"tokens, so a larger budget changes nothing: the divergence stays at {last['fidelity_kld_mean']:.4f}."
    )
    return told


STUDY = Study(
    name="budget",
    title="InfiniGen by the budget",
    axis="budget (share of the tokens)",
    legend="threshold",
    cases=tuple(Case(f"alpha={alpha:g}", budget, InfiniGenPaper(alpha=alpha, budget=budget)) for alpha in ALPHAS for budget in BUDGETS),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
