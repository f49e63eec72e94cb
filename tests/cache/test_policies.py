"""Policies beside the published ones: TOVA and Random by their definitions, and what a policy of a user's own can say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.attention import Observe

from kvjax.cache import H2O, TOVA, CacheShape, Full, Policy, Random, Selection, Slots, Strategy, dense, host, ledger, paged, stage, tokens
from kvjax.cache.strategy import append
from kvjax.errors import SpecError
from kvjax.testing import check_strategy
from kvjax.testing.driver import SHAPE, decode_call, kept, random_tokens, run
from tests.cache.kit import further

STORES = [dense(), paged(16), host("device"), dense().on("gpu"), paged(16).on("gpu")]

# ------------------------------------------------------------------------------------------------------------------------------ TOVA


@pytest.mark.parametrize("prompt", [30, 5])
def test_tova_keeps_what_the_newest_query_attends_to(prompt):
    """One set for the layer, by the attention of the newest query, mean over its heads; nothing is protected."""
    steps, budget = 20, 9
    made = random_tokens(np.random.default_rng(), 1, prompt + steps)
    trace = run(Strategy(TOVA(budget)), made, np.array([prompt]), steps)

    def attention(at: int, held: list[int]) -> np.ndarray:
        q, k = made.q[0, at].astype(np.float64), made.k[0, held].astype(np.float64)
        found = []
        for head, query in enumerate(q):
            logits = k[:, head // SHAPE.group_size] @ query / np.sqrt(SHAPE.head_dim)
            found.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        return np.mean(found, 0)

    held = list(range(prompt))
    for step, state in enumerate(trace.states):
        if step:
            held.append(prompt + step - 1)
        mass = attention(prompt + step - 1, held)
        held = sorted(held[i] for i in sorted(range(len(held)), key=lambda i: (-mass[i], held[i]))[:budget])
        for head in range(SHAPE.num_kv_heads):
            assert sorted(kept(state, 0, head)) == held, f"step {step}"


# ---------------------------------------------------------------------------------------------------------------------------- Random


def test_random_keeps_every_token_of_a_prompt_alike_often():
    length, budget, draws = 40, 10, 400
    position = jnp.broadcast_to(jnp.arange(length), (1, 2, length))
    one = jnp.full((1, 1, 1), length)
    count = np.zeros((2, length))
    for seed in range(draws):
        ranked = np.asarray(Random(budget, seed).priority(Slots(position, (), one, one)))[0]
        assert np.isinf(ranked[:, -1]).all(), "the newest stays"
        for head in range(2):
            count[head, np.argsort(-ranked[head])[:budget]] += 1
    share = (budget - 1) / (length - 1)
    deviation = np.sqrt(draws * share * (1 - share))
    assert np.abs(count[:, :-1] - draws * share).max() < 5 * deviation
    assert np.corrcoef(count[0, :-1], count[1, :-1])[0, 1] < 0.5, "kv heads draw for themselves"


def test_random_victims_are_others_with_another_seed_and_the_same_again():
    made = random_tokens(np.random.default_rng(), 2, 60)
    first, again, other = (run(Strategy(Random(8, seed)), made, np.array([30, 17]), 30).states[-1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.layers[0].position, again.layers[0].position)
    assert (np.asarray(first.layers[0].position) != np.asarray(other.layers[0].position)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TOVA(0), "tova: budget=0 keeps nothing; give at least 1 token"),
        (lambda: TOVA(1.5), "tova: budget=1.5 is not a fraction between 0 and 1"),
        (lambda: Random(0.0), "random: budget=0 keeps nothing"),
        (lambda: Random(seed=-1), "random: seed=-1 is not a whole number from 0 that fits 32 bits"),
        (lambda: Random(seed=True), "random: seed=True is not a whole number"),
    ],
)
def test_what_they_refuse(make, message):
    with pytest.raises(SpecError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------- what a policy can say


@dataclasses.dataclass(frozen=True)
class Latest(Policy):
    """Reads the `n` tokens whose keys are most like the queries of this step, or of the last one."""

    n: int = 6

    def initial(self, k, v, guide):
        return k.transpose(0, 2, 3, 1)  # [B, Hkv, D, S], as a state of its own

    def guess(self, view):
        own = view.own
        queries = view.queries.reshape(own.shape[0], own.shape[1], -1, own.shape[2])
        return jnp.einsum("bngd,bndc->bngc", queries, own)

    def choose(self, logits, position, length, prompt_length):
        ranked = jnp.where(position >= 0, logits.max(2), -jnp.inf)
        _, slot = jax.lax.top_k(ranked, min(self.n, ranked.shape[-1]))
        return Selection(slot, jnp.minimum(self.n, (position >= 0).sum(-1).min(-1)))


@dataclasses.dataclass(frozen=True)
class ByStep(Latest):
    selects = "step"


@dataclasses.dataclass(frozen=True)
class ByLast(Latest):
    selects = "last"


@pytest.mark.parametrize("store", [*STORES[:3:2], *further((STORES[1], *STORES[3:]))], ids=lambda store: f"{store.name}-{store.platform}")
@pytest.mark.parametrize("policy", [ByStep(), ByLast()], ids=repr)
def test_a_policy_chooses_by_the_queries_of_this_step_or_the_last(policy, store):
    checks = ("equals_masked_full_attention", "chunks_change_nothing", "unused_memory_never_leaks", "inactive_rows_are_untouched")
    check_strategy(policy, store, checks=checks)


def test_what_reads_by_a_step_cannot_be_fetched_by_a_host_that_is_ahead_of_it():
    with pytest.raises(SpecError, match="chooses what it reads by the queries of a step"):
        Strategy(ByStep(), host("driven"))


@dataclasses.dataclass(frozen=True)
class Pyramid(H2O):
    """A budget that shrinks with the layers, and in every layer moves to the kv heads whose attention is most spread out."""

    heavy: int = 8
    recent: int = 4
    shifts: bool = True

    rule = None

    def kept_in_layer(self, prompt_length, layer, num_layers):
        share = 1.5 - jnp.asarray(layer) / max(num_layers - 1, 1)
        budget = (share * (self.heavy + self.recent)).astype(jnp.int32)
        return jnp.broadcast_to(budget, (prompt_length.shape[0], 2))

    def most_kept(self, prompt_length, layer=None, num_layers=1):
        return 2 * (self.heavy + self.recent) if layer is None else 3 * (self.heavy + self.recent) - (self.heavy + self.recent) * layer

    def allocate(self, slots, priority, budget):
        if not self.shifts:
            return budget
        flat = (slots.own > slots.own.mean(-1, keepdims=True)).sum(-1)
        moves = jnp.where(flat[:, :1] > flat[:, 1:], 2, -2)
        return budget + jnp.concatenate([moves, -moves], -1)


@pytest.mark.parametrize(
    ("store", "chunk"), [(STORES[0], None), (STORES[1], 8), *further((store, c) for store in STORES[:4] for c in (None, 8))]
)
def test_budgets_may_differ_by_layer_and_kv_head(store, chunk):
    policy, lengths, steps = Pyramid(), np.array([37, 30]), 6
    made = random_tokens(np.random.default_rng(2), 2, 45)
    deep = Deep(Strategy(policy, store), layers=3)
    states, outs = deep.run(made, lengths, steps, chunk)
    want = {0: 18, 1: 12, 2: 6}
    for layer, total in want.items():
        counts = (np.asarray(states.layers[layer].position) >= 0).sum(-1)
        np.testing.assert_array_equal(counts.sum(-1), [2 * total] * 2)
        assert (counts[:, 0] != counts[:, 1]).all(), "what one head has more the other has less"
        np.testing.assert_array_equal(counts, states.layers[layer].budget)
    books = ledger(deep.strategy, states)
    assert books.kept_fraction == 2 * sum(want.values()) * 2 / (3 * 2 * (43 + 36))
    if store.page_size is None and store.platform == "cpu":
        assert [layer.pool.page_size for layer in states.layers] == [37, 25, 13]
    assert np.isfinite(outs).all()


@dataclasses.dataclass(frozen=True)
class Deep:
    """Some layers that are fed the same, through a strategy's entry points as an engine uses them: staged, then committed by index."""

    strategy: Strategy
    layers: int

    def run(self, made, lengths, steps, chunk):
        strategy, shape = self.strategy, dataclasses.replace(SHAPE, num_layers=self.layers)
        longest = int(lengths.max())
        kv = strategy.init(shape, lengths, longest, steps)
        valid = jnp.arange(longest) < lengths[:, None]
        q, k, v = (jnp.asarray(x[:, :longest]) for x in (made.q, made.k, made.v))
        if chunk is None:
            for i in range(self.layers):
                _, layer = strategy.prefill(kv.layers[i], q, k, v, kv, valid, True)
                kv = kv.with_layer(i, layer)
        else:
            staged = stage(strategy.store, strategy.observes, shape, lengths, longest)
            for start in range(0, longest, chunk):
                here = slice(start, start + chunk)
                for i in range(self.layers):
                    _, layer, _ = append(
                        strategy.store.staging, strategy.observes, staged.layers[i], q[:, here], k[:, here], v[:, here], staged,
                        valid[:, here], start == 0,
                    )  # fmt: skip
                    staged = staged.with_layer(i, layer)
                staged = dataclasses.replace(staged, length=staged.length + valid[:, here].sum(-1))
            for i in range(self.layers):
                layer = strategy.commit(staged.layers[i], kv.layers[i], staged.length, kv, index=jnp.int32(i), num_layers=self.layers)
                kv = kv.with_layer(i, layer)
        kv = dataclasses.replace(kv, length=jnp.asarray(lengths, jnp.int32))
        outs, row = [], np.arange(len(lengths))
        for step in range(steps):
            one = [jnp.asarray(x[row, lengths + step][:, None]) for x in (made.q, made.k, made.v)]
            for i in range(self.layers):
                out, layer = strategy.decode(kv.layers[i], *one, kv, jnp.ones(len(lengths), bool))
                kv = kv.with_layer(i, layer)
                outs.append(np.asarray(out))
            kv = dataclasses.replace(kv, length=kv.length + 1)
        return kv, np.stack(outs)


@dataclasses.dataclass(frozen=True)
class Window(H2O):
    """Chooses by the last queries of a prompt, of which a head's largest counts."""

    @property
    def observes(self):
        return Observe("max", "sum", 8)

    rule = None


def test_statistics_of_the_last_queries_do_not_depend_on_chunks():
    check_strategy(Window(heavy=8, recent=8), checks=("chunks_change_nothing", "equals_masked_full_attention", "rows_are_independent"))
    made, lengths = random_tokens(np.random.default_rng(), 2, 40), np.array([37, 20])
    state = run(Strategy(Window(heavy=37, recent=0)), made, lengths, 1).states[0].layers[0]
    for row, length in enumerate(lengths):
        for head in range(SHAPE.num_kv_heads):
            want = np.zeros(length)
            for at in range(length - 8, length):
                queries = made.q[row, at].reshape(SHAPE.num_kv_heads, -1, SHAPE.head_dim)[head].astype(np.float64)
                logits = queries @ made.k[row, : at + 1, head].astype(np.float64).T / 4
                p = np.exp(logits - logits.max(-1, keepdims=True))
                want[: at + 1] += (p / p.sum(-1, keepdims=True)).max(0)
            np.testing.assert_allclose(np.asarray(state.own)[row, head, :length], want, atol=1e-5)


def test_a_tie_between_a_fraction_and_its_tokens():
    made, lengths = random_tokens(np.random.default_rng(), 2, 45), np.array([40, 40])
    a, b = (run(Strategy(policy), made, lengths, 3).states[-1] for policy in (TOVA(0.2), TOVA(8)))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert tokens(0.2, 40) == 8


def test_no_policy_keeps_books_it_does_not_need():
    shape = CacheShape(2, 2, 2, 16, jnp.dtype(jnp.float32))
    for policy in (Full(), Random(8)):
        state = jax.eval_shape(lambda policy=policy: Strategy(policy).init(shape, [20], 20, 4))
        assert jax.tree.leaves([layer.own for layer in state.layers]) == []


def test_a_step_is_one_program_whatever_the_budget_of_its_rows():
    made, lengths = random_tokens(np.random.default_rng(), 3, 60), np.array([50, 31, 9])
    strategy = Strategy(TOVA(0.2))
    before = decode_call._cache_size()
    run(strategy, made, lengths, 6)
    assert decode_call._cache_size() - before <= 1
