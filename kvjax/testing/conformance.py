"""What every strategy must do. Each check draws fresh random inputs and compares with something naive."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import CacheShape, KVState, Policy, Slots, Store, Strategy, dense, ledger
from kvjax.cache.ledger import nbytes
from kvjax.cache.policies import Full
from kvjax.cache.strategy import highest, lowest
from kvjax.errors import SpecError
from kvjax.models.guide import Guide
from kvjax.testing.driver import SHAPE, Tokens, guide, kept, masked_attention, partial_queries, random_tokens, run

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""For outputs of order one, by the type of the cache; the sums run over tens of terms."""

PROMPT, STEPS, CHUNK = 37, 24, 8
RAGGED = np.array([PROMPT, PROMPT - 9, 5])
"""Prompt lengths of a batch; most checks share it, and with it the compiled programs."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a check draws from."""

    rng: np.random.Generator
    shape: CacheShape = SHAPE

    def tokens(self, batch: int = 3, length: int = PROMPT + STEPS) -> Tokens:
        return random_tokens(self.rng, batch, length, shape=self.shape)

    def close(self, got, want, what: str, scale: float = 1.0) -> None:
        """Raises AssertionError unless outputs are what they are wanted to be, within `scale` times TOLERANCE."""
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.isfinite(got).all(), f"not finite, unlike {what}"
        error = float(np.abs(got - want).max(initial=0.0))
        assert error <= scale * TOLERANCE[self.shape.dtype.name], f"off by {error:.2g} from {what}"


class Skip(Exception):
    """A check does not apply to a strategy; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one check: `passed`, or `skipped` with the reason."""

    name: str
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All outcomes for one strategy (a failed check raises instead)."""

    strategy: str
    outcomes: tuple[Outcome, ...]

    def __str__(self) -> str:
        lines = [f"{o.name}: {'passed' if o.skipped is None else 'skipped, ' + o.skipped}" for o in self.outcomes]
        return "\n".join([self.strategy, *lines])


def check_strategy(
    policy: Policy | Strategy, store: Store | None = None, seed: int | None = None, checks: tuple[str, ...] = (), shape: CacheShape = SHAPE
) -> Report:
    """Runs a strategy through the checks. Raises AssertionError at the first that fails.

    Args:
      policy: a policy, or a whole strategy.
      store: where the policy's bytes live; the dense store by default.
      seed: of the random inputs; None draws a fresh one, which a failure names.
      checks: names from CHECKS; empty: all.
      shape: of the layer that is driven: its heads, and the type of its cache.
    """
    strategy = policy if isinstance(policy, Strategy) else Strategy(policy, store or dense())
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    outcomes = []
    for name in checks or CHECKS:
        try:
            CHECKS[name](strategy, Inputs(np.random.default_rng(seed), shape))
        except Skip as reason:
            outcomes.append(Outcome(name, str(reason)))
        except AssertionError as error:
            raise AssertionError(f"{strategy.describe()} fails {name} (seed={seed}): {error}") from error
        else:
            outcomes.append(Outcome(name))
    return Report(strategy.describe(), tuple(outcomes))


def ample_budget_equals_full(strategy: Strategy, inputs: Inputs) -> None:
    """With a budget of at least the whole length, a strategy is the full cache."""
    try:
        ample = Strategy(strategy.policy.ample(2 * (PROMPT + STEPS)), strategy.store)
    except SpecError as error:
        raise Skip(f"no way to set its budget: {error}") from None
    tokens = inputs.tokens()
    full = run(Strategy(Full(), strategy.store), tokens, RAGGED, STEPS)
    inputs.close(run(ample, tokens, RAGGED, STEPS).outs, full.outs, "the full cache")


def equals_masked_full_attention(strategy: Strategy, inputs: Inputs) -> None:
    """Every decode output is full attention masked to the tokens that are kept, at their true positions."""
    tokens = inputs.tokens()
    trace = run(strategy, tokens, RAGGED, STEPS)
    for step in range(0, STEPS, 3):
        for row, length in enumerate(RAGGED.tolist()):
            at = length + step
            held = [set(kept(trace.states[step], row, head)) | {at} for head in range(inputs.shape.num_kv_heads)]
            want = masked_attention(strategy, tokens, row, at, held, length)
            inputs.close(trace.outs[row, step], want, f"row {row}, step {step}: masked full attention")
    _slots_hold_what_they_say(strategy, inputs, tokens, trace.states[-1])


def _slots_hold_what_they_say(strategy: Strategy, inputs: Inputs, tokens: Tokens, kv: KVState) -> None:
    keys, values = (np.asarray(x) for x in strategy.store.tokens(kv.layers[0].pool, kv.table, tokens.batch))
    for row in range(tokens.batch):
        for head in range(inputs.shape.num_kv_heads):
            for position, slot in kept(kv, row, head).items():
                inputs.close(keys[row, slot, head], tokens.k[row, position, head], f"key of position {position} in slot {slot}")
                inputs.close(values[row, slot, head], tokens.v[row, position, head], f"value of position {position} in slot {slot}")


def budget_holds_and_nothing_returns(strategy: Strategy, inputs: Inputs) -> None:
    """The kept set stays within the budget, the store within budget + 1 slots, and an evicted token never comes back."""
    trace = run(strategy, inputs.tokens(), RAGGED, STEPS)
    budget = strategy.policy.kept_tokens(PROMPT)
    if budget is None:
        raise Skip("it keeps everything")
    capacity = trace.states[0].layers[0].pool.capacity(trace.states[0].table)
    if strategy.policy.evicts_in_decode:
        need = strategy.store.rounded(min(budget + 1, PROMPT + STEPS))
        assert capacity == need, f"{capacity} slots for a budget of {budget}, {need} would do"
    for row, length in enumerate(RAGGED):
        limit = strategy.policy.kept_tokens(int(length))
        for head in range(inputs.shape.num_kv_heads):
            before: set[int] = set(range(int(length)))
            for step, state in enumerate(trace.states):
                now = set(kept(state, row, head))
                newest = int(length) + step - 1
                assert now <= before | {newest}, f"row {row} head {head}: {sorted(now - before)} came back at step {step}"
                if strategy.policy.evicts_in_decode:
                    assert len(now) == min(limit, newest + 1), f"row {row} head {head}: {len(now)} kept at step {step}, budget {limit}"
                else:
                    assert len(now) == min(limit, int(length)) + step, f"row {row} head {head}: {len(now)} kept at step {step}"
                before = now


def protected_survive_ties(strategy: Strategy, inputs: Inputs) -> None:
    """With all scores equal, protected tokens stay, and of the others the lower positions."""
    policy = strategy.policy
    budget = policy.kept_tokens(PROMPT)
    if budget is None:
        raise Skip("it keeps everything")
    heads = inputs.shape.num_kv_heads if policy.per_head else 1
    order = inputs.rng.permutation(PROMPT)  # slots stand in any order
    position = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (1, heads, PROMPT))
    own = jax.tree.map(jnp.ones_like, policy.init_own(dataclasses.replace(inputs.shape, num_kv_heads=heads), 1, PROMPT, 0))
    one = jnp.full((1, 1, 1), PROMPT, jnp.int32)
    priority = policy.priority(Slots(position, own, one, one))
    protected = set(order[np.isposinf(np.asarray(priority)[0, 0])].tolist())
    index = np.asarray(highest(priority, position, jnp.asarray([[budget]]), budget + 1))[0, 0]
    stayed = [int(order[i]) for i in index if i < PROMPT]
    assert len(stayed) == min(budget, PROMPT)
    assert stayed == sorted(stayed), f"kept tokens are not in order: {stayed}"
    assert len(protected) > budget or protected <= set(stayed), f"{sorted(protected - set(stayed))} are protected and were dropped"
    victim = int(order[int(np.asarray(lowest(priority, position))[0, 0])])
    assert victim not in protected or len(protected) == PROMPT, f"{victim} is protected and was chosen as victim"
    by_rank = sorted(range(PROMPT), key=lambda p: (-float(np.asarray(priority)[0, 0, int(np.flatnonzero(order == p)[0])]), p))
    assert sorted(by_rank[:budget]) == stayed, "ties do not go to the lowest position"
    assert by_rank[-1] == victim, f"victim {victim}, but {by_rank[-1]} ranks last"


def chunks_change_nothing(strategy: Strategy, inputs: Inputs) -> None:
    """A prompt in chunks, compressed at the end, gives the outputs and the kept sets of one call."""
    tokens = inputs.tokens()
    whole, parts = run(strategy, tokens, RAGGED, STEPS), run(strategy, tokens, RAGGED, STEPS, chunk=CHUNK)
    for row, length in enumerate(RAGGED):
        inputs.close(parts.prompt_out[row, :length], whole.prompt_out[row, :length], "in chunks: in one call")
        for head in range(inputs.shape.num_kv_heads):
            assert kept(parts.states[0], row, head).keys() == kept(whole.states[0], row, head).keys(), "chunks keep other tokens"
    inputs.close(parts.outs, whole.outs, "decoding after chunks: after one call")


def bounded_chunks_stay_bounded(strategy: Strategy, inputs: Inputs) -> None:
    """A prompt in chunks, cut back after each, never occupies more slots than the budget and still decodes as masked attention."""
    if strategy.policy.kept_tokens(PROMPT) is None:
        raise Skip("it keeps everything")
    tokens = inputs.tokens()
    trace = run(strategy, tokens, RAGGED, STEPS, chunk=CHUNK, bounded=True)
    for row, length in enumerate(RAGGED.tolist()):
        for head in range(inputs.shape.num_kv_heads):
            assert len(kept(trace.states[0], row, head)) == min(strategy.policy.kept_tokens(length), length)
        held = [set(kept(trace.states[0], row, head)) | {length} for head in range(inputs.shape.num_kv_heads)]
        want = masked_attention(strategy, tokens, row, length, held, length)
        inputs.close(trace.outs[row, 0], want, f"row {row}: masked full attention")
    _slots_hold_what_they_say(strategy, inputs, tokens, trace.states[-1])


def rows_are_independent(strategy: Strategy, inputs: Inputs) -> None:
    """A row alone equals the row in a ragged batch."""
    tokens = inputs.tokens()
    together = run(strategy, tokens, RAGGED, STEPS)
    for row in range(3):
        alone = run(strategy, tokens.rows(slice(row, row + 1)), RAGGED[row : row + 1], STEPS, width=PROMPT)
        inputs.close(together.outs[row], alone.outs[0], f"row {row} of a batch: the row alone")
        for head in range(inputs.shape.num_kv_heads):
            assert kept(together.states[-1], row, head).keys() == kept(alone.states[-1], 0, head).keys(), (
                f"row {row} keeps other tokens alone"
            )


def inactive_rows_are_untouched(strategy: Strategy, inputs: Inputs) -> None:
    """A decode step leaves every byte of an inactive row as it was."""
    tokens = inputs.tokens()
    active = np.array([True, False, True])
    trace = run(strategy, tokens, RAGGED, STEPS, active=active)
    still = ~active
    for before, after in zip(*(_row_arrays(strategy, state) for state in (trace.states[0], trace.states[-1])), strict=True):
        np.testing.assert_array_equal(after[still], before[still])


def _row_arrays(strategy: Strategy, kv: KVState) -> list[np.ndarray]:
    """What a state holds for its rows, each array with the rows in front."""
    layer = kv.layers[0]
    stored = strategy.store.tokens(layer.pool, kv.table, kv.length.shape[0])
    return [np.asarray(x) for x in (*stored, *jax.tree.leaves((layer.position, layer.own, layer.next_slot, layer.queries)), kv.length)]


def rope_is_relative(strategy: Strategy, inputs: Inputs) -> None:
    """Keys and queries rotated from another starting point give the same outputs: nothing re-numbers positions inside the cache."""
    if strategy.policy.selects:  # some columns of rotated keys do not tell distance, so what is read may differ
        strategy = Strategy(strategy.policy.ample(2 * (PROMPT + STEPS)), strategy.store)
    seed, shape = inputs.rng.integers(1 << 31), inputs.shape
    here, there = (random_tokens(np.random.default_rng(seed), 1, PROMPT + STEPS, offset, shape=shape) for offset in (0, 100))
    lengths = np.array([PROMPT])
    inputs.close(run(strategy, here, lengths, STEPS).outs, run(strategy, there, lengths, STEPS).outs, "the same shifted by 100", 10)


def odd_lengths(strategy: Strategy, inputs: Inputs) -> None:
    """Prompts of one token, shorter than the budget, at it, and one beyond, together and one token alone; decoding to the last slot."""
    budget = strategy.policy.kept_tokens(PROMPT) or PROMPT
    for lengths in ([1], [1, max(1, budget - 1), budget, budget + 1]):
        tokens = inputs.tokens(len(lengths), max(lengths) + STEPS)
        trace = run(strategy, tokens, np.array(lengths), STEPS)
        for row, length in enumerate(lengths):
            at = length + STEPS - 1
            held = [set(kept(trace.states[-2], row, head)) | {at} for head in range(inputs.shape.num_kv_heads)]
            want = masked_attention(strategy, tokens, row, at, held, length)
            inputs.close(trace.outs[row, -1], want, f"prompt of {length}: masked full attention")


def unused_memory_never_leaks(strategy: Strategy, inputs: Inputs) -> None:
    """Memory that starts as NaN, and keys of empty slots turned to NaN before every step, change nothing."""
    tokens = inputs.tokens()
    clean = run(strategy, tokens, RAGGED, STEPS)
    inputs.close(run(strategy, tokens, RAGGED, STEPS, fill=np.nan, poison=True).outs, clean.outs, "with NaN in unused memory: without")
    chunked = run(strategy, tokens, RAGGED, STEPS, chunk=CHUNK)
    dirty = run(strategy, tokens, RAGGED, STEPS, chunk=CHUNK, fill=np.nan, poison=True)
    inputs.close(dirty.outs, chunked.outs, "in chunks with NaN in unused memory: without")


def no_retrace(strategy: Strategy, inputs: Inputs) -> None:
    """Decode steps share one compiled program, however long the rows get."""
    traces, made = 0, guide(strategy, inputs.shape.num_kv_heads, inputs.shape.head_dim)

    @jax.jit
    def step(kv: KVState, q, k, v, active):
        nonlocal traces
        traces += 1
        ahead = strategy.look_ahead(-1, lambda: partial_queries(made, q), kv, active)
        _, layer = strategy.decode(kv.layers[0], q, k, v, kv.handed(ahead), active, made)
        return dataclasses.replace(kv.with_layer(0, layer), length=kv.length + active)

    kv = run(strategy, inputs.tokens(), RAGGED, STEPS).states[-4]
    tokens = inputs.tokens(length=1)
    for active in ((True, True, True), (True, False, True), (True, True, True)):
        kv = step(kv, *(np.asarray(x, inputs.shape.dtype) for x in (tokens.q, tokens.k, tokens.v)), np.array(active))
    assert traces == 1, f"the decode step was traced {traces} times"


def ledger_adds_up(strategy: Strategy, inputs: Inputs) -> None:
    """The ledger's total is the arrays' nbytes, its live bytes are the kept tokens', and XLA sees the same bytes go in and be reused."""
    kv = run(strategy, inputs.tokens(), RAGGED, STEPS).states[-1]
    books = ledger(strategy, kv)
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    assert books.device.total + books.host.total == leaves, f"ledger {books.device.total + books.host.total} bytes, arrays {leaves}"
    pairs = sum(len(kept(kv, row, head)) for row in range(3) for head in range(inputs.shape.num_kv_heads))
    live = books.device.live + books.host.live
    assert live == pairs * 2 * inputs.shape.head_dim * inputs.shape.dtype.itemsize, (
        f"{live} live bytes for {pairs} kept (token, head) pairs"
    )
    assert min(min(dataclasses.astuple(tier)) for tier in (books.device, books.host)) >= 0
    program = _decode_program(strategy, batch=3, prompt=PROMPT, shape=inputs.shape)
    analysis = _memory(program)
    expected = nbytes(strategy.init(inputs.shape, [PROMPT] * 3, PROMPT, STEPS))
    assert analysis.alias_size_in_bytes == expected, f"XLA reuses {analysis.alias_size_in_bytes} bytes, the state has {expected}"


def donation_leaves_no_copy(strategy: Strategy, inputs: Inputs) -> None:
    """Growing the cache grows no temporary of its size, at batch 1 and 8, and the program copies nothing of a cache array's shape."""
    shape = CacheShape(num_layers=2, num_kv_heads=2, group_size=2, head_dim=64, dtype=jnp.dtype(jnp.float32))
    del inputs
    staged = 4 if strategy.store.tier.fetches else 0  # keys and values of this layer and of the next
    for batch in (1, 8):
        temps, layer_bytes, text = [], [], ""
        for prompt in (512, 2048):
            program = _decode_program(strategy, batch, prompt, shape)
            temps.append(_memory(program).temp_size_in_bytes)
            text = program.as_text() or ""
            state = jax.eval_shape(partial(strategy.init, shape, [prompt] * batch, prompt, STEPS))
            keys = state.layers[0].pool.k[0]
            layer_bytes.append(nbytes(keys))
        grown, cache_grown = temps[1] - temps[0], layer_bytes[1] - layer_bytes[0]
        most = max((0.5 + staged) * cache_grown, 16_384)
        assert grown <= most, f"batch {batch}: scratch grows {grown} bytes, a layer's keys {cache_grown}"
        dims = ",".join(map(str, keys.shape))
        copies = [line.strip() for line in text.splitlines() if " copy(" in line and f"f32[{dims}]" in line.split("copy(")[0]]
        assert not copies, f"batch {batch}: the program copies the cache: {copies[0]}"


def _decode_program(strategy: Strategy, batch: int, prompt: int, shape: CacheShape) -> jax.stages.Compiled:
    """A donated decode step through every layer of a state, compiled from shapes."""
    columns = strategy.policy.partial_columns(shape.head_dim)
    ones = Guide(jnp.ones((shape.num_kv_heads, shape.head_dim, columns), jnp.float32), None)

    def step(kv: KVState, q, k, v, active):
        out = q
        for index in range(shape.num_layers):
            out, layer = strategy.decode(kv.layers[index], out, k, v, kv, active, ones)
            kv = kv.with_layer(index, layer)
            queries = out.reshape(batch, shape.num_kv_heads, shape.group_size, -1)[..., :columns]
            kv = kv.handed(strategy.look_ahead(index, partial(jnp.asarray, queries), kv, active))
        return out, dataclasses.replace(kv, length=kv.length + active, ahead=None)

    state = jax.eval_shape(partial(strategy.init, shape, [prompt] * batch, prompt, STEPS))
    q = jax.ShapeDtypeStruct((batch, 1, shape.num_kv_heads * shape.group_size, shape.head_dim), shape.dtype)
    k = jax.ShapeDtypeStruct((batch, 1, shape.num_kv_heads, shape.head_dim), shape.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unusable donation is a warning in JAX and a failure here
        return jax.jit(step, donate_argnums=0).lower(state, q, k, k, jax.ShapeDtypeStruct((batch,), jnp.bool)).compile()


def _memory(program: jax.stages.Compiled):
    analysis = program.memory_analysis()
    if analysis is None:
        raise Skip("this backend has no memory analysis")
    return analysis


CHECKS: dict[str, Callable[[Strategy, Inputs], None]] = {
    check.__name__: check
    for check in (
        ample_budget_equals_full,
        equals_masked_full_attention,
        budget_holds_and_nothing_returns,
        protected_survive_ties,
        chunks_change_nothing,
        bounded_chunks_stay_bounded,
        rows_are_independent,
        inactive_rows_are_untouched,
        rope_is_relative,
        odd_lengths,
        unused_memory_never_leaks,
        no_retrace,
        ledger_adds_up,
        donation_leaves_no_copy,
    )
}
"""The checks by name, in the order they run."""
