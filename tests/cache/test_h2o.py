"""H2O against a naive implementation of the published definition, kv head by kv head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.attention import Mask, Observe, attention
from kvjax.kernels.attention import tokens as fresh

from kvjax.cache import H2O, CacheShape, Strategy, tokens
from kvjax.testing.driver import decode_call, kept, prefill_call

KV_HEADS, HEAD_DIM = 2, 8
REDUCE = {"sum": lambda p: p.sum(0), "first": lambda p: p[0], "max": lambda p: p.max(0)}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive(q, k, prompt: int, heavy: int, recent: int, group: str) -> list[dict[int, float]]:
    """One kv head: the kept positions and their scores after the prompt and after every later token, in float64.

    Args:
      q: [G, S, D] queries of the group; k: [S, D].
    """

    def cut(score: dict[int, float], newest: int) -> dict[int, float]:
        if len(score) <= heavy + recent:
            return score
        late = [p for p in score if p > newest - recent]
        old = sorted((p for p in score if p <= newest - recent), key=lambda p: (-score[p], p))[:heavy]
        return {p: score[p] for p in sorted(old + late)}

    logits = q @ k.T / np.sqrt(k.shape[-1])
    causal = np.tril(np.ones((prompt, prompt), bool))
    probs = softmax(np.where(causal, logits[:, :prompt, :prompt], -np.inf))
    columns = REDUCE[group](probs).sum(0)
    score = cut({j: float(columns[j]) for j in range(prompt)}, prompt - 1)
    history = [score]
    for t in range(prompt, q.shape[1]):
        held = [*score, t]
        received = REDUCE[group](softmax(logits[:, t, held]))
        score = cut({p: score.get(p, 0.0) + float(received[i]) for i, p in enumerate(held)}, t)
        history.append(score)
    return history


def library(strategy: Strategy, q, k, v, prompt: int) -> list[list[dict[int, float]]]:
    """The same from the library: per step, per kv head."""
    total, heads = q.shape[1], q.shape[2]
    shape = CacheShape(1, KV_HEADS, heads // KV_HEADS, HEAD_DIM, jnp.dtype(jnp.float32))
    kv = strategy.init(shape, [prompt], prompt, total - prompt)
    _, kv = prefill_call(strategy, True, kv, *(x[:, :prompt] for x in (q, k, v)), np.ones((1, prompt), bool))
    history = [scores(kv)]
    for t in range(prompt, total):
        _, kv = decode_call(strategy, kv, *(x[:, t : t + 1] for x in (q, k, v)), np.ones(1, bool))
        history.append(scores(kv))
    return history


def scores(kv) -> list[dict[int, float]]:
    found = np.asarray(kv.layers[0].own)[0]
    return [{position: float(found[head, slot]) for position, slot in kept(kv, 0, head).items()} for head in range(KV_HEADS)]


def random_qkv(seed: int, group: int, length: int):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, length, heads, HEAD_DIM)).astype(np.float32) for heads in (KV_HEADS * group, KV_HEADS, KV_HEADS))
    return 2 * q, k, v


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("group", "reduction"), [(1, "sum"), (2, "sum"), (2, "first"), (2, "max")])
def test_kept_sets_and_scores_are_those_of_the_definition(seed, group, reduction):
    prompt, heavy, recent = 30, 5, 4
    q, k, v = random_qkv(seed, group, prompt + 20)
    found = library(Strategy(H2O(heavy, recent, group=reduction)), q, k, v, prompt)
    for head in range(KV_HEADS):
        queries = q[0, :, head * group : (head + 1) * group].swapaxes(0, 1).astype(np.float64)
        expected = naive(queries, k[0, :, head].astype(np.float64), prompt, heavy, recent, reduction)
        for step, want in enumerate(expected):
            assert found[step][head].keys() == want.keys(), f"step {step}, head {head}"
            np.testing.assert_allclose([found[step][head][p] for p in want], list(want.values()), atol=1e-4)


def test_prompt_shorter_than_the_budget_is_kept_whole():
    q, k, v = random_qkv(0, 2, 14)
    found = library(Strategy(H2O(heavy=5, recent=4)), q, k, v, 3)
    assert [len(step[0]) for step in found] == [3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9]


def test_fractions_are_of_the_prompt_and_fixed_there():
    q, k, v = random_qkv(1, 2, 60)
    assert library(Strategy(H2O(0.1, 0.2)), q, k, v, 40) == library(Strategy(H2O(4, 8)), q, k, v, 40)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.05])
def test_fractions_round_down_to_at_least_one_token(ratio):
    lengths = np.arange(1, 3000)
    expected = [max(1, int(ratio * int(n) + 1e-9)) for n in lengths]
    assert [tokens(ratio, int(n)) for n in lengths] == expected
    np.testing.assert_array_equal(tokens(ratio, jnp.asarray(lengths)), expected)


def test_whole_numbers_are_tokens_whatever_the_prompt():
    assert tokens(12, 5) == 12
    np.testing.assert_array_equal(tokens(12, jnp.array([5, 500])), [12, 12])


def test_no_heavy_share_keeps_the_recent_alone():
    assert H2O(heavy=0.0, recent=0.1).kept_tokens(50) == 5
    q, k, v = random_qkv(2, 2, 25)
    found = library(Strategy(H2O(heavy=0, recent=6)), q, k, v, 20)
    assert [sorted(step[1]) for step in found] == [list(range(n - 6, n)) for n in range(20, 26)]


def test_uniform_attention_favours_early_tokens():
    """Without any preference, key j gathers sum over q >= j of 1 / (q + 1): the first tokens win by construction."""
    length = 50
    _, k, v = random_qkv(3, 2, length)
    q = np.zeros((1, length, 4, HEAD_DIM), np.float32)
    (mass,) = attention(q, fresh(k, v), observe=[Observe()]).observed
    harmonic = np.cumsum((1 / np.arange(1, length + 1))[::-1])[::-1]
    np.testing.assert_allclose(mass[0, 0], 2 * harmonic, rtol=1e-5)
    found = library(Strategy(H2O(heavy=5, recent=5)), q, k, v, length)
    assert list(found[0][0]) == [0, 1, 2, 3, 4, 45, 46, 47, 48, 49]


def test_without_decode_eviction_the_prompt_is_compressed_once():
    prompt = 30
    q, k, v = random_qkv(4, 2, prompt + 10)
    once = library(Strategy(H2O(5, 4, decode=False)), q, k, v, prompt)
    always = library(Strategy(H2O(5, 4)), q, k, v, prompt)
    for head in range(KV_HEADS):
        assert once[0][head] == always[0][head]
        assert set(once[-1][head]) == set(once[0][head]) | set(range(prompt, prompt + 10))


def test_padding_gives_no_mass():
    length, padded = 20, 32
    q, k, v = random_qkv(5, 2, padded)
    valid = jnp.arange(padded)[None] < length
    (mass,) = jax.jit(lambda q, k, v, valid: attention(q, fresh(k, v), Mask(counted=valid), observe=[Observe()]).observed)(q, k, v, valid)
    (alone,) = attention(q[:, :length], fresh(k[:, :length], v[:, :length]), observe=[Observe()]).observed
    np.testing.assert_allclose(mass[..., :length], alone, atol=1e-5)
    assert (np.asarray(mass)[..., length:] == 0).all()
