"""Orbax checkpoints of a model: a directory with the parameters and, as JSON inside, the configuration they belong to."""

import dataclasses
import enum
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from kvjax.errors import ModelError, SpecError
from kvjax.models import parameters
from kvjax.models.config import Activation, FactorScaling, LinearScaling, Llama3Scaling, ModelConfig, Norm, Rope

MARKER_FILE = "_CHECKPOINT_METADATA"  # orbax writes it into every finished checkpoint
_SCALINGS = {"llama3": Llama3Scaling, "linear": LinearScaling, "factors": FactorScaling}


def save(path: str | os.PathLike, config: ModelConfig, params: parameters.Parameters) -> None:
    """Writes `config` and `params`, in the dtype they have, to a new directory; a guide that calibration has added is left out.

    Raises:
      ModelError: `path` exists already.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ModelError(f"{path} exists already; a checkpoint is written to a new directory")
    model = {"config": config_to_json(config), "dtype": params["params"]["embed"].dtype.name}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(model=ocp.args.JsonSave(model), params=ocp.args.StandardSave({"params": params["params"]}))
        checkpointer.save(path, args=items)


def restore(
    path: str | os.PathLike, dtype: DTypeLike | None = None, sharding: parameters.Sharding | None = None
) -> tuple[ModelConfig, parameters.Parameters]:
    """What `save` wrote.

    Args:
      dtype: what the parameters are cast to; None keeps the stored one.
      sharding: parameter path to placement; None for the default device.

    Raises:
      ModelError: not a checkpoint, one that kvjax did not write, or a damaged one.
    """
    path = pathlib.Path(path).absolute()
    config, stored = read_config(path)
    wanted = parameters.abstract(config, stored if dtype is None else dtype, sharding)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            restored = checkpointer.restore(path, args=ocp.args.Composite(params=ocp.args.StandardRestore(wanted)))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            raise ModelError(f"{path}: the parameters cannot be restored: {_first_line(error)}") from None
    return config, restored.params


def read_config(path: str | os.PathLike) -> tuple[ModelConfig, jnp.dtype]:
    """The configuration in a checkpoint and the dtype of its parameters. Raises ModelError as `restore`."""
    path = pathlib.Path(path).absolute()
    if not (path / MARKER_FILE).exists():
        raise ModelError(f"{path} is not an orbax checkpoint: it has no {MARKER_FILE}")
    if not (path / "model").is_dir() or not (path / "params").is_dir():
        raise ModelError(f"{path} is an orbax checkpoint, but not of a kvjax model: it needs the items model and params")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            model = checkpointer.restore(path, args=ocp.args.Composite(model=ocp.args.JsonRestore())).model
            return config_from_json(model["config"]), jnp.dtype(model["dtype"])
        except Exception as error:  # as above, and whatever a broken configuration gives
            raise ModelError(f"{path}: the configuration cannot be read: {_first_line(error)}") from None


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """`config` as values that JSON knows; `config_from_json` reads it back."""
    values = {key: value.value if isinstance(value, enum.Enum) else value for key, value in dataclasses.asdict(config).items()}
    if config.rope is not None and config.rope.scaling is not None:
        kind = next(name for name, scaling in _SCALINGS.items() if isinstance(config.rope.scaling, scaling))
        values["rope"]["scaling"] = {"kind": kind} | values["rope"]["scaling"]
    return json.loads(json.dumps(values))


def config_from_json(values: dict[str, Any]) -> ModelConfig:
    """The configuration `config_to_json` described. Raises SpecError for a missing, unknown or impossible value."""
    try:
        rope = values["rope"]
        if rope is not None:
            scaling = {key: tuple(value) if isinstance(value, list) else value for key, value in (rope["scaling"] or {}).items()}
            rope = Rope(rope["theta"], _SCALINGS[str(scaling.pop("kind"))](**scaling) if scaling else None)
        special = {
            "norm": Norm(values["norm"]),
            "activation": Activation(values["activation"]),
            "rope": rope,
            "stop_tokens": tuple(values["stop_tokens"]),
        }
        return ModelConfig(**(values | special))
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"not a model configuration: {type(error).__name__}: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
