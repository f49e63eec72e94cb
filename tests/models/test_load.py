"""load_model: names, directories of both kinds, random weights, and what it says when it cannot."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.models.load
from kvjax.cache.steps import Forward
from kvjax.errors import ModelError, SpecError
from kvjax.models import BUNDLED, Decoder, Model, checkpoint, load_model
from kvjax.models.hugging_face import read_config, save_directory
from kvjax.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer

PARITY = pathlib.Path(__file__).parent.parent / "fixtures" / "parity"
TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
  "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
  "model": {"type": "WordLevel", "vocab": {"hello": 0, "world": 1, "?": 2}, "unk_token": "?"}}"""


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_hugging_face_directory():
    model = load_model(PARITY / "qwen3")
    assert isinstance(model, Model)
    assert model.config == read_config(PARITY / "qwen3")
    assert model.tokenizer is None
    assert model.decoder == Decoder(model.config, jnp.dtype(jnp.float32))
    step = Forward(jnp.arange(4)[None])
    logits, _ = jax.eval_shape(lambda params: model.decoder.apply(params, jnp.zeros((1, 4), jnp.int32), None, step), model.params)
    assert logits.shape == (1, 4, 128)


def test_orbax_directory_is_told_apart_by_content(tmp_path):
    model = load_model(PARITY / "llama_tied")
    checkpoint.save(tmp_path / "weights", model.config, model.params)
    restored = load_model(str(tmp_path / "weights"))
    assert restored.config == model.config
    assert_trees_equal(restored.params, model.params)


def test_tokenizer_of_the_directory(tmp_path):
    shutil.copytree(PARITY / "llama_tied", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(TOKENIZER)
    tokenizer = load_model(tmp_path / "model").tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("hello world") == [0, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)])
def test_dtype_by_name_or_value(dtype):
    model = load_model(PARITY / "qwen3", dtype)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("dtype", "name"), [("int8", "int8"), (jnp.int32, "int32"), ("f33", "f33")])
def test_unknown_dtype(dtype, name):
    with pytest.raises(SpecError, match=f"unknown dtype '{name}'; supported: float32, bfloat16, float16"):
        load_model(PARITY / "qwen3", dtype)


def test_preset_needs_random_weights_asked_for():
    with pytest.raises(SpecError, match=r"preset opt-125m comes without weights: give the directory .* or ask for random weights"):
        load_model("opt-125m")


@pytest.mark.parametrize("name", ["kvjax-9m", "facebook/opt-125m", "./nowhere"])
def test_unknown_name_lists_what_exists(name):
    names = "bundled: kvjax-1m, kvjax-4m; fetched by name: smollm2-135m; presets: bench-32m, .*; or a directory, or a .gguf file"
    with pytest.raises(SpecError, match=f"unknown model '{name}'; {names}"):
        load_model(name)


def test_directory_of_neither_kind(tmp_path):
    with pytest.raises(ModelError, match=r"is neither a Hugging Face directory \(config.json\) nor an orbax checkpoint"):
        load_model(tmp_path)


def test_random_weights_are_the_seeds(monkeypatch):
    small = dataclasses.replace(BUNDLED["kvjax-1m"], num_layers=2, hidden_size=64, head_dim=16)
    monkeypatch.setitem(BUNDLED, "kvjax-1m", small)
    model = load_model("kvjax-1m", "bfloat16", random_weights=True, seed=3)
    assert isinstance(model.tokenizer, ByteTokenizer)
    assert model.dtype == jnp.bfloat16
    assert_trees_equal(model.params, load_model("kvjax-1m", "bfloat16", random_weights=True, seed=3).params)
    layers = model.params["params"]
    other = load_model("kvjax-1m", "bfloat16", random_weights=True, seed=4).params["params"]
    assert (layers["embed"] != other["embed"]).any()
    assert (layers["layer_0"]["attention"]["q"]["weight"] != layers["layer_1"]["attention"]["q"]["weight"]).any()
    assert (layers["final_norm"]["scale"] == 1).all()
    up = layers["layer_0"]["mlp"]["up"]["weight"].astype(jnp.float32)
    assert float(up.std()) == pytest.approx(64**-0.5, rel=0.05)


def test_random_weights_of_a_directory(tmp_path):
    shutil.copytree(PARITY / "opt", tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").unlink()
    model = load_model(tmp_path / "opt", random_weights=True)
    jax.tree.map(lambda _, other: None, model.params, load_model(PARITY / "opt").params)


def test_bundled_model(monkeypatch, tmp_path):
    small = dataclasses.replace(BUNDLED["kvjax-1m"], num_layers=1, hidden_size=32, head_dim=8, intermediate_size=32)
    monkeypatch.setitem(BUNDLED, "kvjax-1m", small)
    monkeypatch.setattr(kvjax.models.load, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match=r"trained weights of kvjax-1m are not in .*; run `python -m kvjax.train --model=kvjax-1m`"):
        load_model("kvjax-1m")
    made = load_model("kvjax-1m", "bfloat16", random_weights=True)
    save_directory(tmp_path / "kvjax-1m", made.config, made.params)
    model = load_model("kvjax-1m", "bfloat16")
    assert model.config == small
    assert_trees_equal(model.params, made.params)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("käse")) == "käse"


def test_bundled_model_by_path_keeps_its_name_and_tokenizer(tmp_path):
    made = load_model(PARITY / "llama_tied")
    save_directory(tmp_path / "output", dataclasses.replace(made.config, name="kvjax-1m"), made.params)
    model = load_model(tmp_path / "output")
    assert model.config.name == "kvjax-1m"
    assert isinstance(model.tokenizer, ByteTokenizer)
