"""The host at the wheel: it fetches what the one-program transfers fetch, bit for bit, and decodes what they decode."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import generate, load_model, score
from kvjax.cache import Ahead, parse_strategy
from kvjax.calibrate import Calibration, calibrate, calibrated
from kvjax.host_driven import _append
from kvjax.models import Model
from kvjax.sampling import Sampling

SPECS = [
    "h2o(heavy=8,recent=8)",
    "infinigen(alpha=4,partial=0.3,budget=0.3,pool=60,victim=lru)",
]


@pytest.fixture(scope="module")
def trained() -> Model:
    return load_model("kvjax-1m", dtype="float32")


@pytest.fixture(scope="module")
def calibration(trained) -> Calibration:
    return calibrate(trained)


@pytest.mark.parametrize("spec", SPECS)
def test_driven_decodes_what_one_program_decodes(trained, calibration, spec):
    rng = np.random.default_rng()
    prompts = [rng.integers(32, 120, length) for length in (120, 77, 5)]
    rows = rng.integers(32, 120, (2, 90))
    found = {}
    for transfer in ("jit", "driven"):
        strategy = parse_strategy(spec, "host", transfer=transfer)
        model = calibrated(trained, strategy, calibration)
        result = generate(model, prompts, strategy=strategy, max_new_tokens=12, stop_tokens=(), steps_per_call=4)
        logits = np.asarray(score(model, rows, prompt_len=60, strategy=strategy))
        found[transfer] = (result.tokens, logits, result.ledger)
    (tokens, logits, books), (driven_tokens, driven_logits, driven_books) = found["jit"], found["driven"]
    assert driven_tokens == tokens
    np.testing.assert_allclose(driven_logits, logits, atol=3e-5)
    assert driven_books.record() == {**books.record(), "kv_transient_bytes": driven_books.transient}


def test_sampling_and_stop_tokens_are_those_of_one_program(trained):
    prompts = [list(b"import os\n"), list(b"def f(x):\n")]
    found = []
    for transfer in ("jit", "driven"):
        strategy = parse_strategy("full", "host", transfer=transfer)
        found.append(
            generate(
                trained, prompts, strategy=strategy, max_new_tokens=30, sampling=Sampling(0.8), seed=3, stop_tokens=tuple(b" \n")
            ).tokens
        )
    assert found[0] == found[1]
    assert any(row[-1] in b" \n" and len(row) < 30 for row in found[0]), "a stop token ended a row"


def test_only_active_rows_enter_the_pool():
    rng = np.random.default_rng()
    pool = tuple(np.zeros((3, 2, 5, 4), np.float32) for _ in range(2))
    new = jnp.asarray(rng.standard_normal((3, 2, 1, 4)), jnp.float32)
    outgoing = Ahead(jnp.asarray([[[1], [2]], [[0], [0]], [[4], [3]]], jnp.int32), new, 2 * new, jnp.zeros(3))
    _append(pool, outgoing, jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(pool[0][0, 1, 2], new[0, 1, 0])
    np.testing.assert_array_equal(pool[1][2, 0, 4], 2 * new[2, 0, 0])
    assert not pool[0][1].any()
    assert np.count_nonzero(pool[0].any(-1)) == 4
