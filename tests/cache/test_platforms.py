"""Stores as cards compute with them, here with the operations' XLA forms: conformance, and the same tokens kept, read and fetched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import Device

from kvjax.cache import H2O, CacheShape, Full, InfiniGen, KVState, OracleTopK, Policy, Store, Strategy, Streaming, View, dense, host, paged
from kvjax.testing import check_strategy
from kvjax.testing.driver import SHAPE, decode_call, random_tokens, run

FULL, STREAMING, HEAVY, TOP = Full(), Streaming(sinks=4, window=12), H2O(heavy=8, recent=8), OracleTopK(6)
DENSE, PAGES, LONG_PAGES = dense().on("gpu"), paged(16).on("gpu"), paged(256).on("gpu")
CPU, H200, A100, TPU = Device("cpu", "cpu"), Device("gpu", "NVIDIA H200"), Device("gpu", "NVIDIA A100"), Device("tpu", "TPU v5e")

# --------------------------------------------------------------------------------------------------------------------- conformance

KEPT, CHUNKS, BOUNDED = "equals_masked_full_attention", "chunks_change_nothing", "bounded_chunks_stay_bounded"
UNUSED, RESTS = "unused_memory_never_leaks", "inactive_rows_are_untouched"
CASES: list[tuple[Policy, Store, tuple[str, ...]]] = [
    (FULL, DENSE, (RESTS, UNUSED, "ledger_adds_up")),
    (HEAVY, DENSE, (KEPT, CHUNKS, RESTS, "budget_holds_and_nothing_returns")),
    (STREAMING, DENSE, (BOUNDED,)),
    (H2O(heavy=8, recent=8, group="max"), DENSE, (CHUNKS,)),
    (FULL, PAGES, (UNUSED,)),
    (HEAVY, PAGES, (BOUNDED, UNUSED, "ledger_adds_up")),
    (HEAVY, LONG_PAGES, (KEPT,)),
    (HEAVY, host("device").on("gpu"), (KEPT,)),
    (InfiniGen(alpha=2.0, budget=8, full_layers=0), host("device").on("gpu"), (UNUSED,)),
    (TOP, PAGES, (KEPT,)),
    (InfiniGen(alpha=2.0, budget=6, pool=12, full_layers=0), host("jit").on("gpu"), (KEPT,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "store", "checks"), CASES, ids=[f"{p.describe()}-{s.name}" for p, s, _ in CASES])
def test_conforms(policy, store, checks):
    report = check_strategy(policy, store, checks=checks)
    assert [outcome.skipped for outcome in report.outcomes] == [None] * len(checks)


# ------------------------------------------------------------------------------------------------------------------ beside the others


@pytest.mark.parametrize("store", [DENSE, PAGES], ids=lambda store: store.name)
@pytest.mark.parametrize("policy", [HEAVY, H2O(heavy=0.1, recent=0.2)], ids=lambda policy: policy.describe())
def test_h2o_keeps_the_same_tokens_in_the_same_slots(policy, store):
    """Over many steps, in rows of their own lengths and budgets, one of which rests."""
    tokens = random_tokens(np.random.default_rng(5), 4, 140)
    lengths, active = np.array([50, 37, 9, 20]), np.array([True, True, True, False])
    want, got = (run(Strategy(policy, at), tokens, lengths, 80, active=active) for at in (dense(), store))
    assert _fused(Strategy(policy, store), got.states[0])
    for step, (one, other) in enumerate(zip(want.states, got.states, strict=True)):
        expected, found = one.layers[0], other.layers[0]
        slots = expected.position.shape[-1]
        np.testing.assert_array_equal(found.position[..., :slots], expected.position, err_msg=f"step {step}")
        assert (found.position[..., slots:] < 0).all()
        np.testing.assert_array_equal(found.next_slot[active], expected.next_slot[active])
        held = expected.position >= 0
        np.testing.assert_allclose(np.where(held, found.own[..., :slots], 0), np.where(held, expected.own, 0), atol=2e-5)
    np.testing.assert_allclose(got.outs[active], want.outs[active], atol=2e-5)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got.prompt_out[row, :length], want.prompt_out[row, :length], atol=2e-5)


def _fused(strategy: Strategy, kv: KVState) -> bool:
    """Whether a decode step of this strategy has the kernel's scope inside that of eviction."""
    q = jnp.zeros((4, 1, SHAPE.num_kv_heads * SHAPE.group_size, SHAPE.head_dim))
    k = q[:, :, : SHAPE.num_kv_heads]
    text = decode_call.lower(strategy, kv, q, k, k, np.ones(4, bool)).as_text(debug_info=True)
    assert "attend/attention_xla" in text
    return "evict/h2o_evict/h2o_evict_xla" in text


@dataclasses.dataclass(frozen=True)
class Latest(H2O):
    """Prefers later tokens, and says that kernels do not know of it."""

    rule = None

    def priority(self, slots):
        return slots.position.astype(jnp.float32)


@pytest.mark.parametrize("policy", [Latest(heavy=8, recent=8), H2O(8, 8, decode=False), H2O(8, 8, group="first")], ids=repr)
def test_what_declares_no_rule_is_not_fused(policy):
    tokens, lengths = random_tokens(np.random.default_rng(5), 4, 60), np.array([50, 37, 9, 20])
    want, got = (run(Strategy(policy, at), tokens, lengths, 8) for at in (dense(), DENSE))
    assert not _fused(Strategy(policy, DENSE), got.states[0])
    np.testing.assert_allclose(got.outs, want.outs, atol=2e-5)


@pytest.mark.parametrize(
    "policy",
    [
        InfiniGen(alpha=2.0, budget=8, sinks=0, recent=0, group="max"),
        InfiniGen(alpha=3.5, budget=0.3, sinks=2, recent=5, group="max"),
        InfiniGen(alpha=4.0, budget=0.3, sinks=2, recent=5),
        InfiniGen(alpha=np.inf, budget=1.0),
        InfiniGen(alpha=1.0, budget=0.3, recent=70),
    ],
    ids=lambda policy: policy.describe(),
)
def test_infinigen_chooses_the_same_slots(policy):
    """In steps of a half, so that many logits are equal and some lie on the threshold itself; the empty slots hold NaN."""
    rng, strategies = np.random.default_rng(), [Strategy(policy, at) for at in (host("device"), host("device").on("gpu"))]
    shape, columns = CacheShape(1, 3, 2, 16, jnp.dtype(jnp.float32)), policy.partial_columns(16)
    length = np.array([128, 77, 1, 0, 100])
    active = np.arange(5) < 4
    layers = [dataclasses.replace(policy, full_layers=0).init_own(shape, 5, 128, 0) for _ in strategies]
    kv = KVState((), jnp.asarray(length, jnp.int32), jnp.asarray(length, jnp.int32))
    states = [s.layer(s.store.init(shape, 5, 128), shape, 9, kv.length, 128) for s in strategies]
    choose = jax.jit(lambda strategy, layer, q: strategy.select(layer, q, kv, active), static_argnums=0)
    for _ in range(10):
        keys = rng.integers(-2, 3, (5, 3, columns, 128)) / 2
        keys[np.broadcast_to((np.arange(128) >= length[:, None])[:, None, None], keys.shape)] = np.nan
        queries = jnp.asarray(rng.integers(-2, 3, (5, 3, 2, columns)), jnp.float32)
        (slot, count), (kernel_slot, kernel_count) = (
            choose(s, dataclasses.replace(state, own=dataclasses.replace(own, partial=jnp.asarray(keys, jnp.float32))), queries)
            for s, state, own in zip(strategies, states, layers, strict=True)
        )
        assert kernel_count.tolist() == count.tolist()
        for row in range(5):
            np.testing.assert_array_equal(kernel_slot[row, :, : count[row]], slot[row, :, : count[row]])
        assert (kernel_slot < 128).all()


def test_only_the_selection_that_kernels_have_is_fused():
    position = jnp.where(jnp.arange(128) < 50, jnp.arange(128), -1)[None, None]

    def near_top(policy):
        own = dataclasses.replace(policy, full_layers=0).init_own(SHAPE, 1, 128, 0)
        return policy.near_top(View(own, position, jnp.array([50]), jnp.array([50]), jnp.zeros((1, 2, 2, 8))))

    for policy in (InfiniGen(count="batch"), InfiniGen(group="mean"), InfiniGen(alpha=0.0)):
        assert near_top(policy) is None
    rule = near_top(InfiniGen(alpha=5, budget=0.2, sinks=2, recent=2))
    assert (rule.alpha, rule.most.tolist(), rule.limit, np.flatnonzero(rule.always).tolist(), rule.group) == (
        5.0, [10], 25, [0, 1, 48, 49], "mass",
    )  # fmt: skip
    assert near_top(InfiniGen(sinks=0, recent=0)).always is None


# --------------------------------------------------------------------------------------------------------------- which store it is


@pytest.mark.parametrize(
    ("store", "device", "platform"),
    [
        (dense(), CPU, "cpu"),
        (paged(16), CPU, "cpu"),
        (dense(), A100, "cpu"),
        (dense(), H200, "gpu"),
        (paged(16, extents=3), H200, "gpu"),
        (paged(), TPU, "tpu"),
        (host("driven", 2), H200, "gpu"),
    ],
    ids=lambda x: getattr(x, "kind", getattr(x, "name", x)),
)
def test_native_store_of_a_device(store, device, platform):
    strategy = Strategy(FULL, store)
    assert strategy.native(device) == Strategy(FULL, store.on(platform))
    assert strategy.native(device).describe() == strategy.describe()


def test_a_tpu_pads_heads_to_its_lanes():
    for store, pages, slots in ((dense().on("tpu"), 2, 128), (paged(32).on("tpu"), 8, 32)):
        pool = jax.eval_shape(lambda store=store: store.init(SHAPE, 2, 100))
        assert pool.k[0].shape == pool.v[0].shape == (pages, SHAPE.num_kv_heads, slots, 128)
    report = check_strategy(HEAVY, paged(32).on("tpu"), checks=(KEPT,))
    assert report.outcomes[0].skipped is None
