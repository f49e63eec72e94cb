"""InfiniGen's speculation: every implementation against the loop in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import UnsupportedError
from kvjax.kernels.speculate import mosaic_gpu, speculate

from tests.kernels.speculate import reference
from tests.kernels.speculate.cases import CASES, Case, call, problem, verify

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


class TestSpeculate:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_is_the_loop(self, case, implementation, rng):
        verify(case, rng, implementation)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_logits_of_any_numbers(self, dtype, implementation, rng):
        """The maximum is a logit, to float32; the slots chosen are in its order, to float32."""
        case = Case(dtype=dtype, dim=25, alpha=99, limit=256, heads=1, counts=(256, 100))
        q, keys, visible, cap, always = problem(case, rng)
        q, keys = (rng.normal(size=x.shape).astype(x.dtype) for x in (q, keys))
        found = call(case, (q, keys, visible, cap, always), implementation)
        want = reference.speculate(q, keys, visible, cap, always, case.alpha, case.limit)
        np.testing.assert_allclose(found.maximum, want.maximum, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(found.count, want.count)
        np.testing.assert_array_equal(found.above, want.above)
        for b, h in np.ndindex(found.maximum.shape):
            chosen = found.index[b, h][: found.count[b]]
            logits = reference.guess(q[b, h], keys[b, h])
            assert len(set(chosen)) == len(chosen)
            np.testing.assert_allclose(logits[chosen], np.sort(logits[visible[b, 0]])[::-1][: len(chosen)], atol=2e-5, rtol=0)

    def test_reference_counts_as_the_paper_does(self):
        """By hand: logits 9 8 5 5 1 and 3 0 0 0 0, threshold 4 below: 2 + 0.5 of two heads is (4 + 5) / 2 = 4."""
        logits = np.array([[9, 8, 5, 5, 1], [3, 0, 0, 0, 0]], np.float32)
        arguments = np.ones((1, 2, 1, 1), np.float32), logits[None, :, None], np.ones((1, 1, 5), bool), np.array([9])
        found = reference.speculate(*arguments, None, 4.5, 5)
        assert found.above.tolist() == [[4, 5]]
        assert found.count.tolist() == [4]
        assert found.index.tolist() == [[[0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]]
        assert found.maximum.tolist() == [[9, 3]]

    def test_reference_sets_aside_what_is_always_fetched(self):
        """By hand: without slot 0 the maxima are 8 and 0, with 3 and 4 slots within 4.5; (4 + 5) / 2 = 4 are fetched, slot 0 first."""
        logits = np.array([[9, 8, 5, 5, 1], [3, 0, 0, 0, 0]], np.float32)
        always = np.arange(5) == 0
        found = reference.speculate(
            np.ones((1, 2, 1, 1), np.float32), logits[None, :, None], np.ones((1, 1, 5), bool), np.array([9]), always[None, None], 4.5, 5
        )
        assert found.above.tolist() == [[3, 4]]
        assert found.count.tolist() == [4]
        assert found.index.tolist() == [[[0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]]
        assert found.maximum.tolist() == [[8, 0]]

    @pytest.mark.parametrize(
        ("case", "reason"),
        [(Case(capacity=200), "200 slots, which is no multiple of 128"), (Case(group=17), "17 query heads a kv head are more than 16")],
    )
    def test_kernel_says_what_it_cannot_do(self, case, reason, rng):
        with pytest.raises(UnsupportedError, match=reason):
            verify(case, rng, "mosaic_gpu")
        verify(case, rng, "xla")

    def test_wrong_shapes_are_refused(self, rng):
        q, keys, visible, cap, always = problem(Case(always=3), rng)
        how = dict(alpha=4.0, limit=8)
        with pytest.raises(ValueError, match="does not fit partial keys"):
            speculate(q[..., 1:], keys, visible, cap, **how)
        with pytest.raises(ValueError, match="visible"):
            speculate(q, keys, visible[..., 1:], cap, **how)
        with pytest.raises(ValueError, match="always"):
            speculate(q, keys, visible, cap, always[..., 1:], **how)
        with pytest.raises(ValueError, match="not one number for each of 6 rows"):
            speculate(q, keys, visible, cap[1:], **how)
        for limit in (0, 257):
            with pytest.raises(ValueError, match=f"limit={limit} is not between 1 and the 256 slots of a row"):
                speculate(q, keys, visible, cap, alpha=4.0, limit=limit)


class TestTheTestsCanFail:
    """Each of these is a mistake somebody could make; the cases above must notice."""

    @staticmethod
    def joins_a_group_by_its_first_head(q, *rest, **how):
        return speculate(q[:, :, :1], *rest, **how)

    @staticmethod
    def sees_every_slot(q, keys, visible, *rest, **how):
        return speculate(q, jnp.nan_to_num(keys), visible | True, *rest, **how)

    @staticmethod
    def has_no_cap(q, keys, visible, cap, *rest, **how):
        return speculate(q, keys, visible, cap + 1000, *rest, **how)

    @staticmethod
    def counts_the_threshold_too(*arguments, alpha, **how):
        return speculate(*arguments, alpha=alpha + 0.5, **how)

    @staticmethod
    def prefers_the_higher_slot(q, keys, visible, cap, always, **how):
        found = speculate(q, keys[..., ::-1], visible[..., ::-1], cap, None if always is None else always[..., ::-1], **how)
        return dataclasses.replace(found, index=jnp.where(found.index == keys.shape[-1], keys.shape[-1], keys.shape[-1] - 1 - found.index))

    @staticmethod
    def counts_a_head_at_a_time(*arguments, **how):
        found = speculate(*arguments, **how)
        return dataclasses.replace(found, count=found.above.max(-1))

    @staticmethod
    def fetches_nothing_always(q, keys, visible, cap, always, **how):
        return speculate(q, jnp.nan_to_num(keys), visible, cap, **how)

    @staticmethod
    def leaves_out_what_is_always_fetched(q, keys, visible, cap, always, **how):
        return speculate(q, keys, visible & ~always, cap, **how)

    @staticmethod
    def fetches_what_is_not_there(q, keys, visible, cap, always, **how):
        return speculate(q, keys, visible | always, cap, always, **how)

    SETTING_ASIDE = fetches_nothing_always, leaves_out_what_is_always_fetched, fetches_what_is_not_there

    MUTANTS = (
        joins_a_group_by_its_first_head, sees_every_slot, has_no_cap, counts_the_threshold_too, prefers_the_higher_slot,
        counts_a_head_at_a_time,
    )  # fmt: skip

    @pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
    def test_mistake_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify(Case(heads=4, limit=200), rng, "xla", mutant)

    @staticmethod
    def takes_the_highest_head(q, keys, visible, cap, always, **how):
        return speculate(q, keys, visible, cap, always, **how | {"group": "max"})

    @pytest.mark.parametrize("mutant", [*SETTING_ASIDE, takes_the_highest_head], ids=lambda mutant: mutant.__name__)
    def test_mistake_with_masses_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify(Case(heads=4, limit=200, always=40, join="mass", alpha=15.0), rng, "xla", mutant)

    @pytest.mark.parametrize("mutant", SETTING_ASIDE, ids=lambda mutant: mutant.__name__)
    def test_mistake_with_what_is_always_fetched_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify(Case(heads=4, limit=200, always=40), rng, "xla", mutant)

    def test_a_maximum_of_one_block_is_noticed(self, rng, monkeypatch):
        guess = mosaic_gpu._guess

        def one_block(*arguments):
            logits, maximum = guess(*arguments)
            return logits, maximum.min(-1, keepdims=True)

        monkeypatch.setattr(mosaic_gpu, "_guess", one_block)
        with pytest.raises(AssertionError):
            verify(Case(capacity=640, counts=(640,), heads=2), rng, "mosaic_gpu")
