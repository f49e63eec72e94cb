"""H2O's eviction: every implementation against the loop in NumPy, and against the strategy's own, in plain JAX."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import UnsupportedError, interpreted
from kvjax.kernels.h2o_evict import h2o_evict, mosaic_gpu, xla
from kvjax.kernels.paged_attention import Statistics

from kvjax.cache import H2O, Strategy
from kvjax.testing.driver import decode_call, random_tokens, run
from tests.kernels.h2o_evict.cases import CASES, Case, outcome, problem, verify

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


class TestH2OEvict:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_is_the_loop(self, case, implementation, rng):
        verify(case, rng, implementation)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_keeps_what_the_strategy_keeps(self, implementation, rng):
        """Decode steps as `write, attend, evict`, against Strategy.decode over the store of a CPU."""
        steps, lengths = 8, np.array([40, 25, 7], np.int32)
        strategy = Strategy(H2O(heavy=6, recent=5))
        tokens = random_tokens(rng, len(lengths), int(lengths.max()) + steps)
        kv = run(strategy, tokens, lengths, 0).states[-1]
        rows = Rows.adopt(kv.layers[0])
        batch = len(lengths)
        budget, recent, active = np.full(batch, 11), np.full(batch, 5), np.ones(batch, bool)
        for step in range(steps):
            now = lengths + step
            q, k, v = (x[np.arange(batch), now] for x in (tokens.q, tokens.k, tokens.v))
            _, kv = decode_call(strategy, kv, q[:, None], k[:, None], v[:, None], active)
            rows.write(k, now)
            given = rows.position, rows.score, rows.attend(q), now + 1, budget, recent, active
            rows.position, rows.score, rows.slot = (np.array(x) for x in outcome(h2o_evict, given, implementation))
            want = Rows.adopt(kv.layers[0])
            assert rows.positions() == want.positions(), f"step {step}"
            np.testing.assert_allclose(rows.scores(), want.scores(), rtol=1e-5, atol=1e-6)

    def test_donated_arrays_are_changed_in_place(self, rng):
        given = problem(Case(capacity=2304, heads=1), rng)
        step = jax.jit(partial(h2o_evict, implementation="xla"), donate_argnums=(0, 1))
        memory = step.lower(*given.arguments).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= given.position.nbytes + given.score.nbytes

    def test_kernel_says_what_it_cannot_do(self, rng):
        case = Case(capacity=120)
        with interpreted("mosaic_gpu"), pytest.raises(UnsupportedError, match="120 slots, which is no multiple of 128"):
            h2o_evict(*problem(case, rng).arguments, implementation="mosaic_gpu")
        verify(case, rng, "xla")

    @pytest.mark.parametrize("broken", ["position", "score", "logits", "lse", "length", "active"])
    def test_wrong_shapes_are_refused(self, broken, rng):
        given = problem(Case(), rng)
        if broken in ("logits", "lse"):
            given.statistics = dataclasses.replace(given.statistics, **{broken: getattr(given.statistics, broken)[..., 1:]})
        else:
            setattr(given, broken, getattr(given, broken)[..., 1:])
        with pytest.raises(ValueError, match="h2o_evict: "):
            h2o_evict(*given.arguments)


class TestTheTestsCanFail:
    """Each of these is a mistake somebody could make; the cases above must notice."""

    @staticmethod
    def protects_nobody(position, score, statistics, length, budget, recent, active, **how):
        return h2o_evict(position, score, statistics, length, budget, recent * 0, active, **how)

    @staticmethod
    def evicts_too_early(position, score, statistics, length, budget, recent, active, **how):
        return h2o_evict(position, score, statistics, length, budget - 1, recent, active, **how)

    @staticmethod
    def moves_idle_rows(position, score, statistics, length, budget, recent, active, **how):
        return h2o_evict(position, score, statistics, length, budget, recent, active | True, **how)

    @staticmethod
    def scores_one_query_head(position, score, statistics, *rest, **how):
        return h2o_evict(position, score, Statistics(statistics.logits[:, :, :1], statistics.lse[:, :, :1]), *rest, **how)

    @staticmethod
    def scores_nothing(position, score, statistics, *rest, **how):
        return h2o_evict(position, score, Statistics(statistics.logits, jnp.full_like(statistics.lse, jnp.inf)), *rest, **how)

    @staticmethod
    def frees_the_next_slot(*given, **how):
        position, score, slot = h2o_evict(*given, **how)
        return position, score, slot + 1

    @staticmethod
    def forgets_to_free(position, *given, **how):
        _, score, slot = h2o_evict(position, *given, **how)
        return position, score, slot

    MUTANTS = (
        protects_nobody, evicts_too_early, moves_idle_rows, scores_one_query_head, scores_nothing, frees_the_next_slot, forgets_to_free,
    )  # fmt: skip

    @pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
    def test_mistake_is_noticed(self, mutant, rng):
        with pytest.raises(AssertionError):
            verify(Case(), rng, "xla", mutant)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_wrong_tie_is_noticed(self, implementation, rng, monkeypatch):
        def lowest_position(position, score, held, protected_from):
            priority = jnp.where(held & (position < protected_from), score, jnp.inf)
            return jnp.where(priority == priority.min(-1, keepdims=True), position, 2**30).argmin(-1)

        def first_slot(a, b):
            return tuple(jnp.where(a[0] <= b[0], x, y) for x, y in zip(a, b, strict=True))

        def first_of_all(priority, position, slots):
            slot = jnp.where(priority == priority.min(), slots, 2**30).min()
            return priority.min(), position.max(), slot

        monkeypatch.setattr(xla, "_victim", lowest_position)
        monkeypatch.setattr(mosaic_gpu, "_worse", first_slot)
        monkeypatch.setattr(mosaic_gpu, "_worst", first_of_all)
        with pytest.raises(AssertionError):
            verify(Case(capacity=2304, heads=1, ties=True), rng, implementation)


@dataclasses.dataclass
class Rows:
    """Keys [B, Hkv, C, D], positions, scores, and the slots for the next tokens, with free slots up to a multiple of 128."""

    k: np.ndarray
    position: np.ndarray
    score: np.ndarray
    slot: np.ndarray

    @staticmethod
    def adopt(layer) -> "Rows":
        """Of a dense layer of the strategy."""
        more = ((0, 0), (0, 0), (0, -layer.position.shape[-1] % 128))
        k = np.pad(np.asarray(layer.pool.k[0]).swapaxes(2, 3), (*more, (0, 0)))
        position = np.pad(layer.position, more, constant_values=-1)
        return Rows(k, position, np.pad(layer.own, more), np.array(layer.next_slot))

    def write(self, k: np.ndarray, length: np.ndarray) -> None:
        """A token's keys [B, Hkv, D]; its position is `length`."""
        at = np.arange(len(k))[:, None], np.arange(k.shape[1]), self.slot
        self.k[at], self.position[at], self.score[at] = k, length[:, None], 0

    def attend(self, q: np.ndarray) -> Statistics:
        """What the attention of queries [B, H, D] over the slots leaves behind, NaN where there is no token."""
        batch, heads = self.position.shape[:2]
        grouped = q.reshape(batch, heads, -1, q.shape[-1]) * q.shape[-1] ** -0.5
        logits = np.einsum("bhgd,bhcd->bhgc", grouped, self.k)
        held = (self.position >= 0)[:, :, None]
        lse = np.log(np.where(held, np.exp(logits), 0).sum(-1))
        return Statistics(np.where(held, logits, np.nan).astype(np.float32), lse.astype(np.float32))

    def positions(self) -> list:
        return [[sorted(set(head.tolist()) - {-1}) for head in row] for row in self.position]

    def scores(self) -> np.ndarray:
        """In the order of positions."""
        order = np.argsort(np.where(self.position < 0, 2**30, self.position), axis=-1)
        held = np.take_along_axis(self.position, order, -1) >= 0
        return np.where(held, np.take_along_axis(self.score, order, -1), 0)
