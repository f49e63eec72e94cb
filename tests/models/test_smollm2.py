"""The public model against what transformers and llama.cpp make of its file (see tests/fixtures/make_smollm2.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.steps import Forward
from kvjax.generation import generate
from kvjax.models import PRESETS
from kvjax.models.source import Source, model_title
from kvjax.report.record import model_fields

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "smollm2"


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURE / "logits.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def texts():
    return json.loads((FIXTURE / "tokens.json").read_text())


def test_configuration_is_the_published_one(smollm2):
    assert smollm2.config == PRESETS["smollm2-135m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == smollm2.config.parameter_count == 134_515_008


def test_records_say_what_the_weights_are(smollm2):
    assert smollm2.source == Source("Q4_1", "Apache-2.0")
    assert model_fields(smollm2) == {
        "model_id": "smollm2-135m", "model_weights": "Q4_1", "model_license": "Apache-2.0", "dtype": "float32",
    }  # fmt: skip


def test_token_ids_of_awkward_texts(smollm2, texts):
    assert len(texts["texts"]) >= 200
    differ = [text for text, ids in texts["texts"] if smollm2.tokenizer.encode(text) != ids]
    assert differ == []


def test_conversations_as_text(smollm2, texts):
    for chat in texts["chats"]:
        assert smollm2.tokenizer.apply_chat_template(chat["messages"]) == chat["open"]
        assert smollm2.tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=False) == chat["closed"]
        assert smollm2.tokenizer.encode_chat(chat["messages"]) == smollm2.tokenizer.encode(chat["open"])


def test_decoding_leaves_special_tokens_out(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.decode(tokenizer.encode("<|im_start|>user\nKäse 漢字 🙂<|im_end|>")) == "user\nKäse 漢字 🙂"


def test_logits(smollm2, expected):
    tokens = expected["tokens"]
    step = Forward(jnp.arange(len(tokens))[None])
    logits = np.asarray(jax.jit(lambda params: smollm2.decoder.apply(params, tokens[None], None, step)[0][0])(smollm2.params))
    assert logits.shape == (256, 49_152)
    top = np.take_along_axis(logits, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(logits[:, expected["column_ids"]], expected["columns"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), expected["logsumexp"], rtol=0, atol=1e-3)


def test_greedy_tokens(smollm2, expected):
    prompts = [[int(i) for i in row if i >= 0] for row in expected["prompts"]]
    made = generate(smollm2, prompts, strategy="full", max_new_tokens=64, stop_tokens=())
    np.testing.assert_array_equal(np.array(made.tokens), expected["greedy"])


def test_titles_say_it_too(smollm2):
    assert model_title(model_fields(smollm2)) == "smollm2-135m (weights Q4_1, Apache-2.0)"
    assert model_title({"model_id": "kvjax-4m", "model_weights": None, "model_license": None}) == "kvjax-4m"
    assert model_title({"model_id": "of an older record"}) == "of an older record"
