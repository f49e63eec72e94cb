"""What tests of engines share."""

import dataclasses
from collections.abc import Callable

import jax
import pytest

from kvjax.engine import engine as engine_module
from kvjax.models import Model, parameters


@pytest.fixture
def few_programs(monkeypatch):
    """One program for decoding and few for prefill in each engine, since compiling is what takes the time; `monkeypatch.undo()` ends it."""
    bucket = engine_module._bucket
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 32)
    monkeypatch.setattr(engine_module, "SMALLEST_CONTEXT", 256)
    monkeypatch.setattr(engine_module, "_bucket", lambda count, least, most: most if least == 1 else bucket(count, least, most))


@pytest.fixture(scope="module")
def restless(byte_model) -> Callable[..., Model]:
    """Makes models whose random weights are so large that every token of a context changes all that follow; a trained one would fall into
    loops. Takes changes of the configuration."""

    def make(**changes) -> Model:
        config = dataclasses.replace(byte_model.config, tie_embeddings=False, **changes)
        params = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, parameters.random(config))
        params["params"] |= {name: 16 * params["params"][name] for name in ("embed", "lm_head")}
        return Model(config, params, byte_model.tokenizer)

    return make
