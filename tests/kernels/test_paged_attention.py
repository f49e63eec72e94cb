"""Paged decode attention: every implementation through the same cases against the float32 reference.

The Mosaic kernels run in their interpreters on a CPU, with race detection. Inputs are new in every run (conftest.py prints the seed).
"""

import contextlib
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kvjax.kernels import dispatch
from kvjax.kernels.paged_attention import (
    Statistics,
    api,
    dense_attention,
    key_mass,
    mosaic_gpu,
    mosaic_tpu,
    paged_attention,
    pool_dim,
    reference,
)

from kvjax.cache.attention import causal_attention

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")
BEYOND = 10**6  # a page that no pool has


@dataclasses.dataclass(frozen=True)
class Case:
    """Dims as in api.py. `visible`: None, or how many kv heads the mask has, and its type."""

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
# bfloat16 and float16 round the weights and the output; logits and log-sum-exps are float32 sums of products that are exact in float32.
TOLERANCE: dict[Any, Any] = {
    jnp.float32: dict(atol=2e-5, rtol=0),
    jnp.bfloat16: dict(atol=2**-8, rtol=2**-7),
    jnp.float16: dict(atol=2**-11, rtol=2**-10),
}
STATISTICS_TOLERANCE: dict[str, Any] = dict(atol=2e-5, rtol=2e-6)


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
    """Output, logits, log-sum-exps and the mass per slot, each against the reference."""
    out, statistics = got
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), want[0], **TOLERANCE[dtype], err_msg="output")
    np.testing.assert_allclose(statistics.logits, want[1].logits, **STATISTICS_TOLERANCE, err_msg="logits")
    np.testing.assert_allclose(statistics.lse, want[1].lse, **STATISTICS_TOLERANCE, err_msg="log-sum-exp")
    np.testing.assert_allclose(mass(statistics), mass(want[1]), atol=2e-5, rtol=0, err_msg="mass")


mass = jax.jit(key_mass)


@partial(jax.jit, static_argnums=(1, 2, 3))
def call(arrays: dict, scale: float | None, name: dispatch.Name, statistics: bool):
    return paged_attention(**arrays, scale=scale, implementation=name, statistics=statistics)


def padded(args: dict) -> dict:
    """The pool as it is allocated on a TPU."""
    dim = args["k_pages"].shape[-1]
    behind = (*[(0, 0)] * 3, (0, pool_dim(dim, "tpu") - dim))
    return args | {name: np.pad(args[name], behind) for name in ("k_pages", "v_pages")}


def run(name: str, args: dict, statistics: bool = False):
    interpreted = contextlib.nullcontext() if name == "xla" else dispatch.interpreted(name)
    if name == "mosaic_tpu":
        args = padded(args)
    arrays = {key: value for key, value in args.items() if key != "scale"}
    with interpreted:
        return jax.tree.map(np.asarray, call(arrays, args.get("scale"), name, statistics))


def supported(name: str, case: Case) -> bool:
    return name != "mosaic_tpu" or case.dtype != jnp.float16


class TestPagedAttention:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_equals_reference(self, name, case, rng):
        args = arguments(case, rng)
        if not supported(name, case):
            with pytest.raises(dispatch.UnsupportedError, match="queries are float16, not bfloat16 or float32"):
                run(name, args)
            return
        check(run(name, args, statistics=True), expected(args), case.dtype)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_statistics_change_nothing(self, name, rng):
        args = arguments(CASES["tables-a-head"], rng)
        np.testing.assert_allclose(
            np.asarray(run(name, args), np.float32), expected(args)[0], **TOLERANCE[jnp.bfloat16], err_msg="output without statistics"
        )

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_dense_rows_are_pages_with_an_identity_table(self, name, rng):
        shape = (2, 2, 64, 64)
        q = rng.standard_normal((2, 4, 64)).astype(jnp.bfloat16)
        k, v = (rng.integers(-127, 128, shape).astype(np.int8) for _ in "kv")
        scales = {f"{x}_scales": rng.uniform(0.005, 0.02, shape[:3]).astype(np.float32) for x in "kv"}
        args = dict(q=q, k_pages=k, v_pages=v, block_tables=np.arange(2)[:, None], lengths=np.array([64, 19], np.int32), **scales)
        stored = padded(args) if name == "mosaic_tpu" else args
        with contextlib.nullcontext() if name == "xla" else dispatch.interpreted(name):
            attend = jax.jit(partial(dense_attention, implementation=name, statistics=True))
            got = attend(q, stored["k_pages"], stored["v_pages"], args["lengths"], **scales)
        check(got, expected(args), jnp.bfloat16)

    def test_reference_is_attention(self, rng):
        """The reference itself, against the attention that the rest of kvjax is tested against."""
        case = Case((21,), jnp.float32, kv_heads=2, group=3, dim=16)
        args = arguments(case, rng)
        slots = np.arange(21)
        pages = args["block_tables"][0, slots // case.page_size]
        k, v = (args[name][pages, :, slots % case.page_size][None] for name in ("k_pages", "v_pages"))
        q = np.concatenate([np.zeros((1, 20, 6, 16), np.float32), args["q"][:, None]], 1)
        np.testing.assert_allclose(expected(args)[0], jax.jit(causal_attention)(q, k, v)[:, -1], atol=2e-5)


class TestTheTestsCanFail:
    """Wrong arguments stand in for a wrong kernel: each must be noticed in the very comparison the cases go through."""

    @pytest.mark.parametrize("wrong", ["one slot too many", "one slot too few", "pages swapped", "mask ignored", "scale", "values"])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_broken_kernel_is_noticed(self, wrong, dtype, rng):
        case = Case((40, 48), dtype, kv_heads=2, visible=(2, jnp.int32) if wrong == "mask ignored" else None)
        args = arguments(case, rng)
        args |= {
            name: np.nan_to_num(args[name].astype(np.float32), nan=1.0).astype(dtype) for name in ("k_pages", "v_pages")
        }  # a NaN would be too easy
        want = expected(args)
        check(run("xla", args, statistics=True), want, dtype)
        broken = dict(args)
        if wrong == "one slot too many":
            broken["lengths"] = np.array([41, 48], np.int32)
        elif wrong == "one slot too few":
            broken["lengths"] = np.array([40, 47], np.int32)
        elif wrong == "pages swapped":
            broken["block_tables"] = args["block_tables"][::-1]
        elif wrong == "mask ignored":
            del broken["visible"]
        elif wrong == "scale":
            broken["scale"] = case.dim**-0.5 * 1.01
        else:
            broken["v_pages"] = args["v_pages"].copy()
            broken["v_pages"][args["block_tables"][0, 0], 0, 3] *= 2
        with pytest.raises(AssertionError, match=r"output|logits|log-sum-exp|mass"):
            check(run("xla", broken, statistics=True), want, dtype)

    def test_race_is_noticed(self):
        """A copy that nobody waits for: the interpreter that the Mosaic GPU kernels run in must complain."""

        def body(source, target, smem, barrier):
            plgpu.copy_gmem_to_smem(source, smem, barrier)
            target[...] = smem[...]
            plgpu.barrier_wait(barrier)

        kernel = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32), scratch_types=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()])  # fmt: skip # noqa: E501
        with dispatch.interpreted("mosaic_gpu"), pytest.raises(Exception, match=r"(?i)race"):
            jax.block_until_ready(kernel(jnp.ones((64, 64))))
        reset_interpreter()


ARGS = dict(
    q=jnp.zeros((2, 4, 64)), k_pages=jnp.zeros((5, 2, 16, 64)), v_pages=jnp.zeros((5, 2, 16, 64)),
    block_tables=jnp.zeros((2, 2), jnp.int32), lengths=jnp.zeros(2, jnp.int32),
)  # fmt: skip


def reset_interpreter() -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()


class TestArguments:
    """What is refused, and how."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(v_pages=jnp.zeros((5, 2, 16, 32))), "differ"),
            (dict(q=jnp.zeros((2, 4, 128))), "pages are"),
            (dict(q=jnp.zeros((2, 5, 64))), "5 query heads do not fit"),
            (dict(block_tables=jnp.zeros((3, 2), jnp.int32)), "tables are"),
            (dict(block_tables=jnp.zeros((2, 2, 2), jnp.int32)), "do not fit tables"),
            (dict(visible=jnp.zeros((2, 2, 31), bool)), "visible is"),
            (dict(k_scales=jnp.zeros((5, 2, 16)), v_scales=jnp.zeros((5, 2, 16))), "int8 pages come with"),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            paged_attention(**(ARGS | change))

    @pytest.mark.parametrize(
        ("module", "change", "reason"),
        [
            (mosaic_gpu, dict(q=jnp.zeros((2, 4, 256)), k_pages=jnp.zeros((5, 2, 16, 256))), "more registers"),
            (mosaic_gpu, dict(k_pages=jnp.zeros((5, 2, 48, 64))), "page_size=48"),
            (mosaic_gpu, dict(k_pages=jnp.zeros((5, 2, 16, 32))), "head_dim=32"),
            (mosaic_tpu, dict(k_pages=jnp.zeros((5, 2, 48, 128))), "page_size=48"),
            (mosaic_tpu, dict(k_pages=jnp.zeros((5, 2, 16, 64))), "would be copied"),
            (mosaic_tpu, dict(block_tables=jnp.zeros((64, 1, 8192), jnp.int32)), "scalar memory"),
        ],
    )
    def test_kernels_say_what_they_do_not_take(self, module, change, reason):
        args = ARGS | dict(block_tables=jnp.zeros((2, 1, 2), jnp.int32))
        args |= dict(q=jnp.zeros((2, 4, 128)), k_pages=jnp.zeros((5, 2, 16, 128)))
        assert module.supports(**args, scale=1.0) is None
        assert reason in module.supports(**(args | change), scale=1.0)

    def test_page_size_of_dense_rows_must_divide(self):
        with pytest.raises(ValueError, match="does not divide"):
            dense_attention(
                jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 48, 64)), jnp.zeros((1, 1, 48, 64)), jnp.zeros(1, jnp.int32), page_size=32
            )


class TestSplits:
    """How a row is shared out among blocks of a GPU."""

    @pytest.mark.parametrize(
        ("batch", "kv_heads", "capacity", "splits"),
        [(1, 8, 8192, 32), (1, 8, 131072, 33), (32, 8, 8192, 2), (256, 32, 2048, 1), (32, 8, 131072, 32), (1, 1, 64, 1)],
    )
    def test_splits(self, batch, kv_heads, capacity, splits):
        assert mosaic_gpu.tiling(batch, kv_heads, capacity, dim=128, itemsize=2, cores=132).splits == splits

    @pytest.mark.parametrize(("dim", "itemsize"), [(64, 2), (80, 2), (96, 2), (128, 2), (256, 2), (128, 1), (256, 1), (128, 4)])
    def test_stages_fit_shared_memory(self, dim, itemsize):
        stages = mosaic_gpu.tiling(1, 8, 8192, dim, itemsize, 132).stages
        assert 2 <= stages <= 4
        assert stages * 2 * mosaic_gpu.TILE * dim * itemsize <= mosaic_gpu.SHARED_MEMORY - 32 * 1024

    def test_join(self, rng):
        logits, values = rng.standard_normal((1, 1, 4, 2, 5)).astype(np.float32), rng.standard_normal((4, 5, 3)).astype(np.float32)
        logits[0, 0, 1] = reference.NEG_INF  # a split with nothing
        weights = np.where(logits > -1e29, np.exp(logits), 0)
        parts = np.einsum("bhngc,ncd->bhngd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), values)
        lse = np.where(weights.sum(-1) > 0, np.log(np.maximum(weights.sum(-1), 1e-30)), reference.NEG_INF)
        out, joined = mosaic_gpu.join_splits(jnp.asarray(parts), jnp.asarray(lse))
        np.testing.assert_allclose(out, np.einsum("bhngc,ncd->bhgd", weights, values) / weights.sum((2, -1))[..., None], atol=1e-6)
        np.testing.assert_allclose(joined, np.log(weights.sum((2, -1))), atol=1e-6)


def test_operation_prefers_kernels():
    assert [implementation.name for implementation in api.OPERATION.implementations] == ["mosaic_gpu", "mosaic_tpu", "xla"]
