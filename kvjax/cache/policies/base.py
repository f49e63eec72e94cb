"""What a policy is: which tokens are kept, and which of them are read."""

import dataclasses
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import summed_mass
from kvjax.cache.notation import written
from kvjax.errors import SpecError

Amount = int | float
"""A budget: an int is tokens, a float is a fraction of the prompt."""

PROTECTED = float("inf")
"""The priority of a slot that must not be evicted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a policy sees when it ranks slots.

    Attributes:
      position: true position of each slot's token; undefined where the slot is empty.
      score: the policy's statistic, float32 of the same shape; None for a policy that keeps none.
      length: tokens seen so far, the newest has position `length - 1`.
      prompt_length: tokens of the prompt.
    """

    position: Int[Array, "B h C"]
    score: Any
    length: Int[Array, "B 1 1"]
    prompt_length: Int[Array, "B 1 1"]


class FusedSelection(NamedTuple):
    """What kvjax.kernels.speculate has to know to choose as a policy does.

    Attributes:
      alpha: how far below the highest guessed logit a slot may be.
      most: slots read at most, of every row.
      limit: slots read at most, of any row (static).
      always: slots that are read whatever the guess says; None: there are no such.
      group: how query heads are joined.
    """

    alpha: float
    most: Int[Array, " B"]
    limit: int
    always: Bool[Array, "B h C"] | None
    group: Literal["max", "mass"] = "max"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Keeps everything and reads everything; subclasses override what they change.

    A policy is a frozen dataclass of plain numbers and strings, so that it is hashable and static under jit; its methods are pure.

    Class attributes:
      observes: the policy wants the attention mass of every key, summed over queries (`observe`).
      per_head: each kv head keeps its own tokens; False shares one choice, and its metadata, among all heads.
      speculates: the policy says, before a layer is computed, which tokens it will read (`select`), for
        all layers but the first `full_layers`.
      home: the one store the policy can stand in; None: any.
      family: what figures, tables and comparisons group it under, and what gives it its look; None: its own name.
      unlimited: it keeps and reads every token, so it is the full cache.
    """

    observes: ClassVar[bool] = False
    per_head: ClassVar[bool] = True
    speculates: ClassVar[bool] = False
    home: ClassVar[str | None] = None
    family: ClassVar[str | None] = None
    unlimited: ClassVar[bool] = False
    full_layers = 0

    @property
    def evicts_in_decode(self) -> bool:
        """Whether the kept set stays within the budget after the prompt too; False appends every new token."""
        return True

    @property
    def exact(self) -> bool:
        """Whether every query sees every token before it, so that the state is a function of the tokens, however they were fed."""
        return self.kept_tokens(1) is None and type(self).readable is Policy.readable

    @property
    def keeps_score(self) -> bool:
        """Whether slots carry a statistic: when mass is observed or tokens start with a score of their own."""
        return self.observes or type(self).initial_score is not Policy.initial_score

    def kept_tokens(self, prompt_length: Any) -> Any:
        """Tokens kept per kv head once the prompt is in: an int for an int, an array for an array. None: all of them, for ever."""
        return None

    def initial_score(self, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"]) -> Float[Array, "B Hkv S"]:
        """The statistic of tokens that were just stored, before any attention to them is observed."""
        return jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)

    def group_mass(self, weights: Float[Array, "... G Q C"], scale: Float[Array, "... G Q"]) -> Float[Array, "... C"]:
        """Attention mass per key, summed over queries, joined over the G query heads of one kv head.

        The probability of a key is `weights * scale[..., None]`; the scale of a query that does not count is zero.
        """
        return summed_mass(weights, scale)

    @property
    def sums_mass(self) -> bool:
        """Whether `group_mass` is a plain sum over queries and query heads, which kernels compute."""
        return type(self).group_mass is Policy.group_mass

    def observe(self, score: Float[Array, "B h C"], mass: Float[Array, "B h C"]) -> Float[Array, "B h C"]:
        """The statistic after a step in which the keys received `mass`."""
        return score + mass

    def priority(self, slots: Slots) -> Float[Array, "B h C"]:
        """What to keep: the higher stays, PROTECTED always does; between equals the lower position stays."""
        raise NotImplementedError(f"{type(self).__name__} has a budget, so it must rank slots: define priority(slots)")

    def fused_eviction(self, prompt_length: Int[Array, " B"]) -> tuple[Int[Array, " B"], Int[Array, " B"]] | None:
        """Where decode steps evict exactly as kvjax.kernels.h2o_evict does: tokens a kv head may hold, and of them protected, the last.

        None, as here, where they do not; a subclass of a policy that they do for has to say so itself.
        """
        return None

    def readable(self, logits: Float[Array, "B Hkv G C"], prompt_length: Int[Array, " B"]) -> Bool[Array, "B Hkv 1 C"] | None:
        """Which stored tokens a decode step reads, given the true logits (NEG_INF where nothing is stored). None: all."""
        return None

    def select(
        self, guess: Float[Array, "B Hkv G C"], position: Int[Array, "B h C"], length: Int[Array, " B"]
    ) -> tuple[Int[Array, "B Hkv K"], Int[Array, " B"]]:
        """Which tokens a decode step reads, for a policy that speculates.

        Args:
          guess: guessed logits; anything where a slot holds no token.
          position: true position of the token in each slot, -1 where there is none.
          length: tokens of the row so far, which is the position of the token that is being decoded.

        Returns:
          K slots per kv head, the most wanted first, and how many of them are meant.
        """
        raise NotImplementedError(f"{type(self).__name__} speculates, so it must choose: define select(guess, position, length)")

    def always_read(self, position: Int[Array, "B h C"], length: Int[Array, " B"]) -> Bool[Array, "B h C"]:
        """The slots that `select` takes whatever the guess says; an audit leaves them out where it judges guesses."""
        return jnp.zeros(position.shape, bool)

    def fused_selection(self, position: Int[Array, "B h C"], length: Int[Array, " B"]) -> FusedSelection | None:
        """Where `select` chooses exactly as kvjax.kernels.speculate does, what that has to know; None, as here, where it does not."""
        return None

    def partial_columns(self, head_dim: int) -> int:
        """Columns of a partial key, for a policy that speculates."""
        raise NotImplementedError(f"{type(self).__name__} speculates, so it must say how wide partial keys are: define partial_columns")

    def observe_use(self, score: Float[Array, "B h C"], used: Bool[Array, "B h C"], length: Int[Array, "B 1 1"]) -> Float[Array, "B h C"]:
        """The statistic of a policy that speculates after the step, the row's token `length`, that fetched the slots in `used`."""
        return score

    def with_budget(self, amount: Amount) -> "Policy":
        """This policy with about `amount` tokens (or that fraction of the prompt) kept or read in total: the meaning of --budget."""
        raise SpecError(f"{self.describe()} has no overall budget to set; give its own arguments instead")

    def ample(self, amount: int) -> "Policy":
        """This policy with nothing left out of `amount` tokens."""
        return self.with_budget(amount)

    def total_budget(self) -> Amount | None:
        """What this policy keeps or reads in total, as `with_budget` takes it; None where it has no limit or does not say."""
        return None

    def describe(self) -> str:
        """The spec string that makes this policy; switches (words, True or False, None) that stand at their default are left out."""
        fields = [f for f in dataclasses.fields(self) if isinstance(f.default, bool | str | None) or "switch" in f.metadata]
        switches = {f.name: f.default for f in fields}
        changed = {name: value for name, value in arguments(self).items() if switches.get(name, ...) != value}
        return written(policy_name(type(self)), changed)


def spec_name(policy: type[Policy]) -> str:
    """The name of a policy of kvjax: `name` if the class defines it, else the class name in lower case."""
    return getattr(policy, "name", policy.__name__.lower())


def policy_name(policy: type[Policy]) -> str:
    """What names a policy in a spec string: its name for one of kvjax, `module:Class` for one of a user's own.

    A class inside a function cannot be named by a spec string; its name stands alone then.
    """
    own = not policy.__module__.startswith(f"{__package__}.")
    return f"{policy.__module__}:{policy.__name__}" if own and policy.__qualname__ == policy.__name__ else spec_name(policy)


def arguments(policy: Policy) -> dict[str, Any]:
    """What makes a policy, by name."""
    return {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy) if field.init}


def total(*amounts: Amount) -> Amount | None:
    """The sum of amounts that are all tokens or all fractions; None for a mixture."""
    if all(isinstance(amount, int) for amount in amounts):
        return sum(amounts)
    return round(sum(amounts), 9) if all(isinstance(amount, float) for amount in amounts) else None


def tokens(amount: Amount, prompt_length: Any) -> Any:
    """An amount in tokens, for an int or an array of prompt lengths. A fraction rounds down, but to no less than one token.

    Fractions are held as ratios with a denominator up to 1,000, so that 0.1 of 2,050 is 205 and not 204 by a rounding error.
    """
    if isinstance(amount, int):
        return amount if isinstance(prompt_length, int) else jnp.full_like(prompt_length, amount)
    ratio = Fraction(amount).limit_denominator(1000)
    share = prompt_length * ratio.numerator // ratio.denominator
    if amount == 0:
        return share
    return max(share, 1) if isinstance(share, int) else jnp.maximum(share, 1)


def halves(amount: Amount) -> tuple[Amount, Amount]:
    """An amount in two parts, which differ by one token at most."""
    return (amount // 2, amount - amount // 2) if isinstance(amount, int) else (amount / 2, amount / 2)


def check_amount(owner: str, name: str, amount: Amount) -> None:
    """Raises SpecError unless `amount` is a number of tokens >= 0 or a fraction in [0, 1]."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise SpecError(f"{owner}: {name}={amount!r} is not a number; give an int (tokens) or a float (fraction of the prompt)")
    if isinstance(amount, int) and amount >= 2**31:
        raise SpecError(f"{owner}: {name} is more tokens than any prompt has; give up to {2**31 - 1}")
    if isinstance(amount, int) and amount < 0:
        raise SpecError(f"{owner}: {name}={amount} is negative; give tokens >= 0 or a fraction between 0 and 1")
    if isinstance(amount, float) and not 0.0 <= amount <= 1.0:
        raise SpecError(f"{owner}: {name}={amount} is not a fraction between 0 and 1; write an int for tokens")
