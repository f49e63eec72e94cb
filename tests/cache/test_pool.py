"""Pages: the conformance kit over them, pages with several readers, prompts in chunks, extents, and their bytes in the ledger."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.attention import Mask, attention, xla_cpu

from kvjax.cache import H2O, Full, KVState, OracleTopK, Policy, Store, Strategy, Streaming, ledger, paged
from kvjax.cache.ledger import Tier
from kvjax.cache.pool import extent_sizes, page_table
from kvjax.errors import SpecError
from kvjax.testing import CHECKS
from kvjax.testing.driver import SHAPE, Tokens, decode_call, random_tokens, run
from tests.cache.kit import assert_conforms, further

TOLERANCE = 2e-5
HEADS = SHAPE.num_kv_heads
TOKEN = 2 * SHAPE.head_dim * 4  # bytes of one token in one kv head
FULL, STREAMING, HEAVY, TOP = Full(), Streaming(sinks=4, window=12), H2O(heavy=8, recent=8), OracleTopK(6)

# --------------------------------------------------------------------------------------------------------------------- conformance

ALL = tuple(CHECKS)
# Small pages in several extents are not asked for donation: a step's partial results of all pages are scratch that outgrows the limit.
DONATION = "donation_leaves_no_copy"
QUICK = tuple(check for check in CHECKS if check != DONATION)  # it compiles four programs
LAYOUT = ("equals_masked_full_attention", "bounded_chunks_stay_bounded", "unused_memory_never_leaks")
CASES: list[tuple[Policy, Store, tuple[str, ...]]] = [
    (FULL, paged(16), ALL),
    (HEAVY, paged(16), QUICK),
    (STREAMING, paged(16), LAYOUT),
    (TOP, paged(16), LAYOUT),
    *((policy, paged(8, extents=3), LAYOUT) for policy in (FULL, HEAVY, TOP)),
    (HEAVY, paged(64, extents=3), ("equals_masked_full_attention", DONATION)),
]


@pytest.mark.parametrize(
    ("policy", "store", "checks"), [*CASES[:1], *further(CASES[1:])], ids=[f"{p.describe()}-{s.page_size}x{s.extents}" for p, s, _ in CASES]
)
def test_built_in_policy_conforms(policy, store, checks):
    assert_conforms(policy, store, checks)


# -------------------------------------------------------------------------------------------------------------------- shared pages


@pytest.mark.parametrize("extents", [1, 3])
@pytest.mark.parametrize("readers", [2, 5])
@pytest.mark.parametrize("policy", [FULL, TOP], ids=lambda policy: policy.describe())
def test_rows_that_share_pages_decode_as_if_they_were_alone(policy, readers, extents):
    """Rows of one prefix, among them one that shares only its first page, between a row of its own and a seat without pages."""
    size, prefix, steps = 8, 3, 12
    rng = np.random.default_rng(readers)
    store = paged(size, extents)
    strategy = Strategy(policy, store)
    lengths = np.array([21, *(24 + np.arange(readers) * 5)[::-1], 13, 0], np.int32)  # the last reader's prompt is the prefix itself
    shares = np.array([0, *[prefix] * readers, 1, 0])
    batch = len(lengths)
    at = np.arange(int(lengths.max()) + steps)
    tokens = random_tokens(rng, batch, len(at))
    same = (at < shares[:, None] * size)[..., None, None]
    tokens = Tokens(*(np.where(same, x[1], x) for x in (tokens.q, tokens.k, tokens.v)))

    kv = strategy.init(SHAPE, lengths, int(lengths.max()), steps, fill=np.nan)
    assert kv.table is not None
    num_pages, most = kv.table.owner.shape[0], kv.table.pages.shape[1]
    free = list(rng.permutation(num_pages))
    table = np.full((batch, most), num_pages, np.int32)
    table[1, :prefix] = [free.pop() for _ in range(prefix)]
    for row in range(batch - 1):
        table[row, : shares[row]] = table[1, : shares[row]]
        own = range(shares[row], store.pages_of(int(lengths[row]) + steps))
        table[row, own] = [free.pop() for _ in own]
    assert free
    shared = page_table(jnp.asarray(table), num_pages)
    kv = dataclasses.replace(kv, table=shared, length=jnp.asarray(lengths))

    fresh = (at < lengths[:, None]) & (at >= np.where(np.arange(batch) == 1, 0, shares * size)[:, None])  # row 1 writes what is shared
    layer = kv.layers[0]
    slot = jnp.broadcast_to(jnp.asarray(at)[:, None], (batch, len(at), 1))
    filled = layer.pool.put(shared, slot, tokens.k, tokens.v, jnp.asarray(fresh)[..., None])
    filled = filled.poisoned(shared, jnp.zeros((batch, HEADS, most * size), bool))
    kv = kv.with_layer(0, dataclasses.replace(layer, pool=filled))

    active = lengths > 0
    alone = run(Strategy(policy), tokens.rows(active), lengths[active], steps).outs
    for step in range(steps):
        now = np.where(active, lengths + step, 0)
        q, k, v = (x[np.arange(batch), now][:, None] for x in (tokens.q, tokens.k, tokens.v))
        out, kv = decode_call(strategy, kv, q, k, v, active)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[active, 0], alone[:, step], atol=TOLERANCE, rtol=0, err_msg=f"step {step}")


# -------------------------------------------------------------------------------------------------------------- prompts in chunks


@pytest.mark.parametrize(("page_size", "extents"), [(8, 1), (8, 3), (24, 1), (150, 1), (150, 3)])
@pytest.mark.parametrize(
    ("starts", "sizes"),
    [((0, 5, 64, 297), (24, 24, 24, 24)), ((8, 128, 0, 289), (24, 1, 7, 0)), ((63, 127, 255, 376), (2, 24, 8, 24))],
    ids=["anywhere", "ragged", "at the ends of pages and turns"],
)
def test_attention_of_a_chunk_is_causal_attention(starts, sizes, extents, page_size):
    """Chunks that begin anywhere, over more slots than are read at a time; keys of slots not written yet are NaN."""
    size, longest = 24, 400
    assert longest > 3 * xla_cpu.SLOTS_AT_A_TIME
    starts, sizes = np.array(starts, np.int32), np.array(sizes)
    rng = np.random.default_rng(0)
    store = paged(page_size, extents)
    tokens = random_tokens(rng, len(starts), longest)
    pool = store.init(SHAPE, len(starts), longest, fill=np.nan)
    pages = store.table(len(starts), longest).pages
    table = page_table(jnp.asarray(rng.permutation(pages.size).astype(np.int32).reshape(pages.shape)), pages.size)

    pool = pool.filled(table, tokens.k, tokens.v, np.arange(longest) < starts[:, None])
    valid = np.arange(size) < sizes[:, None]
    at = np.minimum(starts[:, None] + np.arange(size), longest - 1)
    q, k, v = (x[np.arange(len(starts))[:, None], at] for x in (tokens.q, tokens.k, tokens.v))
    slot = jnp.asarray(starts[:, None] + np.arange(size), jnp.int32)
    pool = pool.put(table, slot[..., None], k, v, valid[..., None])
    out = chunk_call(pool.keys(table), q, slot, jnp.asarray(starts + sizes, jnp.int32))
    want = np.asarray(jax.nn.dot_product_attention(tokens.q, tokens.k, tokens.v, is_causal=True))
    for row, (start, count) in enumerate(zip(starts, sizes, strict=True)):
        np.testing.assert_allclose(out[row, :count], want[row, start : start + count], atol=TOLERANCE, rtol=0)


@jax.jit
def chunk_call(keys, q, slot, length):
    return attention(q, keys, Mask(slot, length=length), implementation="xla_cpu").out


# ------------------------------------------------------------------------------------------------------------ tables and extents


@pytest.mark.parametrize(
    ("num_pages", "extents", "sizes"),
    [
        (10, 1, (10,)),
        (64, 3, (16, 16, 32)),
        (67, 3, (16, 17, 34)),
        (64, 4, (8, 8, 16, 32)),
        (63, 4, (7, 8, 16, 32)),
        (5, 4, (1, 1, 3)),
        (3, 3, (1, 2)),
        (1, 3, (1,)),
        (1, 1, (1,)),
    ],
)
def test_extent_sizes(num_pages, extents, sizes):
    assert extent_sizes(num_pages, extents) == sizes


def test_extents_make_up_the_pool():
    for extents in range(1, 6):
        for num_pages in (*range(1, 10), 16, 33, 100, 1000):
            sizes = extent_sizes(num_pages, extents)
            assert sum(sizes) == num_pages
            assert min(sizes) > 0
            assert len(sizes) == extents if num_pages >= 2 ** (extents - 1) else len(sizes) < extents
            assert all(sizes[i] >= sum(sizes[:i]) for i in range(1, len(sizes)))
            pool = jax.eval_shape(partial(paged(4, extents).pool, SHAPE, num_pages, 4))
            assert [part.shape[0] for part in pool.k] == [part.shape[0] for part in pool.v] == list(sizes)


def test_page_table():
    table = page_table(jnp.array([[3, 0, 6], [3, 5, 1], [6, 6, 6], [5, 6, 6]], jnp.int32), 6)
    assert table.owner.tolist() == [0, 1, 4, 0, 4, 1]
    assert [int(table.index[page]) for page in (0, 1, 3, 5)] == [1, 2, 0, 1]
    assert table.present.tolist() == [[True, True, False], [True, True, True], [False] * 3, [True, False, False]]
    assert table.owned.tolist() == [[True, True, False], [False, True, True], [False] * 3, [False] * 3]
    of_row = table.to_pages(jnp.arange(12).reshape(4, 3))
    assert [int(of_row[page]) for page in (0, 1, 3, 5)] == [1, 5, 0, 4]


def test_page_table_knows_any_id_beyond_the_pool_as_no_page():
    table = page_table(jnp.array([[1, 2, 99]], jnp.int32), 2)
    assert table.present.tolist() == [[True, False, False]]
    assert table.owner.tolist() == [1, 0]


def test_page_without_slots_is_refused():
    with pytest.raises(SpecError, match="page_size=0: a page holds at least one slot; 8 to 128 are usual"):
        paged(0)


# -------------------------------------------------------------------------------------------------------- extents that are not read


def pool_of(pages: list[list[int]], extents: int, num_pages: int = 64) -> tuple[Strategy, KVState, Tokens]:
    """Full-cache rows of 20 tokens in these pages of 8 slots."""
    store = paged(8, extents)
    tokens = random_tokens(np.random.default_rng(1), len(pages), 21)
    lengths = np.full(len(pages), 20, np.int32)
    shared = page_table(jnp.asarray(pages, jnp.int32), num_pages)
    pool = store.pool(SHAPE, num_pages, 8).filled(
        shared, jnp.asarray(tokens.k), jnp.asarray(tokens.v), jnp.asarray(np.arange(21) < lengths[:, None])
    )
    kv = Strategy(FULL, store).init(SHAPE, lengths, 20, 4)
    kv = dataclasses.replace(kv.with_layer(0, dataclasses.replace(kv.layers[0], pool=pool)), table=shared, length=jnp.asarray(lengths))
    return Strategy(FULL, store), kv, tokens


def decode(strategy: Strategy, kv: KVState, tokens: Tokens):
    q, k, v = (jnp.asarray(x[:, 20:]) for x in (tokens.q, tokens.k, tokens.v))
    return jax.jit(lambda kv: strategy.decode(kv.layers[0], q, k, v, kv, jnp.ones(tokens.batch, bool))[0]).lower(kv)


@pytest.mark.parametrize(
    ("pages", "read"),
    [
        ([[3, 2, 1]], [16]),
        ([[4, 5, 18]], [16, 16]),
        ([[0, 1, 2], [40, 7, 4]], [16, 16, 32]),
    ],
)
def test_extents_behind_the_last_page_in_use_are_not_read(monkeypatch, pages, read):
    """Nor is what stands in an extent before it that has no page in use of any consequence."""
    strategy, kv, tokens = pool_of(pages, extents=3)
    want = decode(strategy, kv, tokens).compile()(kv)
    pool = kv.layers[0].pool
    ends = np.cumsum([len(part) for part in pool.k])
    in_use = [bool(np.isin(pages, range(end - len(part), end)).any()) for end, part in zip(ends, pool.k, strict=True)]
    k, v = (tuple(x if used else jnp.full_like(x, jnp.nan) for x, used in zip(parts, in_use, strict=True)) for parts in (pool.k, pool.v))
    kv = kv.with_layer(0, dataclasses.replace(kv.layers[0], pool=dataclasses.replace(pool, k=k, v=v)))

    visited = []
    attend_pages = xla_cpu._attend_pages

    def watched(query, k, *rest):
        jax.debug.callback(lambda: visited.append(k.shape[0]))
        return attend_pages(query, k, *rest)

    monkeypatch.setattr(xla_cpu, "_attend_pages", watched)
    out = decode(strategy, kv, tokens).compile()(kv)
    jax.effects_barrier()
    assert sorted(visited) == read
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(out, want)


def test_compiled_program_has_a_branch_for_every_extent():
    """Nothing above shows what XLA makes of it: computing all branches and choosing afterwards would read everything."""
    branches = {}
    for extents in (1, 3):
        text = decode(*pool_of([[0, 1, 2]], extents)).compile().as_text()
        branches[extents] = [line.count("%") for line in re.findall(r"branch_computations={([^}]*)}", text)]
    assert 3 in branches[3]
    assert 3 not in branches[1]


# ------------------------------------------------------------------------------------------------------------------------ the ledger


def books(policy: Policy, store: Store, lengths: list[int], steps: int):
    strategy = Strategy(policy, store)
    tokens = random_tokens(np.random.default_rng(0), len(lengths), max(lengths) + steps)
    return ledger(strategy, run(strategy, tokens, np.array(lengths), steps).states[-1])


def test_ledger_of_the_full_cache():
    found = books(FULL, paged(16), [20, 12], 4)  # 24 and 16 tokens in 2 and 1 of 2 pages each
    table = (4 + 4 + 4) * 4  # page ids, owners, indices
    slot = HEADS * TOKEN
    assert found.device == Tier(live=(24 + 16) * slot, metadata=2 * 2 * 4 + table, empty=16 * slot, fragmentation=8 * slot)
    assert found.host == Tier()
    assert found.logical == found.device.live
    assert found.bytes_read_per_token == 2 * 16 * slot


def test_ledger_of_h2o():
    found = books(H2O(heavy=3, recent=4), paged(5), [20, 2], 1)  # 8 slots in 2 pages each; 7 tokens in both, 3 in the first
    table = (4 + 4 + 4) * 4
    slot = HEADS * TOKEN
    positions_scores_next = 2 * HEADS * (10 * 4 + 10 * 4 + 4)
    assert found.device == Tier(
        live=(7 + 3) * slot, metadata=positions_scores_next + 2 * 2 * 4 + table, empty=5 * slot, fragmentation=(3 + 2) * slot
    )
    assert found.logical == (21 + 3) * slot
    assert found.kept_fraction == 10 / 24
