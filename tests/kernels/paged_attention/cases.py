"""Cases of paged decode attention against the float32 reference: what every implementation has to get right."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels import dispatch
from kvjax.kernels.paged_attention import Statistics, paged_attention, pool_dim

from tests.kernels.paged_attention import reference
from tests.kernels.proof import TOLERANCE, somehow

BEYOND = 10**6  # a page that no pool has


@dataclasses.dataclass(frozen=True)
class Case:
    """Dims as in kernels/paged_attention/api.py. `visible`: None, or how many kv heads the mask has, and its type."""

    lengths: tuple[int, ...]
    dtype: Any = jnp.bfloat16
    kv_heads: int = 1
    group: int = 4
    dim: int = 64
    page_size: int = 16
    pages: int = 3
    int8: bool = False
    visible: tuple[int, Any] | None = None
    tables_a_head: bool = False
    scale: float | None = None

    @property
    def capacity(self) -> int:
        return self.pages * self.page_size


def ragged(page_size: int, pages: int) -> tuple[int, ...]:
    return (0, 1, page_size - 1, page_size, page_size + 1, pages * page_size)


CASES = {
    "lengths": Case(ragged(16, 5), pages=5),
    "lengths-f32": Case(ragged(32, 3), jnp.float32, group=1, dim=80, page_size=32),
    "lengths-f16": Case(ragged(64, 2), jnp.float16, group=2, dim=96, page_size=64, pages=2, scale=0.3),
    "wide-heads": Case((70,), group=1, dim=256, page_size=64, pages=2),
    "splits": Case((1090, 300), pages=18, page_size=64, group=3),
    "positions-a-head": Case((256, 200), kv_heads=2, dim=128, page_size=128, pages=2, visible=(2, jnp.int32)),
    "mask-of-all-heads": Case((40, 64, 0), jnp.float32, kv_heads=2, group=2, page_size=32, pages=2, visible=(1, jnp.bool_)),
    "int8": Case((33, 64), int8=True, group=9, dim=128, page_size=32, pages=2),
    "int8-positions": Case((64,), int8=True, kv_heads=2, dim=80, page_size=64, pages=1, visible=(2, jnp.int32)),
    "tables-a-head": Case((17, 40), kv_heads=2, group=1, page_size=32, pages=1, tables_a_head=True),
}
STATISTICS_TOLERANCE: dict[str, Any] = dict(atol=2e-5, rtol=2e-6)
"""Of logits and log-sum-exps, whatever the type: float32 sums of products that are exact in float32."""


def arguments(case: Case, rng: np.random.Generator) -> dict:
    """A pool in which every row's pages lie anywhere; NaN (or the largest int8, and NaN scales) in all that is not to be read."""
    batch, page_heads, table_heads = len(case.lengths), *((1, case.kv_heads) if case.tables_a_head else (case.kv_heads, 1))
    num_pages = batch * table_heads * case.pages + 2
    tables = rng.permutation(num_pages)[: num_pages - 2].reshape(batch, table_heads, case.pages).astype(np.int32)
    seen = np.broadcast_to(np.arange(case.capacity) < np.array(case.lengths)[:, None, None], (batch, case.kv_heads, case.capacity))
    result: dict[str, Any] = {}
    if case.visible is not None:
        heads, dtype = case.visible
        shown = rng.random((batch, heads, case.capacity)) < 0.6
        shown[0, 0, : case.capacity // 2] = False  # whole tiles with nothing to see
        seen = seen & shown
        result["visible"] = np.asarray(shown if dtype == jnp.bool_ else np.where(shown, rng.integers(0, 9999, shown.shape), -1), dtype)
    used = np.zeros((num_pages, page_heads, case.page_size), bool)
    for row in range(batch):
        for head in range(case.kv_heads):
            table = tables[row, head // page_heads]
            used[table, head % page_heads] = seen[row, head].reshape(case.pages, case.page_size)
        tables[row, :, -(-case.lengths[row] // case.page_size) :] = BEYOND
    shape = (*used.shape, case.dim)
    for name in ("k", "v"):
        if case.int8:
            values = rng.integers(-127, 128, shape)
            result[f"{name}_pages"] = np.asarray(np.where(used[..., None], values, 127), jnp.int8)
            result[f"{name}_scales"] = np.asarray(np.where(used, rng.uniform(0.005, 0.02, used.shape), np.nan), jnp.float32)
        else:
            result[f"{name}_pages"] = np.asarray(np.where(used[..., None], rng.standard_normal(shape), np.nan), case.dtype)
    result["q"] = np.asarray(rng.standard_normal((batch, case.kv_heads * case.group, case.dim)), case.dtype)
    result["block_tables"] = np.asarray(tables if case.tables_a_head else tables[:, 0])
    result["lengths"] = np.asarray(case.lengths, jnp.int32)
    return result | ({} if case.scale is None else dict(scale=case.scale))


def expected(args: dict) -> tuple[np.ndarray, Statistics]:
    args = dict(args)
    tables = args.pop("block_tables")
    scale = args.pop("scale", args["q"].shape[-1] ** -0.5)
    tables = tables[:, None] if tables.ndim == 2 else tables
    out, logits, lse = reference.paged_attention(block_tables=tables, scale=scale, statistics=True, **args)
    return out, Statistics(logits, lse)


def check(got, want, dtype) -> None:
    """Output, logits and log-sum-exps, each against the reference."""
    out, statistics = got
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), want[0], **TOLERANCE[jnp.dtype(dtype).name], err_msg="output")
    np.testing.assert_allclose(statistics.logits, want[1].logits, **STATISTICS_TOLERANCE, err_msg="logits")
    np.testing.assert_allclose(statistics.lse, want[1].lse, **STATISTICS_TOLERANCE, err_msg="log-sum-exp")


@partial(jax.jit, static_argnums=(1, 2, 3))
def call(arrays: dict, scale: float | None, name: dispatch.Name, statistics: bool):
    return paged_attention(**arrays, scale=scale, implementation=name, statistics=statistics)


def padded(args: dict) -> dict:
    """The pool as it is allocated on a TPU."""
    dim = args["k_pages"].shape[-1]
    behind = (*[(0, 0)] * 3, (0, pool_dim(dim, "tpu") - dim))
    return args | {name: np.pad(args[name], behind) for name in ("k_pages", "v_pages")}


def run(name: dispatch.Name, args: dict, statistics: bool = False):
    """Output, and Statistics where asked for, as NumPy arrays."""
    if name == "mosaic_tpu":
        args = padded(args)
    arrays = {key: value for key, value in args.items() if key != "scale"}
    with somehow(name):
        return jax.tree.map(np.asarray, call(arrays, args.get("scale"), name, statistics))


def supported(name: str, case: Case) -> bool:
    return name != "mosaic_tpu" or case.dtype != jnp.float16


def verify(case: Case, rng: np.random.Generator, implementation: dispatch.Name) -> None:
    """Raises AssertionError where an implementation differs from the reference."""
    args = arguments(case, rng)
    check(run(implementation, args, statistics=True), expected(args), case.dtype)
