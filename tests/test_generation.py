"""Generation and scoring through the library's front door, on tiny random models."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import InputError, PrefillPlan, Sampling, SpecError, generate, score, stream
from kvjax.cache import Forward, parse_strategy
from kvjax.cache.ledger import nbytes
from kvjax.generation import cache_shape, decode_program, run_prefill
from kvjax.models import Model, load_model

STRATEGIES = ["full", "streaming(sinks=2,window=6)", "h2o(heavy=3,recent=4)", "h2o(heavy=3,recent=4,decode=False)", "oracle_topk(k=5)"]
AMPLE = ["full", "streaming(sinks=2,window=60)", "h2o(heavy=30,recent=30)", "oracle_topk(k=60)"]
LENGTHS, NEW = (20, 7, 13), 12


def random_prompts(model: Model, lengths=LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, n) for n in lengths]


def random_ids(model: Model, rows: int = 2, total: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, total))


def forward(model: Model, ids) -> np.ndarray:
    """Logits [B, S, V] of whole sequences without any cache."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(jax.jit(lambda p, t: model.decoder.apply(p, t, None, Forward(positions))[0])(model.params, ids))


@pytest.fixture(scope="module")
def prompts(byte_model) -> list[np.ndarray]:
    return random_prompts(byte_model)


@pytest.fixture(scope="module")
def greedy(byte_model, prompts) -> list[list[int]]:
    """What the full cache generates."""
    return generate(byte_model, prompts, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("kind", ["byte_model", "opt_model"])
def test_full_cache_is_naive_greedy(kind, request):
    model = request.getfixturevalue(kind)
    prompts = random_prompts(model)
    buffer = np.zeros((len(prompts), max(LENGTHS) + NEW), int)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array(LENGTHS)
    everyone = np.arange(len(prompts))
    for step in range(NEW):
        buffer[everyone, lengths + step] = forward(model, buffer)[everyone, lengths + step - 1].argmax(-1)
    result = generate(model, prompts, max_new_tokens=NEW)
    assert result.tokens == [row[n : n + NEW].tolist() for row, n in zip(buffer, lengths, strict=True)]
    assert (result.texts is None) == (model.tokenizer is None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_row_alone_equals_row_in_a_ragged_batch(byte_model, prompts, strategy):
    together = generate(byte_model, prompts[:2], strategy=strategy, max_new_tokens=NEW).tokens
    for prompt, row in zip(prompts[:2], together, strict=True):
        assert generate(byte_model, [prompt], strategy=strategy, max_new_tokens=NEW).tokens == [row]


def test_result(byte_model):
    result = generate(byte_model, ["import os", "x = 1\n"], strategy="h2o(heavy=3,recent=4)", max_new_tokens=5, steps_per_call=2)
    assert [len(row) for row in result.tokens] == [5, 5]
    assert result.texts == [byte_model.tokenizer.decode(row) for row in result.tokens]
    assert len(result.times) == 3
    assert result.times == sorted(result.times)
    assert result.ledger.device.live == 2 * 7 * byte_model.config.kv_elements_per_token * 4
    again = generate(byte_model, [list(b"import os"), list(b"x = 1\n")], strategy=parse_strategy("h2o(heavy=3,recent=4)"), max_new_tokens=5)
    assert again.tokens == result.tokens


def test_stop_token_ends_its_row_and_is_part_of_it(byte_model, prompts, greedy):
    stop = greedy[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in greedy]
    assert generate(byte_model, prompts, max_new_tokens=NEW, stop_tokens=[stop]).tokens == expected


def test_every_row_stopped_ends_the_stream_early(byte_model, prompts, greedy):
    parts = list(stream(byte_model, prompts[:1], max_new_tokens=NEW, stop_tokens=greedy[0][:1], steps_per_call=1))
    assert len(parts) == 1
    assert parts[0].tokens.tolist() == [greedy[0][:1]]


def test_models_own_stop_tokens_are_the_default(byte_model, prompts, greedy):
    config = dataclasses.replace(byte_model.config, stop_tokens=(greedy[0][0],))
    stopping = Model(config, byte_model.params, byte_model.tokenizer)
    assert generate(stopping, prompts[:1], max_new_tokens=NEW).tokens == [greedy[0][:1]]
    assert len(generate(stopping, prompts[:1], max_new_tokens=NEW, stop_tokens=()).tokens[0]) == NEW


@pytest.mark.parametrize("steps", [1, 5])
def test_calls_of_any_size_give_the_same_tokens(byte_model, prompts, greedy, steps):
    parts = [emitted.tokens for emitted in stream(byte_model, prompts, max_new_tokens=NEW, steps_per_call=steps)]
    assert [part.shape[1] for part in parts] == ([1] * NEW if steps == 1 else [1, 5, 5, 1])
    assert np.concatenate(parts, axis=1).tolist() == greedy
    assert generate(byte_model, prompts, max_new_tokens=NEW, steps_per_call=steps).tokens == greedy


# ---------------------------------------------------------------------------------------------------------------------------- sampling

SKEWED = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))


def draws(sampling: Sampling, count: int = 20_000) -> np.ndarray:
    logits = jnp.broadcast_to(SKEWED, (count, 5))
    return np.asarray(jax.jit(sampling.choose)(logits, jnp.arange(count), jnp.full(count, 3)))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(0.5), np.square([0.4, 0.3, 0.15, 0.1, 0.05]) / 0.285),
        (Sampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(1.0, top_k=99), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(1.0, top_p=0.75), [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        (Sampling(1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0, 0]),
    ],
)
def test_distribution(sampling, expected):
    found = np.bincount(draws(sampling), minlength=5) / 20_000
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert (found[np.asarray(expected) == 0] == 0).all()


def test_top_1_is_greedy(byte_model, prompts, greedy):
    assert generate(byte_model, prompts, max_new_tokens=NEW, sampling=Sampling(1.0, top_k=1)).tokens == greedy


def test_seeds_repeat_and_rows_do_not_depend_on_their_neighbours(byte_model, prompts, greedy):
    sampled = generate(byte_model, prompts, max_new_tokens=NEW, sampling=Sampling(1.0), seed=5).tokens
    assert sampled != greedy
    assert generate(byte_model, prompts, max_new_tokens=NEW, sampling=Sampling(1.0), seed=5, steps_per_call=5).tokens == sampled
    assert generate(byte_model, prompts, max_new_tokens=NEW, sampling=Sampling(1.0), seed=6).tokens != sampled
    assert generate(byte_model, prompts[1:2], max_new_tokens=NEW, sampling=Sampling(1.0), seed=6).tokens == sampled[1:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is not a number >= 0"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_sampling_options_are_checked(options, message):
    with pytest.raises(SpecError, match=message):
        Sampling(**options)


# ----------------------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("kind", ["byte_model", "opt_model"])
@pytest.mark.parametrize("strategy", AMPLE)
def test_score_with_room_for_everything_is_the_forward_pass(kind, strategy, request):
    model = request.getfixturevalue(kind)
    ids = random_ids(model)
    logits = score(model, ids, prompt_len=20, strategy=strategy)
    assert logits.shape == (2, 32 - 20 + 1, model.config.vocab_size)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(model, ids)[:, 19:], atol=1e-4)


def test_score_of_a_prompt_alone(byte_model):
    ids = random_ids(byte_model)
    logits = score(byte_model, ids, prompt_len=32)
    np.testing.assert_allclose(logits, forward(byte_model, ids)[:, -1:], atol=1e-4)


def test_score_feeds_what_generate_generates(byte_model, prompts):
    """Teacher-forcing a strategy's own greedy tokens finds each of them again."""
    for strategy in STRATEGIES[1:3]:
        tokens = generate(byte_model, prompts[:1], strategy=strategy, max_new_tokens=NEW).tokens[0]
        ids = np.concatenate([prompts[0], tokens])[None]
        logits = score(byte_model, ids, prompt_len=len(prompts[0]), strategy=strategy)
        assert logits[0, :-1].argmax(-1).tolist() == tokens


# ------------------------------------------------------------------------------------------------------------------- prompts in chunks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_faithful_chunks_change_nothing(byte_model, strategy):
    ids = random_ids(byte_model)
    whole = score(byte_model, ids, prompt_len=20, strategy=strategy)
    parts = score(byte_model, ids, prompt_len=20, strategy=strategy, prefill=PrefillPlan(chunk=8))
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_faithful_chunks_of_a_ragged_batch(byte_model, prompts, greedy):
    assert generate(byte_model, prompts, max_new_tokens=NEW, prefill=PrefillPlan(chunk=8)).tokens == greedy


@pytest.mark.parametrize(("strategy", "exact"), [("full", True), ("h2o(heavy=30,recent=30)", True), ("h2o(heavy=3,recent=4)", False)])
def test_bounded_chunks_are_exact_while_nothing_is_dropped(byte_model, strategy, exact):
    ids = random_ids(byte_model)
    whole = score(byte_model, ids, prompt_len=20, strategy=strategy)
    parts = score(byte_model, ids, prompt_len=20, strategy=strategy, prefill=PrefillPlan(chunk=8, mode="bounded"))
    assert (float(jnp.abs(parts - whole).max()) < 1e-5) == exact


@pytest.mark.parametrize("mode", ["faithful", "bounded"])
def test_arrays_have_budget_plus_one_slots(byte_model, mode):
    strategy = parse_strategy("h2o(heavy=3,recent=4)")
    ids = random_ids(byte_model)[:, :20].astype(np.int32)
    _, kv = run_prefill(byte_model, strategy, ids, np.array([20, 20], np.int32), NEW, PrefillPlan(8, mode))
    assert {layer.position.shape[-1] for layer in kv.layers} == {8}
    assert {layer.pool.capacity(kv.table) for layer in kv.layers} == {8}


# ----------------------------------------------------------------------------------------------------------------------------- stores


@pytest.fixture(scope="module")
def trained() -> Model:
    return load_model("kvjax-1m", dtype="float32")


@pytest.mark.parametrize("plan", [PrefillPlan(), PrefillPlan(24), PrefillPlan(24, "bounded")], ids=["whole", "faithful", "bounded"])
@pytest.mark.parametrize("spec", ["full", "streaming(sinks=4,window=20)", "h2o(heavy=0.2,recent=0.2)"])
def test_pages_hold_what_dense_slots_hold(trained, spec, plan):
    source = (pathlib.Path(__file__).parent / "conftest.py").read_text()
    options = dict(prompts=[source[:48], source[100:111], source[200:237]], max_new_tokens=17)
    same_as = plan if plan.mode == "bounded" else PrefillPlan()
    dense = generate(trained, strategy=parse_strategy(spec, "dense"), prefill=same_as, **options)
    paged = generate(trained, strategy=parse_strategy(spec, "paged", page_size=8), prefill=plan, **options)
    assert paged.tokens == dense.tokens
    assert paged.ledger.device.live == dense.ledger.device.live


# ------------------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts; give at least one"),
        ("text", "prompts is one string; give a list of prompts"),
        ([""], "prompt 0 is not a non-empty list of token ids"),
        ([[1, 2], []], "prompt 1 is not a non-empty list of token ids"),
        ([[0.5]], "prompt 0 is not a non-empty list of token ids"),
        ([[[1]]], "prompt 0 is not a non-empty list of token ids"),
        ([[256]], "token ids from 256 to 256; model bytes has ids 0 to 255"),
        ([[3, -1]], "token ids from -1 to 3"),
        ([[1] * 250], "250 prompt tokens and 12 new ones exceed the 256 positions of model bytes"),
    ],
)
def test_prompts_are_checked(byte_model, prompts, message):
    with pytest.raises(InputError, match=message):
        generate(byte_model, prompts, max_new_tokens=NEW)


def test_text_needs_a_tokenizer(opt_model):
    with pytest.raises(InputError, match="model tiny-opt has no tokenizer; give token ids instead of text"):
        generate(opt_model, ["text"])


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"steps_per_call": 0}])
def test_counts_are_checked(byte_model, options):
    with pytest.raises(InputError, match="=0 is out of range; give one of at least 1"):
        generate(byte_model, [[1]], **options)


@pytest.mark.parametrize(("shape", "prompt_len"), [((2, 8), 0), ((2, 8), 9), ((8,), 4)])
def test_score_checks_its_lengths(byte_model, shape, prompt_len):
    with pytest.raises(InputError, match="give \\[B, S\\] with 1 <= prompt_len <= S"):
        score(byte_model, np.zeros(shape, int), prompt_len=prompt_len)


def test_score_checks_ids_and_positions(byte_model):
    with pytest.raises(InputError, match="token ids from 256 to 256"):
        score(byte_model, np.full((1, 8), 256), prompt_len=4)
    with pytest.raises(InputError, match="exceed the 256 positions"):
        score(byte_model, np.zeros((1, 300), int), prompt_len=4)


@pytest.mark.parametrize(
    ("plan", "message"), [((0,), "prefill chunk of 0 tokens"), ((4, "lazy"), "unknown prefill mode 'lazy'; choose from faithful, bounded")]
)
def test_plan_is_checked(plan, message):
    with pytest.raises(SpecError, match=message):
        PrefillPlan(*plan)


def test_unknown_strategy(byte_model):
    with pytest.raises(SpecError, match="unknown strategy 'h3o'; choose from full, streaming, h2o, tova, random, infinigen"):
        generate(byte_model, [[1]], strategy="h3o")


# ----------------------------------------------------------------------------------------------------------------- the compiled program


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("spec", ["full", "h2o(heavy=0.4,recent=0.4)"])
def test_decode_updates_the_cache_in_place(byte_model, spec, batch):
    strategy, shape = parse_strategy(spec), cache_shape(byte_model)
    scratch = {}
    for prompt in (256, 1024):
        kv = jax.eval_shape(lambda prompt=prompt: strategy.init(shape, [prompt] * batch, prompt, 16))
        analysis = decode_program(byte_model, strategy, Sampling(), kv, steps=4).memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes >= nbytes(kv)
        scratch[prompt] = analysis.temp_size_in_bytes
        one_layer = nbytes((kv.layers[0].pool.k, kv.layers[0].pool.v))
    assert scratch[1024] - scratch[256] < 0.75 * one_layer
