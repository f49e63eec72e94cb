"""Cases of speculation against the loop in NumPy: what every implementation has to get right.

Queries and partial keys are small whole numbers: their products are exact in any order of addition and any of the dtypes, so counts,
indices and ties must come out the same to the last one, and there are many ties.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..dispatch import Name
from ..proof import somehow
from . import reference
from .api import speculate
from .base import Speculation


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
    always: int = 0  # slots of a row that are fetched whatever the guess, some of them not visible

    def __str__(self):
        where = f"{'scattered' if self.scattered else 'first'}{'' if self.shared else '-a-head'}"
        fixed = f"-always{self.always}" if self.always else ""
        return f"c{self.capacity}-{self.heads}h-g{self.group}-d{self.dim}-{self.dtype}-a{self.alpha}-k{self.limit}-{where}{fixed}"


CASES = [
    Case(),
    Case(scattered=True, shared=False, capacity=640, counts=(511, 512, 513)),
    Case(group=1, heads=3, dim=8, dtype="float16", alpha=0.5, counts=(255, 256)),  # one or two over the threshold
    Case(group=5, dim=19, dtype="float32", capacity=1024, limit=1024, alpha=99.5, counts=(1024, 600)),  # everything is
    Case(limit=1, alpha=4.5, counts=(1, 200)),
    Case(dim=38, group=4, heads=1, counts=(200,)),
    Case(always=20),
    Case(always=70, alpha=6.5, shared=False, scattered=True, counts=(0, 1, 50, 256)),  # more than the limit
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
        keys[np.broadcast_to(always[:, :, None], keys.shape)] = np.nan
    return q, keys, visible, cap.astype(np.int32), always


def call(case: Case, arguments, implementation: Name, function=speculate) -> Speculation:
    with somehow(implementation):
        return jax.device_get(jax.jit(partial(function, alpha=case.alpha, limit=case.limit, implementation=implementation))(*arguments))


def verify(case: Case, rng: np.random.Generator, implementation: Name, function=speculate) -> None:
    """Raises AssertionError where an implementation differs from the loop."""
    arguments = problem(case, rng)
    found = call(case, arguments, implementation, function)
    want = reference.speculate(*arguments, case.alpha, case.limit)
    for name in (field.name for field in dataclasses.fields(Speculation)):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(want, name).dtype
