"""What a policy is: which tokens are kept, and which of them are read.

Dims as in kvjax.cache.state; S tokens of a call, G query heads of a kv head, K tokens chosen per kv head.
"""

import dataclasses
import functools
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.notation import written
from kvjax.cache.state import CacheShape, Own
from kvjax.errors import SpecError
from kvjax.kernels.attention import Observe

Amount = int | float
"""A budget: an int is tokens, a float is a fraction of the prompt."""

PROTECTED = float("inf")
"""The priority of a slot that must not be evicted."""

NO_GUIDE = "guesses the next layer's queries, which takes a calibrated model: pass it through kvjax.calibrated(model, strategy) first"

Queries = Literal["keys", "step", "last", "ahead"]
"""By what a policy chooses what a step reads, all but `keys` without looking at the keys themselves: `keys` by the true logits of the step
(a yardstick: it reads every key), `step` by the step's own queries, `last` by those of the step before, `ahead` by what the layer before
guesses of them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a policy sees when it ranks slots.

    Attributes:
      position: true position of each slot's token; undefined where the slot is empty.
      own: the policy's state.
      length: tokens seen so far, the newest has position `length - 1`.
      prompt_length: tokens of the prompt.
    """

    position: Int[Array, "B h C"]
    own: Own
    length: Int[Array, "B 1 1"]
    prompt_length: Int[Array, "B 1 1"]


class Seen(NamedTuple):
    """What a prompt, a chunk of it or a step has shown of the tokens in the slots.

    Attributes:
      mass: what `Policy.observes` asked for; None for a policy that observes nothing.
      used: slots that the step read, of a policy that selects; None after a prompt, and where everything was read.
      length: tokens seen so far.
    """

    mass: Float[Array, "B Hkv C"] | None
    used: Bool[Array, "B Hkv C"] | None
    length: Int[Array, "B 1 1"]


@dataclasses.dataclass(frozen=True)
class View:
    """What a policy sees when it chooses what a step reads, before the step's token is stored.

    Attributes:
      own: its state.
      position: true position of the token in each slot, -1 where there is none.
      length: tokens of the row so far, which is the position of the token that is being decoded.
      prompt_length: tokens of the prompt.
      queries: as `Policy.selects` says: of the step or the last one [B, H, D], or what a guide made of the layer before, scaled.
    """

    own: Own
    position: Int[Array, "B h C"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    queries: Float[Array, "B ..."]


class Selection(NamedTuple):
    """Slots to read, the most wanted first, and how many of them are meant."""

    slot: Int[Array, "B Hkv K"]
    count: Int[Array, " B"]  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class TopMass:
    """A rule of eviction that kernels have (kvjax.kernels.h2o_evict): the state is attention received, summed; the least of it goes.

    Attributes:
      recent: the last tokens, which stay.
    """

    recent: Amount


class NearTop(NamedTuple):
    """A rule of selection that kernels have (kvjax.kernels.speculate).

    Attributes:
      queries, partial_keys: guessed queries, scaled, and as many columns of the keys.
      alpha: how far below the highest guessed logit (or with group="mass" below all attention) a slot may be.
      most: slots read at most, of every row.
      limit: slots read at most, of any row (static).
      always: slots that are read whatever the guess says; None: there are no such.
      group: how query heads are joined.
    """

    queries: Float[Array, "B Hkv G P"]
    partial_keys: Float[Array, "B Hkv P C"]
    alpha: float
    most: Int[Array, " B"]
    limit: int
    always: Bool[Array, "B h C"] | None
    group: Literal["max", "mass"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Keeps everything and reads everything; subclasses override what they change.

    A policy is a frozen dataclass of plain numbers and strings, so that it is hashable and static under jit; its methods are pure.

    What a policy keeps books of is its own state, made by `initial` of the tokens that are stored, changed by `observe` after attention.
    `priority` says by it what is kept. With `selects`, `select` says what a step reads.

    Class attributes:
      per_head: each kv head keeps its own tokens; False shares one choice, and its books, among all heads.
      family: what figures, tables and comparisons group it under, and what gives it its look; None: its own name.
      unlimited: it keeps and reads every token, so it is the full cache.
      full_layers: layers at the bottom that read everything, of a policy that selects.
      selects: by what the policy chooses what a step reads; None: it reads everything.
      fetches: the policy's choice is of tokens to fetch, so it stands in a store with a tier that fetches and in no other.
    """

    per_head: ClassVar[bool] = True
    family: ClassVar[str | None] = None
    unlimited: ClassVar[bool] = False
    full_layers = 0
    selects: ClassVar[Queries | None] = None
    fetches: ClassVar[bool] = False

    @property
    def observes(self) -> Observe | None:
        """The statistic of attention that `observe` is to be given; None: none."""
        return None

    @property
    def rule(self) -> TopMass | None:
        """That decode steps evict exactly so, which a kernel can do in one launch; a subclass that ranks in another way has to say None."""
        return None

    # ------------------------------------------------------------------------------------------------------------------ what is kept

    def kept_tokens(self, prompt_length: Any) -> Any:
        """Tokens kept per kv head once the prompt is in: an int for an int, an array for an array. None: all of them, for ever."""
        return None

    def kept_in_layer(self, prompt_length: Int[Array, " B"], layer: Any, num_layers: int) -> Int[Array, "B h"] | None:
        """Tokens kept in a layer (an int, or a traced one), by kv head or for all, where `kept_tokens` does not say it; else None."""
        return None

    def most_kept(self, prompt_length: int, layer: int | None = None, num_layers: int = 1) -> int | None:
        """Tokens that any kv head of a layer (None: of any layer) may have to hold: what memory is allocated for."""
        return self.kept_tokens(prompt_length)

    def allocate(self, slots: Slots, priority: Float[Array, "B h C"], budget: Int[Array, "B h"]) -> Int[Array, "B h"]:
        """What each kv head may hold from here on, once the prompt is in; only asked where `kept_in_layer` gives budgets by head."""
        return budget

    @property
    def evicts(self) -> bool:
        """Whether it ever drops a token."""
        return self.kept_tokens(1) is not None

    @property
    def evicts_in_decode(self) -> bool:
        """Whether the kept set stays within the budget after the prompt too; False appends every new token."""
        return True

    @property
    def exact(self) -> bool:
        """Whether every query sees every token before it, so that the state is a function of the tokens, however they were fed."""
        return not self.evicts and self.selects is None

    def init_own(self, shape: CacheShape, rows: int, slots: int, layer: int) -> Own:
        """The state of a layer that holds nothing: zeros like what `initial` gives."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _made_of(self, shape, rows, slots))

    def initial(self, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], guide: Any) -> Own:
        """The state of tokens that were just stored, arrays [B, h, ..., S]; `guide`: what a calibration has for this layer, or None.

        By default zeros per token and head (one for all, with a shared choice) for a policy that observes, and nothing for others.
        """
        return () if self.observes is None else jnp.zeros((k.shape[0], k.shape[2] if self.per_head else 1, k.shape[1]), jnp.float32)

    def observe(self, own: Own, seen: Seen) -> Own:
        """The state after attention; by default what was observed is added up, over the heads, too, where they share one choice."""
        if seen.mass is None:
            return own
        return own + (seen.mass if self.per_head else seen.mass.sum(1, keepdims=True))

    def priority(self, slots: Slots) -> Float[Array, "B h C"]:
        """What to keep: the higher stays, PROTECTED always does; between equals the lower position stays."""
        raise NotImplementedError(f"{type(self).__name__} has a budget, so it must rank slots: define priority(slots)")

    # ------------------------------------------------------------------------------------------------------------------ what is read

    def selects_by(self, own: Own) -> bool:
        """Whether there is something to select by in this layer."""
        return True

    def select(self, view: View) -> Selection:
        """What a step reads beside its own token, by its queries; by default what `choose` makes of `guess`."""
        return self.choose(self.guess(view), view.position, view.length, view.prompt_length)

    def guess(self, view: View) -> Float[Array, "B Hkv G C"]:
        """Logits as far as they can be told without the keys, scaled; anything where a slot holds no token."""
        raise NotImplementedError(f"{type(self).__name__} selects, so it must choose: define select(view), or guess(view) and choose")

    def choose(
        self, logits: Float[Array, "B Hkv G C"], position: Int[Array, "B h C"], length: Int[Array, " B"], prompt_length: Int[Array, " B"]
    ) -> Selection:
        """Which slots to read, given logits: guessed ones, or true ones where it selects by `keys` and where a guess is audited.

        Args:
          logits: anything where a slot holds no token.
          position, length, prompt_length: as in View.
        """
        raise NotImplementedError(
            f"{type(self).__name__} selects, so it must choose: define choose(logits, position, length, prompt_length)"
        )

    def always_read(self, position: Int[Array, "B h C"], length: Int[Array, " B"]) -> Bool[Array, "B h C"]:
        """The slots that are read whatever the guess says; an audit leaves them out where it judges guesses."""
        return jnp.zeros(position.shape, bool)

    @property
    def guesses(self) -> bool:
        """Whether it takes a guide to choose: a model that kvjax.calibrate has prepared."""
        return self.selects == "ahead"

    def partial_columns(self, head_dim: int) -> int:
        """Columns of the partial keys that a guide makes, for a policy that guesses; 0 for others."""
        return 0

    def near_top(self, view: View) -> NearTop | None:
        """Where `select` chooses exactly as kvjax.kernels.speculate does, what that has to know; None, as here, where it does not."""
        return None

    @property
    def tracks_use(self) -> bool:
        """Whether `observe` is to be told which slots a step read."""
        return False

    # --------------------------------------------------------------------------------------------------------------------- its name

    def with_budget(self, amount: Amount) -> "Policy":
        """This policy with about `amount` tokens (or that fraction of the prompt) kept or read in total: the meaning of --budget."""
        raise SpecError(f"{self.describe()} has no overall budget to set; give its own arguments instead")

    def with_kept(self, amount: int | None) -> "Policy | None":
        """This policy with `amount` tokens kept (None: all of them); None where there is no such thing."""
        return self.with_budget(amount) if self.evicts and amount is not None else None

    def most_read(self, prompt_length: int, held: int) -> int:
        """Tokens of a kv head that a step reads at most of `held`, beside its own, behind a prompt of `prompt_length`."""
        return held

    def before_reading(self) -> "Policy":
        """This policy with what makes no difference to the state that a prompt leaves at its default: equal ones can share it."""
        return self

    def unbounded(self) -> "Policy":
        """This policy without a limit on what it reads, where it has one that can be lifted."""
        return self

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


@functools.lru_cache(maxsize=1024)
def _made_of(policy: Policy, shape: CacheShape, rows: int, slots: int) -> Own:
    """The shapes of the state that a policy makes of so many tokens."""
    token = jax.ShapeDtypeStruct((rows, slots, shape.num_kv_heads, shape.head_dim), shape.dtype)
    return jax.eval_shape(lambda k, v: policy.initial(k, v, None), token, token)


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
