"""Prefill attention with log-sum-exp, and column mass: every implementation against every score at once in NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.attention import Mask, Observe, attention, tokens
from kvjax.kernels.dispatch import UnsupportedError
from kvjax.kernels.prefill_attention import api, column_mass, mosaic_gpu, mosaic_tpu, prefill_attention, xla
from kvjax.kernels.prefill_attention.mosaic_gpu import Config

from tests.kernels.prefill_attention import reference
from tests.kernels.prefill_attention.cases import (
    BLOCK,
    CASES,
    EXACT,
    MASS_TOLERANCE,
    WARPGROUPS,
    Case,
    Problem,
    call,
    problem,
    verify_attention,
    verify_mass,
)

SMALL = Config(warpgroups=WARPGROUPS, queries=64, stages=2)
assert SMALL.keys == BLOCK


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles for problems of the interpreter's size, so that they have several of them; those for a card are tried once below."""
    monkeypatch.setattr(mosaic_gpu, "config_for", lambda *sizes: SMALL)
    monkeypatch.setattr(mosaic_gpu, "MASKED", 32)
    monkeypatch.setattr(mosaic_tpu, "BLOCK_Q", 128)
    monkeypatch.setattr(mosaic_tpu, "BLOCK_K", 128)
    monkeypatch.setattr(xla, "BLOCK_Q", 64)
    monkeypatch.setattr(xla, "BLOCK_K", 96)


@pytest.mark.usefixtures("small_tiles")
class TestPrefillAttention:
    @pytest.mark.parametrize("case", CASES + EXACT, ids=str)
    def test_xla(self, case, rng):
        verify_attention(case, rng, "xla")

    @pytest.mark.parametrize("case", [*CASES[:-1], dataclasses.replace(CASES[-1], dim=64)], ids=str)
    def test_mosaic_gpu(self, case, rng):
        verify_attention(case, rng, "mosaic_gpu")

    @pytest.mark.parametrize(
        ("case", "reason"),
        [
            (Case(counts=(8,), dtype="float32"), "tensor cores take bfloat16 or float16, these are float32 and float32"),
            (Case(counts=(8,), dim=72), "head dim 72 is neither 64 nor 128"),
            (Case(counts=(8,), dim=256), "head dim 256 is neither 64 nor 128"),
        ],
    )
    def test_kernel_says_what_it_cannot_do(self, case, reason, rng):
        with pytest.raises(UnsupportedError, match=reason):
            verify_attention(case, rng, "mosaic_gpu")

    def test_wrong_shapes_are_refused(self):
        q, k, start = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16)), jnp.zeros(2, jnp.int32)
        for arguments, message in [
            ((q, k[:1], k[:1], start, start), "do not fit together"),
            ((q[:, :, :3], k, k, start, start), "3 query heads are no multiple of 2 kv heads"),
            ((q, k, k, start[:1], start), "not one number for each of 2 rows"),
            ((q, k, k[:, 1:], start, start), "differ in shape"),
        ]:
            with pytest.raises(ValueError, match=message):
                prefill_attention(*arguments)
        with pytest.raises(ValueError, match="lse"):
            column_mass(q, k, jnp.zeros((2, 8, 4)), start, start)


@pytest.mark.usefixtures("small_tiles")
class TestColumnMass:
    @pytest.mark.parametrize("case", CASES + EXACT, ids=str)
    def test_xla(self, case, rng):
        verify_mass(case, rng, "xla")

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_mosaic_gpu(self, case, rng):
        verify_mass(case, rng, "mosaic_gpu")

    @pytest.mark.parametrize("case", [*CASES[:-1], *EXACT], ids=str)
    def test_mosaic_tpu(self, case, rng):
        verify_mass(case, rng, "mosaic_tpu")

    @pytest.mark.parametrize("config", mosaic_gpu.CONFIGS[::2], ids=str)
    def test_tiles_for_a_card(self, config, rng, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "config_for", lambda *sizes: config)
        monkeypatch.setattr(mosaic_gpu, "MASKED", 16)
        verify_mass(Case(counts=(260,), kv_heads=1, group=1, dim=128), rng, "mosaic_gpu")

    def test_is_the_score_of_a_prompt(self, rng):
        """What H2O's policy is given of a prompt where no kernel runs."""
        given = problem(Case(counts=(150, 40), dtype="float32"), rng)
        library = jax.jit(lambda q, k, v, counts: attention(q, tokens(k, v), Mask(counted=counts), observe=[Observe()]).observed)
        q, k, v = (np.nan_to_num(x) for x in (given.q, given.k, given.v))
        (want,) = library(q, k, v, given.counts)
        _, lse = call(prefill_attention, "xla", given.q, given.k, given.v, given.start, given.count)
        mass = call(column_mass, "xla", given.q, given.k, lse, given.start, given.count)
        np.testing.assert_allclose(mass, want, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)

    def test_chunks_add_up(self, rng):
        given = problem(Case(counts=(200,), kv_heads=1, dtype="float32"), rng)
        whole = reference.column_mass(given.q, given.k, *_sums(given), given.start, given.count)
        total = np.zeros_like(whole)
        attend, add = (jax.jit(partial(function, implementation="xla")) for function in (prefill_attention, column_mass))
        for first, last in ((0, 90), (90, 91), (91, 200)):
            q = np.pad(given.q[:, first:last], ((0, 0), (0, 110 - (last - first)), (0, 0), (0, 0)), constant_values=np.nan)
            where = np.array([first]), np.array([last - first])
            total += add(q, given.k, attend(q, given.k, given.v, *where)[1], *where)
        np.testing.assert_allclose(total, whole, atol=MASS_TOLERANCE, rtol=MASS_TOLERANCE)

    @pytest.mark.parametrize("function", ["prefill_attention", "column_mass"])
    def test_nothing_as_large_as_the_scores(self, function):
        """Twice the prompt, twice the scratch memory, not four times; and far less than the scores."""
        temporary = []
        for size in (2048, 4096):
            q, k = (jax.ShapeDtypeStruct((1, size, heads, 32), jnp.float32) for heads in (4, 2))
            lse, row = jax.ShapeDtypeStruct((1, 4, size), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
            arguments = (q, k, k, row, row) if function == "prefill_attention" else (q, k, lse, row, row)
            compiled = jax.jit(partial(getattr(api, function), implementation="xla")).lower(*arguments).compile()
            temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        assert temporary[1] < 2.1 * temporary[0]
        assert temporary[1] < 4 * 4096**2 * 4 / 8


def _sums(given: Problem):
    return (reference.prefill_attention(given.q, given.k, given.v, given.start, given.count)[1],)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "length", "dim", "want"),
    [
        (1, 8, 8192, 128, Config(4, 128, 3)),  # 256 blocks of 256 keys
        (1, 40, 2048, 128, Config(4, 128, 3)),
        (4, 8, 2048, 128, Config(4, 128, 3)),
        (2, 8, 2048, 128, Config(2, 128, 3)),  # 128 blocks of 256 keys would leave 4 of 132 multiprocessors idle
        (1, 8, 2048, 128, Config(1, 128, 2)),
        (1, 8, 512, 128, Config(1, 128, 2)),  # there are no 132 blocks
        (1, 8, 8192, 256, Config(2, 128, 2)),  # the ones before it do not fit
    ],
)
def test_tiles_are_as_large_as_the_card_stays_busy(batch, kv_heads, length, dim, want):
    assert mosaic_gpu.config_for(batch, kv_heads, length, dim, cores=132) == want
    assert want.shared_memory(dim) <= mosaic_gpu.SHARED_MEMORY


class TestTheTestsCanFail:
    """Each of these is a mistake somebody could make; the cases above must notice."""

    @staticmethod
    def uses_an_lse_in_bfloat16(operation, q, k, lse, start, count, **how):
        return operation(q, k, lse.astype(jnp.bfloat16).astype(jnp.float32), start, count, **how)

    @staticmethod
    def sees_the_next_token(operation, q, k, x, start, count, **how):
        return operation(q, k, x, start + 1, count, **how)

    @staticmethod
    def forgets_the_last_query(operation, q, k, x, start, count, **how):
        return operation(q, k, x, start, count - 1, **how)

    @staticmethod
    def takes_one_head_of_the_group(operation, q, k, lse, start, count, **how):
        return operation(q[:, :, ::2], k, lse[:, ::2], start, count, **how)

    @staticmethod
    def forgets_the_scale(operation, q, k, x, start, count, scale, **how):
        return operation(q, k, x, start, count, **how)

    @staticmethod
    def answers_four_percent_too_much(operation, q, k, v, start, count, **how):
        out, lse = operation(q, k, v, start, count, **how)
        return (1.04 * out.astype(jnp.float32)).astype(out.dtype), lse

    BOTH = (sees_the_next_token, forgets_the_last_query, forgets_the_scale)
    OF_MASS = (*BOTH, uses_an_lse_in_bfloat16, takes_one_head_of_the_group)

    @pytest.mark.parametrize("mutant", OF_MASS, ids=lambda mutant: mutant.__name__)
    def test_mistake_in_mass_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify_mass(Case(counts=(100, 80), scale=0.2), rng, "xla", partial(mutant, column_mass))

    @pytest.mark.parametrize("mutant", BOTH, ids=lambda mutant: mutant.__name__)
    def test_mistake_in_attention_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify_attention(Case(counts=(100, 80), scale=0.2), rng, "xla", partial(mutant, prefill_attention))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_small_error_in_small_outputs_is_noticed(self, dtype, rng):
        """Behind two hundred tokens, where attention averages most of the values away."""
        case = Case(counts=(40,), starts=(200,), scale=0.05, dtype=dtype)
        verify_attention(case, rng, "xla")
        with pytest.raises(AssertionError, match="output"):
            verify_attention(case, rng, "xla", partial(self.answers_four_percent_too_much, prefill_attention))

    @pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
    def test_a_diagonal_one_off_is_noticed(self, implementation, rng, monkeypatch, small_tiles):
        """In the kernels themselves: their masks think that a row begins one token later than it does."""
        module = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}[implementation]
        original = module._column_mass

        def shifted(*refs, **how):
            class Later:
                def __init__(self, ref):
                    self.ref = ref

                def __getitem__(self, at):
                    return self.ref[at] + (1 if implementation == "mosaic_tpu" or at[1] == 0 else 0)

            place = 3 if implementation == "mosaic_gpu" else 0
            return original(*refs[:place], Later(refs[place]), *refs[place + 1 :], **how)

        monkeypatch.setattr(module, "_column_mass", shifted)
        with pytest.raises(AssertionError):
            verify_mass(Case(counts=(200,), kv_heads=1), rng, implementation)
