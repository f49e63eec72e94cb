"""Random inputs that are new in every run: a failing test prints the seed, KVJAX_TEST_SEED=<seed> brings it back."""

import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("KVJAX_TEST_SEED") or secrets.randbits(64))
    print(f"KVJAX_TEST_SEED={seed}")
    return np.random.default_rng(seed)
