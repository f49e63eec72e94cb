"""Tiny GGUF files, and the same weights as Hugging Face directories, written without anything of kvjax's."""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from gguf.quants import dequantize, quantize

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2, 256, 512, 4, 2, 96
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_PLAIN = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
BYTES = {byte: chr(byte) for byte in _PLAIN} | {byte: chr(256 + index) for index, byte in enumerate(_OTHERS)}
"""How byte-level BPE writes the 256 bytes."""
TYPES = gguf.GGMLQuantizationType


def shapes(head_dim: int, bias: bool, qk_norm: bool, tied: bool) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensor names and shapes."""
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q, HIDDEN), "self_attn.k_proj.weight": (kv, HIDDEN), "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q), "mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER), "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    if bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if qk_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    whole = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    whole |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    return whole if tied else whole | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def to_halves(stored: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k as Hugging Face has them, from those of llama's GGUF layout, which pairs neighbours."""
    result = np.empty_like(stored)
    for row in range(len(stored)):
        head, within = divmod(row, head_dim)
        pair, side = divmod(within, 2)
        result[head * head_dim + side * (head_dim // 2) + pair] = stored[row]
    return result


def encoded(rng: np.random.Generator, shape: tuple[int, ...], kind: TYPES) -> np.ndarray:
    """Random weights in a type: quantised, or where the package cannot quantise, random blocks with moderate scales."""
    values = rng.normal(0, 0.1, shape).astype(np.float32)
    if len(shape) == 1 or kind == TYPES.F32:
        return values
    try:
        return quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
        scales = {TYPES.Q4_K: (0, 2), TYPES.Q6_K: (208,), TYPES.Q5_K: (0, 2), TYPES.Q2_K: (80, 82), TYPES.Q3_K: (108,)}
        for at in scales[kind]:
            raw[..., at : at + 2] = np.float16(0.01).reshape(1).view(np.uint8)
        return raw.reshape(shape[0], -1)


class Spec:
    """What a file is to be; keyword arguments change it."""

    def __init__(self, architecture: str = "llama", kind: TYPES = TYPES.F32, **changes: Any):
        self.architecture, self.kind = architecture, kind
        self.head_dim: int = changes.pop("head_dim", 64)
        self.tied: bool = changes.pop("tied", True)
        self.bias: bool = changes.pop("bias", architecture == "qwen2")
        self.qk_norm: bool = changes.pop("qk_norm", architecture == "qwen3")
        self.rope_factors: np.ndarray | None = changes.pop("rope_factors", None)
        self.metadata: dict[str, Any] = changes.pop("metadata", {})
        self.config: dict[str, Any] = changes.pop("config", {})
        self.tokenizer: dict[str, Any] | None = changes.pop("tokenizer", None)
        self.extra: dict[str, np.ndarray] = changes.pop("extra", {})
        assert not changes, changes


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def write(folder: pathlib.Path, spec: Spec) -> tuple[pathlib.Path, pathlib.Path]:
    """The GGUF file and the Hugging Face directory."""
    rng = np.random.default_rng(7)
    file, directory = folder / "tiny.gguf", folder / "tiny"
    directory.mkdir()
    writer = gguf.GGUFWriter(file, spec.architecture)
    values: dict[str, Any] = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50_000.0, "rope.dimension_count": spec.head_dim,
    }  # fmt: skip
    if spec.head_dim != HIDDEN // HEADS:
        values |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    values = {f"{spec.architecture}.{key}": value for key, value in values.items()} | spec.metadata
    if spec.tokenizer is not None:
        values |= {f"tokenizer.{key}": value for key, value in spec.tokenizer.items()}
    for key, value in values.items():
        if value is not None:
            add(writer, key, value)
    weights = {}
    for name, shape in shapes(spec.head_dim, spec.bias, spec.qk_norm, spec.tied).items():
        kind = spec.kind if len(shape) == 2 else TYPES.F32
        raw = encoded(rng, shape, kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        stored = dequantize(raw, kind)
        neighbours = spec.architecture in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name)
        weights[name] = np.ascontiguousarray(to_halves(stored, spec.head_dim) if neighbours else stored)
    if spec.rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", spec.rope_factors.astype(np.float32))
    for name, array in spec.extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[spec.architecture]
    config = {
        "architectures": [f"{family}ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": spec.head_dim,
        "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 50_000.0,
        "tie_word_embeddings": spec.tied, "eos_token_id": None,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | spec.config))
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    return file, directory


def byte_tokenizer(pre: str = "gpt-2", merges: tuple[str, ...] = (), special: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: 256 bytes, what the merges make, special tokens."""
    tokens = [BYTES[b] for b in range(256)]
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    types = [1] * len(tokens) + [3] * len(special)
    return {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": [*tokens, *special], "ggml.token_type": types,
        "ggml.merges": list(merges) or None,
    } | changes  # fmt: skip
