"""Random inputs that are new in every run: a failing test prints the seed, KVJAX_TEST_SEED=<seed> brings it back."""

import os
import secrets

# A kernel of several threads is as many executions inside one, each of which holds a thread of XLA's pool while it waits for the others:
# with a pool as large as two cores they wait for ever.
os.environ.setdefault("NPROC", "16")

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("KVJAX_TEST_SEED") or secrets.randbits(64))
    print(f"KVJAX_TEST_SEED={seed}")
    return np.random.default_rng(seed)
