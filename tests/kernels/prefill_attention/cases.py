"""Cases of prefill attention with log-sum-exp, and of column mass, against every score at once in NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.prefill_attention import column_mass, prefill_attention

from tests.kernels.prefill_attention import reference
from tests.kernels.proof import TOLERANCE, somehow

LSE_TOLERANCE = 2e-5  # whatever the dtype: products of bfloat16 and float16 are exact in float32
MASS_TOLERANCE = 2e-5  # of a key's mass, relative; and absolute, for keys that receive nothing
WARPGROUPS = 2
"""Of a block of a Mosaic GPU kernel, in its interpreter."""

BLOCK = 128
"""Keys of an interpreted block, and queries and keys of attention's: one less, it, one more are the lengths to try."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `counts` queries that begin at `starts`, in arrays with room for `queries` and `keys`."""

    counts: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    queries: int = 0
    keys: int = 0
    kv_heads: int = 2
    group: int = 2
    dim: int = 64
    dtype: str = "bfloat16"
    scale: float | None = None

    def __str__(self):
        counts, starts = ("_".join(map(str, numbers)) for numbers in (self.counts, self.starts))
        return f"{counts}-from{starts}-{self.kv_heads}h-g{self.group}-d{self.dim}-{self.dtype}"


CASES = [
    Case(counts=(0, 1, 63, 64, 65), kv_heads=1, group=1),
    Case(counts=(BLOCK - 1, BLOCK, BLOCK + 1), kv_heads=1, group=1, dim=128),
    Case(counts=(140,), kv_heads=1, group=3, scale=0.05),
    Case(counts=(70, 3), starts=(100, 129), queries=80, keys=200, kv_heads=1),  # chunks
    Case(counts=(70,), kv_heads=2, group=1, dim=80, dtype="float16"),
]
EXACT = [
    Case(counts=(130, 1, 0), kv_heads=1, group=3, dim=48, dtype="float32"),
    Case(counts=(60, 170), starts=(200, 7), queries=170, keys=270, kv_heads=1, dtype="float32"),
]


@dataclasses.dataclass
class Problem:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    start: np.ndarray
    count: np.ndarray
    scale: float | None

    @property
    def counts(self):
        return np.arange(self.q.shape[1]) < self.count[:, None]


def problem(case: Case, rng: np.random.Generator) -> Problem:
    """NaN wherever nothing counts."""
    batch, dtype = len(case.counts), jnp.dtype(case.dtype)
    count, start = np.array(case.counts, np.int32), np.broadcast_to(np.array(case.starts, np.int32), (batch,))
    size, length = case.queries or max(case.counts), case.keys or int((start + count).max())
    heads = (case.kv_heads * case.group, case.kv_heads, case.kv_heads)
    sizes = (size, length, length)
    q, k, v = (rng.normal(size=(batch, n, h, case.dim)).astype(dtype) for n, h in zip(sizes, heads, strict=True))
    q *= dtype.type(2)  # so that attention has favourites
    for b in range(batch):
        q[b, count[b] :] = np.nan
        k[b, start[b] + count[b] :] = np.nan
        v[b, start[b] + count[b] :] = np.nan
    return Problem(q, k, v, start, count, case.scale)


def call(function, implementation: Name, *arguments, **options):
    """Jitted."""
    with somehow(implementation, threads=WARPGROUPS if implementation == "mosaic_gpu" else 1):
        return jax.device_get(jax.jit(partial(function, implementation=implementation, **options))(*arguments))


def verify_attention(case: Case, rng: np.random.Generator, implementation: Name, function=prefill_attention) -> None:
    """Raises AssertionError where an implementation differs from the reference."""
    given = problem(case, rng)
    out, lse = call(function, implementation, given.q, given.k, given.v, given.start, given.count, scale=given.scale)
    want, sums = reference.prefill_attention(given.q, given.k, given.v, given.start, given.count, given.scale)
    assert out.dtype == given.q.dtype
    assert lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float32), want, **TOLERANCE[case.dtype], err_msg="output")
    np.testing.assert_array_equal(out[~given.counts], 0)
    np.testing.assert_allclose(lse, sums, atol=LSE_TOLERANCE, rtol=1e-6)


def verify_mass(case: Case, rng: np.random.Generator, implementation: Name, function=column_mass) -> None:
    """Raises AssertionError where an implementation differs from the reference, or probabilities do not add up."""
    given = problem(case, rng)
    _, lse = reference.prefill_attention(given.q, given.k, given.v, given.start, given.count, given.scale)
    lse = np.where(given.counts[:, None], lse, np.nan).astype(np.float32)
    mass = call(function, implementation, given.q, given.k, lse, given.start, given.count, scale=given.scale)
    want = reference.column_mass(given.q, given.k, lse, given.start, given.count, given.scale)
    assert mass.dtype == np.float32
    np.testing.assert_allclose(mass, want, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)
    np.testing.assert_allclose(mass.sum((1, 2)), given.count * given.q.shape[2], rtol=1e-4)  # probabilities of a query add up to one
