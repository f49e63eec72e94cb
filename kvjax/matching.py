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
from typing import Literal, get_args

import jax
import numpy as np

from kvjax.cache import CacheShape, KVState, Strategy
from kvjax.cache.ledger import device_bytes
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
    kept = strategy.policy.most_kept(sizes.prompt)
    kept = sizes.length if kept is None else min(kept, sizes.length)
    return min(kept, strategy.policy.most_read(sizes.prompt, sizes.length))


def _device_bytes(strategy: Strategy, sizes: Sizes) -> float:
    return device_bytes(strategy, state(strategy, sizes))


def _moved_bytes(strategy: Strategy, sizes: Sizes) -> float:
    """The mean over the steps that decode `output` tokens, all but the first of them.

    A fetch has one of the store's sizes, the least that holds what is wanted, so what is moved is a staircase in what is wanted.
    """
    tier, policy = strategy.store.tier, strategy.policy
    if not tier.in_host or sizes.output == 1:
        return 0.0
    shape, capacity = sizes.shape, strategy.slots(sizes.prompt, sizes.length)
    kept = policy.most_kept(sizes.prompt)
    row = 2 * shape.head_dim * np.dtype(shape.dtype).itemsize
    layers = min(policy.full_layers, shape.num_layers) if policy.selects else shape.num_layers
    layers = max(layers, 1)  # nothing looks ahead for the first
    moved = 0
    for held in range(sizes.prompt, sizes.prompt + sizes.output - 1):
        in_use = held if kept is None or held <= kept else capacity  # a freed slot may lie before the last one in use
        stored = held if kept is None else min(held, kept)
        whole = tier.moved(capacity, in_use)
        chosen = tier.moved(policy.most_read(sizes.prompt, capacity), policy.most_read(sizes.prompt, stored))
        moved += layers * whole + (shape.num_layers - layers) * chosen
    return moved * shape.num_kv_heads * row / (sizes.output - 1)


# ------------------------------------------------------------------------------------------------------------------------------- knobs


def _knob(strategy: Strategy, currency: Currency) -> Callable[[int | None], Strategy | None] | None:
    """How a strategy is limited to a number of tokens; for None, without a limit, or None where there is no such thing."""
    policy = strategy.policy
    if currency == "moved_bytes" and not strategy.store.tier.in_host:
        return None
    if currency == "device_bytes" and not policy.evicts and policy.with_kept(1) is None:  # what a step reads takes no bytes away
        return None
    if not _turns(policy):
        return None

    def turned(knob: int | None) -> Strategy | None:
        if currency == "device_bytes":
            changed = policy.with_kept(knob)
        else:
            changed = None if knob is None else policy.with_budget(knob)
        return None if changed is None else Strategy(changed, strategy.store)

    return turned


def _turns(policy: Policy) -> bool:
    """Whether a budget makes a difference to it."""
    try:
        return policy.with_budget(1.0) != policy.with_budget(0.5)
    except SpecError:
        return False


def _reason(strategy: Strategy, currency: Currency) -> str:
    if currency == "device_bytes" and _turns(strategy.policy):
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
