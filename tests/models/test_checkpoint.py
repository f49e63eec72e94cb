"""Orbax checkpoints: what goes in comes out, and what is not one is refused."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kvjax.errors import ModelError, SpecError
from kvjax.models import checkpoint, parameters
from kvjax.models.config import BUNDLED, PRESETS
from kvjax.models.hugging_face import load_parameters, read_config

PARITY = pathlib.Path(__file__).parent.parent / "fixtures" / "parity"


@pytest.fixture
def written(tmp_path):
    """A checkpoint of the post-norm OPT fixture: (path, config, params)."""
    case = PARITY / "opt_post_norm_projected"
    config = read_config(case)
    params = load_parameters(case, config, jnp.float32)
    checkpoint.save(tmp_path / "checkpoint", config, params)
    return tmp_path / "checkpoint", config, params


def test_round_trip(written):
    path, config, params = written
    restored_config, restored = checkpoint.restore(path)
    assert restored_config == config
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {jnp.dtype(jnp.float32)}


def test_restore_to_another_dtype_and_placement(written):
    path, _, params = written
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    _, restored = checkpoint.restore(path, jnp.bfloat16, lambda at: rows if at == ("embed",) else None)
    jax.tree.map(lambda got, full: np.testing.assert_array_equal(got, full.astype(jnp.bfloat16)), restored, params)
    assert restored["params"]["embed"].sharding == rows


def test_bfloat16_stays_bfloat16(tmp_path):
    config = dataclasses.replace(BUNDLED["kvjax-1m"], num_layers=1, hidden_size=32, intermediate_size=32)
    params = parameters.random(config, jnp.bfloat16)
    checkpoint.save(tmp_path / "model", config, params | {"guide": {"layer_0": jnp.ones(3)}})  # what calibration adds stays out
    _, restored = checkpoint.restore(tmp_path / "model")
    assert restored["params"]["embed"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize("name", [*BUNDLED, *PRESETS])
def test_configurations_survive_json(name):
    config = (BUNDLED | PRESETS)[name]
    assert checkpoint.config_from_json(checkpoint.config_to_json(config)) == config


@pytest.mark.parametrize("change", [{"norm": "batch"}, {"colour": 1}, {"rope": {"theta": 1.0, "scaling": {"kind": "yarn"}}}])
def test_unknown_values_in_a_configuration(change):
    values = checkpoint.config_to_json(BUNDLED["kvjax-1m"]) | change
    with pytest.raises(SpecError, match="not a model configuration"):
        checkpoint.config_from_json(values)


def test_existing_directory_is_not_overwritten(written):
    path, config, params = written
    with pytest.raises(ModelError, match="exists already"):
        checkpoint.save(path, config, params)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_not_a_checkpoint(tmp_path, make):
    make(tmp_path / "other")
    with pytest.raises(ModelError, match="other is not an orbax checkpoint: it has no _CHECKPOINT_METADATA"):
        checkpoint.restore(tmp_path / "other")


def test_checkpoint_of_something_else(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other", {"weights": np.ones(3)})
    with pytest.raises(ModelError, match="other is an orbax checkpoint, but not of a kvjax model"):
        checkpoint.restore(tmp_path / "other")


def test_damaged_configuration(written):
    path = written[0]
    next(file for file in (path / "model").iterdir() if file.name == "metadata").write_text("{")
    with pytest.raises(ModelError, match="the configuration cannot be read") as error:
        checkpoint.restore(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab_size": 64}, "Requested shape"), ({"num_layers": 3}, "tree structures do not match")],
    ids=["shape", "layers"],
)
def test_parameters_that_do_not_fit_the_configuration(written, tmp_path, change, message):
    _, config, params = written
    checkpoint.save(tmp_path / "misfit", dataclasses.replace(config, **change), params)
    with pytest.raises(ModelError, match=f"misfit: the parameters cannot be restored: .*{message}") as error:
        checkpoint.restore(tmp_path / "misfit")
    assert "\n" not in str(error.value)
