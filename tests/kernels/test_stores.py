"""Whole models over the kernels themselves, in their interpreters, beside the same models on the stores of a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels import dispatch
from kvjax.kernels.attention import Mask, Observe, attention
from kvjax.kernels.prefill_attention import mosaic_gpu

from kvjax import score
from kvjax.cache import CacheShape, dense, parse_strategy
from kvjax.generation import as_strategy, run_prefill
from kvjax.models import BUNDLED, Model, ModelConfig, parameters
from tests.kernels.prefill_attention.cases import MASS_TOLERANCE, WARPGROUPS
from tests.kernels.proof import TOLERANCE

TINY = dataclasses.replace(
    BUNDLED["kvjax-1m"], name="tiny", vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=64, max_position=128,
)  # fmt: skip
PROMPT, STEPS = 20, 4


def random_model(config: ModelConfig, dtype: str = "float32") -> Model:
    return Model(config, parameters.random(config, dtype=dtype), None)


@pytest.mark.parametrize(
    ("spec", "page_size", "kernel"),
    [
        ("h2o(heavy=8,recent=8)", None, "mosaic_gpu"),
        ("h2o(heavy=8,recent=8)+paged", 16, "mosaic_gpu"),
        ("vllm", 64, "mosaic_gpu"),
        ("h2o(heavy=8,recent=8)+paged", 64, "mosaic_tpu"),
    ],
)
def test_steps_have_the_logits_of_a_cpu(spec, page_size, kernel, rng):
    """Two rows, and for h2o an eviction in every step."""
    model, strategy = random_model(TINY), parse_strategy(spec, page_size=page_size)
    tokens = rng.integers(0, TINY.vocab_size, (2, PROMPT + STEPS))
    want = np.asarray(score(model, tokens, prompt_len=PROMPT, strategy=strategy))
    with dispatch.interpreted(kernel):
        assert as_strategy(strategy).store.platform == kernel[-3:]
        got = np.asarray(score(model, tokens, prompt_len=PROMPT, strategy=strategy))
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of the interpreter's size; the number of threads of a block is the same for all kernels that it runs."""
    monkeypatch.setattr(mosaic_gpu, "config_for", lambda *sizes: mosaic_gpu.Config(warpgroups=WARPGROUPS, queries=64, stages=2))
    monkeypatch.setattr(mosaic_gpu, "MASKED", 32)


@pytest.mark.usefixtures("small_tiles")
def test_prompt_is_that_of_a_cpu(rng):
    """Attention and column mass on tensor cores, in float16: what is kept, its scores, and the logits."""
    model, strategy = random_model(TINY, "float16"), parse_strategy("h2o(heavy=8,recent=8)")
    tokens, lengths = rng.integers(0, TINY.vocab_size, (2, 24)).astype(np.int32), np.array([24, 19], np.int32)
    want, expected = run_prefill(model, strategy, tokens, lengths, 2)
    with dispatch.interpreted("mosaic_gpu", threads=WARPGROUPS):
        got, found = run_prefill(model, as_strategy(strategy), tokens, lengths, 2)
    (one,), (other,) = expected.layers, found.layers
    slots = one.position.shape[-1]
    np.testing.assert_array_equal(other.position[..., :slots], one.position)
    held = np.asarray(one.position) >= 0
    scores, wanted = np.asarray(other.own)[..., :slots][held], np.asarray(one.own)[held]
    np.testing.assert_allclose(scores, wanted, rtol=MASS_TOLERANCE, atol=MASS_TOLERANCE)
    np.testing.assert_allclose(got, want, **TOLERANCE["float16"])


@pytest.mark.usefixtures("small_tiles")
def test_chunk_of_a_prompt_is_that_of_a_cpu(rng):
    """Behind tokens that the store holds: its output and the mass that all keys receive."""
    shape = CacheShape(1, 1, 2, 64, jnp.dtype(jnp.float16))
    start, valid = jnp.array([16, 11]), jnp.arange(8) < jnp.array([8, 3])[:, None]
    q, k, v = (jnp.asarray(rng.standard_normal((2, 24, heads, 64)), jnp.float16) for heads in (2, 1, 1))

    def chunk(store):
        length = start + valid.sum(-1)
        held = jnp.arange(24) < length[:, None]
        pool = store.init(shape, 2, 40).filled(None, k, v, held)
        mask = Mask(start[:, None] + jnp.arange(8), length=length, counted=valid)
        attend = jax.jit(lambda pool, q: attention(q, pool.keys(None, 24), mask, observe=[Observe()]))
        found = attend(pool, q[:, :8])
        return np.where(valid[..., None, None], found.out, 0).astype(np.float32), np.where(held[:, None], found.observed[0], 0)

    want, mass = chunk(dense())
    with dispatch.interpreted("mosaic_gpu", threads=WARPGROUPS):
        got, found = chunk(dense().on("gpu"))
    np.testing.assert_allclose(got, want, **TOLERANCE["float16"])
    np.testing.assert_allclose(found, mass, rtol=MASS_TOLERANCE, atol=MASS_TOLERANCE)
