"""Gathering: every implementation through the same cases against the reference, bit for bit; the Mosaic GPU kernel interpreted on a CPU."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels import dispatch
from kvjax.kernels.gather import gather_pages, gather_rows, gather_tokens, mosaic_gpu, reference

IMPLEMENTATIONS = ("xla", "mosaic_gpu")
CASES = {  # rows of the pool, elements of a row, rows wanted, type
    "one row": (5, 64, 1, jnp.bfloat16),
    "a token of 128": (300, 128, 33, jnp.bfloat16),
    "keys and values of 80": (40, 160, 64, jnp.float16),
    "float32": (40, 96, 65, jnp.float32),
    "int8": (40, 256, 64, jnp.int8),
    "pages": (9, 2 * 16 * 64, 5, jnp.bfloat16),
    "long pages": (6, 16 * 640, 4, jnp.bfloat16),
}


def run(name: str, function, *args):
    with contextlib.nullcontext() if name == "xla" else dispatch.interpreted(name):
        return np.asarray(jax.jit(partial(function, implementation=name))(*args))


def random_pool(rng, shape, dtype) -> np.ndarray:
    if dtype == jnp.int8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)


def assert_same_bits(got, want) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


class TestGather:
    @pytest.mark.parametrize(("height", "width", "count", "dtype"), CASES.values(), ids=CASES)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_equals_reference(self, name, height, width, count, dtype, rng):
        """Any order, some rows twice, numbers on both sides of the pool; rows nobody asks for are NaN, and one that is asked for too."""
        index = rng.integers(0, height, count).astype(np.int32)
        index[rng.random(count) < 0.2] = rng.choice([-1, height, height + 7, 2**31 - 1, -(2**31)])
        index[0] = rng.integers(0, height)
        pool = random_pool(rng, (height, width), dtype)
        if dtype != jnp.int8:
            pool[~np.isin(np.arange(height), index)] = np.nan
            pool[index[0], ::3] = np.nan
        assert_same_bits(run(name, gather_rows, pool, index), reference.gather_rows(pool, index))

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
