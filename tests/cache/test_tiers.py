"""Host memory: the conformance kit over it, its transfers against each other and against NumPy, what a fetch moves, its memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import H2O, CacheShape, Full, InfiniGen, OracleTopK, Policy, Store, Strategy, Streaming, host
from kvjax.cache.pool import page_table
from kvjax.cache.strategy import _joined
from kvjax.cache.tiers import Ahead, Host
from kvjax.errors import SpecError
from kvjax.testing.driver import SHAPE, decode_call, guide, random_tokens, run
from tests.cache.kit import assert_conforms, further

FULL, STREAMING, HEAVY, TOP = Full(), Streaming(sinks=4, window=12), H2O(heavy=8, recent=8), OracleTopK(6)
GUESS, LIMITED = InfiniGen(alpha=2.0, budget=8, full_layers=0), InfiniGen(alpha=2.0, budget=6, pool=16, full_layers=0)
JIT, DEVICE = host("jit"), host("device")

# --------------------------------------------------------------------------------------------------------------------- conformance

LAYOUT = ("equals_masked_full_attention", "bounded_chunks_stay_bounded", "unused_memory_never_leaks")
CASES: list[tuple[Policy, Store, tuple[str, ...]]] = [
    (FULL, JIT, ("chunks_change_nothing", "inactive_rows_are_untouched", "unused_memory_never_leaks", "no_retrace", "ledger_adds_up")),
    (HEAVY, JIT, LAYOUT),
    (STREAMING, DEVICE, LAYOUT),
    (TOP, DEVICE, (*LAYOUT, "donation_leaves_no_copy")),
]


@pytest.mark.parametrize(
    ("policy", "store", "checks"), [*CASES[:1], *further(CASES[1:])], ids=[f"{p.describe()}-{s.options['transfer']}" for p, s, _ in CASES]
)
def test_built_in_policy_conforms(policy, store, checks):
    assert_conforms(policy, store, checks)


# ----------------------------------------------------------------------------------------------------------- transfers agree exactly


@pytest.mark.parametrize(
    ("policy", "chunk"), [(FULL, 8), (HEAVY, None), (GUESS, 8), (LIMITED, None)], ids=["full", "h2o", "infinigen", "pool"]
)
def test_transfers_agree_bit_for_bit(policy, chunk):
    """Outputs and every array of every state, in a ragged batch with a row that sits out."""
    tokens = random_tokens(np.random.default_rng(), 3, 45)
    lengths, active = np.array([37, 20, 3]), np.array([True, True, False])
    jit, device = (run(Strategy(policy, store), tokens, lengths, 6, chunk=chunk, active=active) for store in (JIT, DEVICE))
    np.testing.assert_array_equal(jit.prompt_out, device.prompt_out)
    np.testing.assert_array_equal(jit.outs, device.outs)
    for one, other in zip(jit.states, device.states, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    kinds = [trace.states[-1].layers[0].pool.k[0].sharding.memory_kind for trace in (jit, device)]
    assert kinds[0] != kinds[1]


# ---------------------------------------------------------------------------------------------------------- a fetch, against NumPy

SEATS, SLOTS, BATCH = 5, 12, 3


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((SEATS, SHAPE.num_kv_heads, SLOTS, SHAPE.head_dim)).astype(np.float32) for _ in range(2))
    return k, v


def pool_of(store: Store, pool):
    """A pool of these seats, all of them written."""
    k, v = (jnp.asarray(x.swapaxes(1, 2)) for x in pool)
    empty = store.pool(SHAPE, SEATS, SLOTS, fill=np.nan)
    return jax.jit(partial(store.tier.filled, table=None))(empty, k=k, v=v, valid=jnp.ones((SEATS, SLOTS), bool))


@partial(jax.jit, static_argnums=0)
def fetch(tier: Host, pool, table, slot, count, held):
    return tier.fetch(pool, table, slot, count, held)


def seats(rows: np.ndarray):
    return page_table(jnp.asarray(rows, jnp.int32)[:, None], SEATS)


@pytest.mark.parametrize("seated", [False, True])
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize(("transfer", "levels"), [("jit", 4), ("jit", 1), ("device", 3)])
def test_a_fetch_brings_what_is_wanted_and_moves_the_least_size_that_holds_it(pool, transfer, levels, selected, seated):
    store = host(transfer, levels)
    here = pool_of(store, pool)
    rng = np.random.default_rng()
    rows = rng.permutation(SEATS)[:BATCH] if seated else np.arange(BATCH)
    table = seats(rows) if seated else None
    heads, most = SHAPE.num_kv_heads, 7 if selected else SLOTS
    slot = np.stack([[rng.permutation(SLOTS)[:most] for _ in range(heads)] for _ in range(BATCH)]).astype(np.int32)
    where = slot if selected else np.broadcast_to(np.arange(SLOTS), (BATCH, heads, SLOTS))
    sizes = sorted({int(np.ceil(most * (i + 1) / levels)) for i in range(levels)})
    held = np.array([SLOTS, 9, 5], np.int32)
    for largest in range(most + 1):
        count = np.array([largest, largest // 2, 0], np.int32)
        staged = fetch(store.tier, here, table, jnp.asarray(slot) if selected else None, jnp.asarray(count), jnp.asarray(held))
        moved = next(size for size in sizes if size >= largest)
        assert staged.k.shape == (BATCH, heads, most + 1, SHAPE.head_dim)
        for row in range(BATCH):
            for head in range(heads):
                for got, all_of in ((staged.k, pool[0]), (staged.v, pool[1])):
                    want = np.zeros((most + 1, SHAPE.head_dim), np.float32)  # behind what is moved: nothing
                    want[:moved] = all_of[rows[row], head, where[row, head, :moved]]
                    np.testing.assert_array_equal(np.asarray(got)[row, head], want)
                places = np.full(most + 1, SLOTS)
                places[: count[row]] = where[row, head, : count[row]]
                np.testing.assert_array_equal(np.asarray(staged.slot)[row, head], places)
        np.testing.assert_array_equal(staged.traffic, [heads * held.sum(), heads * count.sum(), BATCH * heads * moved])


@pytest.mark.parametrize("selected", [False, True])
def test_the_host_itself_fetches_the_same(pool, selected):
    tier = Host("driven", 3)
    rng = np.random.default_rng(1)
    slot = np.stack([[rng.permutation(SLOTS)[:7] for _ in range(2)] for _ in range(SEATS)]).astype(np.int32)
    count = np.array([5, 2, 0, 1, 4], np.int32)
    selection = (jnp.asarray(slot), jnp.asarray(count)) if selected else None
    got, size = tier.fetch_by_host(pool, selection, count)
    want = fetch(Host("device", 3), pool_of(host("device"), pool), None, None if selection is None else selection[0], count, count)
    for name in ("slot", "k", "v"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert float(want.traffic[2]) == SEATS * 2 * int(size)


@pytest.mark.parametrize(
    ("most", "levels", "sizes"), [(12, 4, [3, 6, 9, 12]), (7, 3, [3, 5, 7]), (3, 4, [1, 2, 3]), (1, 4, [1]), (9, 1, [9])]
)
def test_sizes_of_a_fetch(most, levels, sizes):
    assert Host(levels=levels).sizes(most) == sizes


@pytest.mark.parametrize("transfer", ["jit", "device"])
def test_a_new_token_takes_its_slot_in_pool_and_staging(pool, transfer):
    """Its slot was fetched with the token that gives way: that one is no longer seen, whichever of its places it had."""
    tier = Host(transfer)
    table = seats(np.array([4, 1, 2]))
    slot = jnp.asarray(np.stack([[np.arange(4), np.arange(4) + 5]] * BATCH), jnp.int32)
    new = jnp.asarray([[2, 6], [3, 7], [0, 5]], jnp.int32)
    active = np.array([True, True, False])
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((BATCH, 1, 2, SHAPE.head_dim)).astype(np.float32) for _ in range(2))

    @jax.jit
    def step(here):
        staged = tier.fetch(here, table, slot, jnp.array([4, 3, 0]), jnp.array([SLOTS] * BATCH))
        return tier.put(here, table, new[:, None], k, v, jnp.asarray(active)[:, None, None]), _joined(staged, new, k, v, SLOTS)

    here, staged = step(pool_of(host(transfer), pool))
    want_k, want_v = (x.copy() for x in pool)
    for row, seat in ((0, 4), (1, 1)):
        for head in range(2):
            want_k[seat, head, new[row, head]], want_v[seat, head, new[row, head]] = k[row, 0, head], v[row, 0, head]
    np.testing.assert_array_equal(here.k[0], want_k)
    np.testing.assert_array_equal(here.v[0], want_v)
    for row, (seat, count) in enumerate([(4, 4), (1, 3)]):
        for head in range(2):
            places = np.asarray(staged.slot)[row, head]
            read = places[places < SLOTS].tolist()
            assert sorted(read) == sorted({*np.asarray(slot)[row, head, :count].tolist(), int(new[row, head])})
            for place in np.flatnonzero(places < SLOTS):
                np.testing.assert_array_equal(np.asarray(staged.k)[row, head, place], want_k[seat, head, places[place]])
                np.testing.assert_array_equal(np.asarray(staged.v)[row, head, place], want_v[seat, head, places[place]])


# ------------------------------------------------------------------------------------------------------------------------- what is moved


@pytest.mark.parametrize(
    ("policy", "held"),
    [
        (FULL, [[37, 20], [38, 21], [39, 22], [40, 23], [41, 24]]),
        (HEAVY, [[16, 16]] * 5),
        (H2O(heavy=4, recent=4, decode=False), [[8, 8], [9, 9], [10, 10], [11, 11], [12, 12]]),
        (H2O(heavy=0.1, recent=0.1), [[6, 4]] * 5),
    ],
    ids=lambda value: value.describe() if isinstance(value, Policy) else "",
)
def test_all_that_is_held_is_fetched_and_no_more_than_the_slots_in_use(policy, held):
    """Two rows, five steps: what the books say of a policy that chooses nothing."""
    kv = run(Strategy(policy, DEVICE), random_tokens(np.random.default_rng(0), 2, 42), np.array([37, 20]), 5).states[-1]
    decoded, rows, wanted, moved = np.asarray(kv.layers[0].traffic)
    assert decoded == 10
    assert rows == SHAPE.num_kv_heads * np.sum(held)
    assert rows <= wanted <= rows + SHAPE.num_kv_heads * 10  # a slot that was freed lies between the others
    assert wanted <= moved


# ------------------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("store", [JIT, DEVICE], ids=["jit", "device"])
def test_scratch_of_a_selected_fetch_does_not_grow_with_the_pool(store):
    """Nor does the compiled step copy anything of the pool's shape, and the pool is reused in place."""
    strategy = Strategy(InfiniGen(budget=32, pool=None, full_layers=0), store)
    temps = []
    for capacity in (512, 4096):
        state = jax.eval_shape(partial(strategy.init, SHAPE, [capacity - 8] * 4, capacity - 8, 8))
        q, k = (jax.ShapeDtypeStruct((4, 1, heads, SHAPE.head_dim), jnp.float32) for heads in (4, 2))
        step = jax.jit(decode_call.__wrapped__, static_argnums=0, donate_argnums=1)
        program = step.lower(strategy, state, q, k, k, jax.ShapeDtypeStruct((4,), bool)).compile()
        analysis = program.memory_analysis()
        if analysis is None:
            pytest.skip("this backend has no memory analysis")
        temps.append(analysis.temp_size_in_bytes)
        assert analysis.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        shapes = (f"f32[4,2,{capacity},16]", f"f32[{4 * 2 * capacity},16]")
        copies = [line.split("copy(")[0] for line in (program.as_text() or "").splitlines() if " copy(" in line]
        assert not [line for line in copies if any(shape in line for shape in shapes)]
    grown, keys = temps[1] - temps[0], 4 * 2 * (4096 - 512) * SHAPE.head_dim * 4
    guesses = 4 * 4 * (4096 - 512) * 4  # a guessed logit per query head and slot
    assert grown < min(8 * guesses, 0.9 * 2 * keys), f"scratch grows {grown} bytes, the pool's keys {keys}"


# ------------------------------------------------------------------------------------------------------------------------------- errors


def test_bad_stores():
    with pytest.raises(SpecError, match="unknown transfer 'pigeon'; choose from device, jit, driven"):
        host("pigeon")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="levels=0: a fetch has at least one size"):
        host(levels=0)


def test_bfloat16_is_kept_and_fetched_as_such():
    shape = CacheShape(1, 2, 2, 16, jnp.dtype(jnp.bfloat16))
    strategy = Strategy(GUESS, JIT)
    kv = strategy.init(shape, [4], 4, 2)
    layer = kv.layers[0]
    assert {x.dtype for x in (*layer.pool.k, *layer.pool.v, layer.own.partial)} == {jnp.dtype(jnp.bfloat16)}
    tokens = random_tokens(np.random.default_rng(0), 1, 5)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (tokens.q, tokens.k, tokens.v))

    @jax.jit
    def step(kv):
        _, layer = strategy.prefill(kv.layers[0], q[:, :4], k[:, :4], v[:, :4], kv, jnp.ones((1, 4), bool), True, guide=guide(strategy))
        kv = dataclasses.replace(kv.with_layer(0, layer), length=jnp.array([4]))
        ahead = strategy.look_ahead(-1, lambda: jnp.zeros((1, 2, 2, layer.own.partial.shape[2])), kv, jnp.ones(1, bool))
        out, layer = strategy.decode(kv.layers[0], q[:, 4:], k[:, 4:], v[:, 4:], kv.handed(ahead), jnp.ones(1, bool), guide(strategy))
        return out, ahead, layer

    out, ahead, layer = step(kv)
    assert isinstance(ahead, Ahead)
    assert {x.dtype for x in (out, ahead.k, layer.pool.k[0], layer.own.partial)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(layer.pool.k[0][0, :, :5], k[0].swapaxes(0, 1))
