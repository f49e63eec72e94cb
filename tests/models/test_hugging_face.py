"""Hugging Face directories: what transformers computes, what is refused and how, and what is written back."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kvjax.cache.steps import Forward
from kvjax.errors import ModelError
from kvjax.models import parameters
from kvjax.models.config import BUNDLED, PRESETS, LinearScaling, Llama3Scaling, ModelConfig, Rope
from kvjax.models.decoder import Decoder
from kvjax.models.hugging_face import load_parameters, read_config, save_directory

PARITY = pathlib.Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.name for path in PARITY.iterdir())
FAMILIES = {
    "opt", "opt_post_norm_projected", "llama_untied", "llama_tied", "llama_biased", "llama3_rope", "linear_rope", "mistral",
    "qwen2", "qwen3",
}  # fmt: skip


def forward(config: ModelConfig):
    """The jitted logits [B, S, V] of whole sequences."""
    decoder = Decoder(config)

    @jax.jit
    def logits(params, tokens):
        return decoder.apply(params, tokens, None, Forward(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)))[0]

    return logits


def test_every_family_has_a_fixture():
    assert set(CASES) == FAMILIES


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(case):
    config = read_config(PARITY / case)
    params = load_parameters(PARITY / case, config, jnp.float32)
    expected = np.load(PARITY / case / "expected.npz")
    tokens, greedy = expected["tokens"], expected["greedy"]
    length = tokens.shape[1]
    logits = forward(config)

    buffer = np.concatenate([tokens, np.zeros_like(greedy)], axis=1)  # causal: what lies ahead does not matter
    for position in range(length, buffer.shape[1]):
        buffer[:, position] = np.asarray(logits(params, buffer)[:, position - 1].argmax(-1))

    np.testing.assert_array_equal(buffer[:, length:], greedy)
    np.testing.assert_allclose(logits(params, buffer)[:, :length], expected["logits"], rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------- config.json


@pytest.fixture
def edited(tmp_path):
    """A function that copies a fixture and changes its config.json."""

    def edit(case: str, **changes) -> pathlib.Path:
        path = tmp_path / case
        shutil.copytree(PARITY / case, path)
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(values))
        return path

    return edit


def test_name_is_that_of_the_directory():
    assert read_config(PARITY / "qwen3").name == "qwen3"


@pytest.mark.parametrize(
    ("case", "modern", "scaling"),
    [
        ("llama3_rope", {"rope_type": "llama3"}, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        ("linear_rope", {"type": "linear"}, LinearScaling(4.0)),
    ],
)
def test_both_spellings_of_rope_scaling(edited, case, modern, scaling):
    values = json.loads((PARITY / case / "config.json").read_text())["rope_parameters"]
    theta = values.pop("rope_theta")
    values.pop("rope_type")
    path = edited(case, rope_parameters=None, rope_scaling=values | modern, rope_theta=theta)
    assert read_config(path) == read_config(PARITY / case)
    assert read_config(path).rope == Rope(theta, scaling)


def test_sliding_window_caps_the_context(edited):
    assert read_config(PARITY / "mistral").max_position == 128
    assert read_config(edited("mistral", sliding_window=None)).max_position == 256


def test_stop_tokens_of_both_files_in_order(edited):
    path = edited("llama_tied", eos_token_id=[7, 9])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert read_config(path).stop_tokens == (7, 9, 5)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert read_config(path).stop_tokens == (7, 9, 3)


def test_llama_without_kv_heads_has_one_a_query_head(edited):
    assert read_config(edited("llama_biased", num_key_value_heads=None)).num_kv_heads == 4


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
REFUSED: list[tuple[str, dict, str]] = [
    (
        "llama_tied",
        {"architectures": ["GemmaForCausalLM"]},
        "architecture 'GemmaForCausalLM' is not supported; supported: OPTForCausalLM, ",
    ),
    ("llama_tied", {"architectures": None}, "architecture None is not supported"),
    ("llama_tied", {"architectures": "LlamaForCausalLM"}, "architecture None is not supported"),
    ("llama_tied", {"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\) are not supported; use a float32, "),
    ("llama_tied", {"rope_parameters": YARN}, "rope type 'yarn' is not supported; supported: default, linear, llama3"),
    ("llama_tied", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("llama_tied", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ("llama_tied", {"rope_parameters": "linear"}, "rope scaling must be an object, not 'linear'"),
    ("llama_tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; supported: 1.0"),
    ("llama_tied", {"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported; supported: "silu"'),
    ("llama_tied", {"hidden_size": None}, "hidden_size is missing"),
    ("llama_tied", {"hidden_size": "32"}, "hidden_size must be a positive integer, not '32'"),
    ("llama_tied", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
    ("llama_tied", {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number, not 'tiny'"),
    ("llama_tied", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
    ("llama_tied", {"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ("llama_tied", {"head_dim": 7}, "head_dim=7 is odd"),
    ("llama_tied", {"head_dim": None, "hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
    ("llama_tied", {"eos_token_id": "</s>"}, "eos_token_id must be token ids, not '</s>'"),
    ("opt", {"activation_function": "gelu"}, 'activation_function="gelu" is not supported; supported: "relu"'),
    ("opt", {"enable_bias": False}, "enable_bias=false is not supported; supported: true"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=false is not supported"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=true is not supported"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true is not supported; supported: false"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer type 'sliding_attention' is not supported"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED, ids=[f"{case}-{next(iter(changes))}" for case, changes, _ in REFUSED])
def test_configuration_is_refused_in_one_line(edited, case, changes, message):
    with pytest.raises(ModelError, match=message) as error:
        read_config(edited(case, **changes))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not readable JSON"),
        ("[1]", "config.json must hold a JSON object, not list"),
        (None, "config.json does not exist"),
    ],
)
def test_broken_configuration_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------------------------- weights


def load(path: pathlib.Path):
    return load_parameters(path, read_config(path), jnp.float32)


def rewrite(path: pathlib.Path, change):
    """Rewrites model.safetensors with `change(tensors)` applied in place."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def refused(path: pathlib.Path, message: str):
    with pytest.raises(ModelError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_tensor(edited):
    path = edited("qwen3")
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))
    refused(path, "qwen3: tensor model.layers.1.self_attn.q_norm.weight is missing")


def test_wrong_shape(edited):
    path = edited("opt")
    rewrite(path, lambda tensors: tensors.update({"model.decoder.layers.0.fc1.bias": np.zeros(5, np.float32)}))
    refused(path, r"model.safetensors: model.decoder.layers.0.fc1.bias has shape \[5\], but config.json needs \[48\]")


def test_wrong_dtype(edited):
    path = edited("llama_tied")
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}))
    refused(path, "model.norm.weight is I8; supported: F64, F32, F16, BF16")


def test_unknown_tensors(edited):
    path = edited("llama_tied")
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32), "z": np.zeros(1, np.float32)}
    rewrite(path, lambda tensors: tensors.update(extra))
    refused(path, r"tensor model.layers.0.self_attn.q_proj.bias and 1 more has no place in the model that config.json describes")


def test_harmless_extra_tensors(edited):
    path = edited("llama_tied")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    rewrite(path, add)
    jax.tree.map(np.testing.assert_array_equal, load(path), load(PARITY / "llama_tied"))


def test_tied_head_that_differs(edited):
    path = edited("llama_tied")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    refused(path, r"lm_head.weight differs from model.embed_tokens.weight, but config.json ties them \(tie_word_embeddings\)")


def test_opt_saved_without_the_outer_module(edited):
    path = edited("opt")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(path, strip)
    jax.tree.map(np.testing.assert_array_equal, load(path), load(PARITY / "opt"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(edited, name):
    path = edited("llama_tied")
    (path / "model.safetensors").rename(path / name)
    refused(path, f"llama_tied has pickled weights only \\({name}\\), which can run code when opened; convert them to safetensors")


def test_no_weights(edited):
    path = edited("llama_tied")
    (path / "model.safetensors").unlink()
    refused(path, "llama_tied has no weights: neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_corrupt_file(edited, keep):
    path = edited("llama_tied")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:keep])
    refused(path, "model.safetensors is not a readable safetensors file: ")


def test_missing_shard(edited):
    path = edited("llama_untied")
    (path / "model-00003-of-00005.safetensors").unlink()
    refused(path, "model-00003-of-00005.safetensors does not exist, although model.safetensors.index.json lists it")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/weights.safetensors", "sub/x.safetensors", "..\\x.safetensors", "a.bin"])
def test_index_may_not_leave_the_directory(edited, shard):
    path = edited("llama_untied")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(path, "model.safetensors.index.json: .* is not the name of a .safetensors file in this directory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json is not readable JSON"),
        ("{}", "index.json: weight_map must map tensor names to file names"),
        ('{"weight_map": {"a": 1}}', "index.json: weight_map must map tensor names to file names"),
        (
            '{"weight_map": {"a": "model-00001-of-00005.safetensors"}}',
            "tensor a is missing, although model.safetensors.index.json places it",
        ),
    ],
)
def test_broken_index(edited, text, message):
    path = edited("llama_untied")
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, message)


def test_bfloat16_checkpoint_is_read_exactly(edited):
    path = edited("qwen2")
    wide = load(path)
    rewrite(path, lambda tensors: tensors.update({name: value.astype(jnp.bfloat16) for name, value in tensors.items()}))
    config = read_config(path)
    narrow = load_parameters(path, config, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda got, full: np.testing.assert_array_equal(got, full.astype(jnp.bfloat16)), narrow, wide)
    jax.tree.map(lambda got, same: np.testing.assert_array_equal(got, same.astype(jnp.float32)), load(path), narrow)


def test_sharding_is_asked_for_every_parameter():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    asked = []

    def sharding(path):
        asked.append(path)
        return rows if path[-1] == "weight" else None

    config = read_config(PARITY / "opt")
    params = load_parameters(PARITY / "opt", config, jnp.float32, sharding)["params"]
    assert params["layer_0"]["attention"]["q"]["weight"].sharding == rows
    assert params["embed"].sharding != rows
    assert ("layer_1", "mlp", "down", "bias") in asked


# ------------------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("case", ["llama_untied", "llama_tied", "llama3_rope", "linear_rope"])
def test_save_directory_reads_back(tmp_path, case):
    config = dataclasses.replace(read_config(PARITY / case), name="written", stop_tokens=(3, 4))
    params = load_parameters(PARITY / case, config, jnp.bfloat16)
    save_directory(tmp_path / "model", config, params)
    assert read_config(tmp_path / "model") == config
    jax.tree.map(np.testing.assert_array_equal, load_parameters(tmp_path / "model", config, jnp.bfloat16), params)


@pytest.mark.parametrize("case", ["opt", "llama_biased", "qwen2", "qwen3"])
def test_save_directory_refuses_what_llama_cannot_say(tmp_path, case):
    config = read_config(PARITY / case)
    with pytest.raises(ModelError, match=f"model {case} cannot be written as a Llama directory"):
        save_directory(tmp_path, config, load_parameters(PARITY / case, config, jnp.float32))


# -------------------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", [*BUNDLED, *PRESETS])
def test_parameter_count_is_that_of_the_tree(name):
    config = dataclasses.replace((BUNDLED | PRESETS)[name], num_layers=1)
    assert config.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(parameters.abstract(config)))


@pytest.mark.parametrize("case", CASES)
def test_parameter_count_is_that_of_the_file(case):
    config = read_config(PARITY / case)
    assert config.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(parameters.abstract(config)))


PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}
"""Parameters of the published checkpoints, tied embeddings counted once."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name):
    assert PRESETS[name].parameter_count == PUBLISHED[name]
