"""Cases of H2O's evict-and-write against the loop in NumPy: what every implementation has to get right."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..dispatch import Name
from ..proof import somehow
from . import reference
from .api import h2o_evict
from .base import Attention, H2OCache, Token

SCORE_TOLERANCE = 1e-5  # of scores up to about 40
STEP = 1 / 64  # how far apart the scores of two tokens are, where they are not equal


@dataclasses.dataclass(frozen=True)
class Case:
    """C = pages * size slots a row."""

    size: int = 32
    pages: int = 4
    heads: int = 2
    group: int = 2
    dim: int = 64
    dtype: str = "bfloat16"
    recent: int = 10
    mode: str = "evict and write"
    ties: bool = False

    def __str__(self):
        ties = "-ties" if self.ties else ""
        return f"{self.pages}x{self.size}-{self.heads}h-g{self.group}-d{self.dim}-{self.dtype}-{self.mode}{ties}"


CASES = [
    Case(),
    Case(mode="evict"),
    Case(mode="write"),
    Case(ties=True, mode="write"),
    Case(group=1, heads=4, dim=80, dtype="float16"),
    Case(size=384, pages=3, group=4, heads=1, dim=128),  # one span of slots and a bit
    Case(size=2304, pages=1, heads=1, dim=96, dtype="float32", ties=True),  # two spans and a bit, dense
    Case(recent=0),
]


@dataclasses.dataclass
class Problem:
    """Arguments of one call; the rows hold 0, 1, budget - 1, budget, budget + 1 and C tokens, and the last one is not active."""

    cache: H2OCache
    attention: Attention | None
    token: Token | None
    length: np.ndarray
    budget: np.ndarray
    recent: np.ndarray
    active: np.ndarray

    @property
    def arguments(self):
        return self.cache, self.attention, self.token, self.length, self.budget, self.recent, self.active


def problem(case: Case, rng: np.random.Generator) -> Problem:
    capacity = case.pages * case.size
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
    lse[counts == 0] = np.inf
    if case.ties:
        lse[:] = np.inf
    mass = np.exp(seen - lse[..., None]).sum(2)
    if case.ties:
        levels = rng.integers(0, 4, slots)
    else:  # the lowest scores are those of the tokens that are protected
        last = position >= (length - case.recent)[:, None, None]
        levels = rng.permuted(np.broadcast_to(np.arange(capacity), slots), axis=-1) - np.where(last, capacity, 0)
    score = levels * STEP - mass  # which makes the sums differ by STEP

    num_pages = batch * case.pages + 3
    shape, dtype = (num_pages, case.heads, case.size, case.dim), jnp.dtype(case.dtype)
    pages = rng.permutation(num_pages)[: batch * case.pages].reshape(batch, case.pages).astype(np.int32)
    keys, values = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    for pool in (keys, values):
        pool[np.setdiff1d(np.arange(num_pages), pages)] = np.nan
    slots_of: Any = (keys, values, pages, position, np.where(held, score, np.nan).astype(np.float32))
    seen_by: Any = (np.where(held[:, :, None], logits, np.nan), lse.astype(np.float32))
    new: Any = [rng.normal(size=(batch, case.heads, case.dim)).astype(np.float32) for _ in range(2)]
    cache, token = H2OCache(*slots_of), Token(*new)
    attention = None if case.mode == "write" else Attention(*seen_by)
    active = np.arange(batch) < batch - 1
    if case.mode == "evict":
        return Problem(cache, attention, None, length, np.full(batch, budget), np.full(batch, case.recent), active)
    token = token if case.mode == "write" else Token(*(x.astype(dtype) for x in token))  # the other one is cast
    return Problem(cache, attention, token, length, np.full(batch, budget), np.full(batch, case.recent), active)


def outcome(call, arguments, implementation: Name):
    with somehow(implementation):
        return jax.device_get(jax.jit(partial(call, implementation=implementation))(*arguments))


def verify(case: Case, rng: np.random.Generator, implementation: Name, call=h2o_evict) -> None:
    """Raises AssertionError where an implementation differs from the loop."""
    given = problem(case, rng)
    found, slot = outcome(call, given.arguments, implementation)
    want, chosen = reference.h2o_evict(*given.arguments)
    np.testing.assert_array_equal(slot[given.active], chosen[given.active])
    for name in ("k_pages", "v_pages", "block_tables", "position"):
        np.testing.assert_array_equal(bits(getattr(found, name)), bits(getattr(want, name)), err_msg=name)
    held = want.position >= 0
    np.testing.assert_allclose(found.score[held], want.score[held], atol=SCORE_TOLERANCE, rtol=0)
    idle = ~given.active
    np.testing.assert_array_equal(bits(found.score[idle]), bits(given.cache.score[idle]))
    if case.mode != "evict":
        rows, heads = np.nonzero((slot < held.shape[-1]) & given.active[:, None])
        np.testing.assert_array_equal(found.score[rows, heads, slot[rows, heads]], 0)


def bits(x: Any) -> np.ndarray:
    """So that one NaN equals another, and is not mistaken for another."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
