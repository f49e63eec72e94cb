"""Budgets matched by what they cost, so that strategies are compared at one price.

    match(parse_strategy("h2o+paged"), "device_bytes", 4 * 2**20, Sizes(shape, batch=8, prompt=952, output=64))

A fifth of the tokens costs every strategy something else: pages round up, evicting policies keep scores and positions, InfiniGen has
everything in host memory and partial keys on the device. So the price is named (the currency), and each strategy turns its own knob as far
as the price allows. Costs are arithmetic over shapes, nothing is run:

  tokens        per kv head, kept once the prompt is in, or read at a step by policies that keep more. Layers that a speculating policy
                reads whole are not in it.
  device_bytes  of a batch's cache: keys and values, empty room, metadata, partial keys. Scratch of a step is not in it, nor is what a host
                store stages for one.
  moved_bytes   from host memory per decoded token, at most: a policy that speculates may want less. Zero without a host store.

Turning a knob up never costs less, so bisection finds the most that is within the price.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np

from kvjax.cache import CacheShape, HostStore, KVState, OracleTopK, Strategy, tokens
from kvjax.cache.ledger import nbytes
from kvjax.cache.policies import Policy
from kvjax.errors import SpecError
from kvjax.generation import as_strategy

Currency = Literal["tokens", "device_bytes", "moved_bytes"]
CURRENCIES = get_args(Currency)

UNITS = {"tokens": "tokens", "device_bytes": "bytes on the device", "moved_bytes": "bytes moved per token"}


class MatchError(SpecError):
    """A price that a strategy cannot be had for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cost of a strategy depends on besides.

    Attributes:
      batch: rows.
      prompt: tokens of every prompt.
      output: tokens that every row generates; all but the first take a decode step.
      reserve: there is room for at least so many new tokens.
    """

    shape: CacheShape
    batch: int
    prompt: int
    output: int
    reserve: int = 0

    def __post_init__(self):
        if min(self.batch, self.prompt, self.output) < 1:
            raise SpecError(f"batch={self.batch}, prompt={self.prompt} and output={self.output} must all be at least 1")

    @property
    def length(self) -> int:
        """Tokens that a row has room for."""
        return self.prompt + max(self.output, self.reserve)


@dataclasses.dataclass(frozen=True)
class Match:
    """A strategy whose cost is within a price.

    Attributes:
      knob: what its own knob was set to, in tokens; None where nothing had to be limited.
      cost: what it costs, in the currency.
    """

    strategy: Strategy
    knob: int | None
    cost: float


def match(strategy: Strategy, currency: Currency, target: float, sizes: Sizes) -> Match:
    """The strategy with the largest budget whose cost is at most `target`.

    The knob is `Policy.with_budget` in tokens; of a policy in host memory that speculates, for bytes on the device, its pool.

    Raises MatchError when it has no knob, or none that gets it down to the target.
    """
    turned = _knob(strategy, currency)
    if turned is None:
        fixed = cost(strategy, currency, sizes)
        if fixed > target:
            raise MatchError(
                f"{strategy.describe()} {_reason(strategy, currency)}: {fixed:.10g} {UNITS[currency]}, more than {target:.10g}"
            )
        return Match(strategy, None, fixed)
    free = turned(None)
    if free is not None and cost(free, currency, sizes) <= target:
        return Match(free, None, cost(free, currency, sizes))

    def price(knob: int) -> float | None:
        """None for a knob too small for the policy."""
        try:
            set_to = turned(knob)
        except SpecError:
            return None
        assert set_to is not None
        return cost(set_to, currency, sizes)

    smallest = least_knob(price, sizes.length)
    if smallest is None:
        raise MatchError(f"{strategy.describe()} has no budget in tokens to match by; give its own arguments in tokens")
    least = price(smallest)
    assert least is not None
    if least > target:
        raise MatchError(
            f"{strategy.describe()} costs at least {least:.10g} {UNITS[currency]} (with {smallest} tokens), more than {target:.10g}"
        )
    knob = largest(lambda n: (price(n) or 0.0) <= target, smallest, sizes.length)
    found = turned(knob)
    assert found is not None
    return Match(found, knob, cost(found, currency, sizes))


def largest_batch(strategy: Strategy, device_bytes: int, sizes: Sizes, most: int = 2**16) -> int:
    """How many rows fit into so many bytes on the device, up to `most`; 0: none. The batch of `sizes` does not count."""

    def fits(rows: int) -> bool:
        return cost(strategy, "device_bytes", dataclasses.replace(sizes, batch=rows)) <= device_bytes

    return largest(fits, 1, most) if fits(1) else 0


def cost(strategy: Strategy, currency: Currency, sizes: Sizes) -> float:
    """What a strategy costs, by arithmetic over its shapes. Raises SpecError for an unknown currency."""
    if currency not in CURRENCIES:
        raise SpecError(f"unknown currency {currency!r}; choose from {', '.join(CURRENCIES)}")
    return {"tokens": _tokens, "device_bytes": _device_bytes, "moved_bytes": _moved_bytes}[currency](strategy, sizes)


def state(strategy: Strategy, sizes: Sizes) -> KVState:
    """The shapes of a batch's cache, as kvjax.generation allocates it."""
    lengths = np.full(sizes.batch, sizes.prompt, np.int32)
    return jax.eval_shape(
        partial(as_strategy(strategy).init, sizes.shape, max_prompt=sizes.prompt, max_new=sizes.length - sizes.prompt), lengths
    )


# ------------------------------------------------------------------------------------------------------------------------------- costs


def _tokens(strategy: Strategy, sizes: Sizes) -> float:
    policy: Any = strategy.policy
    kept = policy.kept_tokens(sizes.prompt)
    kept = sizes.length if kept is None else min(kept, sizes.length)
    if isinstance(policy, OracleTopK):
        return min(kept, tokens(policy.k, sizes.prompt))
    return min(kept, tokens(policy.budget, sizes.length)) if policy.speculates else kept


def _device_bytes(strategy: Strategy, sizes: Sizes) -> float:
    kv = state(strategy, sizes)
    return nbytes(kv) - (nbytes([(layer.store.k, layer.store.v) for layer in kv.layers]) if _in_host_memory(strategy) else 0)


def _moved_bytes(strategy: Strategy, sizes: Sizes) -> float:
    """The mean over the steps that decode `output` tokens, all but the first of them.

    A fetch has one of the store's sizes, the least that holds what is wanted, so what is moved is a staircase in what is wanted.
    """
    if not _in_host_memory(strategy) or sizes.output == 1:
        return 0.0
    store, policy = strategy.store, strategy.policy
    assert isinstance(store, HostStore)
    shape, capacity = sizes.shape, strategy.slots(sizes.prompt, sizes.length)
    kept = policy.kept_tokens(sizes.prompt)
    row = 2 * shape.head_dim * np.dtype(shape.dtype).itemsize
    moved = 0
    for held in range(sizes.prompt, sizes.prompt + sizes.output - 1):
        in_use = held if kept is None or held <= kept else capacity  # a freed slot may lie before the last one in use
        whole = _fetched(store, capacity, min(in_use, capacity))
        guessed = whole
        if policy.speculates:
            budget: Any = getattr(policy, "budget", capacity)
            stored = held if kept is None else min(held, kept)
            guessed = _fetched(store, min(tokens(budget, capacity), capacity), min(tokens(budget, stored), stored))
        layers = min(policy.full_layers, shape.num_layers) if policy.speculates else shape.num_layers
        layers = max(layers, 1)  # nothing looks ahead for the first
        moved += layers * whole + (shape.num_layers - layers) * guessed
    return moved * shape.num_kv_heads * row / (sizes.output - 1)


def _fetched(store: HostStore, most: int, wanted: int) -> int:
    """Rows that are moved per kv head where `wanted` of up to `most` are asked for."""
    return min(size for size in store.sizes(most) if size >= min(wanted, most))


def _in_host_memory(strategy: Strategy) -> bool:
    return isinstance(strategy.store, HostStore) and strategy.store.transfer != "device"


# ------------------------------------------------------------------------------------------------------------------------------- knobs


def _knob(strategy: Strategy, currency: Currency) -> Callable[[int | None], Strategy | None] | None:
    """How a strategy is limited to a number of tokens; for None, without a limit, or None where there is no such thing."""
    policy: Any = strategy.policy
    if policy.speculates and currency == "device_bytes":
        return lambda knob: Strategy(dataclasses.replace(policy, pool=knob), strategy.store)
    if currency == "device_bytes" and policy.kept_tokens(1) is None:
        return None  # what a step reads takes no bytes away
    if currency == "moved_bytes" and not _in_host_memory(strategy):
        return None
    if type(policy).with_budget is Policy.with_budget or policy.with_budget(1.0) == policy.with_budget(0.5):
        return None

    def turned(knob: int | None) -> Strategy | None:
        return None if knob is None else Strategy(policy.with_budget(knob), strategy.store)

    return turned


def _reason(strategy: Strategy, currency: Currency) -> str:
    if currency == "device_bytes" and strategy.policy.with_budget(0.5) != strategy.policy:
        return "keeps every token whatever it reads"
    return "has no budget to turn down"


def least_knob(price: Callable[[int], float | None], most: int) -> int | None:
    """The least number of tokens that a policy accepts, if it accepts all above it; None: none up to `most`."""
    if price(most) is None:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) is not None else (middle, high)
    return high


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number in [low, high] that fits, where `low` does and all below one that fits do."""
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
