"""Ablation: a pool that is too small, and what gives way.

Twice: the document as a prompt, at once, when nothing has been fetched yet and every victim is the oldest token; and fed token by token
behind its first fifth, as in the accuracy simulation of the paper's code, when there are fetches to count.
"""

from experiments.infinigen.study import Case, Points, Study, main, percent
from kvjax.cache import InfiniGenPaper

POOLS = (0.2, 0.4, 0.6, 0.8, 1.0)
VICTIMS = ("counter", "lru", "fifo")


def findings(points: Points) -> list[str]:
    told = []
    for how in ("at once", "fed"):
        at = {v: points[f"{how}, {v}", 0.8] for v in VICTIMS}
        recalls = ", ".join(f"{percent(r['task_recall'])} with {v}" for v, r in at.items())
        whole = points[f"{how}, counter", 1.0]["task_recall"]
        told.append(f"A document that comes {how}, in a pool of 80 % of it: {recalls}; {percent(whole)} in a pool for all of it.")
    spread = max(
        abs(points[f"at once, {a}", x]["task_recall"] - points[f"at once, {b}", x]["task_recall"])
        for x in POOLS
        for a in VICTIMS
        for b in VICTIMS
    )
    told.append(f"At once, the victims' recalls differ by at most {100 * spread:.1f} points: what a prompt loses, it loses by age.")
    return told


def cases(how: str, fed: bool) -> tuple[Case, ...]:
    made = [(victim, pool, InfiniGenPaper(pool=pool, victim=victim)) for victim in VICTIMS for pool in POOLS]  # type: ignore[arg-type]
    return tuple(Case(f"{how}, {victim}", pool, policy, fed) for victim, pool, policy in made)


STUDY = Study(
    name="pool",
    title="InfiniGen by the pool's limit and its victims",
    axis="pool (share of the document)",
    legend="document, victim",
    cases=(*cases("at once", False), *cases("fed", True)),
    findings=findings,
)

if __name__ == "__main__":
    main(STUDY)
