"""config.json of a Hugging Face directory, read into a ModelConfig and written for a Llama.

What cannot be computed exactly as the checkpoint means it is refused (ModelError), never approximated.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from kvjax.errors import ModelError, SpecError, clipped
from kvjax.models.config import Activation, FactorScaling, LinearScaling, Llama3Scaling, ModelConfig, Norm, Rope

CONFIG_FILE = "config.json"
_NAME_KEY = "kvjax_name"  # config.json has no place for a model's name of its own


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The configuration of a Hugging Face directory, under the directory's name (or the one `save_directory` recorded).

    Stop tokens are those of config.json and, where there is one, of generation_config.json.

    Raises:
      ModelError: config.json is missing, broken, incomplete, or asks for something kvjax does not compute.
    """
    path = pathlib.Path(path)
    settings = Settings(path / CONFIG_FILE, read_json(path / CONFIG_FILE))
    architectures = settings.values.get("architectures")
    family = architectures[0] if isinstance(architectures, list) and architectures else None
    if family not in tuple(_FAMILIES):  # whatever JSON holds there, hashable or not
        raise settings.error(f"architecture {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    if quantization := settings.values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise settings.error(f"quantised weights ({method}) are not supported; use a float32, bfloat16 or float16 checkpoint")
    fields = _FAMILIES[family](settings)
    stop_tokens = (*fields.pop("stop_tokens"), *_generation_stop_tokens(path))
    name = settings.values.get(_NAME_KEY) or path.resolve().name
    try:
        return ModelConfig(name=str(name), stop_tokens=tuple(dict.fromkeys(stop_tokens)), **fields)
    except SpecError as error:
        raise settings.error(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of a JSON file, with typed access; every complaint names the file."""

    path: pathlib.Path
    values: Mapping[str, Any]

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {clipped(message)}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!r}")
        return value

    def require(self, key: str, only: Any) -> None:
        """Refuses any value of `key` but `only`; absent and null count as `only`."""
        value = self.values.get(key)
        if value is not None and value != only:
            raise self.error(f"{key}={json.dumps(value)} is not supported; supported: {json.dumps(only)}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        return value


def _opt(settings: Settings) -> dict[str, Any]:
    settings.require("activation_function", "relu")
    settings.require("enable_bias", True)
    settings.require("layer_norm_elementwise_affine", True)
    settings.require("_remove_final_layer_norm", False)
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    embedding = settings.integer("word_embed_proj_dim", hidden)
    return {
        "vocab_size": settings.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": settings.integer("ffn_dim"),
        "num_layers": settings.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _divide_hidden(settings, hidden, heads),
        "max_position": settings.integer("max_position_embeddings"),
        "norm": Norm.LAYER,
        "activation": Activation.RELU,
        "rope": None,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "tie_embeddings": settings.boolean("tie_word_embeddings", True),
        "norm_first": settings.boolean("do_layer_norm_before", True),
        "embedding_size": None if embedding == hidden else embedding,
        "stop_tokens": _stop_tokens(settings, default=(2,)),
    }


def _llama(settings: Settings) -> dict[str, Any]:
    bias = settings.boolean("attention_bias", False)
    mlp_bias = settings.boolean("mlp_bias", False)
    return _gated(settings, default_stop=(2,)) | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": mlp_bias}


def _mistral(settings: Settings) -> dict[str, Any]:
    fields = _gated(settings, default_stop=(2,))
    if settings.values.get("sliding_window") is not None:  # up to the window, sliding attention is full attention
        fields["max_position"] = min(fields["max_position"], settings.integer("sliding_window"))
    return fields


def _qwen2(settings: Settings) -> dict[str, Any]:
    _refuse_sliding_layers(settings)
    return _gated(settings) | {"qkv_bias": True}


def _qwen3(settings: Settings) -> dict[str, Any]:
    _refuse_sliding_layers(settings)
    bias = settings.boolean("attention_bias", False)
    return _gated(settings, default_head_dim=128) | {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


_FAMILIES: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "OPTForCausalLM": _opt,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _gated(settings: Settings, default_stop: tuple[int, ...] = (), default_head_dim: int | None = None) -> dict[str, Any]:
    """What Llama and its descendants share."""
    settings.require("hidden_act", "silu")
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    if settings.values.get("head_dim") is None and default_head_dim is None:
        head_dim = _divide_hidden(settings, hidden, heads)
    else:
        head_dim = settings.integer("head_dim", default_head_dim)
    if head_dim % 2:
        raise settings.error(f"head_dim={head_dim} is odd; rotary embedding needs an even one")
    return {
        "vocab_size": settings.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": settings.integer("intermediate_size"),
        "num_layers": settings.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position": settings.integer("max_position_embeddings"),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "rope": _rope(settings),
        "tie_embeddings": settings.boolean("tie_word_embeddings", False),
        "stop_tokens": _stop_tokens(settings, default_stop),
    }


def _rope(settings: Settings) -> Rope:
    """From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaced them in transformers 5."""
    given = settings.values.get("rope_scaling") or settings.values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise settings.error(f"rope scaling must be an object, not {given!r}")
    shared = {key: settings.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = Settings(settings.path, shared | given)
    rope.require("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", 10_000.0)
    match given.get("rope_type", given.get("type", "default")):
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, LinearScaling(rope.number("factor")))
        case "llama3":
            return Rope(
                theta,
                Llama3Scaling(
                    factor=rope.number("factor"),
                    low_freq_factor=rope.number("low_freq_factor"),
                    high_freq_factor=rope.number("high_freq_factor"),
                    original_max_position=rope.integer("original_max_position_embeddings"),
                ),
            )
        case kind:
            raise settings.error(f"rope type {kind!r} is not supported; supported: default, linear, llama3")


def _refuse_sliding_layers(settings: Settings) -> None:
    settings.require("use_sliding_window", False)
    for kind in settings.values.get("layer_types") or ():
        if kind != "full_attention":
            raise settings.error(f"layer type {kind!r} is not supported; supported: full_attention in every layer")


def _divide_hidden(settings: Settings, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise settings.error(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return hidden // heads


def _stop_tokens(settings: Settings, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    if "eos_token_id" not in settings.values:
        return default
    value = settings.values["eos_token_id"]
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise settings.error(f"eos_token_id must be token ids, not {value!r}")
    return tuple(ids)


def _generation_stop_tokens(path: pathlib.Path) -> tuple[int, ...]:
    file = path / "generation_config.json"
    return _stop_tokens(Settings(file, read_json(file))) if file.exists() else ()


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError when there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


def llama_values(config: ModelConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """What config.json of a Llama says, in the spelling that transformers 4 and 5 both read. Raises ModelError for any other shape."""
    plain = ModelConfig(
        name=config.name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position=config.max_position,
        norm_eps=config.norm_eps,
        rope=config.rope,
        tie_embeddings=config.tie_embeddings,
        stop_tokens=config.stop_tokens,
    )
    if config != plain or config.rope is None or isinstance(config.rope.scaling, FactorScaling):
        raise ModelError(
            f"model {config.name} cannot be written as a Llama directory: that needs rotary positions with a scaling it can name, "
            "RMS norm before each block, a SiLU-gated MLP, and neither biases nor qk-norm; save it with kvjax.models.checkpoint"
        )
    stop = list(config.stop_tokens)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        _NAME_KEY: config.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None if not stop else stop[0] if len(stop) == 1 else stop,
        "torch_dtype": dtype.name,
    }


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    match rope.scaling:
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
        case LinearScaling() as scaling:
            return {"rope_type": "linear", "factor": scaling.factor}
        case _:
            return None
