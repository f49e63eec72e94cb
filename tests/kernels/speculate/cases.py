"""Cases of speculation against the loop in NumPy: what every implementation has to get right.

Queries and partial keys are small whole numbers: their products are exact in any order of addition and any of the dtypes, so counts,
indices and ties must come out the same to the last one, and there are many ties.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.speculate import speculate
from kvjax.kernels.speculate.base import GroupJoin, Speculation

from tests.kernels.proof import somehow
from tests.kernels.speculate import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of which some have the first slots visible, or any."""

    capacity: int = 256
    heads: int = 2
    group: int = 2
    dim: int = 11
    counts: tuple[int, ...] = (0, 1, 127, 128, 129, 256)
    dtype: str = "bfloat16"
    limit: int = 64
    alpha: float = 20.0
    shared: bool = True  # which slots are visible is the same for all kv heads
    scattered: bool = False
    join: GroupJoin = "max"
    always: int = 0  # slots of a row that are fetched whatever the guess, some of them not visible

    def __str__(self):
        where = f"{'scattered' if self.scattered else 'first'}{'' if self.shared else '-a-head'}"
        fixed = f"-always{self.always}" if self.always else ""
        join = "" if self.join == "max" else f"-{self.join}"
        return f"c{self.capacity}-{self.heads}h-g{self.group}-d{self.dim}-{self.dtype}-a{self.alpha}-k{self.limit}-{where}{fixed}{join}"


CASES = [
    Case(),
    Case(scattered=True, shared=False, capacity=640, counts=(511, 512, 513)),
    Case(group=1, heads=3, dim=8, dtype="float16", alpha=0.5, counts=(255, 256)),  # one or two over the threshold
    Case(group=5, dim=19, dtype="float32", capacity=1024, limit=1024, alpha=99.5, counts=(1024, 600)),  # everything is
    Case(limit=1, alpha=4.5, counts=(1, 200)),
    Case(dim=38, group=4, heads=1, counts=(200,)),
    Case(always=20),
    Case(always=70, alpha=6.5, shared=False, scattered=True, counts=(0, 1, 50, 256)),  # more than the limit
    Case(join="mass", alpha=15.0, group=3, always=20, scattered=True),
    Case(join="mass", alpha=9.0, group=1, dtype="float32", shared=False, limit=256),
]


def problem(case: Case, rng: np.random.Generator):
    """NaN in slots that are not visible, or always fetched."""
    counts = np.array(case.counts)
    shape = (len(counts), case.heads)
    visible = np.arange(case.capacity) < counts[:, None, None]
    visible = np.array(np.broadcast_to(visible, (len(counts), 1 if case.shared else case.heads, case.capacity)))
    if case.scattered:
        visible = rng.permuted(visible, axis=-1)
        visible[1:] &= rng.random(visible[1:].shape) < 0.9
    q = rng.integers(-3, 4, (*shape, case.group, case.dim)).astype(case.dtype)
    keys = rng.integers(-4, 5, (*shape, case.dim, case.capacity)).astype(jnp.dtype(case.dtype))
    keys[np.broadcast_to(~visible[:, :, None], keys.shape)] = np.nan
    cap = np.where(np.arange(len(counts)) % 2, rng.integers(1, 9, len(counts)), case.limit + 3)  # one that matters, one that does not
    always = None
    if case.always:
        always = rng.permuted(np.broadcast_to(np.arange(case.capacity) < case.always, visible.shape), axis=-1)
        if case.join == "max":
            keys[np.broadcast_to(always[:, :, None], keys.shape)] = np.nan
    return q, keys, visible, cap.astype(np.int32), always


def call(case: Case, arguments, implementation: Name, function=speculate) -> Speculation:
    with somehow(implementation):
        how: Any = dict(alpha=case.alpha, limit=case.limit, group=case.join, implementation=implementation)
        return jax.device_get(jax.jit(partial(function, **how))(*arguments))


def verify_masses(case: Case, arguments, found: Speculation, want: Speculation, margin: float = 1e-4) -> None:
    """`verify` where softmax rounds: a slot whose mass is this close to the threshold or to another's may be on either side."""
    q, keys, visible, cap, always = arguments
    np.testing.assert_allclose(found.maximum, want.maximum, atol=margin, rtol=0)
    for b in range(len(q)):
        fixed, masses = [], []
        for h in range(case.heads):
            seen = visible[b, h % visible.shape[1]]
            aside = seen & (always[b, h % always.shape[1]] if always is not None else False)
            mass = np.full(case.capacity, -np.inf)
            mass[seen] = reference.log_mass(q[b, h], keys[b, h][:, seen])
            mass[aside] = -np.inf
            assert (mass > margin - case.alpha).sum() <= found.above[b, h] <= (mass > -margin - case.alpha).sum()
            fixed.append(np.flatnonzero(aside))
            masses.append(mass)
        total = (int(found.above[b].sum()) + sum(map(len, fixed))) // case.heads
        assert found.count[b] == (max(1, min(total, cap[b], case.limit)) if visible[b].any() else 0)
        for h in range(case.heads):
            chosen, rest = np.split(found.index[b, h][: found.count[b]], [len(fixed[h])])
            np.testing.assert_array_equal(chosen, fixed[h][: len(chosen)])
            assert (found.index[b, h][found.count[b] :] == case.capacity).all()
            rest = rest[rest < case.capacity]
            assert len(set(rest)) == len(rest) == min(max(found.count[b] - len(fixed[h]), 0), np.isfinite(masses[h]).sum())
            best = np.sort(masses[h])[::-1][: len(rest)]
            np.testing.assert_allclose(masses[h][rest], best, atol=margin, rtol=0)


def verify(case: Case, rng: np.random.Generator, implementation: Name, function=speculate) -> None:
    """Raises AssertionError where an implementation differs from the loop."""
    arguments = problem(case, rng)
    found = call(case, arguments, implementation, function)
    q, keys, visible, cap, always = arguments
    want: Any = reference.speculate(q, keys, visible, cap, always, case.alpha, case.limit, case.join)
    if case.join == "mass":
        verify_masses(case, arguments, found, want)
        return
    for name in (field.name for field in dataclasses.fields(Speculation)):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(want, name).dtype
