"""Cases of H2O's eviction against the loop in NumPy: what every implementation has to get right."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.paged_attention import Statistics

from tests.kernels.h2o_evict import reference
from tests.kernels.proof import somehow

SCORE_TOLERANCE: dict[str, Any] = dict(rtol=1e-6, atol=2e-6)
STEP = 1 / 64  # how far apart the scores of two tokens are, where they are not equal


@dataclasses.dataclass(frozen=True)
class Case:
    """Dims as in kernels/h2o_evict/api.py."""

    capacity: int = 128
    heads: int = 2
    group: int = 2
    recent: int = 10
    ties: bool = False

    def __str__(self):
        return f"c{self.capacity}-{self.heads}h-g{self.group}-recent{self.recent}{'-ties' if self.ties else ''}"


CASES = [
    Case(),
    Case(ties=True),
    Case(heads=4, group=1),
    Case(capacity=1152, heads=1, group=4),  # one span of slots and a bit
    Case(capacity=2304, heads=1, ties=True),  # two spans and a bit
    Case(recent=0),
]


@dataclasses.dataclass
class Problem:
    """Arguments of one call; the rows hold 0, 1, budget - 1, budget, budget + 1 and C tokens, and the last one is not active."""

    position: np.ndarray
    score: np.ndarray
    statistics: Statistics
    length: np.ndarray
    budget: np.ndarray
    recent: np.ndarray
    active: np.ndarray

    @property
    def arguments(self):
        return self.position, self.score, self.statistics, self.length, self.budget, self.recent, self.active


def problem(case: Case, rng: np.random.Generator) -> Problem:
    capacity = case.capacity
    budget = int(rng.integers(case.recent + 2, capacity - 1))
    counts = np.array([0, 1, budget - 1, budget, budget + 1, capacity, budget + 1])
    batch = len(counts)
    slots = (batch, case.heads, capacity)
    length = counts + rng.integers(0, 1000, batch)

    position = np.full(slots, -1, np.int32)
    for b, count in enumerate(counts):
        for h in range(case.heads):
            last = np.arange(length[b] - min(case.recent, count), length[b])
            older = rng.choice(length[b] - len(last), count - len(last), replace=False)
            where = rng.permutation(capacity)[:count] if rng.random() < 0.5 else np.arange(count)  # with holes, and without
            position[b, h, where] = rng.permutation(np.concatenate([older, last]))
    held = position >= 0

    logits = rng.normal(size=(batch, case.heads, case.group, capacity)).astype(np.float32) * 3
    seen = np.where(held[:, :, None], logits, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(seen).sum(-1))
    lse[counts == 0] = -1e30
    if case.ties:
        lse[:] = np.inf  # so that nothing is added to scores that are equal
    mass = np.exp(seen - lse[..., None]).sum(2)
    if case.ties:
        levels = rng.integers(0, 4, slots)
    else:  # the lowest scores are those of the tokens that are protected
        last = position >= (length - case.recent)[:, None, None]
        levels = rng.permuted(np.broadcast_to(np.arange(capacity), slots), axis=-1) - np.where(last, capacity, 0)
    score = levels * STEP - mass  # which makes the sums differ by STEP

    saw: Any = (np.where(held[:, :, None], logits, np.nan), lse.astype(np.float32))
    rows = (length, np.full(batch, budget), np.full(batch, case.recent), np.arange(batch) < batch - 1)
    return Problem(position, np.where(held, score, np.nan).astype(np.float32), Statistics(*saw), *rows)


def outcome(call, arguments, implementation: Name):
    with somehow(implementation):
        return jax.device_get(jax.jit(partial(call, implementation=implementation))(*arguments))


def verify(case: Case, rng: np.random.Generator, implementation: Name, call=h2o_evict) -> None:
    """Raises AssertionError where an implementation differs from the loop."""
    given = problem(case, rng)
    position, score, slot = outcome(call, given.arguments, implementation)
    wanted, scores, chosen = reference.h2o_evict(*given.arguments)
    np.testing.assert_array_equal(slot[given.active], chosen[given.active])
    np.testing.assert_array_equal(position, wanted)
    held = given.position >= 0
    np.testing.assert_allclose(score[held], scores[held], **SCORE_TOLERANCE)
    idle = ~given.active
    np.testing.assert_array_equal(score[idle][held[idle]], given.score[idle][held[idle]])
