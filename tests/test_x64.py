"""JAX_ENABLE_X64 is a setting of the user's other programs: kvjax computes the same under it."""

import contextlib

import jax
import numpy as np
import pytest

from kvjax import Engine, Sampling, calibrated, generate, parse_strategy

PROMPTS = [list(range(40)), list(range(50, 70))]
SPECS = (
    "streaming(sinks=2,window=20)",
    "h2o(heavy=8,recent=8)",
    "h2o(heavy=0.2,recent=0.2)+paged",
    "vllm",
    "oracle_topk(k=0.3)",
    "infinigen",
)
FURTHER = ("vllm", "oracle_topk(k=0.3)", "infinigen")


def cells(specs) -> list:
    return [pytest.param(spec, marks=[pytest.mark.slow] if spec in FURTHER else []) for spec in specs]


def twice(compute) -> tuple[object, object]:
    """What is computed as it is by default, and with 64-bit types enabled."""
    results = []
    for setting in (contextlib.nullcontext(), jax.enable_x64(True)):
        with setting:
            results.append(compute())
    return results[0], results[1]


@pytest.mark.parametrize("spec", cells(SPECS))
def test_generated_tokens(byte_model, spec):
    model = calibrated(byte_model, parse_strategy(spec)) if spec == "infinigen" else byte_model
    sampling = Sampling(1.0, 20, 0.9)
    narrow, wide = twice(
        lambda: generate(model, PROMPTS, strategy=spec, max_new_tokens=8, stop_tokens=[], sampling=sampling, seed=1).tokens
    )
    assert narrow == wide


@pytest.mark.parametrize("spec", cells(("full", "h2o(heavy=8,recent=8)", *FURTHER)))
def test_served_tokens(byte_model, spec):
    model = calibrated(byte_model, parse_strategy(spec)) if spec == "infinigen" else byte_model

    def serve() -> list[list[int]]:
        engine = Engine(model, spec, kv_memory="4MiB", max_num_seqs=1, max_model_len=64, prefill_chunk=32, sampling=Sampling(1.0))
        return [list(engine.stream(np.array(prompt), max_tokens=6, stop_tokens=[])) for prompt in PROMPTS]

    narrow, wide = twice(serve)
    assert narrow == wide
