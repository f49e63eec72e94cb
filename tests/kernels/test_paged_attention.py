"""Paged decode attention: every implementation through the same cases against the float32 reference.

The Mosaic kernels run in their interpreters on a CPU, with race detection. Inputs are new in every run (conftest.py prints the seed).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kvjax.kernels import dispatch
from kvjax.kernels.paged_attention import api, dense_attention, mosaic_gpu, mosaic_tpu, paged_attention
from kvjax.kernels.paged_attention.base import NEG_INF

from tests.kernels.paged_attention.cases import CASES, Case, arguments, check, expected, padded, run, supported, verify
from tests.kernels.proof import TOLERANCE, somehow

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")


class TestPagedAttention:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_equals_reference(self, name, case, rng):
        if not supported(name, case):
            with pytest.raises(dispatch.UnsupportedError, match="queries are float16, not bfloat16 or float32"):
                verify(case, rng, name)
            return
        verify(case, rng, name)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_statistics_change_nothing(self, name, rng):
        args = arguments(CASES["tables-a-head"], rng)
        np.testing.assert_allclose(
            np.asarray(run(name, args), np.float32), expected(args)[0], **TOLERANCE["bfloat16"], err_msg="output without statistics"
        )

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_dense_rows_are_pages_with_an_identity_table(self, name, rng):
        shape = (2, 2, 64, 64)
        q = rng.standard_normal((2, 4, 64)).astype(jnp.bfloat16)
        k, v = (rng.integers(-127, 128, shape).astype(np.int8) for _ in "kv")
        scales = {f"{x}_scales": rng.uniform(0.005, 0.02, shape[:3]).astype(np.float32) for x in "kv"}
        args = dict(q=q, k_pages=k, v_pages=v, block_tables=np.arange(2)[:, None], lengths=np.array([64, 19], np.int32), **scales)
        stored = padded(args) if name == "mosaic_tpu" else args
        with somehow(name):
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
        np.testing.assert_allclose(expected(args)[0], jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, -1], **TOLERANCE["float32"])


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
        with pytest.raises(AssertionError, match=r"output|logits|log-sum-exp"):
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
        logits[0, 0, 1] = NEG_INF  # a split with nothing
        weights = np.where(logits > -1e29, np.exp(logits), 0)
        parts = np.einsum("bhngc,ncd->bhngd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), values)
        lse = np.where(weights.sum(-1) > 0, np.log(np.maximum(weights.sum(-1), 1e-30)), NEG_INF)
        out, joined = mosaic_gpu.join_splits(jnp.asarray(parts), jnp.asarray(lse))
        np.testing.assert_allclose(out, np.einsum("bhngc,ncd->bhgd", weights, values) / weights.sum((2, -1))[..., None], atol=1e-6)
        np.testing.assert_allclose(joined, np.log(weights.sum((2, -1))), atol=1e-6)


def test_operation_prefers_kernels():
    assert [implementation.name for implementation in api.OPERATION.implementations] == ["mosaic_gpu", "mosaic_tpu", "xla"]
