"""Small models with random weights, made once."""

import dataclasses
import os
import pathlib
import shutil
import tempfile

# Programs compiled once serve all processes of a run: those of pytest, which inherit this from the first, and those that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / f"kvjax-tests-{os.getpid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

from kvjax.models import BUNDLED, PRESETS, Model, ModelConfig, parameters
from kvjax.models.tokenizer import ByteTokenizer

BYTES = dataclasses.replace(
    BUNDLED["kvjax-1m"], name="bytes", hidden_size=64, intermediate_size=96, num_layers=2, head_dim=16, max_position=256
)
OPT = dataclasses.replace(
    PRESETS["opt-125m"], name="tiny-opt", vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=8, max_position=128, stop_tokens=(),
)  # fmt: skip


def random_model(config: ModelConfig, tokenizer=None) -> Model:
    return Model(config, parameters.random(config), tokenizer)


def pytest_sessionfinish(session) -> None:
    """Removes the compiled programs; the process that started the others does."""
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(session.config, "workerinput") and cache.name == f"kvjax-tests-{os.getpid()}":
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Drops a module's compiled programs behind it: each takes several memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def byte_model() -> Model:
    """Llama-like: RoPE, two query heads a kv head, a byte tokenizer."""
    return random_model(BYTES, ByteTokenizer())


@pytest.fixture(scope="session")
def opt_model() -> Model:
    """OPT-like: learned positions, biases, multi-head attention, no tokenizer."""
    return random_model(OPT)
