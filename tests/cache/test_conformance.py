"""Every built-in strategy passes the conformance kit, and every check of the kit fails something that deserves it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache import H2O, DenseStore, Full, Policy, Strategy, Streaming, parse_strategy
from kvjax.cache.attention import NEG_INF
from kvjax.testing import CHECKS, check_strategy, conformance

ALL = tuple(CHECKS)
WHAT_IS_KEPT = ("equals_masked_full_attention", "budget_holds_and_nothing_returns", "chunks_change_nothing", "odd_lengths")
STRATEGIES = {
    "full": ALL,
    "streaming(sinks=4,window=12)": ALL,
    "streaming(sinks=0.1,window=0.2)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8)": ALL,
    "h2o(heavy=0.1,recent=0.2)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8,decode=False)": ALL,
    "h2o(heavy=8,recent=8,group=first)": WHAT_IS_KEPT,
    "h2o(heavy=8,recent=8,group=max)": WHAT_IS_KEPT,
    "oracle_topk(k=6)": ALL,
    "oracle_topk(k=0.2)": ("equals_masked_full_attention", "odd_lengths"),
}
KEEPS_EVERYTHING = {"budget_holds_and_nothing_returns", "protected_survive_ties", "bounded_chunks_stay_bounded"}


@pytest.mark.parametrize("spec", STRATEGIES)
def test_built_in_strategy_conforms(spec):
    checks, strategy = STRATEGIES[spec], parse_strategy(spec, "dense")
    report = check_strategy(strategy, checks=checks)
    assert [outcome.name for outcome in report.outcomes] == list(checks)
    skipped = {outcome.name for outcome in report.outcomes if outcome.skipped}
    assert skipped == (KEEPS_EVERYTHING & set(checks) if strategy.policy.kept_tokens(1) is None else set())


class SlotBehind(DenseStore):
    """Writes every token one slot too early."""

    def write(self, layer, shared, slot, k, v, active):
        return super().write(layer, shared, jnp.maximum(slot - 1, 0), k, v, active)


class HalfKeys(DenseStore):
    """Keeps half of a key's channels, so that products are no longer a matter of distance."""

    def attend(self, layer, shared, q, *rest):
        half = jnp.arange(q.shape[-1]) < q.shape[-1] // 2
        return super().attend(layer, shared, jnp.where(half, q, 0), *rest)


class AdditiveMask(DenseStore):
    """Adds the mask to the logits, where NaN stays NaN."""

    def attend(self, layer, shared, q, visible, readable, group_mass):
        batch, heads, dim = q.shape
        kv_heads = layer.k.shape[0] // batch
        logits = jnp.einsum("ngd,nds->ngs", q.reshape(batch * kv_heads, -1, dim) * dim**-0.5, layer.k)
        logits = logits.reshape(batch, kv_heads, *logits.shape[1:]) + jnp.where(visible, 0, NEG_INF)[:, :, None]
        probs = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("ngs,nsd->ngd", probs.reshape(batch * kv_heads, *probs.shape[2:]), layer.v)
        return out.reshape(batch, heads, dim), None


class WritesEveryone(DenseStore):
    """Writes the rows that are not active too."""

    def write(self, layer, shared, slot, k, v, active):
        return super().write(layer, shared, slot, k, v, jnp.ones_like(active))


class Growing(DenseStore):
    """Takes a new slot for every token, by concatenation."""

    def write(self, layer, shared, slot, k, v, active):
        longer = dataclasses.replace(layer, k=jnp.pad(layer.k, ((0, 0), (0, 0), (0, 1))), v=jnp.pad(layer.v, ((0, 0), (0, 1), (0, 0))))
        return super().write(longer, shared, slot, k, v, active)

    def attend(self, layer, shared, q, visible, *rest):
        spare = self.capacity(layer, shared) - visible.shape[-1]
        return super().attend(layer, shared, q, jnp.pad(visible, ((0, 0), (0, 0), (0, spare))), *rest)


class RepeatsHeads(DenseStore):
    """Repeats the keys and values for every query head before attending."""

    def attend(self, layer, shared, q, visible, *rest):
        batch, heads, _ = q.shape
        group = batch * heads // layer.k.shape[0]
        visible = jnp.broadcast_to(visible, (batch, heads, visible.shape[-1]))
        repeated = dataclasses.replace(layer, k=jnp.repeat(layer.k, group, axis=0), v=jnp.repeat(layer.v, group, axis=0))
        return super().attend(repeated, shared, q, visible, *rest)


class ShrugsAtOneToken(DenseStore):
    """Does not store a prompt of a single token."""

    def fill_selected(self, layer, shared, k, *rest):
        return super().fill_selected(layer, shared, jnp.zeros_like(k) if k.shape[1] == 1 else k, *rest)


class Understates(DenseStore):
    """Says that a token takes half of the bytes it takes."""

    def token_bytes(self, layer, batch):
        heads, size = super().token_bytes(layer, batch)
        return heads, size // 2


@dataclasses.dataclass(frozen=True)
class Forgetful(Full):
    """Never reads the first token."""

    def readable(self, logits, prompt_length):
        return jnp.broadcast_to(jnp.arange(logits.shape[-1]) > 0, (*logits.shape[:2], 1, logits.shape[-1]))


@dataclasses.dataclass(frozen=True)
class Averages(H2O):
    """Spreads every row's attention mass over the batch."""

    def observe(self, score, mass):
        return score + mass.mean(0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class LargestOfTheCall(H2O):
    """Scores by the largest probability within a call, which depends on where calls are cut."""

    def group_mass(self, weights, scale):
        return (weights * scale[..., None]).max(-2).sum(-2)


@dataclasses.dataclass(frozen=True)
class Roomy(Strategy):
    """Allocates more slots than the budget asks for."""

    def slots(self, prompt_length, max_length):
        return super().slots(prompt_length, max_length) + 4


@dataclasses.dataclass(frozen=True)
class OverBudget(Strategy):
    """Evicts one token too late."""

    def _evict(self, *arguments):
        assert isinstance(self.policy, Streaming)
        longer = dataclasses.replace(self.policy, window=self.policy.window + 1)
        return Strategy(longer, self.store)._evict(*arguments)


@dataclasses.dataclass(frozen=True)
class Revenant(Strategy):
    """Says of a freed slot that it holds the first token again."""

    def _evict(self, *arguments):
        after = super()._evict(*arguments)
        assert after.position is not None
        return dataclasses.replace(after, position=jnp.maximum(after.position, 0))


@dataclasses.dataclass(frozen=True)
class FirstChunkOnly(Strategy):
    """Drops the later chunks of a bounded prompt."""

    def _prefill_bounded(self, layer, *arguments):
        out, _ = super()._prefill_bounded(layer, *arguments)
        return out, layer


STREAMING, HEAVY = Streaming(sinks=4, window=12), H2O(heavy=8, recent=8)
BROKEN: list[tuple[Policy | Strategy, DenseStore, str]] = [
    (Forgetful(), DenseStore(), "ample_budget_equals_full"),
    (STREAMING, SlotBehind(), "equals_masked_full_attention"),
    (Roomy(STREAMING), DenseStore(), "budget_holds_and_nothing_returns"),
    (OverBudget(STREAMING), DenseStore(), "budget_holds_and_nothing_returns"),
    (Revenant(Streaming(sinks=0, window=12)), DenseStore(), "budget_holds_and_nothing_returns"),
    (LargestOfTheCall(heavy=8, recent=8), DenseStore(), "chunks_change_nothing"),
    (FirstChunkOnly(STREAMING), DenseStore(), "bounded_chunks_stay_bounded"),
    (Averages(heavy=8, recent=8), DenseStore(), "rows_are_independent"),
    (STREAMING, WritesEveryone(), "inactive_rows_are_untouched"),
    (STREAMING, HalfKeys(), "rope_is_relative"),
    (STREAMING, ShrugsAtOneToken(), "odd_lengths"),
    (Full(), AdditiveMask(), "unused_memory_never_leaks"),
    (Full(), Growing(), "no_retrace"),
    (STREAMING, Understates(), "ledger_adds_up"),
    (Full(), RepeatsHeads(), "donation_leaves_no_copy"),
]


@pytest.mark.parametrize(
    ("policy", "store", "check"), BROKEN, ids=[f"{check}-{type(p).__name__}-{type(s).__name__}" for p, s, check in BROKEN]
)
def test_broken_strategy_fails(policy, store, check):
    with pytest.raises(AssertionError, match=f"fails {check} "):
        check_strategy(policy, store, seed=0, checks=(check,))


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
        check_strategy(STREAMING, HalfKeys(), seed=7, checks=("rope_is_relative",))
