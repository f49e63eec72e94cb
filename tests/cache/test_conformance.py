"""Every built-in strategy passes the conformance kit, and every check of the kit fails something that deserves it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from kvjax.kernels.attention import Attended

from kvjax.cache import H2O, Full, Policy, Selection, Store, Strategy, Streaming, dense, parse_strategy
from kvjax.cache.policies.base import Own, Seen
from kvjax.cache.pool import Pool
from kvjax.cache.tiers import Device
from kvjax.testing import CHECKS, check_strategy, conformance
from tests.cache.kit import assert_conforms, further

ALL = tuple(CHECKS)
WHAT_IS_KEPT = ("equals_masked_full_attention", "budget_holds_and_nothing_returns", "chunks_change_nothing", "odd_lengths")
AT_ONCE = ("full", "h2o(heavy=8,recent=8)", "tova(budget=12)")
STRATEGIES = {
    "full": ALL,
    "streaming(sinks=4,window=12)": ALL,
    "streaming(sinks=0.1,window=0.2)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8)": ALL,
    "h2o(heavy=0.1,recent=0.2)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8,decode=False)": ALL,
    "h2o(heavy=8,recent=8,group=first)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8,group=max)": WHAT_IS_KEPT,
    "tova(budget=12)": ALL,
    "random(budget=12)": ALL,
    "oracle_topk(k=6)": ALL,
    "oracle_topk(k=0.2)": ("equals_masked_full_attention", "odd_lengths"),
}


@pytest.mark.parametrize("spec", [*AT_ONCE, *further(spec for spec in STRATEGIES if spec not in AT_ONCE)])
def test_built_in_strategy_conforms(spec):
    assert_conforms(parse_strategy(spec).policy, dense(), STRATEGIES[spec])


@dataclasses.dataclass(frozen=True)
class SlotBehind(Device):
    """Writes every token one slot too early."""

    def put(self, pool, table, slot, k, v, valid):
        return super().put(pool, table, jnp.maximum(slot - 1, 0), k, v, valid)


@dataclasses.dataclass(frozen=True)
class WritesEveryone(Device):
    """Writes the rows that are not active too."""

    def put(self, pool, table, slot, k, v, valid):
        return super().put(pool, table, slot, k, v, jnp.ones_like(valid))


@dataclasses.dataclass(frozen=True)
class Growing(Device):
    """Takes a new slot for every token, by concatenation."""

    def put(self, pool, table, slot, k, v, valid):
        (old_k,), (old_v,) = pool.k, pool.v
        longer = jnp.pad(old_k, ((0, 0), (0, 0), (0, 0), (0, 1))), jnp.pad(old_v, ((0, 0), (0, 0), (0, 1), (0, 0)))
        pool = dataclasses.replace(pool, k=longer[:1], v=longer[1:], page_size=pool.page_size + 1)
        return super().put(pool, table, slot, k, v, valid)


@dataclasses.dataclass(frozen=True)
class ShrugsAtOneToken(Device):
    """Does not store a prompt of a single token."""

    def chosen(self, pool, table, k, v, index, rows=None):
        return super().chosen(pool, table, jnp.zeros_like(k) if k.shape[1] == 1 else k, v, index, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Understates(Pool):
    """Says that a token takes half of the bytes it takes."""

    @property
    def token_bytes(self) -> int:
        return super().token_bytes // 2


@dataclasses.dataclass(frozen=True)
class Cheap(Store):
    def init(self, *arguments) -> Pool:
        pool = super().init(*arguments)
        return Understates(pool.k, pool.v, pool.layout, pool.page_size, pool.head_dim)


@dataclasses.dataclass(frozen=True)
class HalfKeys(Strategy):
    """Looks at half of a key's channels, so that products are no longer a matter of distance."""

    def _attend(self, layer, q, *rest):
        return super()._attend(layer, jnp.where(jnp.arange(q.shape[-1]) < q.shape[-1] // 2, q, 0), *rest)


@dataclasses.dataclass(frozen=True)
class AdditiveMask(Strategy):
    """Multiplies what is not visible by zero, where NaN stays NaN."""

    def _attend(self, layer, q, k, v, slot, kv, *rest):
        (keys,), (values,) = layer.pool.k, layer.pool.v
        visible = jnp.arange(keys.shape[-1]) <= slot[..., None]
        grouped = q[:, 0].reshape(q.shape[0], keys.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
        probabilities = jnp.exp(jnp.einsum("bngd,bndc->bngc", grouped, keys)) * visible[:, :, None]
        probabilities /= probabilities.sum(-1, keepdims=True)
        return Attended(jnp.einsum("bngc,bncd->bngd", probabilities, values).reshape(q.shape)), None


@dataclasses.dataclass(frozen=True)
class RepeatsHeads(Strategy):
    """Repeats the keys and values for every query head before attending."""

    def _attend(self, layer, q, *rest):
        group = q.shape[2] // layer.pool.num_heads
        repeated = (tuple(jnp.repeat(x, group, axis=1) for x in parts) for parts in (layer.pool.k, layer.pool.v))
        k, v = repeated
        return super()._attend(dataclasses.replace(layer, pool=dataclasses.replace(layer.pool, k=k, v=v)), q, *rest)


@dataclasses.dataclass(frozen=True)
class Forgetful(Full):
    """Never reads the first token."""

    selects = "keys"

    def choose(self, logits, position, length, prompt_length):
        slots = jnp.broadcast_to(jnp.arange(1, logits.shape[-1]), (*logits.shape[:2], logits.shape[-1] - 1))
        return Selection(slots, jnp.full(length.shape, slots.shape[-1]))


@dataclasses.dataclass(frozen=True)
class Averages(H2O):
    """Spreads every row's attention mass over the batch."""

    def observe(self, own: Own, seen: Seen) -> Own:
        assert seen.mass is not None
        return own + seen.mass.mean(0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class OfTheLastChunk(Strategy):
    """Forgets what the chunks before the last have shown."""

    def commit(self, source, *rest, **options):
        return super().commit(dataclasses.replace(source, observed=tuple(x % 0.5 for x in source.observed)), *rest, **options)


@dataclasses.dataclass(frozen=True)
class Roomy(Strategy):
    """Allocates more slots than the budget asks for."""

    def slots(self, *arguments):
        return super().slots(*arguments) + 4


@dataclasses.dataclass(frozen=True)
class OverBudget(Strategy):
    """Evicts one token too late."""

    def _after(self, *arguments):
        assert isinstance(self.policy, Streaming)
        longer = dataclasses.replace(self.policy, window=self.policy.window + 1)
        return Strategy(longer, self.store)._after(*arguments)


@dataclasses.dataclass(frozen=True)
class Revenant(Strategy):
    """Says of a freed slot that it holds the first token again."""

    def _after(self, *arguments):
        after = super()._after(*arguments)
        assert after.position is not None
        return dataclasses.replace(after, position=jnp.maximum(after.position, 0))


@dataclasses.dataclass(frozen=True)
class FirstChunkOnly(Strategy):
    """Drops the later chunks of a bounded prompt."""

    def _prefill_bounded(self, layer, *arguments):
        out, _ = super()._prefill_bounded(layer, *arguments)
        return out, layer


STREAMING, HEAVY = Streaming(sinks=4, window=12), H2O(heavy=8, recent=8)
BROKEN: list[tuple[Policy | Strategy, str]] = [
    (Forgetful(), "ample_budget_equals_full"),
    (Strategy(STREAMING, Store(tier=SlotBehind())), "equals_masked_full_attention"),
    (Roomy(STREAMING), "budget_holds_and_nothing_returns"),
    (OverBudget(STREAMING), "budget_holds_and_nothing_returns"),
    (Revenant(Streaming(sinks=0, window=12)), "budget_holds_and_nothing_returns"),
    (OfTheLastChunk(HEAVY), "chunks_change_nothing"),
    (FirstChunkOnly(STREAMING), "bounded_chunks_stay_bounded"),
    (Averages(heavy=8, recent=8), "rows_are_independent"),
    (Strategy(STREAMING, Store(tier=WritesEveryone())), "inactive_rows_are_untouched"),
    (HalfKeys(STREAMING), "rope_is_relative"),
    (Strategy(STREAMING, Store(tier=ShrugsAtOneToken())), "odd_lengths"),
    (AdditiveMask(Full()), "unused_memory_never_leaks"),
    (Strategy(Full(), Store(tier=Growing())), "no_retrace"),
    (Strategy(STREAMING, Cheap()), "ledger_adds_up"),
    (RepeatsHeads(Full()), "donation_leaves_no_copy"),
]


@pytest.mark.parametrize(("strategy", "check"), BROKEN, ids=[f"{check}-{i}" for i, (_, check) in enumerate(BROKEN)])
def test_broken_strategy_fails(strategy, check):
    with pytest.raises(AssertionError, match=f"fails {check} "):
        check_strategy(strategy, seed=0, checks=(check,))


@pytest.mark.parametrize("ranking", ["highest", "lowest"])
def test_ties_that_go_upwards_fail(monkeypatch, ranking):
    right = getattr(conformance, ranking)

    def upwards(priority, position, *rest):
        return right(priority + 1e-3 * position, position, *rest)

    monkeypatch.setattr(conformance, ranking, upwards)
    with pytest.raises(AssertionError, match="fails protected_survive_ties "):
        check_strategy(HEAVY, seed=0, checks=("protected_survive_ties",))


def test_every_check_can_fail():
    assert {check for *_, check in BROKEN} | {"protected_survive_ties"} == set(CHECKS)


def test_report_reads_well():
    report = check_strategy(Full(), checks=("ample_budget_equals_full", "protected_survive_ties"))
    assert str(report).splitlines() == ["full", "ample_budget_equals_full: passed", "protected_survive_ties: skipped, it keeps everything"]


def test_failure_names_the_seed_that_repeats_it():
    with pytest.raises(AssertionError, match=r"streaming\(sinks=4,window=12\) fails rope_is_relative \(seed=7\): off by"):
        check_strategy(HalfKeys(STREAMING), seed=7, checks=("rope_is_relative",))
