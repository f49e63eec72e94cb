"""GGUF files: the same weights as a Hugging Face directory has, and what is refused."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize
from made_gguf import HIDDEN, TYPES, VOCABULARY, Spec, byte_tokenizer, write

from kvjax.errors import ModelError
from kvjax.models import checkpoint, load_model
from kvjax.models.config import LinearScaling, Llama3Scaling, Rope
from kvjax.models.decoder import rope_frequencies
from kvjax.models.gguf_file import read_header
from kvjax.models.hugging_face import save_directory
from kvjax.models.source import Source

KINDS = (TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_1, TYPES.Q4_K, TYPES.Q6_K)
CASES = [
    *(Spec("llama", kind) for kind in KINDS),
    Spec("llama", TYPES.Q4_0, head_dim=32, tied=False, bias=True, config={"attention_bias": True}),
    Spec("mistral", TYPES.Q5_0, tied=False),
    Spec("qwen2", TYPES.Q4_K),
    Spec("qwen2", TYPES.Q8_0, tied=False),
    Spec("qwen3", TYPES.Q6_K),
    Spec("qwen3", TYPES.Q4_1, head_dim=128),
]  # fmt: skip


def names(spec: Spec) -> str:
    return f"{spec.architecture}-{spec.kind.name}-{spec.head_dim}"


@pytest.mark.parametrize("spec", CASES, ids=names)
def test_weights_are_those_of_the_directory(tmp_path, spec):
    if (
        spec.architecture == "llama" and spec.bias
    ):  # Hugging Face's switch gives the output projection a bias too, llama.cpp's files need not
        spec.config = {"architectures": ["Qwen2ForCausalLM"]}
    file, directory = write(tmp_path, spec)
    model, other = load_model(file), load_model(directory)
    assert model.config == other.config
    jax.tree.map(np.testing.assert_array_equal, model.params, other.params)
    assert model.source == Source(spec.kind.name)


def test_another_dtype(tmp_path):
    file, directory = write(tmp_path, Spec("llama", TYPES.Q4_1))
    model, other = load_model(str(file), "bfloat16"), load_model(directory, "bfloat16")
    assert model.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, model.params, other.params)


def test_random_weights_of_a_file_have_no_source(tmp_path):
    file, _ = write(tmp_path, Spec("llama", TYPES.Q4_1))
    model = load_model(file, random_weights=True)
    assert model.source is None
    jax.tree.map(lambda a, b: None, model.params, load_model(file).params)


@pytest.mark.parametrize(
    "kind", [k for k in TYPES if k.name[0] in "BQTMIN" and k.name not in ("I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0")]
)
def test_every_type_that_gguf_dequantises(tmp_path, kind):
    """A block of rows at a time gives what the whole tensor gives."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (40, 8 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("one", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(tmp_path / "one.gguf")
    with np.errstate(all="ignore"):
        whole = dequantize(raw, kind)
    assert file.tensors["one"].shape == (40, 8 * block)
    np.testing.assert_array_equal(file.read(file.tensors["one"], np.float32), whole)
    order = np.random.default_rng(2).permutation(40)
    np.testing.assert_array_equal(file.read(file.tensors["one"], np.float32, order)[order], whole)


def test_blocks_of_rows_make_the_whole(tmp_path, monkeypatch):
    file, directory = write(tmp_path, Spec("llama", TYPES.Q4_1))
    monkeypatch.setattr("kvjax.models.gguf_file._BLOCK_ELEMENTS", 7 * HIDDEN)
    jax.tree.map(np.testing.assert_array_equal, load_model(file).params, load_model(directory).params)


def test_linear_rope(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    file, directory = write(tmp_path, Spec("llama", metadata=scaling, config=config))
    assert load_model(file).config == load_model(directory).config
    assert load_model(file).config.rope == Rope(50_000.0, LinearScaling(4.0))


def test_llama3_rope_comes_as_a_tensor_of_divisors(tmp_path):
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 128)
    plain, wavelengths = rope_frequencies(Rope(50_000.0), 64), 2 * np.pi / np.asarray(rope_frequencies(Rope(50_000.0), 64))
    factors = []
    for wavelength in wavelengths:  # Llama 3.1's rule, per pair
        if wavelength < 128 / 4:
            factors.append(1.0)
        elif wavelength > 128 / 1:
            factors.append(8.0)
        else:
            smooth = (128 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    file, _ = write(tmp_path, Spec("llama", rope_factors=np.array(factors)))
    model = load_model(file)
    rope = model.config.rope
    assert rope is not None
    np.testing.assert_allclose(rope_frequencies(rope, 64), rope_frequencies(Rope(50_000.0, scaling), 64), rtol=1e-6)
    assert (rope_frequencies(rope, 64) != plain).any()
    checkpoint.save(tmp_path / "saved", model.config, model.params)
    assert load_model(tmp_path / "saved").config == model.config
    with pytest.raises(ModelError, match="rotary positions with a scaling it can name"):
        save_directory(tmp_path / "written", model.config, model.params)


def test_neighbouring_columns_are_rotated_as_in_the_layout_of_the_file(tmp_path):
    """Attention scores from the file's own rows, rotated in pairs of neighbours, are those of kvjax's halves."""
    from kvjax.models.decoder import rope_angles, rotate

    file, _ = write(tmp_path, Spec("llama", TYPES.F32))
    header = read_header(file)
    stored = [header.read(header.tensors[f"blk.0.attn_{name}.weight"], np.float32)[:64] for name in "qk"]
    x = np.random.default_rng(3).normal(size=(9, HIDDEN)).astype(np.float32)
    angles = np.arange(9)[:, None] * 50_000.0 ** (-np.arange(32) / 32)

    def turned(rows):
        y = (x @ rows.T).reshape(9, 32, 2)
        a, b = y[..., 0], y[..., 1]
        return np.stack([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1).reshape(9, 64)

    layer = load_model(file).params["params"]["layer_0"]["attention"]
    positions = jnp.arange(9)[None]
    q, k = (rotate((x @ layer[n]["weight"][:64].T)[None, :, None], rope_angles(Rope(50_000.0), 64, positions))[0, :, 0] for n in "qk")
    np.testing.assert_allclose(q @ k.T, turned(stored[0]) @ turned(stored[1]).T, atol=2e-3, rtol=1e-4)


def test_stop_tokens(tmp_path):
    tokenizer = byte_tokenizer(special=("<s>", "</s>", "<|eot_id|>"), **{"ggml.eos_token_id": 257, "ggml.eot_token_id": 258})
    with pytest.raises(ModelError, match=f"a stop token must be a token id below {VOCABULARY}, not 257"):
        load_model(write(tmp_path, Spec(tokenizer=tokenizer))[0])
    small = {
        "ggml.model": "gpt2",
        "ggml.tokens": ["a", "b", "<|im_end|>", "ab", "<e>"],
        "ggml.token_type": [1, 1, 3, 1, 3],
        "ggml.eos_token_id": 4,
    }
    (tmp_path / "two").mkdir()
    assert load_model(write(tmp_path / "two", Spec(tokenizer=small))[0]).config.stop_tokens == (4, 2)


def test_licence_of_the_metadata(tmp_path):
    file, _ = write(tmp_path, Spec(metadata={"general.license": "one\nline " + "x" * 99}))
    assert load_model(file).source == Source("F32", "one line " + "x" * 48 + "...")


L = "llama."
PIECES = {"ggml.model": "llama", "ggml.tokens": ["a"], "ggml.scores": [0.0]}
REFUSED = [
    (Spec(metadata={L + "expert_count": 8}), r"llama\.expert_count=8 is not supported; supported: 0"),
    (Spec(metadata={L + "attention.sliding_window": 128}), "a sliding window of 128 tokens, less than the context of 512"),
    (Spec(metadata={L + "pooling_type": 1}), r"llama\.pooling_type=1 is not supported"),
    (Spec(metadata={L + "attention.causal": False}), r"llama\.attention\.causal=False is not supported"),
    (Spec(metadata={L + "logit_scale": 0.5}), r"llama\.logit_scale=0\.5 is not supported"),
    (Spec(metadata={L + "token_shift_count": 2}), r"'llama\.token_shift_count' is a property that kvjax does not know"),
    (Spec(metadata={L + "rope.scaling.type": "yarn", L + "rope.scaling.factor": 4.0}), "rope scaling 'yarn' is not supported"),
    (Spec(metadata={L + "rope.dimension_count": 32}), "rope.dimension_count=32 differs from the head dimension of 64"),
    (Spec(metadata={L + "attention.key_length": 63}), "rope.dimension_count=64 differs from the head dimension of 63"),
    (Spec(metadata={L + "attention.key_length": 63, L + "rope.dimension_count": 63}), "a head dimension of 63 is odd"),
    (Spec(metadata={L + "attention.value_length": 32}), "attention.value_length=32 differs from the head dimension of 64"),
    (Spec(metadata={L + "attention.head_count": 0}), "attention.head_count must be a positive integer, not 0"),
    (Spec(metadata={L + "attention.head_count": [4, 4]}), r"attention.head_count must be a positive integer, not \[4, 4\]"),
    (Spec(metadata={L + "attention.head_count_kv": 3}), "num_heads=4 is not a multiple of num_kv_heads=3"),
    (Spec(metadata={L + "block_count": None}), "block_count is missing"),
    (Spec(metadata={L + "block_count": 2**31}), "it has tensors of 2 layers, but block_count=2147483648"),
    (Spec(metadata={L + "context_length": 2**32 - 1}), "context_length=4294967295 is more than kvjax can count"),
    (Spec(metadata={L + "embedding_length": 128}), "rope.dimension_count=64 differs from the head dimension of 32"),
    (Spec(metadata={L + "feed_forward_length": 2**30}), r"has shape \[512, 256\], but the metadata need \[1073741824, 256\]"),
    (Spec(metadata={L + "rope.freq_base": float("nan")}), "rope.freq_base must be a positive number, not nan"),
    (Spec(metadata={L + "rope.freq_base": float("inf")}), "rope.freq_base must be a positive number, not inf"),
    (Spec(metadata={"general.type": "adapter"}), "it holds no model, but general.type='adapter'"),
    (Spec(metadata={"split.count": 3}), "it is one of 3 parts"),
    (Spec(rope_factors=np.ones(8)), r"rope_freqs.weight has shape \[8\], but the metadata need \[32\]"),
    (Spec(rope_factors=np.zeros(32)), "rope_freqs.weight must hold positive numbers"),
    (Spec(extra={"blk.0.ffn_gate_inp.weight": np.zeros((8, 256))}), "tensor 'blk.0.ffn_gate_inp.weight' has no place in the model"),
    (Spec(extra={"rope_freqs.weight": np.ones(32, np.int32)}), "tensor rope_freqs.weight is I32, which cannot be dequantised"),
    (Spec(qk_norm=True), "tensor 'blk.0.attn_q_norm.weight' and 3 more has no place"),
    (Spec("qwen2", bias=False), "tensor 'blk.0.attn_k.bias' is missing"),
    (Spec("qwen3", qk_norm=False), "tensor 'blk.0.attn_k_norm.weight' is missing"),
    (Spec(tokenizer={"ggml.model": "llama", "ggml.tokens": ["a"]}), "the tokenizer has 1 tokens, but 0 scores"),
    (Spec(tokenizer=PIECES | {"ggml.scores": [float("nan")]}), "the scores of the tokenizer must be finite numbers"),
    (Spec(tokenizer=PIECES | {"ggml.precompiled_charsmap": [1, 2]}), "a table of normalisations .* is not supported"),
    (Spec(tokenizer=PIECES | {"ggml.remove_extra_whitespaces": True}), "that removes spaces .* is not supported"),
    (Spec(tokenizer={"ggml.model": "bert", "ggml.tokens": ["a"]}), "tokenizer 'bert' is not supported"),
    (Spec(tokenizer=byte_tokenizer("jina-v2-code")), "pre-tokenizer 'jina-v2-code' is not supported; supported: smollm, "),
    (Spec(tokenizer=byte_tokenizer(**{"ggml.merges": ["a b"]})), "the merge 'a b' of the tokenizer is not of two tokens"),
    (Spec(tokenizer=byte_tokenizer(**{"ggml.merges": ["ab"]})), "the merge 'ab' of the tokenizer is not of two tokens"),
    (Spec(tokenizer=byte_tokenizer(**{"ggml.token_type": [1]})), "the tokenizer has 256 tokens, but 1 token types"),
    (Spec(tokenizer=byte_tokenizer(**{"ggml.bos_token_id": 999})), "bos_token_id must be a token id below 256, not 999"),
    (Spec(tokenizer=byte_tokenizer(**{"ggml.tokens": [1, 2]})), "tokenizer.ggml.tokens must be a list of str"),
    (Spec(tokenizer=byte_tokenizer(**{"chat_template": 7})), "tokenizer.chat_template must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(tmp_path, spec, message):
    file, _ = write(tmp_path, spec)
    with pytest.raises(ModelError, match=message) as error:
        load_model(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_unknown_architecture(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'rwkv6' is not supported; supported: llama, mistral, qwen2, qwen3"):
        load_model(tmp_path / "x.gguf")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match=r"x\.gguf is no GGUF file"):
        load_model(tmp_path / "x.gguf")


def test_memory_of_a_read_is_the_result_and_a_block(tmp_path):
    import gguf

    raw = np.zeros((4096, 2048 // 32 * 18), np.uint8)  # 8 million values in Q4_0: 4.7 MB here, 16.8 MB in float16, 33.6 MB in float32
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("one", raw, raw_dtype=TYPES.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(tmp_path / "one.gguf")
    tracemalloc.start()
    try:
        array = file.read(file.tensors["one"], np.float16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert array.shape == (4096, 2048)
    assert peak < array.nbytes + 8e6
