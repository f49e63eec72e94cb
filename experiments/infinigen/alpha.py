"""Ablation: alpha, how far below the highest guess a token may be, under the default budget and without one."""

import math

from experiments.infinigen.study import Case, Points, Study, main, percent
from kvjax.cache import InfiniGenPaper

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 9.0, math.inf)
BUDGETS = (0.2, 1.0)


def findings(points: Points) -> list[str]:
    free = {alpha: points["budget=1", alpha] for alpha in ALPHAS}
    capped = {alpha: points["budget=0.2", alpha] for alpha in ALPHAS}
    enough = next((a for a in ALPHAS if free[a]["task_recall"] >= 0.95 * free[math.inf]["task_recall"]), math.inf)
    binds = next((a for a in ALPHAS if capped[a]["kv_wanted_fraction_speculating"] > 0.95 * 0.2), math.inf)
    reads = ", ".join(f"{percent(free[a]['kv_wanted_fraction_speculating'])} at {a:g}" for a in (2.0, 4.0, 5.0, 9.0))
    return [
        f"Without a budget, alpha alone decides: the guessing layers read {reads}; from alpha={enough:g} on 95 % of the recall is there.",
        f"A budget of 0.2 is what limits from alpha={binds:g} on. With alpha=inf and no budget everything is read, and the divergence is "
        f"{free[math.inf]['fidelity_kld_mean']:.1e}: rounding.",
    ]


STUDY = Study(
    name="alpha",
    title="InfiniGen by alpha",
    axis="alpha",
    legend="reads at most",
    cases=tuple(Case(f"budget={budget:g}", alpha, InfiniGenPaper(alpha=alpha, budget=budget)) for budget in BUDGETS for alpha in ALPHAS),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
