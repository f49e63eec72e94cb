"""Hugging Face directories, read and written without torch: safetensors weights beside the config.json of hugging_face_config."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from kvjax.errors import ModelError
from kvjax.models import parameters
from kvjax.models.config import ModelConfig
from kvjax.models.hugging_face_config import CONFIG_FILE, llama_values, read_config, read_json

__all__ = ["CONFIG_FILE", "load_parameters", "read_config", "save_directory"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family calls its tensors: our module (or parameter) to theirs, outside and inside the layers."""

    outside: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]

    def __call__(self, path: parameters.Path) -> str:
        """The checkpoint's name of one parameter: ("layer_0", "attention", "q", "bias") -> "model.layers.0.self_attn.q_proj.bias"."""
        if path[0].startswith("layer_"):
            table, inner, prefix = self.inside, path[1:], f"{self.layers}.{path[0].removeprefix('layer_')}."
        else:
            table, inner, prefix = self.outside, path, ""
        whole, module = "/".join(inner), "/".join(inner[:-1])
        if whole in table:
            return f"{prefix}{table[whole]}.weight"
        return f"{prefix}{table[module]}.{'bias' if inner[-1] == 'bias' else 'weight'}"


_LLAMA_NAMES = Names(
    outside={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
    },
    layers="model.layers",
    inside={
        "attention_norm": "input_layernorm",
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/o": "self_attn.o_proj",
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    },
)
_OPT_NAMES = Names(
    outside={
        "embed": "model.decoder.embed_tokens",
        "embed_positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "final_norm": "model.decoder.final_layer_norm",
        "lm_head": "lm_head",
    },
    layers="model.decoder.layers",
    inside={
        "attention_norm": "self_attn_layer_norm",
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp/up": "fc1",
        "mlp/down": "fc2",
    },
)


def _names(config: ModelConfig) -> Names:
    return _OPT_NAMES if config.rope is None else _LLAMA_NAMES


def load_parameters(
    path: str | os.PathLike, config: ModelConfig, dtype: DTypeLike, sharding: parameters.Sharding | None = None
) -> parameters.Parameters:
    """The weights of a Hugging Face directory as the parameters of `Decoder(config, dtype)`.

    Tensors are read one after the other, each cast to `dtype` on the host and put in its place before the next is touched.

    Args:
      path: a directory with model.safetensors, or model.safetensors.index.json and the shards it lists.
      sharding: parameter path to placement; None for the default device.

    Raises:
      ModelError: no weights, or only pickles; a file that is missing, corrupt or outside the directory; a tensor that is missing,
        unknown, not of a float type, or of the wrong shape.
    """
    path = pathlib.Path(path)
    names = _names(config)
    wanted = parameters.abstract(config, dtype, sharding)
    with contextlib.ExitStack() as stack:
        tensors = _open_weights(path, stack)
        used = {name: _stored_name(path, tensors, name) for name in _names_of(names, wanted)}
        _refuse_unknown(path, config, tensors, set(used.values()))

        def read(at: parameters.Path, want: jax.ShapeDtypeStruct) -> jax.Array:
            name = used[names(at)]
            array = tensors[name].read(name, want.shape)
            return jax.device_put(array.astype(want.dtype, copy=False), want.sharding)

        return parameters.map_with_path(read, wanted)


@dataclasses.dataclass(frozen=True)
class _WeightFile:
    """An open safetensors file."""

    path: pathlib.Path
    handle: Any

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, in the dtype it is stored in."""
        stored = self.handle.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ModelError(f"{self.path}: {name} has shape {list(stored.get_shape())}, but config.json needs {list(shape)}")
        if stored.get_dtype() not in _WEIGHT_DTYPES:
            raise ModelError(f"{self.path}: {name} is {stored.get_dtype()}; supported: {', '.join(_WEIGHT_DTYPES)}")
        return self.handle.get_tensor(name)


def _open_weights(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _WeightFile]:
    """Every tensor's name and the file that holds it."""
    if (path / WEIGHTS_FILE).exists():
        file = _open_file(path / WEIGHTS_FILE, stack)
        return dict.fromkeys(file.handle.keys(), file)
    if not (path / INDEX_FILE).exists():
        raise ModelError(_no_weights(path))
    index = path / INDEX_FILE
    located = read_json(index).get("weight_map")
    if not isinstance(located, dict) or not all(isinstance(shard, str) for shard in located.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to file names")
    files = {}
    for shard in dict.fromkeys(located.values()):
        if pathlib.PurePath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: {shard!r} is not the name of a .safetensors file in this directory")
        files[shard] = _open_file(path / shard, stack)
        held = set(files[shard].handle.keys())
        if absent := [name for name, at in located.items() if at == shard and name not in held]:
            raise ModelError(f"{path / shard}: tensor {absent[0]} is missing, although {INDEX_FILE} places it there")
    return {name: files[shard] for name, shard in located.items()}


def _open_file(file: pathlib.Path, stack: contextlib.ExitStack) -> _WeightFile:
    try:
        return _WeightFile(file, stack.enter_context(safetensors.safe_open(file, framework="numpy")))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist, although {INDEX_FILE} lists it") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from None


def _no_weights(path: pathlib.Path) -> str:
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES):
        return f"{path} has pickled weights only ({pickles[0]}), which can run code when opened; convert them to safetensors"
    return f"{path} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}"


def _names_of(names: Names, tree: parameters.Parameters) -> list[str]:
    return jax.tree.leaves(parameters.map_with_path(lambda at, leaf: names(at), tree))


def _stored_name(path: pathlib.Path, tensors: Mapping[str, _WeightFile], name: str) -> str:
    """`name` as this checkpoint spells it: some OPT checkpoints were saved without the outer "model."."""
    for spelling in (name, name.removeprefix("model.")):
        if spelling in tensors:
            return spelling
    raise ModelError(f"{path}: tensor {name} is missing")


def _refuse_unknown(path: pathlib.Path, config: ModelConfig, tensors: Mapping[str, _WeightFile], used: set[str]) -> None:
    """Extra tensors mean another model, except old buffers and a tied head that repeats the embedding."""
    unknown = [name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and "lm_head.weight" in unknown:
        unknown.remove("lm_head.weight")
        embed = _stored_name(path, tensors, _names(config)(("embed",)))
        shape = (config.vocab_size, config.embedding_size or config.hidden_size)
        if not np.array_equal(tensors[embed].read(embed, shape), tensors["lm_head.weight"].read("lm_head.weight", shape)):
            raise ModelError(f"{path}: lm_head.weight differs from {embed}, but config.json ties them (tie_word_embeddings)")
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ModelError(f"{path}: tensor {unknown[0]}{more} has no place in the model that config.json describes")


def save_directory(path: str | os.PathLike, config: ModelConfig, params: parameters.Parameters, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes config.json and model.safetensors (as `dtype`) that `read_config`, `load_parameters` and transformers load as Llama.

    Raises:
      ModelError: the configuration is not a plain Llama: RMS norm before each block, rotary positions, gated SiLU, no biases.
    """
    path = pathlib.Path(path)
    values = llama_values(config, jnp.dtype(dtype))
    names = _names(config)
    tensors: dict[str, np.ndarray] = {}

    def collect(at: parameters.Path, leaf: jax.Array) -> None:
        tensors[names(at)] = np.ascontiguousarray(np.asarray(leaf).astype(dtype))

    parameters.map_with_path(collect, params)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
