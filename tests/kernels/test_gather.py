"""Gathering: every implementation through the same cases against the reference, bit for bit; the Mosaic GPU kernel interpreted on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels import dispatch
from kvjax.kernels.gather import gather_pages, gather_rows, gather_tokens, mosaic_gpu

from tests.kernels.gather import reference
from tests.kernels.gather.cases import CASES, assert_same_bits, random_pool, run, verify

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


class TestGather:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_equals_reference(self, name, case, rng):
        verify(case, rng, name)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_tokens(self, name, rng):
        pool = random_pool(rng, (2, 3, 20, 64), jnp.bfloat16)
        slots = rng.integers(-1, 22, (2, 3, 7)).astype(np.int32)
        want = np.zeros((2, 3, 7, 64), pool.dtype)
        for row, head, place in np.ndindex(slots.shape):
            if 0 <= slots[row, head, place] < 20:
                want[row, head, place] = pool[row, head, slots[row, head, place]]
        assert_same_bits(run(name, gather_tokens, pool, slots), want)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_pages(self, name, rng):
        pages = random_pool(rng, (6, 2, 16, 64), jnp.bfloat16)
        numbers = np.array([[5, 0, 6], [0, -1, 3]], np.int32)
        want = np.concatenate([pages, np.zeros_like(pages[:1])])[np.where((numbers < 0) | (numbers > 5), 6, numbers)]
        assert_same_bits(run(name, gather_pages, pages, numbers), want)

    def test_wrong_row_is_noticed(self, rng):
        pool, index = random_pool(rng, (9, 64), jnp.bfloat16), np.array([3, 4], np.int32)
        with pytest.raises(AssertionError):
            assert_same_bits(run("xla", gather_rows, pool, index + 1), reference.gather_rows(pool, index))


@pytest.mark.parametrize(
    ("width", "itemsize", "shape"), [(128, 2, (1, 128)), (160, 2, (1, 160)), (2048, 2, (8, 256)), (10240, 2, (8, 256)), (96, 4, (1, 96))]
)
def test_transfers_divide_a_row(width, itemsize, shape):
    assert mosaic_gpu.transfer_shape(width, itemsize) == shape


def test_what_is_refused():
    with pytest.raises(ValueError, match="a pool is"):
        gather_rows(jnp.zeros(3), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="a pool is"):
        gather_rows(jnp.zeros((3, 4)), jnp.zeros(2))
    with pytest.raises(ValueError, match="slots"):
        gather_tokens(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 2, 1), jnp.int32))
    with dispatch.interpreted("mosaic_gpu"), pytest.raises(dispatch.UnsupportedError, match="rows of 6 bytes are not a multiple of 16"):
        gather_rows(jnp.zeros((4, 3), jnp.bfloat16), jnp.zeros(2, jnp.int32), implementation="mosaic_gpu")
    assert "nothing to copy" in (mosaic_gpu.supports(jnp.zeros((4, 8)), jnp.zeros(0, jnp.int32)) or "")
