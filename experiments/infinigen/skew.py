"""Ablation: the skew. Does turning queries and keys, so that few columns hold their magnitude, make the guess from few columns better?

At alpha=inf, as in the paper: every case reads its whole budget. Under a threshold a guess from few columns, which is flatter, reads more.
"""

import math

from experiments.infinigen.study import Case, Points, Study, main, percent
from kvjax.cache import InfiniGenPaper

PARTIAL = (0.1, 0.3, 0.5, 1.0)


def findings(points: Points) -> list[str]:
    worst = {x: points["without", x]["fidelity_kld_mean"] / max(points["with", x]["fidelity_kld_mean"], 1e-12) for x in PARTIAL}
    helps = [x for x in PARTIAL if worst[x] > 1 and x < 1]
    told = ", ".join(f"{ratio:.2f} at {x:g}" for x, ratio in worst.items())
    recalls = ", ".join(
        f"{percent(points['with', x]['task_recall'])} with it and {percent(points['without', x]['task_recall'])} without at {x:g}"
        for x in PARTIAL[:2]
    )
    return [
        f"The divergence without the skew, over that with it, by the share of columns: {told}; above 1 the skew helps, which it does at "
        f"{len(helps)} of the {len(PARTIAL) - 1} shares below all columns. Recall is {recalls}."
    ]


STUDY = Study(
    name="skew",
    title="InfiniGen (alpha=inf, budget=0.2) with and without the skew, by the share of a head's columns that guess",
    axis="columns that guess (share)",
    legend="skew",
    cases=tuple(
        Case(name, partial, InfiniGenPaper(alpha=math.inf, partial=partial, skew=skew))
        for name, skew in (("with", True), ("without", False))
        for partial in PARTIAL
    ),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
