"""Blocked attention against the plain one, its statistics against explicit column sums, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Policy
from kvjax.cache.attention import causal_attention, chunk_attention, prompt_attention

SUM = Policy().group_mass


def random_qkv(rng: np.random.Generator, batch: int, length: int, kv_heads: int, group: int, dim: int):
    return tuple(rng.standard_normal((batch, length, heads, dim)).astype(np.float32) for heads in (kv_heads * group, kv_heads, kv_heads))


def probabilities(q, k, position) -> np.ndarray:
    """Causal P [B, Hkv, G, Q, K] in float64; `position` [B, S] of the keys, query i being token i."""
    batch, length, _, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, dim).astype(np.float64)
    logits = np.einsum("bqngd,bknd->bngqk", grouped, k.astype(np.float64)) / np.sqrt(dim)
    logits = np.where(np.arange(length)[None, :, None] >= position[:, None, :], logits.transpose(1, 2, 0, 3, 4), -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return (probs / probs.sum(-1, keepdims=True)).transpose(2, 0, 1, 3, 4)


@pytest.mark.parametrize("block", [5, 16, 64])
@pytest.mark.parametrize(
    ("batch", "length", "kv_heads", "group", "dim"), [(1, 1, 1, 1, 4), (2, 23, 2, 3, 8), (1, 32, 3, 1, 6), (1, 83, 2, 2, 4)]
)
def test_prompt_attention_is_causal_attention(batch, length, kv_heads, group, dim, block):
    rng = np.random.default_rng(length + block)
    q, k, v = random_qkv(rng, batch, length, kv_heads, group, dim)
    counted = rng.random((batch, length)) < 0.7
    out, (mass,) = jax.jit(lambda *x: prompt_attention(*x, (SUM,), block))(q, k, v, counted)
    np.testing.assert_allclose(out, causal_attention(q, k, v), atol=2e-6)
    probs = probabilities(q, k, np.broadcast_to(np.arange(length), (batch, length)))
    np.testing.assert_allclose(mass, np.einsum("bngqk,bq->bnk", probs, counted), atol=1e-5)
    _, nothing = jax.eval_shape(lambda *x: prompt_attention(*x, (), block), q, k, v, counted)
    assert nothing == ()


def test_blocks_change_no_gradient():
    q, k, v = random_qkv(np.random.default_rng(0), 1, 12, 2, 2, 4)
    every = np.ones((1, 12), bool)
    blocked = jax.grad(lambda *x: jnp.sin(prompt_attention(*x, every, block=5)[0]).sum(), argnums=(0, 1, 2))
    plain = jax.grad(lambda *x: jnp.sin(causal_attention(*x)).sum(), argnums=(0, 1, 2))
    for got, want in zip(jax.jit(blocked)(q, k, v), jax.jit(plain)(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("block", [3, 64])
def test_chunk_attention_over_keys_in_any_order_with_gaps(block):
    rng = np.random.default_rng(block)
    batch, length, start, spare = 2, 29, 20, 5
    q, k, v = random_qkv(rng, batch, length, 2, 2, 8)
    want = causal_attention(q, k, v)[:, start:]
    order = rng.permutation(length + spare)
    position = np.where(order < length, order, -1)
    at = np.minimum(order, length - 1)
    keys, values = (np.where((position >= 0)[None, :, None, None], x[:, at], 1e3) for x in (k, v))
    queries = np.broadcast_to(np.arange(start, length), (batch, length - start))
    counted = np.ones_like(queries, bool)
    where = np.broadcast_to(position, (batch, 1, length + spare))
    attend = jax.jit(lambda *x: chunk_attention(*x, SUM, block))
    out, mass = attend(q[:, start:], keys, values, queries, where, counted)
    np.testing.assert_allclose(out, want, atol=2e-6)
    columns = probabilities(q, k, np.broadcast_to(np.arange(length), (batch, length)))[:, :, :, start:].sum((2, 3))
    np.testing.assert_allclose(mass, np.where(position >= 0, columns[:, :, at], 0), atol=1e-5)


def test_chunk_attention_with_other_tokens_per_head():
    """Each kv head sees its own kept set."""
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, 1, 12, 2, 1, 8)
    where = np.where(rng.random((1, 2, 12)) < 0.5, np.arange(12), -1)
    where[..., -1] = 11
    out, _ = chunk_attention(q[:, -1:], k, v, np.array([[11]]), where, np.ones((1, 1), bool))
    for head in range(2):
        held = where[0, head] >= 0
        logits = k[0, held, head] @ q[0, -1, head] / np.sqrt(8)
        probs = np.exp(logits - logits.max())
        np.testing.assert_allclose(out[0, 0, head], probs / probs.sum() @ v[0, held, head], atol=2e-6)


@pytest.mark.parametrize("rules", [(), (SUM,)], ids=["plain", "statistics"])
def test_scratch_memory_of_a_prompt_grows_with_its_length_and_not_its_square(rules):
    def scratch(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (4, 2))
        valid = jax.ShapeDtypeStruct((1, length), bool)
        program = jax.jit(lambda q, k, v, valid: prompt_attention(q, k, v, valid, rules, 64)).lower(q, k, k, valid).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = scratch(256), scratch(1024)
    assert long < 1.5 * 4 * short


@pytest.mark.parametrize("rules", [(), (SUM,)], ids=["plain", "statistics"])
def test_the_program_of_a_prompt_does_not_grow_with_it(rules):
    def size(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (4, 2))
        valid = jax.ShapeDtypeStruct((1, length), bool)
        return len(jax.jit(lambda q, k, v, valid: prompt_attention(q, k, v, valid, rules)).lower(q, k, k, valid).as_text().splitlines())

    assert size(512) < size(2048)  # one step, for long prompts
    assert size(16384) <= 1.02 * size(2048)
