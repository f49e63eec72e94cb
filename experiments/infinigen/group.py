"""Ablation: how the query heads of a kv head are joined, which the paper leaves open, by the budget."""

from experiments.infinigen.study import Case, Points, Study, best, main, percent
from kvjax.cache import InfiniGenPaper

BUDGETS = (0.05, 0.1, 0.2, 0.4)


def findings(points: Points) -> list[str]:
    winners = best(points, ("max", "mean"))
    told = ", ".join(f"{name} at {x:g}" for x, name in winners.items())
    wanted = {(group, x): percent(points[group, x]["kv_wanted_fraction_speculating"]) for group in ("max", "mean") for x in BUDGETS}
    reads = ", ".join(f"{wanted['max', x]} and {wanted['mean', x]} at {x:g}" for x in BUDGETS)
    return [
        f"The lesser divergence is that of {told}. With the highest guess of a group and with its mean, the guessing layers read {reads}."
    ]


STUDY = Study(
    name="group",
    title="InfiniGen by how the guesses of a kv head's query heads are joined",
    axis="budget (share of the tokens)",
    legend="joined by",
    cases=tuple(Case(group, budget, InfiniGenPaper(budget=budget, group=group)) for group in ("max", "mean") for budget in BUDGETS),  # type: ignore[arg-type]
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
