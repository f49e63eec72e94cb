"""The attention operation: every implementation and layout against every score at once in NumPy, its statistics, and its memory."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.attention import Keys, Mask, Observe, api, attention, page_table, scores, tokens, xla
from kvjax.kernels.dispatch import UnsupportedError

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
OBSERVES = [Observe(group, reduce, last) for group in ("sum", "first", "max") for reduce in ("sum", "max") for last in (None, 3)]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Dims: B rows, S queries, K keys of a row, H and Hkv heads, D head dim. Where nothing is seen, keys are NaN and values large."""

    q: np.ndarray  # [B, S, H, D]
    k: np.ndarray  # [B, K, Hkv, D]
    v: np.ndarray
    query: np.ndarray  # [B, S], positions
    key: np.ndarray  # [B, h, K], positions, -1 where there is none
    counted: np.ndarray  # [B, S]

    def heads(self) -> tuple[int, int]:
        return self.k.shape[2], self.q.shape[2] // self.k.shape[2]


def expected(
    at: Problem, scale: float, window: int | None = None, softcap: float | None = None, sinks: np.ndarray | None = None,
    observe: Sequence[Observe] = (),
):  # fmt: skip
    """Output [B, S, H, D] and statistics [B, Hkv, K], in float64, a row and a head at a time."""
    (heads, group), out = at.heads(), np.zeros(at.q.shape)
    shape = (at.q.shape[0], heads, group, at.q.shape[1], at.k.shape[1])
    probability = np.zeros(shape)
    for b, h, g, s in np.ndindex(shape[:4]):
        position = at.key[b, min(h, at.key.shape[1] - 1)]
        seen = (position >= 0) & (position <= at.query[b, s])
        if window is not None:
            seen &= position > at.query[b, s] - window
        if not seen.any():
            continue
        logits = scale * at.k[b, seen, h].astype(np.float64) @ at.q[b, s, h * group + g].astype(np.float64)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h * group + g]))
        probability[b, h, g, s, seen] = weights / total
        out[b, s, h * group + g] = weights / total @ at.v[b, seen, h].astype(np.float64)
    observed = []
    for what in observe:
        last = np.where(at.counted, at.query, -1).max(1)
        counts = at.counted if what.last is None else at.counted & (at.query > last[:, None] - what.last)
        p = np.where(counts[:, None, None, :, None], probability, 0)
        p = {"sum": p.sum(2), "first": p[:, :, 0], "max": p.max(2)}[what.group]
        observed.append(p.sum(2) if what.reduce == "sum" else p.max(2))
    return out, observed


def random_problem(rng: np.random.Generator, batch=2, queries=23, keys=41, heads=2, group=3, dim=8, per_head=True, start=None) -> Problem:
    """A chunk of a prompt, or one query a row, over keys in any order with gaps."""
    q, k, v = (
        rng.standard_normal((batch, n, h, dim)).astype(np.float32) for n, h in ((queries, heads * group), (keys, heads), (keys, heads))
    )
    start = keys - 1 if queries == 1 else start  # of a decode step, no token is later than it
    first = rng.integers(0, keys - queries, batch) if start is None else np.full(batch, start)
    query = (first[:, None] + np.arange(queries)).astype(np.int32)
    key = np.full((batch, heads if per_head else 1, keys), -1, np.int32)
    for b, h in np.ndindex(key.shape[:2]):
        held = rng.random(keys) < 0.8
        held[query[b]] = True
        slots = rng.permutation(keys)
        key[b, h, slots[: held.sum()]] = np.flatnonzero(held)
    empty = np.broadcast_to(key < 0, (batch, heads, keys)).swapaxes(1, 2)[..., None]
    return Problem(q, np.where(empty, np.nan, k), np.where(empty, 1e3, v), query, key, rng.random((batch, queries)) < 0.8)


def in_layout(at: Problem, layout: str, rng: np.random.Generator, extents: int = 1) -> Keys:
    """The keys of a problem as they would lie: a page of 6 slots in any place of the pool, or a row each."""
    if layout == "tokens":
        return tokens(jnp.asarray(at.k), jnp.asarray(at.v))
    batch, length, heads, dim = at.k.shape
    size = 6 if layout.startswith("paged") else length
    count = -(-length // size)
    spare = ((0, 0), (0, count * size - length), (0, 0), (0, 0))
    k, v = (np.pad(x, spare).reshape(batch, count, size, heads, dim).swapaxes(2, 3) for x in (at.k, at.v))  # [B, T, Hkv, Z, D]
    k, v = (x.reshape(-1, heads, size, dim) for x in (k, v))
    table = None
    if layout.startswith("paged"):
        num_pages = batch * count + 3
        pages = rng.permutation(num_pages)[: batch * count].reshape(batch, count)
        whole = [np.full((num_pages, *x.shape[1:]), np.nan if x is k else 0, np.float32) for x in (k, v)]
        for pool, x in zip(whole, (k, v), strict=True):
            pool[pages.reshape(-1)] = x
        (k, v), table = whole, page_table(jnp.asarray(pages, jnp.int32), num_pages)
    columns = layout.endswith("columns")
    k = k.swapaxes(2, 3) if columns else k
    cuts = [len(k) // 4, len(k) // 2][: extents - 1]
    parts = (tuple(jnp.asarray(part) for part in np.split(x, cuts)) for x in (k, v))
    return Keys(*parts, table, "columns" if columns else "rows")


def padded(at: Problem, keys: Keys) -> jax.Array:
    """The positions of a problem's keys, for all slots there are."""
    spare = keys.capacity - at.key.shape[-1] if keys.layout != "tokens" else 0
    return jnp.pad(jnp.asarray(at.key), ((0, 0), (0, 0), (0, spare)), constant_values=-1)


@partial(jax.jit, static_argnames=("observe", "window", "softcap", "scale", "implementation", "residuals"))
def attend(q, keys, query, key, counted, sinks=None, window=None, **options: Any):
    return attention(q, keys, Mask(query, key, counted=counted, window=window), sinks=sinks, **options)


# ------------------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("block", [5, 64])
@pytest.mark.parametrize(("batch", "length", "heads", "group", "dim"), [(1, 1, 1, 1, 4), (2, 83, 2, 3, 8), (1, 130, 3, 1, 6)])
def test_a_prompt(batch, length, heads, group, dim, block, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", block)
    rng = np.random.default_rng()
    q, k, v = (rng.standard_normal((batch, length, n, dim)).astype(np.float32) for n in (heads * group, heads, heads))
    query = np.broadcast_to(np.arange(length), (batch, length))
    at = Problem(q, k, v, query, query[:, None], rng.random((batch, length)) < 0.8)
    run = jax.jit(lambda q, k, v, counted: attention(q, tokens(k, v), Mask(counted=counted), observe=OBSERVES))
    found, (want, observed) = run(at.q, at.k, at.v, at.counted), expected(at, dim**-0.5, observe=OBSERVES)
    np.testing.assert_allclose(found.out, want, atol=2e-6)
    for what, got, one in zip(OBSERVES, found.observed, observed, strict=True):
        np.testing.assert_allclose(got, one, atol=1e-5, err_msg=str(what))


@pytest.mark.parametrize("layout", ["tokens", "columns", "rows", "paged columns", "paged rows"])
@pytest.mark.parametrize("per_head", [True, False])
def test_a_chunk_over_keys_in_any_order_with_gaps(layout, per_head):
    rng = np.random.default_rng()
    at = random_problem(rng, per_head=per_head)
    keys = in_layout(at, layout, rng, extents=3 if layout == "paged columns" else 1)
    found = attend(at.q, keys, at.query, padded(at, keys), at.counted, observe=tuple(OBSERVES))
    want, observed = expected(at, 8**-0.5, observe=OBSERVES)
    np.testing.assert_allclose(found.out, want, atol=5e-6)
    for what, got, one in zip(OBSERVES, found.observed, observed, strict=True):
        np.testing.assert_allclose(got[..., :41], one, atol=1e-5, err_msg=str(what))


@pytest.mark.parametrize(
    "options", [dict(window=7), dict(softcap=1.5), dict(scale=0.7), dict(sinks=True), dict(window=3, sinks=True)], ids=str
)
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("layout", ["tokens", "columns", "paged columns"])
def test_windows_caps_scales_and_sinks(layout, queries, options):
    rng = np.random.default_rng()
    at = random_problem(rng, queries=queries, per_head=False)
    at = dataclasses.replace(at, counted=np.ones_like(at.counted))
    keys = in_layout(at, layout, rng)
    sinks = rng.standard_normal(6).astype(np.float32) if "sinks" in options else None
    rest = {name: value for name, value in options.items() if name != "sinks"}
    found = attend(at.q, keys, at.query, padded(at, keys), at.counted, sinks, observe=(Observe(),), **rest)
    want, (observed,) = expected(at, **({"scale": 8**-0.5} | rest), sinks=sinks, observe=[Observe()])
    np.testing.assert_allclose(found.out, want, atol=5e-6)
    np.testing.assert_allclose(found.observed[0][..., :41], observed, atol=1e-5)


def test_what_a_query_sees_may_be_said_outright():
    rng = np.random.default_rng()
    at = random_problem(rng, queries=1)
    seen = (at.key >= 0) & (rng.random(at.key.shape) < 0.5)
    seen[..., 0] |= ~seen.any(-1)
    at = dataclasses.replace(at, k=np.nan_to_num(at.k), key=np.where(seen, 0, -1))
    for layout in ("tokens", "columns", "rows", "paged columns"):
        keys = in_layout(at, layout, rng)
        visible = padded(at, keys) >= 0
        found = attention(jnp.asarray(at.q), keys, Mask(jnp.asarray(at.query), visible))
        np.testing.assert_allclose(found.out, expected(at, 8**-0.5)[0], atol=5e-6)


# -------------------------------------------------------------------------------------------------------------------- decode steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128)])
@pytest.mark.parametrize(
    ("layout", "extents"), [("columns", 1), ("rows", 1), ("paged columns", 1), ("paged columns", 3), ("paged rows", 1)]
)
@pytest.mark.parametrize("implementation", ["xla", "xla_cpu"])
def test_a_step(implementation, layout, extents, group, dim, dtype):
    if implementation == "xla_cpu" and layout == "paged rows":
        pytest.skip("it is for kernels")
    rng = np.random.default_rng()
    at = random_problem(rng, 3, 1, 41, 2, group, dim)
    rounded = {name: np.asarray(getattr(at, name), jnp.dtype(dtype)).astype(np.float32) for name in ("q", "k", "v")}
    at = dataclasses.replace(at, **rounded)
    keys = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, in_layout(at, layout, rng, extents))
    counted = np.ones((3, 1), bool)
    observe = (Observe(), Observe("first"), Observe("max"))
    found = attend(at.q.astype(jnp.dtype(dtype)), keys, at.query, padded(at, keys), counted, observe=observe, implementation=implementation)
    want, observed = expected(dataclasses.replace(at, counted=counted), dim**-0.5, observe=observe)
    np.testing.assert_allclose(np.asarray(found.out, np.float32), want, atol=TOLERANCE[dtype])
    for got, one in zip(found.observed, observed, strict=True):
        np.testing.assert_allclose(got[..., :41], one, atol=TOLERANCE[dtype])


def test_residuals_are_logits_and_their_sum():
    rng = np.random.default_rng()
    at = random_problem(rng, 3, 1)
    keys = in_layout(at, "rows", rng)
    found = attend(at.q, keys, at.query, padded(at, keys), np.ones((3, 1), bool), residuals=True)
    logits, lse = found.residuals
    probability = np.where(np.asarray(logits) > -1e29, np.exp(np.asarray(logits) - np.asarray(lse)[..., None]), 0)
    at = dataclasses.replace(at, counted=np.ones((3, 1), bool))
    np.testing.assert_allclose(probability.sum(2), expected(at, 8**-0.5, observe=[Observe()])[1][0], atol=1e-5)


@pytest.mark.parametrize(("layout", "extents"), [("columns", 1), ("rows", 1), ("paged columns", 3), ("paged rows", 1), ("tokens", 1)])
def test_scores_are_the_logits_of_every_slot(layout, extents):
    rng = np.random.default_rng()
    at = random_problem(rng, 3, 1)
    at = dataclasses.replace(at, k=np.nan_to_num(at.k))
    got = np.asarray(scores(jnp.asarray(at.q), in_layout(at, layout, rng, extents)))[..., :41]
    want = np.einsum("bngd,bknd->bngk", at.q[:, 0].reshape(3, 2, 3, 8), at.k) * 8**-0.5
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_no_more_than_the_first_slots_are_read():
    rng = np.random.default_rng()
    at = random_problem(rng, 2, 9, 40, per_head=False, start=3)
    key = np.where(np.arange(40) < 12, np.arange(40), -1)[None, None].repeat(2, 0)
    at = dataclasses.replace(at, k=np.nan_to_num(at.k), v=at.v % 1.0, key=key)
    for layout in ("columns", "rows", "paged columns", "paged rows"):
        keys = dataclasses.replace(in_layout(at, layout, rng), most=12)
        found = attention(jnp.asarray(at.q), keys, Mask(jnp.asarray(at.query), length=jnp.array([12, 12])), observe=[Observe()])
        assert found.observed[0].shape[-1] == 12
        np.testing.assert_allclose(found.out, expected(at, 8**-0.5)[0], atol=5e-6)


def test_what_cannot_be_run_is_refused():
    q, k = jnp.zeros((1, 1, 3, 8)), jnp.zeros((1, 5, 2, 8))
    with pytest.raises(ValueError, match=r"H a multiple of 2 kv heads; got \(1, 1, 3, 8\)"):
        attention(q, tokens(k, k))
    with pytest.raises(UnsupportedError, match="xla_cpu cannot run this: it reads pages whose keys stand transposed"):
        attention(q[:, :, :2], tokens(k, k), implementation="xla_cpu")
    assert [x.name for x in api.OPERATION.implementations] == ["mosaic_gpu", "mosaic_tpu", "xla_cpu", "xla"]


# --------------------------------------------------------------------------------------------------------- gradients, memory, programs


def test_blocks_change_no_gradient(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 5)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 12, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    blocked = jax.grad(lambda q, k, v: jnp.sin(attention(q, tokens(k, v)).out).sum(), argnums=(0, 1, 2))
    plain = jax.grad(lambda *x: jnp.sin(jax.nn.dot_product_attention(*x, is_causal=True)).sum(), argnums=(0, 1, 2))
    for got, want in zip(jax.jit(blocked)(q, k, v), jax.jit(plain)(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def lowered(length: int, observe: Sequence[Observe]):
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (4, 2))
    counted = jax.ShapeDtypeStruct((1, length), bool)
    return jax.jit(lambda q, k, v, counted: attention(q, tokens(k, v), Mask(counted=counted), observe=observe)).lower(q, k, k, counted)


@pytest.mark.parametrize("observe", [(), (Observe(),)], ids=["plain", "statistics"])
def test_scratch_memory_of_a_prompt_grows_with_its_length_and_not_its_square(observe):
    def scratch(length: int) -> int:
        analysis = lowered(length, observe).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert scratch(1024) < 1.5 * 4 * scratch(256)


@pytest.mark.parametrize("observe", [(), (Observe(),)], ids=["plain", "statistics"])
def test_the_program_of_a_prompt_does_not_grow_with_it(observe):
    short, long, longest = (len(lowered(length, observe).as_text().splitlines()) for length in (512, 2048, 16384))
    assert short < long  # one step, for long prompts
    assert longest <= 1.02 * long
