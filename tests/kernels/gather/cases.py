"""Cases of gathering against the reference, bit for bit: what every implementation has to get right."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.gather import gather_rows

from tests.kernels.gather import reference
from tests.kernels.proof import somehow


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of the pool, elements of a row, rows wanted, type."""

    height: int
    width: int
    count: int
    dtype: Any = jnp.bfloat16


CASES = {
    "one row": Case(5, 64, 1),
    "a token of 128": Case(300, 128, 33),
    "keys and values of 80": Case(40, 160, 64, jnp.float16),
    "float32": Case(40, 96, 65, jnp.float32),
    "int8": Case(40, 256, 64, jnp.int8),
    "pages": Case(9, 2 * 16 * 64, 5),
    "long pages": Case(6, 16 * 640, 4),
}


def arguments(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Any order, some rows twice, numbers on both sides of the pool; rows nobody asks for are NaN, and one that is asked for too."""
    index = rng.integers(0, case.height, case.count).astype(np.int32)
    index[rng.random(case.count) < 0.2] = rng.choice([-1, case.height, case.height + 7, 2**31 - 1, -(2**31)])
    index[0] = rng.integers(0, case.height)
    pool = random_pool(rng, (case.height, case.width), case.dtype)
    if case.dtype != jnp.int8:
        pool[~np.isin(np.arange(case.height), index)] = np.nan
        pool[index[0], ::3] = np.nan
    return pool, index


def random_pool(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    if dtype == jnp.int8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)


def run(implementation: Name, function, *args) -> np.ndarray:
    with somehow(implementation):
        return np.asarray(jax.jit(partial(function, implementation=implementation))(*args))


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def verify(case: Case, rng: np.random.Generator, implementation: Name) -> None:
    """Raises AssertionError where an implementation differs from the reference."""
    given = arguments(case, rng)
    assert_same_bits(run(implementation, gather_rows, *given), reference.gather_rows(*given))
