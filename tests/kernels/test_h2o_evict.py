"""H2O's evict-and-write: every implementation against the loop in NumPy, and against the strategy that it is to replace."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvjax.kernels.dispatch import UnsupportedError, interpreted
from kvjax.kernels.h2o_evict import Attention, H2OCache, Token, h2o_evict, mosaic_gpu, reference, xla
from kvjax.kernels.h2o_evict.cases import CASES, Case, problem, verify

from kvjax.cache import H2O, Strategy
from kvjax.testing.driver import SHAPE, decode_call, random_tokens, run

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


class TestH2OEvict:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_is_the_loop(self, case, implementation, rng):
        verify(case, rng, implementation)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_keeps_what_the_strategy_keeps(self, implementation, rng):
        """Decode steps as `evict and write, attend`, against Strategy.decode, which evicts at the end of the step before."""
        steps, lengths = 8, np.array([40, 25, 7], np.int32)
        strategy = Strategy(H2O(heavy=6, recent=5))
        tokens = random_tokens(rng, len(lengths), int(lengths.max()) + steps)
        states = run(strategy, tokens, lengths, 0).states
        kv = states[-1]
        mine = adopt(kv.layers[0], len(lengths))
        batch, heads, capacity = mine.position.shape
        pending = Attention(
            np.zeros((batch, heads, SHAPE.group_size, capacity), np.float32), np.full((batch, heads, SHAPE.group_size), np.inf)
        )
        budget, recent, active = np.full(batch, 11), np.full(batch, 5), np.ones(batch, bool)
        call = jax.jit(partial(h2o_evict, implementation=implementation))
        for step in range(steps):
            now = lengths + step
            q, k, v = (x[np.arange(batch), now] for x in (tokens.q, tokens.k, tokens.v))
            _, kv = decode_call(strategy, kv, q[:, None], k[:, None], v[:, None], active)
            with interpreted("mosaic_gpu"):
                mine, slot = jax.device_get(call(mine, pending, Token(k, v), now, budget, recent, active))
            pending = attend(mine, q)
            settled, _ = reference.h2o_evict(mine, pending, None, now + 1, budget, recent, active)
            assert positions(settled) == positions(adopt(kv.layers[0], batch)), f"step {step}"
            np.testing.assert_allclose(scores(settled), scores(adopt(kv.layers[0], batch)), atol=2e-5, rtol=0)
            at = np.arange(batch)[:, None], np.arange(heads), slot
            np.testing.assert_array_equal(mine.k_pages[at], k)
            np.testing.assert_array_equal(mine.v_pages[at], v)

    def test_donated_cache_is_changed_in_place(self, rng):
        given = problem(Case(size=2304, pages=1, heads=1, dtype="float32"), rng)
        step = jax.jit(partial(h2o_evict, implementation="xla"), donate_argnums=0)
        memory = step.lower(*given.arguments).compile().memory_analysis()
        cache = given.cache
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in (cache.k_pages, cache.v_pages, cache.position, cache.score))
        assert memory.temp_size_in_bytes < cache.k_pages.nbytes / 4

    @pytest.mark.parametrize(
        ("case", "reason"),
        [(Case(size=30), "120 slots, which is no multiple of 128"), (Case(dim=12), "24 bytes"), (Case(dim=264), "264 is more than 256")],
    )
    def test_kernel_says_what_it_cannot_do(self, case, reason, rng):
        given = problem(case, rng)
        with interpreted("mosaic_gpu"), pytest.raises(UnsupportedError, match=reason):
            h2o_evict(*given.arguments, implementation="mosaic_gpu")
        verify(case, rng, "xla")

    @pytest.mark.parametrize("broken", ["position", "score", "logits", "k", "v_pages", "nothing"])
    def test_wrong_shapes_are_refused(self, broken, rng):
        given = problem(Case(), rng)
        cache, attention, token, *rest = given.arguments
        if broken == "nothing":
            attention = token = None
        elif broken == "logits":
            attention = attention._replace(logits=attention.logits[..., 1:])
        elif broken == "k":
            token = token._replace(k=token.k[..., 1:])
        else:
            cache = dataclasses.replace(cache, **{broken: getattr(cache, broken)[..., 1:]})
        with pytest.raises(ValueError, match="h2o_evict: "):
            h2o_evict(cache, attention, token, *rest)


class TestTheTestsCanFail:
    """Each of these is a mistake somebody could make; the cases above must notice."""

    @staticmethod
    def protects_nobody(cache, attention, token, length, budget, recent, active, **how):
        return h2o_evict(cache, attention, token, length, budget, recent * 0, active, **how)

    @staticmethod
    def evicts_too_early(cache, attention, token, length, budget, recent, active, **how):
        return h2o_evict(cache, attention, token, length, budget - 1, recent, active, **how)

    @staticmethod
    def moves_idle_rows(cache, attention, token, length, budget, recent, active, **how):
        return h2o_evict(cache, attention, token, length, budget, recent, active | True, **how)

    @staticmethod
    def scores_one_query_head(cache, attention, token, *rest, **how):
        return h2o_evict(cache, Attention(attention.logits[:, :, :1], attention.lse[:, :, :1]), token, *rest, **how)

    @staticmethod
    def writes_values_as_keys(cache, attention, token, *rest, **how):
        return h2o_evict(cache, attention, Token(token.v, token.k), *rest, **how)

    @staticmethod
    def ignores_the_page_table(cache, attention, token, *rest, **how):
        found, slot = h2o_evict(dataclasses.replace(cache, block_tables=jnp.sort(cache.block_tables, -1)), attention, token, *rest, **how)
        return dataclasses.replace(found, block_tables=cache.block_tables), slot

    MUTANTS = (
        protects_nobody, evicts_too_early, moves_idle_rows, scores_one_query_head, writes_values_as_keys, ignores_the_page_table,
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
            verify(Case(size=2304, pages=1, heads=1, ties=True, mode="write"), rng, implementation)


def adopt(layer, batch: int) -> H2OCache:
    """A dense layer of the strategy in this layout, with free slots up to a multiple of 128."""
    more = -layer.position.shape[-1] % 128
    k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in (np.asarray(layer.store.k).swapaxes(1, 2), np.asarray(layer.store.v)))
    k, v = (np.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
    position = np.pad(layer.position, ((0, 0), (0, 0), (0, more)), constant_values=-1)
    return H2OCache(k, v, np.arange(batch)[:, None], position, np.pad(layer.score, ((0, 0), (0, 0), (0, more))))


def attend(cache: H2OCache, q: np.ndarray) -> Attention:
    """What attention over the slots leaves behind, NaN where there is no token."""
    batch, heads, _ = cache.position.shape
    grouped = q.reshape(batch, heads, -1, q.shape[-1]) * q.shape[-1] ** -0.5
    logits = np.einsum("bhgd,bhcd->bhgc", grouped, cache.k_pages)
    held = (cache.position >= 0)[:, :, None]
    lse = np.log(np.where(held, np.exp(logits), 0).sum(-1))
    return Attention(np.where(held, logits, np.nan).astype(np.float32), lse.astype(np.float32))


def positions(cache: H2OCache) -> list:
    return [[sorted(set(head.tolist()) - {-1}) for head in row] for row in cache.position]


def scores(cache: H2OCache) -> np.ndarray:
    """In the order of positions."""
    order = np.argsort(np.where(cache.position < 0, 2**30, cache.position), axis=-1)
    held = np.take_along_axis(cache.position, order, -1) >= 0
    return np.where(held, np.take_along_axis(cache.score, order, -1), 0)
