"""GGUF files as models: architectures llama, mistral, qwen2 and qwen3, dequantised in NumPy one tensor at a time.

Two things differ from a Hugging Face directory. The files of llama and mistral pair neighbouring columns for the rotary
embedding, where Hugging Face (and kvjax) pairs the halves of a head: rows of q and k, and their biases, are put back in
that order. And scaled rotary frequencies may come as a tensor of divisors. What cannot be computed exactly as the file
means it is refused (ModelError).
"""

import collections
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from kvjax.errors import ModelError, SpecError, clipped
from kvjax.models import parameters
from kvjax.models.config import FactorScaling, LinearScaling, ModelConfig, Rope
from kvjax.models.gguf_file import MAGIC, GgufFile, TensorInfo, read_header
from kvjax.models.hugging_face import Names
from kvjax.models.hugging_face_config import Settings
from kvjax.models.source import Source

_NEIGHBOURS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
"""Architecture to whether its files pair neighbouring columns for the rotary embedding."""
_QKV_BIAS, _QK_NORM = ("qwen2",), ("qwen3",)
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MAX_POSITION = 2**31 - 1

_NAMES = Names(
    outside={"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"},
    layers="blk",
    inside={
        "attention_norm": "attn_norm",
        "attention/q": "attn_q",
        "attention/k": "attn_k",
        "attention/v": "attn_v",
        "attention/o": "attn_output",
        "attention/q_norm": "attn_q_norm",
        "attention/k_norm": "attn_k_norm",
        "mlp_norm": "ffn_norm",
        "mlp/gate": "ffn_gate",
        "mlp/up": "ffn_up",
        "mlp/down": "ffn_down",
    },
)

_READ_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
"""Keys of an architecture that are read here, or that follow from others."""
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "pooling_type": 0, "attention.causal": True, "use_parallel_residual": False,
    "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0, "rope.scaling.attn_factor": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}  # fmt: skip
"""Keys that change what is computed, and the value that does not."""


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a file begins as GGUF files do. Raises ModelError for one that cannot be opened."""
    try:
        with open(path, "rb") as handle:
            return handle.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def read_config(file: GgufFile) -> ModelConfig:
    """The configuration that a file's metadata and tensors describe, under the file's name without its suffix.

    Stop tokens are those that the tokenizer's metadata calls end of sequence, of turn or of message.

    Raises:
      ModelError: metadata that is missing, contradicts the tensors, or asks for something kvjax does not compute.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in tuple(_NEIGHBOURS):
        raise file.error(f"architecture {architecture!r} is not supported; supported: {', '.join(_NEIGHBOURS)}")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise file.error(f"it holds no model, but general.type={kind!r}")
    if file.metadata.get("split.count", 1) != 1:
        raise file.error(f"it is one of {file.metadata['split.count']} parts; join them first (llama.cpp: llama-gguf-split --merge)")
    settings = _settings(file, architecture)
    layers, hidden, heads = (settings.integer(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    head_dim = _head_dim(settings, hidden, heads)
    max_position = settings.integer("context_length")
    if max_position > _MAX_POSITION:
        raise settings.error(f"context_length={max_position} is more than kvjax can count")
    if settings.values.get("attention.sliding_window") is not None:
        window = settings.integer("attention.sliding_window")
        if window < max_position:
            raise settings.error(f"a sliding window of {window} tokens, less than the context of {max_position}, is not supported")
    try:
        config = ModelConfig(
            name=pathlib.Path(file.path).stem,
            vocab_size=_tensor(file, _EMBEDDING).shape[0],
            hidden_size=hidden,
            intermediate_size=settings.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=settings.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position=max_position,
            norm_eps=_short(settings.number("attention.layer_norm_rms_epsilon")),
            rope=_rope(file, settings, head_dim),
            qkv_bias=architecture in _QKV_BIAS or "blk.0.attn_q.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_up.bias" in file.tensors,
            qk_norm=architecture in _QK_NORM,
            tie_embeddings=_HEAD not in file.tensors,
            stop_tokens=_stop_tokens(file),
        )
    except SpecError as error:
        raise file.error(str(error)) from None
    _check_shapes(file, config)
    return config


def source(file: GgufFile) -> Source:
    """The type that holds most of the weights, and the licence that the metadata names."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in file.tensors.values():
        sizes[tensor.kind] += tensor.num_elements
    license = file.metadata.get("general.license")
    return Source(sizes.most_common(1)[0][0], clipped(" ".join(license.split()), 60) if isinstance(license, str) else None)


def load_parameters(
    file: GgufFile, config: ModelConfig, dtype: DTypeLike, sharding: parameters.Sharding | None = None
) -> parameters.Parameters:
    """The weights of a file as the parameters of `Decoder(config, dtype)`.

    Tensors are dequantised one after the other, straight into `dtype`, and each is put in its place before the next is
    touched.

    Args:
      sharding: parameter path to placement; None for the default device.

    Raises:
      ModelError: a tensor that is missing, unknown, of the wrong shape, or of a type that cannot be dequantised.
    """
    tree = parameters.abstract(config, dtype, sharding)
    names = set(jax.tree.leaves(parameters.map_with_path(lambda at, leaf: _NAMES(at), tree))) | {_ROPE_FACTORS}
    if unknown := [name for name in file.tensors if name not in names]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise file.error(f"tensor {unknown[0]!r}{more} has no place in the model that the metadata describe")
    neighbours = _NEIGHBOURS[file.metadata["general.architecture"]]

    def check(at: parameters.Path, leaf: jax.ShapeDtypeStruct) -> None:
        tensor = _tensor(file, _NAMES(at))
        if tensor.shape != leaf.shape:
            raise file.error(f"{tensor.name} has shape {list(tensor.shape)}, but the metadata need {list(leaf.shape)}")

    def read(at: parameters.Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = _tensor(file, _NAMES(at))
        if neighbours and at[-2:-1] in (("q",), ("k",)):
            order = _halves(leaf.shape[0], config.head_dim)
            if len(leaf.shape) == 1:
                array = np.empty(leaf.shape, leaf.dtype)
                array[order] = file.read(tensor, leaf.dtype)
            else:
                array = file.read(tensor, leaf.dtype, order)
        else:
            array = file.read(tensor, leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    parameters.map_with_path(check, tree)
    return parameters.map_with_path(read, tree)


def _halves(rows: int, head_dim: int) -> np.ndarray:
    """Where each row of q or k goes: row 2i + j of a head is row j * head_dim / 2 + i when halves are paired."""
    row = np.arange(rows)
    within = row % head_dim
    return row - within + within % 2 * (head_dim // 2) + within // 2


def _settings(file: GgufFile, architecture: str) -> Settings:
    """The metadata of the architecture, without their prefix. Refuses keys whose meaning is unknown here."""
    prefix = f"{architecture}."
    settings = Settings(file.path, {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)})
    for key, value in settings.values.items():
        if key in _NEUTRAL:
            if value != _NEUTRAL[key]:
                raise settings.error(f"{prefix}{key}={value!r} is not supported; supported: {_NEUTRAL[key]!r}")
        elif key not in _READ_KEYS:
            raise settings.error(f"{prefix + key!r} is a property that kvjax does not know")
    return settings


def _head_dim(settings: Settings, hidden: int, heads: int) -> int:
    if settings.values.get("attention.key_length") is None and hidden % heads:
        raise settings.error(f"embedding_length={hidden} is not a multiple of attention.head_count={heads}")
    head_dim = settings.integer("attention.key_length", hidden // heads or None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := settings.integer(key, head_dim)) != head_dim:
            raise settings.error(f"{key}={value} differs from the head dimension of {head_dim}, which is not supported")
    if head_dim % 2:
        raise settings.error(f"a head dimension of {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def _rope(file: GgufFile, settings: Settings, head_dim: int) -> Rope:
    theta = _short(settings.number("rope.freq_base", 10_000.0))
    kind = settings.values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise settings.error(f"rope scaling {kind!r} is not supported; supported: none, linear, and a tensor {_ROPE_FACTORS}")
    if kind == "linear":
        factor = _short(settings.number("rope.scaling.factor"))
    else:
        factor = _short(settings.number("rope.scale_linear", 1.0))
    if _ROPE_FACTORS not in file.tensors:
        return Rope(theta, None if factor == 1.0 else LinearScaling(factor))
    if factor != 1.0:
        raise settings.error(f"rope scaling by a factor as well as by a tensor {_ROPE_FACTORS} is not supported")
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise file.error(f"{_ROPE_FACTORS} has shape {list(tensor.shape)}, but the metadata need {[head_dim // 2]}")
    factors = tuple(float(value) for value in file.read(tensor, np.float32))
    if not all(0 < value < math.inf for value in factors):
        raise file.error(f"{_ROPE_FACTORS} must hold positive numbers")
    return Rope(theta, FactorScaling(factors))


def _short(value: float) -> float:
    """The shortest decimal number with the same float32: metadata say 9.99999974e-06 where 1e-05 is meant."""
    return float(str(np.float32(value)))


def _tensor(file: GgufFile, name: str) -> TensorInfo:
    try:
        return file.tensors[name]
    except KeyError:
        raise file.error(f"tensor {name!r} is missing") from None


def _check_shapes(file: GgufFile, config: ModelConfig) -> None:
    """Refuses metadata that the tensors contradict, before a tree of that many layers and that size is built."""
    held = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if len(held) != config.num_layers:
        raise file.error(f"it has tensors of {len(held)} layers, but block_count={config.num_layers}")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Mapping[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, config.hidden_size),
        "blk.0.attn_q.weight": (q, config.hidden_size),
        "blk.0.attn_k.weight": (kv, config.hidden_size),
        "blk.0.ffn_up.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, shape in shapes.items():
        if _tensor(file, name).shape != shape:
            raise file.error(f"{name} has shape {list(file.tensors[name].shape)}, but the metadata need {list(shape)}")


_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


def _stop_tokens(file: GgufFile) -> tuple[int, ...]:
    """Ids that end a turn: named by the metadata, or by the text they have in the families that are read here."""
    from kvjax.models.gguf_tokenizer import control_tokens

    ids = [file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    control = control_tokens(file)
    ids += [control.get(text) for text in _END_TOKENS]
    size = _tensor(file, _EMBEDDING).shape[0]
    for value in ids:
        if value is not None and not (isinstance(value, int) and 0 <= value < size):
            raise file.error(f"a stop token must be a token id below {size}, not {value!r}")
    return tuple(dict.fromkeys(value for value in ids if value is not None))


__all__ = ["is_gguf", "load_parameters", "read_config", "read_header", "source"]
