"""Ablation: which columns guess. The paper's sum of |Q| and |K|, the artifact's |Q| alone, and its union of two half-sized sets.

Every case reads its whole budget (alpha=inf; see skew).
"""

import math

from experiments.infinigen.study import Case, Points, Study, best, main
from kvjax.cache import InfiniGenPaper

LIVE = (0.125, 0.25, 0.5)
RULES = ("sum", "query", "union")


def findings(points: Points) -> list[str]:
    winners = best(points, RULES)
    told = ", ".join(f"{name} at {x:g}" for x, name in winners.items())
    spread = max(
        max(points[rule, x]["fidelity_kld_mean"] for rule in RULES)
        / max(min(points[rule, x]["fidelity_kld_mean"] for rule in RULES), 1e-12)
        for x in LIVE
    )
    return [f"At equal numbers of columns the least divergence is that of {told}; the worst rule is at most {spread:.2f} times the best."]


STUDY = Study(
    name="columns",
    title="InfiniGen (alpha=inf, budget=0.2) by the rule that picks the columns, at equal numbers (a union of two sets of half the size)",
    axis="columns that guess (share)",
    legend="columns",
    cases=tuple(
        Case(rule, live, InfiniGenPaper(alpha=math.inf, partial=live / 2 if rule == "union" else live, columns=rule))  # type: ignore[arg-type]
        for rule in RULES
        for live in LIVE
    ),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
