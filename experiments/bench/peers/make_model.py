"""Llama directories in the Hugging Face layout and their llama.cpp counterpart.

    python -m experiments.bench.peers.make_model gguf DIR       # DIR/model.gguf from DIR/config.json and DIR/model.safetensors
    python -m experiments.bench.peers.make_model random DIR     # a random-weight directory of the benchmark's shape

The GGUF file is float32 throughout and has no vocabulary (tokenizer "no_vocab"): tokens are plain ids.
`gguf` is imported only where a GGUF file is written; the rest needs numpy and safetensors.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GGUF_NAME = "model.gguf"
WEIGHTS_NAME = "model.safetensors"
_ALL_F32 = 0  # llama.cpp's file type number for a file of float32 tensors


class ModelError(ValueError):
    """A directory that cannot be converted."""


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama decoder; the defaults are kvjax's preset bench-32m. `max_position` is in tokens."""

    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    max_position: int = 8192
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LlamaShape":
        """From a parsed config.json. Raises ModelError for what this converter does not cover."""
        if config.get("model_type") != "llama":
            raise ModelError(f"config.json: model_type {config.get('model_type')!r} is not 'llama'")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ModelError("config.json: biases are not covered")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ModelError(f"config.json: rope scaling {rope} is not covered")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )

    def to_config(self) -> dict[str, Any]:
        """The config.json of this shape; no stop token, so that greedy decoding never ends early."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "torch_dtype": "float32",
        }

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(Hugging Face name, llama.cpp name, shape) of every tensor, matrices as [out, in]."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        m, f = self.hidden_size, self.intermediate_size
        yield "model.embed_tokens.weight", "token_embd.weight", (self.vocab_size, m)
        for i in range(self.num_layers):
            for theirs, ours, shape in (
                ("input_layernorm", "attn_norm", (m,)),
                ("self_attn.q_proj", "attn_q", (q, m)),
                ("self_attn.k_proj", "attn_k", (kv, m)),
                ("self_attn.v_proj", "attn_v", (kv, m)),
                ("self_attn.o_proj", "attn_output", (m, q)),
                ("post_attention_layernorm", "ffn_norm", (m,)),
                ("mlp.gate_proj", "ffn_gate", (f, m)),
                ("mlp.up_proj", "ffn_up", (f, m)),
                ("mlp.down_proj", "ffn_down", (m, f)),
            ):
                yield f"model.layers.{i}.{theirs}.weight", f"blk.{i}.{ours}.weight", shape
        yield "model.norm.weight", "output_norm.weight", (m,)
        if not self.tie_embeddings:
            yield "lm_head.weight", "output.weight", (self.vocab_size, m)


def interleave_heads(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the output rows of a q or k projection `[heads * D, in]` from rotated halves to rotated neighbours.

    Hugging Face rotates rows (i, i + D/2) of a head together, llama.cpp's "llama" architecture rows (2i, 2i + 1): new row 2i of a head
    is its old row i, new row 2i + 1 its old row i + D/2. Queries and keys change alike, so their products do not.
    """
    out, width = weight.shape
    return weight.reshape(num_heads, 2, out // num_heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write_gguf(directory: Path) -> Path:
    """Writes DIR/model.gguf unless it is newer than the weights, and returns its path. The write is atomic."""
    import gguf
    from safetensors import safe_open

    target, source = directory / GGUF_NAME, directory / WEIGHTS_NAME
    if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, (directory / "config.json").stat().st_mtime):
        return target
    shape = LlamaShape.from_config(json.loads((directory / "config.json").read_text()))
    if shape.head_dim % 2:
        raise ModelError(f"config.json: head_dim {shape.head_dim} is odd")

    partial = target.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(directory.name)
    writer.add_file_type(_ALL_F32)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_tokenizer_model("no_vocab")

    with safe_open(source, framework="numpy") as weights:
        present = set(weights.keys())
        for theirs, ours, expected in shape.tensors():
            if theirs not in present:
                raise ModelError(f"{WEIGHTS_NAME}: no tensor {theirs}")
            weight = weights.get_tensor(theirs)
            if weight.shape != expected or weight.dtype != np.float32:
                raise ModelError(f"{WEIGHTS_NAME}: {theirs} is {weight.dtype} {weight.shape}, not float32 {expected}")
            if ".attn_q." in ours:
                weight = interleave_heads(weight, shape.num_heads)
            elif ".attn_k." in ours:
                weight = interleave_heads(weight, shape.num_kv_heads)
            writer.add_tensor(ours, np.ascontiguousarray(weight))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target


def write_random(directory: Path, shape: LlamaShape = LlamaShape(), seed: int = 0, std: float = 0.05) -> Path:
    """Writes config.json and model.safetensors with normal weights of standard deviation `std` (norm scales: 1 plus such noise)."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)
    weights = {}
    for name, _, dims in shape.tensors():
        noise = generator.standard_normal(dims, dtype=np.float32) * np.float32(std)
        weights[name] = noise if len(dims) > 1 else 1 + noise
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.to_config(), indent=2) + "\n")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("gguf", "random"))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    print((write_gguf if arguments.action == "gguf" else write_random)(arguments.directory))


if __name__ == "__main__":
    main()
