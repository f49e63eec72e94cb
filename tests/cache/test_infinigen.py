"""InfiniGen: the conformance kit, a naive oracle of what it reads in real models, its count, partial keys and victims, what it refuses."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import PrefillPlan
from kvjax.cache import CacheShape, Decode, InfiniGen, InfiniGenPaper, Prefill, Strategy, host, ledger, parse_strategy
from kvjax.calibrate import Calibration, calibrate, prepare
from kvjax.errors import SpecError
from kvjax.models import Model, parameters
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Attention
from kvjax.testing import check_strategy
from kvjax.testing.driver import SHAPE, guide, kept, partial_queries, prefill_call, random_tokens, run

# --------------------------------------------------------------------------------------------------------------------- conformance

CASES = {
    ("infinigen(alpha=2,budget=8,full_layers=0)", "jit"): (
        "ample_budget_equals_full", "equals_masked_full_attention",
    ),
    ("infinigen(alpha=2,budget=6,pool=12,full_layers=0)", "jit"): (
        "equals_masked_full_attention", "budget_holds_and_nothing_returns", "protected_survive_ties", "unused_memory_never_leaks",
        "ledger_adds_up",
    ),
    ("infinigen(alpha=2,pool=0.5,victim=lru,full_layers=0)", "device"): (
        "budget_holds_and_nothing_returns", "protected_survive_ties", "bounded_chunks_stay_bounded",
    ),
    ("infinigen(alpha=2,pool=12,victim=fifo,full_layers=0)", "device"): ("protected_survive_ties",),
    ("infinigen(alpha=1,budget=9,sinks=2,recent=3,pool=14,full_layers=0)", "jit"): (
        "equals_masked_full_attention", "budget_holds_and_nothing_returns", "unused_memory_never_leaks",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "transfer"), CASES)
def test_conforms(spec, transfer):
    report = check_strategy(parse_strategy(spec, transfer=transfer), checks=CASES[spec, transfer])
    assert [outcome.skipped for outcome in report.outcomes] == [None] * len(CASES[spec, transfer])


# ------------------------------------------------------------------------------------------------------------- what the rule selects


def joined_by(policy: InfiniGen, logits: np.ndarray) -> np.ndarray:
    """Of a kv head's query heads [G, tokens held]: their highest, their mean, or the log of the mean attention they give."""
    if policy.group == "mass":
        attention = np.exp(logits - logits.max(-1, initial=-1e9, keepdims=True))
        return np.log((attention / attention.sum(-1, keepdims=True)).mean(0))
    return logits.max(0) if policy.group == "max" else logits.mean(0)


def most_read(policy: InfiniGen, held: int) -> int:
    return min(policy.budget, held) if isinstance(policy.budget, int) else min(held, max(1, math.floor(policy.budget * held + 1e-9)))


def set_aside(policy: InfiniGen, positions, length: int, most: int) -> set[int]:
    """Of these positions those that are always read: the first ones and the last of `length`, half of `most` together at most."""
    sinks = min(policy.sinks, most // 2)
    recent = min(policy.recent, most // 2 - sinks)
    return {p for p in positions if p < sinks or length - recent <= p < length}


def naive_selection(policy: InfiniGen, logits: list[list[dict[int, float]]], lengths: list[int]) -> list[tuple[int, list[list[int]]]]:
    """Per row how many tokens are read, and per kv head all positions in the order of their wanting.

    Args:
      logits: per row and kv head, position -> joined logit of the tokens held.
    """
    rows = []
    for heads, length in zip(logits, lengths, strict=True):
        most, counts, orders = most_read(policy, len(heads[0])), [], []
        for by_position in heads:
            fixed = set_aside(policy, by_position, length, most)
            rest = sorted((p for p in by_position if p not in fixed), key=lambda p: (-by_position[p], p))
            highest = by_position[rest[0]] if rest else 0.0
            if policy.group == "mass":
                near = sum(by_position[p] > -policy.threshold for p in rest)
            else:
                near = sum(by_position[p] > highest - policy.threshold or by_position[p] == highest for p in rest)
            counts.append(near + len(fixed))
            orders.append(sorted(fixed) + rest)
        rows.append((most, counts, orders))
    every = [n for _, counts, _ in rows for n in counts]
    found = []
    for most, counts, orders in rows:
        mean = sum(every) // len(every) if policy.count == "batch" else sum(counts) // len(counts)
        found.append((max(min(1, most), min(mean, most)), orders))
    return found


RULES = [
    InfiniGenPaper(alpha=2.0, budget=8, sinks=0, recent=0),
    InfiniGenPaper(alpha=3.5, budget=0.3, sinks=1, recent=2),
    InfiniGenPaper(alpha=2.0, budget=0.9, count="batch", sinks=2, recent=0),
    InfiniGenPaper(alpha=2.0, budget=0.9, group="mean", sinks=0, recent=4),
    InfiniGenPaper(alpha=0.0, budget=8, sinks=1, recent=1),
    InfiniGen(alpha=2.9, budget=9, group="max"),  # half of 9 is less than the sinks and the recent
    InfiniGen(alpha=2.9, budget=0.8, sinks=1, recent=3),
    InfiniGen(alpha=3.7, budget=0.8, sinks=0, recent=0, count="batch"),
    InfiniGenPaper(alpha=math.inf, budget=1.0),
]


@pytest.mark.parametrize("policy", RULES, ids=lambda policy: policy.describe())
def test_selection_is_the_rule_ties_included(policy):
    """Logits in steps of a half, so that many are equal and some lie on the threshold itself; ties go to the lower slot."""
    choose, always = jax.jit(policy.choose), jax.jit(policy.always_read)
    rng = np.random.default_rng()
    for _ in range(20):
        guess = rng.integers(-8, 9, (4, 3, 2, 20)) / 2
        held = np.array([20, 13, 1, 0])
        position = np.full((4, 3, 20), -1)
        for row, head in np.ndindex(4, 3):  # 7 tokens are gone, of every head its own; slots stand in the order of positions
            slots, kept = (np.sort(rng.permutation(n)[: held[row]]) for n in (20, held[row] + 7))
            position[row, head, slots] = kept
        guess = np.where(position[:, :, None] >= 0, guess, np.nan)  # partial keys of empty slots may be anything
        arguments = jnp.asarray(position), jnp.asarray(held + 7)
        slot, count = choose(jnp.asarray(guess, jnp.float32), *arguments, arguments[1])
        seen = [[position[b, h] >= 0 for h in range(3)] for b in range(4)]
        joined = [[joined_by(policy, guess[b, h][:, seen[b][h]]) for h in range(3)] for b in range(4)]
        logits = [[dict(zip(position[b, h][seen[b][h]].tolist(), joined[b][h], strict=True)) for h in range(3)] for b in range(4)]
        naive = naive_selection(policy, logits, (held + 7).tolist())
        assert count.tolist() == [n for n, _ in naive]
        for row, head in np.ndindex(4, 3):
            n, orders = naive[row]
            read = position[row, head, slot[row, head, :n]].tolist()
            if policy.group == "mass":  # where the rest is as large to float32, either may come first
                rank = [logits[row][head][p] for p in orders[head][:n]]
                np.testing.assert_allclose([logits[row][head][p] for p in read], rank, atol=1e-5)
                assert len(set(read)) == n
            else:
                assert read == orders[head][:n]
            fixed = set_aside(policy, logits[row][head], held[row] + 7, most_read(policy, held[row]))
            assert set(position[row, head, np.asarray(always(*arguments))[row, head]]) == fixed


def test_a_sink_no_longer_sets_the_threshold():
    """One logit stands 9 above all others: the published rule reads that token alone, the default one reads what is near the next."""
    guess = jnp.where(jnp.arange(40) == 0, 9.0, jnp.where(jnp.arange(40) % 4 == 1, 0.0, -5.0))[None, None, None]
    position, length = jnp.arange(40)[None, None], jnp.array([40])
    assert InfiniGenPaper(budget=30).choose(guess, position, length, length)[1].tolist() == [1]
    slot, count = InfiniGen(sinks=1, recent=4, alpha=4.0, budget=30, group="max").choose(guess, position, length, length)
    assert count.tolist() == [1 + 4 + 9]
    assert slot[0, 0, :14].tolist() == [0, 36, 37, 38, 39, *range(1, 36, 4)]


def test_a_head_that_looks_at_the_sink_wants_nothing():
    """Of two query heads one gives 0.99 to the sink, the other spreads its attention over 9 tokens: those are read, though their logits are
    lower than what the first has next to the sink."""
    first = jnp.where(jnp.arange(40) == 0, 20.0, jnp.where(jnp.arange(40) < 12, 9.0, 0.0))
    second = jnp.where((jnp.arange(40) >= 12) & (jnp.arange(40) < 21), 5.0, -5.0)
    position, length = jnp.arange(40)[None, None], jnp.array([40])
    policy = InfiniGen(sinks=1, recent=0, alpha=4.0, budget=30)
    slot, count = policy.choose(jnp.stack([first, second])[None, None], position, length, length)
    assert count.tolist() == [10]
    assert slot[0, 0, :10].tolist() == [0, *range(12, 21)]


def test_mean_of_equal_counts_is_that_count():
    """For some numbers of heads, 41 and 47 the first, a product with the rounded reciprocal falls just below it."""
    for heads in (41, 47):
        counts = jnp.array([1, 2, 4, 8])
        guess = jnp.broadcast_to(jnp.where(jnp.arange(10) < counts[:, None, None, None], 0.0, -9.0), (4, heads, 1, 10))
        position, plain = jnp.broadcast_to(jnp.arange(10), (4, 1, 1, 10)), InfiniGenPaper(budget=10, sinks=0, recent=0)
        for policy in (plain, dataclasses.replace(plain, count="batch")):
            everything = jax.jit(jax.vmap(policy.choose))  # a batch of one each
            _, found = everything(guess[:, None], position, jnp.full((4, 1), 10), jnp.full((4, 1), 10))
            assert found[:, 0].tolist() == counts.tolist()


def test_one_mean_serves_the_batch_only_where_that_is_asked_for():
    near = jnp.array([10, 2])  # tokens close to the highest, of 10
    guess = jnp.where(jnp.arange(10) < near[:, None, None, None], 0.0, -9.0)
    position, length = jnp.broadcast_to(jnp.arange(10), (2, 1, 10)), jnp.array([10, 10])
    policy = InfiniGenPaper(budget=10, sinks=0, recent=0)
    assert policy.choose(guess, position, length, length)[1].tolist() == [10, 2]
    assert dataclasses.replace(policy, count="batch").choose(guess, position, length, length)[1].tolist() == [6, 6]


@pytest.mark.parametrize(
    ("policy", "dim", "count"),
    [
        (InfiniGenPaper(), 64, 19),
        (InfiniGenPaper(partial=0.2, columns="query"), 64, 12),
        (InfiniGenPaper(partial=0.2, columns="union"), 64, 24),
        (InfiniGen(partial=0.2), 64, 12),
        (InfiniGenPaper(partial=0.9, columns="union"), 16, 16),
        (InfiniGenPaper(partial=0.01), 16, 1),
        (InfiniGenPaper(partial=1), 16, 16),
    ],
)
def test_columns_of_partial_keys(policy, dim, count):
    strategy = Strategy(policy, host())
    state = jax.eval_shape(partial(strategy.init, CacheShape(3, 2, 2, dim, jnp.dtype(jnp.float32)), [4], 4, 2))
    assert [None if layer.own.partial is None else layer.own.partial.shape for layer in state.layers] == [None, None, (1, 2, count, 6)]


# ---------------------------------------------------------------------------------------------------- an oracle, over whole models


@dataclasses.dataclass(frozen=True)
class Recording(Strategy):
    """Notes the slots that stand staged when a layer's new token arrives."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def decode(self, layer, q, k, v, kv, active, guide=None):
        ahead = self._at_hand(layer, q[:, 0], kv, active) if kv.ahead is None else kv.ahead
        assert ahead is not None
        self.seen.append(ahead.slot)
        return super().decode(layer, q, k, v, kv.handed(ahead), active, guide)


def watched(decoder, params, tokens, kv, step):
    """The new state, and the attention input of every layer."""
    inputs = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        _, kv = decoder.apply(params, tokens, kv, step)
    return kv, inputs


@partial(jax.jit, static_argnums=(0, 1))
def prompt_call(decoder, strategy, params, tokens, kv, lengths):
    return watched(decoder, params, tokens, kv, Prefill(lengths, strategy))


@partial(jax.jit, static_argnums=(0, 1))
def step_call(decoder, policy, params, token, kv, active):
    seen: list = []
    kv, inputs = watched(decoder, params, token, kv, Decode(active, Recording(policy, host("device"), seen=seen)))
    return kv, inputs, seen


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Guessed logits in float64, from the weights as they were loaded, the calibration's numbers, and attention inputs."""

    model: Model
    calibration: Calibration
    policy: InfiniGen

    def projected(self, layer: int, name: str, x: np.ndarray, positions: np.ndarray, correction: np.ndarray | None = None) -> np.ndarray:
        """[N, heads, D] of `x` [N, M], normalised and rotated as they meet in the product."""
        config, own = self.model.config, self.model.params["params"][f"layer_{layer}"]["attention"]
        weight = np.asarray(own[name]["weight"], np.float64)
        y = x @ (weight if correction is None else weight + correction).T
        if "bias" in own[name]:
            y = y + np.asarray(own[name]["bias"], np.float64)
        y = y.reshape(len(x), -1, config.head_dim)
        if config.qk_norm:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * np.asarray(own[f"{name}_norm"], np.float64)
        if config.rope is not None:
            half = config.head_dim // 2
            angle = positions[:, None, None] * config.rope.theta ** (-np.arange(half) / half)
            a, b = y[..., :half], y[..., half:]
            y = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
        return y

    def columns(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """[D, P] for queries and for keys: the kept columns of A, or of the projections."""
        if self.policy.columns == "product":
            kept = max(1, int(self.policy.partial * self.model.config.head_dim))
            return self.calibration.product_query[layer, head, :, :kept], self.calibration.product_key[layer, head, :, :kept]
        policy, found, dim = self.policy, self.calibration, self.model.config.head_dim
        query, key = (found.query_mass, found.key_mass) if policy.skew else (found.plain_query_mass, found.plain_key_mass)
        query, key = query[layer, head], key[layer, head]
        each = max(1, int(policy.partial * dim))
        best: dict[str, set] = {
            name: set(np.argsort(-mass)[:each]) for name, mass in (("sum", query + key), ("query", query), ("key", key))
        }
        chosen = best["query"] | best["key"] if policy.columns == "union" else best[policy.columns]
        if policy.columns == "union":  # filled up to the same size everywhere
            rest = [c for c in np.argsort(-(query + key)) if c not in chosen]
            chosen |= set(rest[: min(2 * each, dim) - len(chosen)])
        turn = found.skew[layer, head].astype(np.float64) if policy.skew else np.eye(dim)
        return turn[:, sorted(chosen)], turn[:, sorted(chosen)]

    def guess(self, layer: int, before: np.ndarray, own: np.ndarray, held: list[np.ndarray]) -> list[np.ndarray]:
        """Per kv head: joined logits of the positions in `held`.

        Args:
          before: the attention input [M] of layer `layer - 1` for the token at position len(own).
          own: attention inputs [N, M] of `layer` for the tokens before it.
        """
        config, at = self.model.config, np.array([len(own)])
        correction = None
        if self.policy.correction:
            correction = self.calibration.up[layer].astype(np.float64) @ self.calibration.down[layer]
        q = self.projected(layer, "q", before[None], at, correction)[0].reshape(config.num_kv_heads, -1, config.head_dim)
        k = self.projected(layer, "k", own, np.arange(len(own)))
        found = []
        for head, positions in enumerate(held):
            of_queries, of_keys = self.columns(layer, head)
            logits = (q[head] @ of_queries) @ (k[positions, head] @ of_keys).T / np.sqrt(config.head_dim)
            found.append(joined_by(self.policy, logits))
        return found


MARGIN = 1e-4
"""Where a guessed logit lies closer than this to the threshold, or two at the cut lie closer together, float32 may decide otherwise."""


def clearly(policy: InfiniGen, by_position: dict[int, float], length: int) -> bool:
    """Whether no logit of a kv head lies on its threshold."""
    fixed = set_aside(policy, by_position, length, most_read(policy, len(by_position)))
    rest = np.array([x for p, x in by_position.items() if p not in fixed])
    highest = 0 if policy.group == "mass" else rest.max(initial=-np.inf)
    return not rest.size or np.abs(rest - highest + policy.alpha).min() > MARGIN


STEPS, LENGTHS = 8, np.array([26, 15, 3])
STYLES: dict[str, InfiniGen] = {
    "opt": InfiniGenPaper(alpha=2.0, partial=0.5, budget=16, sinks=2, recent=3, full_layers=1),
    "llama-mha": InfiniGenPaper(alpha=2.0, partial=0.3, budget=0.8, sinks=0, recent=0, columns="union", full_layers=0),
    "llama-gqa": InfiniGenPaper(
        alpha=1.5, partial=0.4, budget=0.7, sinks=1, recent=0, columns="query", skew=False, group="mean", count="batch", full_layers=1
    ),
    "llama-default": InfiniGen(alpha=3.0, partial=0.4, budget=0.7, sinks=1, recent=2, full_layers=1),
    "opt-default": InfiniGen(alpha=3.0, partial=0.4, budget=0.7, sinks=0, recent=3, full_layers=1),
    "qwen3-gqa": InfiniGenPaper(alpha=2.5, partial=0.4, budget=9, sinks=1, recent=2, pool=12, victim="lru", full_layers=1),
}


def sharp_model(style: str, byte_model: Model, opt_model: Model) -> Model:
    """Random weights, with queries large enough for attention to have favourites."""
    config: ModelConfig = dataclasses.replace((opt_model if style.startswith("opt") else byte_model).config, name=style, num_layers=3)
    if style == "llama-mha":
        config = dataclasses.replace(config, num_kv_heads=config.num_heads)
    if style.startswith("qwen3"):
        config = dataclasses.replace(config, qk_norm=True)
    params = parameters.random(config)
    rng = np.random.default_rng(len(style))

    def scaled(path, x):
        names = [key.key for key in path]
        if "bias" in names:
            return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        if "q_norm" in names or "k_norm" in names:
            return jnp.asarray(1 + rng.random(x.shape), x.dtype)
        return 3 * x if "q" in names and not config.qk_norm else x

    return Model(config, jax.tree_util.tree_map_with_path(scaled, params), None)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_read_is_what_the_oracle_says(style, byte_model, opt_model):
    policy, model = STYLES[style], sharp_model(style, byte_model, opt_model)
    config, rng = model.config, np.random.default_rng(7)
    tokens = rng.integers(0, config.vocab_size, (3, LENGTHS.max() + STEPS)).astype(np.int32)
    calibration = calibrate(model, tokens)
    options: dict = {name: getattr(policy, name) for name in ("partial", "columns", "skew", "correction")}
    prepared = prepare(model, calibration, **options)
    oracle, strategy = Oracle(model, calibration, policy), Strategy(policy, host("device"))
    shape = CacheShape(config.num_layers, config.num_kv_heads, config.group_size, config.head_dim, jnp.dtype(jnp.float32))

    kv = strategy.init(shape, LENGTHS, int(LENGTHS.max()), STEPS, fill=np.nan)
    kv, inputs = prompt_call(prepared.decoder, strategy, prepared.params, jnp.asarray(tokens[:, : LENGTHS.max()]), kv, jnp.asarray(LENGTHS))
    history = [[np.asarray(x, np.float64)[row, :n] for row, n in enumerate(LENGTHS)] for x in inputs]  # per layer and row
    compared = unclear = below = rows = 0
    for step in range(STEPS):
        at = LENGTHS + step
        active = np.array([True, True, step % 3 != 1 or policy.count == "batch"])
        before, at = kv, np.asarray(kv.length)
        token = jnp.asarray(tokens[np.arange(3), at][:, None])
        kv, inputs, seen = step_call(prepared.decoder, policy, prepared.params, token, kv, jnp.asarray(active))
        inputs = [np.asarray(x, np.float64)[:, 0] for x in inputs]
        for layer in range(config.num_layers):
            state, staged = before.layers[layer], np.asarray(seen[layer])
            capacity = state.pool.page_size
            where = np.broadcast_to(np.arange(capacity), (3, config.num_kv_heads, capacity))
            where = np.where(where < at[:, None, None], where, -1) if state.position is None else np.asarray(state.position)
            read = [[set(where[b, h, s[s < capacity]].tolist()) for h, s in enumerate(staged[b])] for b in range(3)]
            held = [[np.sort(p[p >= 0]) for p in where[b]] for b in range(3)]
            if layer < max(policy.full_layers, 1):
                assert all(read[b][h] - {-1} == set(held[b][h].tolist()) for b in range(3) for h in range(len(held[b])) if active[b])
                continue
            guesses = [oracle.guess(layer, inputs[layer - 1][b], history[layer][b], held[b]) for b in range(3)]
            logits = [
                [dict(zip(positions.tolist(), guess.tolist(), strict=True)) for positions, guess in zip(*row, strict=True)]
                for row in zip(held, guesses, strict=True)
            ]
            naive = naive_selection(policy, logits, at.tolist())
            clear = [all(clearly(policy, by_position, int(at[b])) for by_position in logits[b]) for b in range(3)]
            for b in range(3):
                if not active[b]:
                    assert read[b] == [set()] * config.num_kv_heads
                    continue
                count, orders = naive[b]
                below, rows = below + (count < most_read(policy, len(held[b][0]))), rows + 1
                for h, order in enumerate(orders):
                    gap = np.inf
                    if count < len(order) and order[count - 1] not in set_aside(policy, order, at[b], most_read(policy, len(order))):
                        gap = logits[b][h][order[count - 1]] - logits[b][h][order[count]]
                    if gap <= MARGIN or not (clear[b] if policy.count == "request" else all(clear)):
                        unclear += 1
                        continue
                    compared += 1
                    assert read[b][h] == set(order[:count]), f"layer {layer}, step {step}, row {b}, head {h}"
        history = [
            [np.vstack([old, x[b]]) if active[b] else old for b, old in enumerate(rows)] for rows, x in zip(history, inputs, strict=True)
        ]
    assert compared > 20 * unclear
    assert below > 0.25 * rows, "the cap decides too often for the threshold to be tested"


# ------------------------------------------------------------------------------------------------ all of it is the full cache again


def ample(model: Model, full_layers: int) -> tuple[Model, Strategy]:
    strategy = Strategy(InfiniGenPaper(alpha=math.inf, budget=1000, full_layers=full_layers), host())
    return kvjax.calibrated(model, strategy, calibrate(model, np.arange(2 * 20).reshape(2, 20))), strategy


@pytest.mark.parametrize("which", ["byte_model", "opt_model"])
def test_ample_has_the_logits_of_the_full_cache(which, request):
    model = request.getfixturevalue(which)
    ids = np.random.default_rng(11).integers(0, model.config.vocab_size, (2, 24))
    ready, strategy = ample(model, 0)
    full = kvjax.score(model, ids, prompt_len=18)
    np.testing.assert_allclose(kvjax.score(ready, ids, prompt_len=18, strategy=strategy), full, atol=1e-5)


def test_ample_generates_as_the_full_cache_token_for_token(byte_model):
    prompts = [list(range(40, 58)), list(range(60, 70))]
    ready, strategy = ample(byte_model, 1)
    arguments = dict(max_new_tokens=12, steps_per_call=1)
    assert kvjax.generate(ready, prompts, strategy=strategy, **arguments).tokens == kvjax.generate(byte_model, prompts, **arguments).tokens


@pytest.mark.slow
def test_limited_pool_in_chunks_generates_as_in_one_call(byte_model):
    strategy = Strategy(InfiniGenPaper(alpha=2.0, budget=6, pool=0.5, full_layers=1), host("device"))
    prompts = [list(range(40, 70)), list(range(60, 80))]
    ready = kvjax.calibrated(byte_model, strategy, calibrate(byte_model, np.array([prompts[0]])))
    whole, chunked = (
        kvjax.generate(ready, prompts, strategy=strategy, max_new_tokens=6, steps_per_call=1, prefill=plan)
        for plan in (PrefillPlan(), PrefillPlan(chunk=16))
    )
    assert chunked.tokens == whole.tokens
    assert chunked.ledger.kept_fraction == whole.ledger.kept_fraction == 2 * 25 / (36 + 26 - 2) / 2


def test_model_without_a_guide_is_refused(byte_model):
    for spec in ("infinigen(full_layers=0)", "infinigen(full_layers=1)"):
        with pytest.raises(SpecError, match=r"full_layers=\d\) guesses .* pass it through kvjax.calibrated\(model, strategy\)"):
            kvjax.generate(byte_model, [[1, 2, 3]], strategy=spec, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------------------- partial keys


@pytest.mark.parametrize("pool", [None, 12])
def test_partial_keys_are_those_of_the_keys_in_their_slots(pool):
    """After a prompt in chunks, and after decoding and evicting, with a row that sits out."""
    strategy = Strategy(InfiniGenPaper(alpha=2.0, budget=6, pool=pool, full_layers=0), host("device"))
    tokens, lengths = random_tokens(np.random.default_rng(), 3, 45), np.array([37, 20, 3])
    trace = run(strategy, tokens, lengths, 6, chunk=8, fill=np.nan, active=np.array([True, False, True]))
    columns = np.asarray(guide(strategy).key)
    for kv in (trace.states[0], trace.states[-1]):
        layer = kv.layers[0]
        for row in range(3):
            for head in range(SHAPE.num_kv_heads):
                held = kept(kv, row, head)
                assert len(held) == min(int(kv.length[row]), pool or 99)
                for position, slot in held.items():
                    np.testing.assert_array_equal(layer.pool.k[0][row, head, slot], tokens.k[row, position, head])
                    want = tokens.k[row, position, head] @ columns[head]
                    np.testing.assert_allclose(layer.own.partial[row, head, :, slot], want, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------------- victims


@partial(jax.jit, static_argnums=0)
def noted_step(policy, kv, q, k, v, active):
    """A step of the driver, and the slots that were staged for it."""
    seen: list = []
    strategy = Recording(policy, host("device"), seen=seen)
    ahead = strategy.look_ahead(-1, lambda: partial_queries(guide(strategy), q), kv, active)
    _, layer = strategy.decode(kv.layers[0], q, k, v, kv.handed(ahead), active, guide(strategy))
    return dataclasses.replace(kv.with_layer(0, layer), length=kv.length + active), seen[0]


@pytest.mark.parametrize("policy", [
    InfiniGenPaper(alpha=1.5, budget=6, sinks=0, recent=0, pool=20, victim="counter", full_layers=0),
    InfiniGenPaper(alpha=1.5, budget=6, sinks=0, recent=0, pool=0.5, victim="lru", full_layers=0),
    InfiniGenPaper(alpha=1.5, budget=6, sinks=0, recent=0, pool=20, victim="fifo", full_layers=0),
    InfiniGenPaper(alpha=1.5, budget=6, sinks=2, recent=3, pool=20, victim="counter", full_layers=0),
    InfiniGenPaper(alpha=1.5, budget=6, sinks=1, recent=20, pool=0.5, victim="fifo", full_layers=0),
], ids=lambda policy: f"{policy.victim}-{policy.sinks}-{policy.recent}")  # fmt: skip
def test_victims_are_those_of_a_naive_book(policy):
    """A victim per head and step once the pool is full, never the newcomer, never one twice; what is gone is not fetched again.

    The book: how often a token was fetched and when last, its own step included; between equals the oldest goes. Sinks and the recent stay,
    as far as half of the pool has room for them.
    """
    lengths, steps = np.array([37, 20]), 150
    tokens = random_tokens(np.random.default_rng(5), 2, int(lengths.max()) + steps, sharpness=3.0)
    strategy = Strategy(policy, host("device"))
    kv = strategy.init(SHAPE, lengths, 37, steps)
    valid = np.arange(37) < lengths[:, None]
    _, kv = prefill_call(strategy, True, kv, *(x[:, :37] for x in (tokens.q, tokens.k, tokens.v)), valid)
    limits = [20, 20] if policy.pool == 20 else [18, 10]
    heads = [(row, head) for row in range(2) for head in range(SHAPE.num_kv_heads)]
    sinks = policy.sinks
    held, dropped = {}, {}
    for row, head in heads:  # the statistics of a prompt's tokens are equal
        length = int(lengths[row])
        kept_first = set(range(sinks)) | set(range(max(sinks, length - limits[row] + sinks), length))
        held[row, head], dropped[row, head] = dict.fromkeys(sorted(kept_first), (0, 0)), set(range(length)) - kept_first
    gone: dict = {rh: [] for rh in heads}
    for step in range(steps):
        where = np.asarray(kv.layers[0].position)
        for row, head in heads:
            assert {int(p) for p in where[row, head] if p >= 0} == set(held[row, head]), f"step {step}, row {row}, head {head}"
        at = lengths + step
        q, k, v = (x[np.arange(2), at][:, None] for x in (tokens.q, tokens.k, tokens.v))
        kv, staged = noted_step(policy, kv, q, k, v, jnp.ones(2, bool))
        staged = np.asarray(staged)
        for row, head in heads:
            book, slots = held[row, head], staged[row, head]
            used = where[row, head, slots[slots < where.shape[-1]]].tolist()
            assert 1 <= len(used) == len(set(used)) <= 6
            assert set(used) <= set(book), f"step {step}: fetched {set(used) - set(book)}, which the pool does not hold"
            new = int(at[row])
            book[new] = (0, 0)
            for position in (*used, new):
                book[position] = (book[position][0] + 1, new)
            if len(book) > limits[row]:
                rank = {"counter": lambda p: (book[p][0], p), "lru": lambda p: (book[p][1], p), "fifo": lambda p: p}[policy.victim]  # noqa: B023
                fixed = set_aside(policy, book, new + 1, limits[row]) | {new}
                victim = min((p for p in book if p not in fixed), key=rank)
                del book[victim]
                gone[row, head].append(victim)
    for row, head in heads:
        full_after = max(0, limits[row] - int(lengths[row]))
        assert len(gone[row, head]) == len(set(gone[row, head])) == steps - full_after
        assert not set(gone[row, head]) & dropped[row, head]
        assert not {int(p) for p in np.asarray(kv.layers[0].position)[row, head]} & set(gone[row, head])


@pytest.mark.parametrize("victim", ["counter", "lru"])
def test_where_everything_is_read_the_oldest_goes(victim):
    """Every token is used in every step there, so the count would be the age and the newest token the least used."""
    strategy = Strategy(InfiniGenPaper(sinks=0, recent=0, pool=12, victim=victim, full_layers=1), host("device"))
    kv = run(strategy, random_tokens(np.random.default_rng(0), 2, 45), np.array([37, 20]), 8).states[-1]
    for row, newest in enumerate((44, 27)):
        assert set(kept(kv, row, 0)) == set(range(newest - 11, newest + 1))


# ----------------------------------------------------------------------------------------------------------------------------- books


def test_books_of_a_selected_fetch_against_a_hand_count():
    """Budget 6 of at most 6 slots in sizes 2, 3, 5, 6; an alpha without end, so that every step wants the budget, or all there is."""
    strategy = Strategy(InfiniGenPaper(alpha=math.inf, budget=6, partial=0.25, full_layers=0), host())
    tokens = random_tokens(np.random.default_rng(0), 2, 24)
    kv = run(strategy, tokens, np.array([20, 3]), 4).states[-1]
    decoded, held, wanted, moved = np.asarray(kv.layers[0].traffic).tolist()
    assert decoded == 2 * 4
    assert held == 2 * (20 + 21 + 22 + 23 + 3 + 4 + 5 + 6)
    assert wanted == 2 * (4 * 6 + 3 + 4 + 5 + 6)
    assert moved == 2 * 2 * 4 * 6
    token = 2 * SHAPE.head_dim * 4
    books = ledger(strategy, kv)
    slots, partials = 2 * 2 * 24, 2 * 2 * 4 * 24 * 4
    assert (books.host.live, books.host.empty) == (2 * (24 + 7) * token, slots * token - 2 * (24 + 7) * token)
    assert (books.host.metadata, books.device.live, books.device.empty) == (0, 0, 0)
    assert books.device.metadata == partials + 4 * 4 + 2 * 2 * 4  # traffic, lengths and prompt lengths
    assert books.device.total + books.host.total == sum(x.nbytes for x in jax.tree.leaves(kv))
    assert books.bytes_moved_per_token == moved * token / decoded
    assert books.fetched == (moved / held,)
    assert books.wanted == (wanted / held,)
    flat = books.record()
    assert flat["kv_fetched_fraction"] == flat["kv_fetched_fraction_layer_0"] == moved / held
    assert flat["kv_wanted_fraction"] == wanted / held


# ---------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1}, "alpha=-1 is not a number of at least 0"),
        ({"alpha": math.nan}, "alpha=nan is not a number of at least 0"),
        ({"alpha": "high"}, "alpha='high' is not a number of at least 0"),
        ({"alpha": True}, "alpha=True is not a number of at least 0"),
        ({"partial": 0.0}, "partial=0.0 is not a fraction of the columns above 0 and up to 1"),
        ({"partial": 2}, "partial=2 is not a fraction of the columns above 0 and up to 1"),
        ({"partial": math.nan}, "partial=nan is not a fraction"),
        ({"budget": 0}, "budget=0 reads nothing; give at least 1 token"),
        ({"budget": 0.0}, "budget=0 reads nothing"),
        ({"budget": 1.5}, "budget=1.5 is not a fraction between 0 and 1"),
        ({"budget": "all"}, "budget='all' is not a number"),
        ({"columns": "key"}, "columns=key does not exist; choose from product, sum, query, union"),
        ({"skew": "no"}, "skew='no' is not True or False"),
        ({"correction": 1}, "correction=1 is not True or False"),
        ({"count": "head"}, "count=head does not exist; choose from request, batch"),
        ({"group": "sum"}, "group=sum does not exist; choose from mass, max, mean"),
        ({"pool": 0}, "pool=0 keeps nothing; give tokens or a fraction of the prompt, or leave it out"),
        ({"pool": -3}, "pool=-3 is negative"),
        ({"victim": "random"}, "victim=random does not exist; choose from counter, lru, fifo"),
        ({"full_layers": -1}, "full_layers=-1 is not a number of layers"),
        ({"full_layers": 1.5}, "full_layers=1.5 is not a number of layers"),
        ({"sinks": -1}, "sinks=-1 is not a number of tokens, 0 or more"),
        ({"sinks": 0.1}, "sinks=0.1 is not a number of tokens"),
        ({"recent": True}, "recent=True is not a number of tokens"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SpecError, match=f"^infinigen: {message}") as error:
        InfiniGen(**arguments)
    assert "\n" not in str(error.value)
