"""The stores of a card, here with the operations' XLA forms: conformance, and the same tokens kept, read and fetched as on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import Device

from kvjax.cache import H2O, CacheShape, DenseStore, Full, HostStore, InfiniGen, OracleTopK, PagedStore, Policy, Strategy, Streaming
from kvjax.cache.attention import summed_mass
from kvjax.cache.state import KVState, LayerState
from kvjax.cache.stores import KernelDenseStore, KernelHostStore, KernelPagedStore, Store
from kvjax.testing import check_strategy
from kvjax.testing.driver import SHAPE, decode_call, random_tokens, run

FULL, STREAMING, HEAVY, TOP = Full(), Streaming(sinks=4, window=12), H2O(heavy=8, recent=8), OracleTopK(6)
DENSE, PAGES, LONG_PAGES = KernelDenseStore(), KernelPagedStore(16), KernelPagedStore(256)
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
    (TOP, PAGES, (KEPT,)),
    (HEAVY, KernelHostStore("device"), (KEPT,)),
    (InfiniGen(alpha=2.0, budget=8, full_layers=0), KernelHostStore("device"), (UNUSED,)),
    (InfiniGen(alpha=2.0, budget=6, pool=12, full_layers=0), KernelHostStore("jit"), (KEPT,)),
]


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
    want, got = (run(Strategy(policy, at), tokens, lengths, 80, active=active) for at in (DenseStore(), store))
    assert _fused(Strategy(policy, store), got.states[0])
    for step, (one, other) in enumerate(zip(want.states, got.states, strict=True)):
        expected, found = one.layers[0], other.layers[0]
        slots = expected.position.shape[-1]
        np.testing.assert_array_equal(found.position[..., :slots], expected.position, err_msg=f"step {step}")
        assert (found.position[..., slots:] < 0).all()
        np.testing.assert_array_equal(found.next_slot[active], expected.next_slot[active])
        held = expected.position >= 0
        np.testing.assert_allclose(np.where(held, found.score[..., :slots], 0), np.where(held, expected.score, 0), atol=2e-5)
    np.testing.assert_allclose(got.outs[active], want.outs[active], atol=2e-5)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got.prompt_out[row, :length], want.prompt_out[row, :length], atol=2e-5)


def _fused(strategy: Strategy, kv: KVState) -> bool:
    """Whether a decode step of this strategy has the kernel's scope inside that of eviction."""
    q = jnp.zeros((4, 1, SHAPE.num_kv_heads * SHAPE.group_size, SHAPE.head_dim))
    k = q[:, :, : SHAPE.num_kv_heads]
    text = decode_call.lower(strategy, kv, q, k, k, np.ones(4, bool)).as_text(debug_info=True)
    assert "attend/paged_attention_xla" in text
    return "evict/h2o_evict/h2o_evict_xla" in text


@dataclasses.dataclass(frozen=True)
class Latest(H2O):
    """Prefers later tokens."""

    def priority(self, slots):
        return slots.position.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Fading(H2O):
    """Forgets old attention."""

    def observe(self, score, mass):
        return 0.9 * score + mass


@dataclasses.dataclass(frozen=True)
class Head(H2O):
    """Looks at one query head, by its own means."""

    def group_mass(self, weights, scale):
        return summed_mass(weights[..., -1:, :, :], scale[..., -1:, :])


@dataclasses.dataclass(frozen=True)
class Norms(H2O):
    """Starts with the length of the key."""

    def initial_score(self, k, v):
        return jnp.linalg.norm(k, axis=-1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Narrow(H2O):
    """Reads the latest alone."""

    def readable(self, logits, prompt_length):
        return logits[:, :, :1] > 0


@pytest.mark.parametrize("policy", [Latest(), Fading(), Head(), Norms(), Narrow(), H2O(decode=False), H2O(group="first")], ids=repr)
def test_only_the_rule_itself_is_fused(policy):
    assert policy.fused_eviction(jnp.array([100])) is None
    budget, recent = H2O(heavy=5, recent=0.1).fused_eviction(jnp.array([100, 30]))
    assert (budget.tolist(), recent.tolist()) == ([15, 8], [10, 3])


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
    rng, strategies = np.random.default_rng(), (Strategy(policy, HostStore("device")), Strategy(policy, KernelHostStore("device")))
    shape, columns = CacheShape(1, 3, 2, 16, jnp.dtype(jnp.float32)), policy.partial_columns(16)
    length = np.array([128, 77, 1, 0, 100])
    active = np.arange(5) < 4
    layers = [LayerState(s.store.with_partial(s.store.init(shape, 5, 128), 5, columns)) for s in strategies]
    kv = KVState((), jnp.asarray(length, jnp.int32), jnp.asarray(length, jnp.int32))
    choose = jax.jit(lambda strategy, layer, q: strategy.choose(layer, q, kv, active), static_argnums=0)
    for _ in range(10):
        keys = rng.integers(-2, 3, (5, 3, columns, 128)) / 2
        keys[np.broadcast_to((np.arange(128) >= length[:, None])[:, None, None], keys.shape)] = np.nan
        queries = jnp.asarray(rng.integers(-2, 3, (5, 3, 2, columns)), jnp.float32)
        (slot, count), (kernel_slot, kernel_count) = (
            choose(s, LayerState(dataclasses.replace(layer.store, partial=jnp.asarray(keys, jnp.float32))), queries)
            for s, layer in zip(strategies, layers, strict=True)
        )
        assert kernel_count.tolist() == count.tolist()
        for row in range(5):
            np.testing.assert_array_equal(kernel_slot[row, :, : count[row]], slot[row, :, : count[row]])
        assert (kernel_slot < 128).all()


def test_only_the_published_selection_is_fused():
    @dataclasses.dataclass(frozen=True)
    class Greedy(InfiniGen):
        def select(self, guess, position, length):
            return super().select(guess, position, length + 1)

    position = jnp.where(jnp.arange(128) < 50, jnp.arange(128), -1)[None, None]
    length = jnp.array([50])
    for policy in (Greedy(), InfiniGen(count="batch"), InfiniGen(group="mean"), InfiniGen(alpha=0.0)):
        assert policy.fused_selection(position, length) is None
    alpha, most, limit, always, group = InfiniGen(alpha=5, budget=0.2, sinks=2, recent=2).fused_selection(position, length)
    assert (alpha, most.tolist(), limit, np.flatnonzero(always).tolist(), group) == (5.0, [10], 25, [0, 1, 48, 49], "mass")
    assert InfiniGen(sinks=0, recent=0).fused_selection(position, length).always is None


# --------------------------------------------------------------------------------------------------------------- which store it is


class OfTheirOwn(DenseStore):
    """A user's."""


@pytest.mark.parametrize(
    ("store", "device", "native"),
    [
        (DenseStore(), CPU, DenseStore()),
        (PagedStore(16), CPU, PagedStore(16)),
        (DenseStore(), A100, DenseStore()),
        (DenseStore(), H200, KernelDenseStore("gpu")),
        (PagedStore(16, extents=3), H200, KernelPagedStore(16, platform="gpu")),
        (PagedStore(), TPU, KernelPagedStore(platform="tpu")),
        (HostStore("driven", 2), H200, KernelHostStore("driven", 2, "gpu")),
        (OfTheirOwn(), H200, OfTheirOwn()),
        (KernelDenseStore("tpu"), H200, KernelDenseStore("tpu")),
    ],
    ids=lambda x: getattr(x, "kind", type(x).__name__),
)
def test_native_store_of_a_device(store, device, native):
    strategy = Strategy(FULL, store)
    assert strategy.native(device) == Strategy(FULL, native)
    assert type(strategy.native(device).store) is type(native)
    described = strategy.describe().replace("page_size=16,extents=3", "16")  # kernels read what they read, and know no extents
    assert strategy.native(device).describe() == described


def test_a_tpu_pads_heads_to_its_lanes():
    dense, paged = KernelDenseStore("tpu"), KernelPagedStore(32, platform="tpu")
    for store, blocks, slots in ((dense, 2, 128), (paged, 8, 32)):
        layer = jax.eval_shape(lambda store=store: store.init(SHAPE, 2, 100))
        assert layer.k.shape == layer.v.shape == (blocks, SHAPE.num_kv_heads, slots, 128)
    report = check_strategy(HEAVY, paged, checks=(KEPT,))
    assert report.outcomes[0].skipped is None
