"""The peer workers of `make bench`: the client alone, the conversion's arithmetic, and, where the peers are installed, their agreement."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.bench.peers import client, prompts, protocol
from experiments.bench.peers.agree import FLOAT16_VARIANTS, equal_tokens
from experiments.bench.peers.make_model import LlamaShape, ModelError, interleave_heads, write_random

SMALL = LlamaShape(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_position=512
)
COMPILED = ("hf-static-compile", "hf-static-freeze")  # minutes on a small machine, left to experiments.bench.peers.agree

ECHO_WORKER = """
import sys
from experiments.bench.peers.protocol import RequestError, serve

def load(words): return {"words": words}
def shout(word):
    print("not a reply")
    return {"word": word.upper()}
def refuse(): raise RequestError("no thanks")
def crash(): sys.exit("the roof fell in")

serve({"load": load, "shout": shout, "refuse": refuse, "crash": crash})
"""


@pytest.fixture
def echo(monkeypatch, tmp_path):
    """A worker without engines, started under this interpreter."""
    (tmp_path / "echo_worker.py").write_text(ECHO_WORKER)
    runner = tmp_path / "python"
    runner.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PWD" exec "{sys.executable}" "$@"\n')
    runner.chmod(0o755)
    monkeypatch.setitem(client.WORKERS, "echo", ("echo_worker", ()))
    with client.start(str(runner), "echo", words=["a"]) as worker:
        yield worker


def test_a_call_gets_its_reply_and_stray_output_does_not_mix_in(echo):
    assert echo.loaded == {"words": ["a"]}
    assert [echo.call("shout", word=word)["word"] for word in ("a", "b")] == ["A", "B"]


@pytest.mark.parametrize(
    ("op", "message"),
    [("refuse", "refuse: no thanks"), ("dance", "unknown op 'dance'; this worker has: load, shout"), ("shout", "TypeError")],
)
def test_a_refused_request_raises_and_the_worker_goes_on(echo, op, message):
    with pytest.raises(client.WorkerError, match=message):
        echo.call(op)
    assert echo.call("shout", word="c") == {"word": "C"}


def test_a_dead_worker_shows_its_last_words(echo):
    with pytest.raises(client.WorkerError, match=r"status 1 during 'crash'(.|\n)*the roof fell in"):
        echo.call("crash")
    with pytest.raises(client.WorkerError, match="the roof fell in"):
        echo.call("shout", word="d")


def test_an_interpreter_that_does_not_start_is_named(tmp_path):
    with pytest.raises(client.WorkerError, match="does not start"):
        client.start(str(tmp_path / "nothing"), "transformers")
    with pytest.raises(client.WorkerError, match=r"there are: transformers, llama\.cpp"):
        client.start(sys.executable, "vllm")


def test_available_without_and_with_a_wrong_interpreter(monkeypatch, tmp_path):
    monkeypatch.delenv(client.PYTHON_VARIABLE, raising=False)
    assert client.available() == client.Peers(None, (), dict.fromkeys(client.WORKERS, "KVJAX_PEERS_PYTHON is not set"))
    monkeypatch.setenv(client.PYTHON_VARIABLE, str(tmp_path / "nothing"))
    assert client.available().workers == ()
    assert all("does not start" in why for why in client.available().missing.values())


def test_prompts_are_the_same_for_any_batch_and_context():
    long = prompts.prompt(3, 40, 8192)
    assert [row[:10] for row in long[:2]] == prompts.prompt(2, 10, 8192)
    assert len({tuple(row) for row in long}) == 3
    assert all(0 <= token < 8192 for row in long for token in row)
    assert len(set(long[0])) > 35


def test_check_prompt_refuses_what_is_not_the_cell():
    protocol.check_prompt([[1, 2], [3, 4]], 2, 2, 5)
    for tokens, message in (([[1, 2]], "1 rows"), ([[1, 2], [3]], "lengths"), ([[1, 2], [3, 5]], r"\[0, 5\)")):
        with pytest.raises(protocol.RequestError, match=message):
            protocol.check_prompt(tokens, 2, 2, 5)


def test_equal_tokens_counts_up_to_the_first_difference():
    assert equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 4


def test_interleaved_heads_rotate_neighbours_as_the_original_rotates_halves():
    heads, dim, width = 3, 8, 5
    generator = np.random.default_rng(0)
    weight, x = generator.standard_normal((heads * dim, width)), generator.standard_normal(width)
    angle = generator.standard_normal(dim // 2)

    def rotate(pairs):  # [heads, dim / 2, 2]
        a, b = pairs[..., 0], pairs[..., 1]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    halves = rotate(np.moveaxis((weight @ x).reshape(heads, 2, dim // 2), 1, -1))
    neighbours = rotate((interleave_heads(weight, heads) @ x).reshape(heads, dim // 2, 2))
    np.testing.assert_allclose(neighbours, halves, atol=1e-12)


def test_a_random_directory_has_every_tensor_and_its_own_shape_back(tmp_path):
    from safetensors.numpy import load_file

    write_random(tmp_path, SMALL)
    assert {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()} == {
        name: shape for name, _, shape in SMALL.tensors()
    }
    assert LlamaShape.from_config(json.loads((tmp_path / "config.json").read_text())) == SMALL


@pytest.mark.parametrize(
    "change",
    [{"model_type": "opt"}, {"attention_bias": True}, {"rope_scaling": {"rope_type": "llama3"}}, {"rope_parameters": {"type": "linear"}}],
)
def test_a_config_beyond_the_converter_is_refused(change):
    with pytest.raises(ModelError, match=r"config\.json"):
        LlamaShape.from_config(SMALL.to_config() | change)


def test_the_benchmark_shape_is_the_preset():
    from kvjax.models.config import preset

    config, shape = preset("bench-32m"), LlamaShape()
    assert sum(int(np.prod(dims)) for _, _, dims in shape.tensors()) == config.parameter_count
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position", "norm_eps"):
        assert getattr(shape, name) == getattr(config, name)


def test_every_pin_is_exact_and_torch_comes_first():
    lines = (Path(client.__file__).parent / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith("torch==")
    assert all(line.count("==") == 1 and " " not in line for line in lines)


needs_peers = pytest.mark.skipif(not os.environ.get(client.PYTHON_VARIABLE), reason=f"{client.PYTHON_VARIABLE} is not set")


@needs_peers
def test_all_variants_continue_alike_and_repeat_themselves(tmp_path):
    """Batches of 1, 2 and 8, two prompts for one cell, and back: greedy tokens equal in every variant and every repetition.

    Every prompt holds id 0, which transformers also knows as the padding token.
    """
    peers = client.available()
    assert peers.python is not None
    assert not peers.missing
    write_random(tmp_path, SMALL, std=0.15)
    requests = [(1, 24, 0), (1, 24, 0), (1, 24, 5), (1, 24, 0), (2, 40, 0), (8, 17, 0)]
    found: dict[str, list] = {}
    for name in peers.workers:
        with client.start(peers.python, name, model=str(tmp_path), threads=1) as worker:
            for variant in (v for v in worker.loaded["decode"] if v not in COMPILED):
                for batch, context, offset in requests:
                    tokens = prompts.prompt(batch, context, SMALL.vocab_size)
                    tokens = [[0, *((token + offset) % SMALL.vocab_size for token in row[1:])] for row in tokens]
                    cell = {"engine": variant, "batch": batch, "context": context, "tokens": tokens}
                    reply = worker.call("decode", steps=8, **cell)
                    assert worker.call("prefill", **cell)["first"] == reply["first"]
                    assert reply["seconds"] > 0
                    found.setdefault(variant, []).append((reply["first"], reply["tokens"]))
            with pytest.raises(client.WorkerError, match="unknown engine"):
                worker.call("decode", engine="vllm", batch=1, context=4, steps=1)
    expected = next(iter(found.values()))
    for variant, got in found.items():
        assert got[0] == got[1] == got[3] != got[2]
        if variant not in FLOAT16_VARIANTS:
            assert got == expected, variant
