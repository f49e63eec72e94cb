"""Compiled programs: kept on disk by the command lines, shared between similar lengths."""

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import kvjax
from kvjax import compilation
from kvjax.generation import bucket, unrolled_prefill, unrolled_steps

SETTINGS = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)  # fmt: skip


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """JAX as a command line finds it, with a cache folder of its own; its settings are put back."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    if "compilation_cache" not in flags.FLAGS:
        compilation.define_flag()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    yield tmp_path / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_by_default(cached):
    compilation.apply_flag()
    assert jax.config.jax_compilation_cache_dir == str(cached)
    assert cached.is_dir()


def test_the_flag_turns_it_off(cached):
    with flagsaver.flagsaver(compilation_cache=False):
        compilation.apply_flag()
    assert not jax.config.jax_enable_compilation_cache
    assert not cached.exists()


def test_a_folder_of_the_users_own_stays(cached, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation.apply_flag()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_where_nothing_can_be_written_nothing_is_kept(cached):
    cached.parent.joinpath("compiled").write_text("a file in the way")
    compilation.apply_flag()
    assert jax.config.jax_compilation_cache_dir is None


def test_buckets_hold_the_length_and_little_more():
    sizes = {length: bucket(length) for length in range(1, 9000)}
    assert all(size >= length and size % 16 == 0 for length, size in sizes.items())
    assert all(size - length < max(16, length / 8) for length, size in sizes.items())
    assert len({sizes[length] for length in range(4097, 8193)}) == 8
    assert [sizes[length] for length in (1, 64, 952, 1024, 1025)] == [16, 64, 960, 1024, 1152]


@pytest.mark.parametrize("spec", ["full", "h2o(heavy=0.2,recent=0.2)"])
def test_prompts_of_similar_lengths_share_programs_and_keep_their_tokens(byte_model, spec):
    prompts = [np.random.default_rng(length).integers(0, 256, length) for length in (33, 40, 48)]
    compiled = []
    for prompt in prompts:
        result = kvjax.generate(byte_model, [prompt], strategy=spec, max_new_tokens=5, steps_per_call=4)
        exact = np.concatenate([one.tokens for one in kvjax.stream(byte_model, [prompt], strategy=spec, max_new_tokens=5)], axis=1)
        assert result.tokens == exact.tolist()
        compiled.append((unrolled_prefill._cache_size(), unrolled_steps._cache_size()))
    grown = np.diff(compiled, axis=0)
    assert (grown <= 1).all(), "the exact lengths take a program each, the rounded ones none after the first"


def test_generate_fills_the_model_to_its_last_position(byte_model):
    prompt = np.random.default_rng(0).integers(0, 256, byte_model.config.max_position - 7)
    assert len(kvjax.generate(byte_model, [prompt], max_new_tokens=7).tokens[0]) == 7
