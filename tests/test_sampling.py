"""Settings as arrays: what a row chooses is what its own settings say, and programs do not depend on them."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from kvjax import InputError, Sampling, generate
from kvjax.cache import Full, Strategy, host
from kvjax.generation import _next_token, first_token, unrolled_steps
from kvjax.sampling import NOT_FINITE, SamplingArrays, as_arrays, choose

SETTINGS = [
    Sampling(),
    *(Sampling(t, k, p) for t, k, p in itertools.product((0.3, 0.7, 1.0, 1.7), (0, 1, 4, 50, 10**6), (0.05, 0.5, 0.9, 1.0))),
]


def constant(sampling: Sampling, logits, seeds, positions):
    """The same choice with the settings compiled in, as constants, and with `top_k` of JAX."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -1e30, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        logits = jnp.where(logits < jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True), -1e30, logits)
    keys = [jax.random.fold_in(jax.random.key(seed), position) for seed, position in zip(seeds, positions, strict=True)]
    return jnp.stack([jax.random.categorical(key, row) for key, row in zip(keys, logits, strict=True)])


def mixed(rows: int, vocab: int = 300):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (rows, vocab)), jnp.float32)
    return logits, rng.integers(0, 2**31, rows).astype(np.int32), rng.integers(0, 10_000, rows).astype(np.int32)


def test_a_row_draws_what_its_settings_draw_as_constants():
    each, picked = 4, np.random.default_rng().permutation(len(SETTINGS) - 1)[:9] + 1
    settings = [Sampling(), *(SETTINGS[i] for i in picked)]  # other ones every time: each compiles programs of its own
    logits, seeds, positions = mixed(each * len(settings))
    found = np.asarray(jax.jit(choose)(logits, positions, as_arrays([s for s in settings for _ in range(each)], seeds)))
    for i, sampling in enumerate(settings):
        own = slice(i * each, (i + 1) * each)
        alone = jax.jit(lambda *arguments, sampling=sampling: constant(sampling, *arguments))(logits[own], seeds[own], positions[own])
        assert found[own].tolist() == alone.tolist(), sampling
        assert found[own].tolist() == jax.jit(sampling.choose)(logits[own], seeds[own], positions[own]).tolist(), sampling


LOGITS = np.log([0.02, 0.28, 0.1, 0.2, 0.2, 0.05, 0.15])


def expected(sampling: Sampling) -> np.ndarray:
    """Probabilities, by the definitions: the k most likely tokens (and who ties with them), the fewest of those that reach top_p."""
    if not sampling.temperature:
        return np.eye(len(LOGITS))[LOGITS.argmax()]
    probs = np.exp(LOGITS / sampling.temperature)
    if sampling.top_k:
        probs[probs < np.sort(probs)[-min(sampling.top_k, len(probs))]] = 0
    probs /= probs.sum()
    kept, reached = np.zeros(len(probs), bool), 0.0
    for token in np.argsort(-probs, kind="stable"):
        if reached >= sampling.top_p:
            break
        kept[token], reached = True, reached + probs[token]
    probs[(probs < probs[kept].min()) | (probs == 0)] = 0
    return probs / probs.sum()


def test_draws_of_a_mixed_batch_follow_the_distribution_of_each_row():
    """Ten thousand draws of each setting, all in one call, by a chi-square test."""
    settings = [Sampling(t, k, p) for t, k, p in itertools.product((0.6, 1.0, 2.0), (0, 1, 2, 3, 5), (0.25, 0.6, 0.95, 1.0))] + [Sampling()]
    count = 10_000
    seeds = np.arange(count * len(settings), dtype=np.int32)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (len(seeds), len(LOGITS)))
    arrays = as_arrays([s for s in settings for _ in range(count)], seeds)
    found = np.asarray(jax.jit(choose)(logits, np.full(len(seeds), 3, np.int32), arrays)).reshape(len(settings), count)
    for sampling, tokens in zip(settings, found, strict=True):
        counts, probs = np.bincount(tokens, minlength=len(LOGITS)), expected(sampling)
        assert not counts[probs == 0].any(), sampling
        if (probs > 0).sum() > 1:
            assert chisquare(counts[probs > 0], count * probs[probs > 0]).pvalue > 1e-4, sampling


def test_the_smallest_top_p_is_greedy():
    logits, seeds, positions = mixed(50)
    assert (np.asarray(Sampling(5.0, top_p=1e-300).choose(logits, seeds, positions)) == np.asarray(logits).argmax(-1)).all()


def test_rows_do_not_depend_on_neighbours_that_sample_or_are_broken():
    logits, seeds, positions = mixed(6)
    samplings = [Sampling(), Sampling(1.0), Sampling(), Sampling(2.0, 5, 0.9), Sampling(), Sampling(0.7)]
    whole = np.asarray(choose(logits, positions, as_arrays(samplings, seeds)))
    assert (whole[::2] == np.asarray(choose(logits, positions))[::2]).all()
    broken = logits.at[1, 7].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(-jnp.inf)
    found = np.asarray(choose(broken, positions, as_arrays(samplings, seeds)))
    assert (found[[1, 2, 3]] == NOT_FINITE).all()
    assert (found[[0, 4, 5]] == whole[[0, 4, 5]]).all()


def primitives(jaxpr, inside: bool = False) -> set[tuple[str, bool]]:
    """Names of all that a program computes, and whether it stands in a branch."""
    found = set()
    for equation in jaxpr.eqns:
        found.add((equation.primitive.name, inside))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(part := getattr(value, "jaxpr", value), "eqns"):
                found |= primitives(part, inside or equation.primitive.name == "cond")
    return found


def test_what_a_call_does_not_want_is_not_computed():
    """A program of greedy rows draws nothing; that of others sorts in a branch alone, which is taken where a row has top_k or top_p."""
    logits, seeds, positions = mixed(4)
    greedy = {name for name, _ in primitives(jax.make_jaxpr(choose)(logits, positions, as_arrays([Sampling()] * 4, seeds)).jaxpr)}
    assert "argmax" in greedy
    assert not greedy & {"sort", "cumsum", "cond"}
    assert not any("random" in name or "threefry" in name for name in greedy)
    sampled = primitives(jax.make_jaxpr(choose)(logits, positions, as_arrays([Sampling(1.0)] * 4, seeds)).jaxpr)
    assert {inside for name, inside in sampled if name == "sort"} == {True}


def test_arrays_on_the_host():
    arrays = SamplingArrays.of([Sampling()] * 3, np.zeros(3))
    assert arrays.rows([0, 2], 4) is None
    assert arrays.rows([], 2) is None
    arrays.put(1, Sampling(0.5, 7, 0.25), 9)
    assert arrays.rows([0, 2], 4) is None
    rows = arrays.rows([2, 1], 4)
    assert rows is not None
    assert rows.temperature.tolist() == [0, 0.5, 0, 0]
    assert (rows.top_k[1], rows.top_p[1], rows.seed[1]) == (7, 0.25, 9)
    arrays.put(1, Sampling(), 0)
    assert rows.temperature[1] == 0.5, "a call keeps what it was given"
    assert {x.dtype.name for x in jax.tree.leaves(rows)} == {"float32", "int32"}


# ------------------------------------------------------------------------------------------------------------------------ in generation

OWN = [Sampling(1.5), Sampling(), Sampling(3.0, top_k=20), Sampling(2.0, top_p=0.8), Sampling(4.0, 30, 0.9)]
PROMPTS = [list(np.random.default_rng(n).integers(0, 256, n)) for n in (20, 7, 13, 9, 16)]


@pytest.mark.parametrize("stringing", ["unroll", "calls"])
@pytest.mark.parametrize("strategy", ["full", "h2o(heavy=3,recent=4)", Strategy(Full(), host("driven"))], ids=str)
def test_rows_of_a_batch_generate_what_each_does_alone(byte_model, strategy, stringing):
    model = dataclasses.replace(byte_model, stringing=stringing)
    options = dict(strategy=strategy, max_new_tokens=9, stop_tokens=())
    tokens = generate(model, PROMPTS, sampling=OWN, seed=[11, 12, 13, 14, 15], steps_per_call=3, **options).tokens
    greedy = generate(model, PROMPTS, **options).tokens
    assert [a == b for a, b in zip(tokens, greedy, strict=True)] == [False, True, False, False, False]
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], sampling=OWN[i], seed=11 + i, **options).tokens == [tokens[i]]


@pytest.mark.parametrize("stringing", ["unroll", "calls"])
def test_other_settings_compile_nothing(byte_model, stringing):
    model = dataclasses.replace(byte_model, stringing=stringing)
    sizes = []
    for sampling in (Sampling(1.0), Sampling(0.5, 3, 0.9), OWN, OWN[::-1], Sampling(2.0, top_p=0.3)):
        generate(model, PROMPTS, sampling=sampling, max_new_tokens=5, steps_per_call=4)
        sizes.append([function._cache_size() for function in (first_token, unrolled_steps, _next_token)])
    assert sizes[0][0] > 0
    assert sizes == sizes[:1] * 5


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([Sampling()] * 3, "3 samplings for 5 prompts; give one each, or a single one"),
        ([], "0 samplings for 5 prompts"),
        ([Sampling()] * 4 + [0.5], "sampling is float; write for example kvjax.Sampling(temperature=0.8)"),
        ({"temperature": 0.8}, "sampling is dict; write for example"),
        (None, "sampling is NoneType; write for example"),
    ],
)
def test_samplings_are_checked(byte_model, sampling, message):
    with pytest.raises(InputError, match=re.escape(message)):
        generate(byte_model, PROMPTS, sampling=sampling)
