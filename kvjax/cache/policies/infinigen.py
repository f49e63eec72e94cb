"""InfiniGen (OSDI'24): keep everything in host memory, guess one layer ahead which tokens will matter, fetch those alone."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import NEG_INF
from kvjax.cache.policies.base import PROTECTED, Amount, Policy, Slots, check_amount, tokens
from kvjax.errors import SpecError

Columns = Literal["sum", "query", "union"]
Count = Literal["request", "batch"]
GroupJoin = Literal["max", "mean"]
Victim = Literal["counter", "lru", "fifo"]


@dataclasses.dataclass(frozen=True)
class InfiniGen(Policy):
    """Reads, per kv head, the tokens whose guessed logit comes within `alpha` of the highest, and the newest token.

    The guess for a layer is made while the layer before it is computed, from that layer's attention input: a few columns of the skewed
    query, `partial` of them, times the same columns of every key (section 4.2 and 4.3 of the paper; kvjax.calibrate finds the skew and
    the columns). How many tokens are read is the mean over the kv heads of a request, between one token and `budget`; which ones, each
    kv head decides for itself. The first `full_layers` layers read everything.

    Attributes:
      alpha: how far below the highest guessed logit a token may be (logits are scaled, so exp(-alpha) of the largest weight); the paper
        takes 4 for OPT and 5 for Llama-2.
      partial: columns of a head, as a fraction of its width.
      budget: tokens read at most, or that fraction of the tokens held.
      columns: which columns: the largest of |Q| + |K| summed over tokens (the paper), of |Q| alone (the artifact's speed code), or the
        union of the largest of either (its accuracy code).
      skew: turn queries and keys so that few columns matter; False takes them as they are, for comparison.
      count: whether every request counts for itself or, as in the artifact, one mean serves the whole batch.
      group: how the query heads of a kv head are joined, which the paper, being about multi-head attention, leaves open.
      pool: tokens the pool holds, or that fraction of the prompt; None: no limit.
      victim: what gives way when the pool is full: the token fetched least often, least recently, or the oldest.
      full_layers: layers at the bottom that read everything, because outliers only emerge behind them.
    """

    alpha: float = 4.0
    partial: float = 0.3
    budget: Amount = 0.2
    columns: Columns = "sum"
    skew: bool = True
    count: Count = "request"
    group: GroupJoin = "max"
    pool: Amount | None = None
    victim: Victim = "counter"
    full_layers: int = dataclasses.field(default=2, metadata=dict(switch=True))

    speculates = True
    home = "host"

    def __post_init__(self):
        check_amount("infinigen", "budget", self.budget)
        if not self.budget:
            raise SpecError("infinigen: budget=0 reads nothing; give at least 1 token, for example infinigen(budget=0.2)")
        for name, least in (("alpha", 0), ("full_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise SpecError(f"infinigen: {name}={value!r} is not a number of at least {least}")
        if not isinstance(self.full_layers, int):
            raise SpecError(f"infinigen: full_layers={self.full_layers!r} is not a number of layers")
        if isinstance(self.partial, bool) or not isinstance(self.partial, int | float) or not 0 < self.partial <= 1:
            raise SpecError(f"infinigen: partial={self.partial!r} is not a fraction of the columns above 0 and up to 1")
        if not isinstance(self.skew, bool):
            raise SpecError(f"infinigen: skew={self.skew!r} is not True or False")
        if self.pool is not None:
            check_amount("infinigen", "pool", self.pool)
            if not self.pool:
                raise SpecError("infinigen: pool=0 keeps nothing; give tokens or a fraction of the prompt, or leave it out")
        for name, kind in (("columns", Columns), ("count", Count), ("group", GroupJoin), ("victim", Victim)):
            if getattr(self, name) not in get_args(kind):
                raise SpecError(f"infinigen: {name}={getattr(self, name)} does not exist; choose from {', '.join(get_args(kind))}")

    @property
    def exact(self) -> bool:
        return False

    @property
    def keeps_score(self) -> bool:
        return self.pool is not None and self.victim != "fifo"

    def with_budget(self, amount: Amount) -> "InfiniGen":
        return dataclasses.replace(self, budget=amount)

    def ample(self, amount: int) -> "InfiniGen":
        return dataclasses.replace(self, budget=amount, alpha=math.inf, pool=None)

    # ------------------------------------------------------------------------------------------------------------------ what is read

    def select(
        self, guess: Float[Array, "B Hkv G C"], visible: Bool[Array, "B h C"], length: Int[Array, " B"]
    ) -> tuple[Int[Array, "B Hkv K"], Int[Array, " B"]]:
        joined = guess.max(2) if self.group == "max" else guess.mean(2)
        joined = jnp.where(visible, joined, NEG_INF)
        near = visible & (joined > joined.max(-1, keepdims=True) - self.alpha)
        near |= visible & (joined == joined.max(-1, keepdims=True))  # with alpha=0 the highest alone
        counts = near.sum(-1)
        mean = counts.sum(-1) // counts.shape[-1] if self.count == "request" else jnp.full(counts.shape[:1], counts.sum() // counts.size)
        held = visible.sum(-1).min(-1)
        most = self._most(held)
        count = jnp.clip(mean, jnp.minimum(1, most), most)
        _, slot = jax.lax.top_k(joined, self._limit(guess.shape[-1]))
        return slot.astype(jnp.int32), count.astype(jnp.int32)

    def fused_selection(self, held: Int[Array, " B"], capacity: int) -> tuple[float, Int[Array, " B"], int] | None:
        """For counts of every request and the query head that wants most; with alpha=0 equals count here, and not in the kernel."""
        same = type(self).select is InfiniGen.select and self.count == "request" and self.group == "max"
        return (float(self.alpha), self._most(held), self._limit(capacity)) if same and self.alpha else None

    def _most(self, held: Int[Array, " B"]) -> Int[Array, " B"]:
        """Tokens read at most of rows that hold so many."""
        return jnp.minimum(tokens(self.budget, held), held)

    def _limit(self, capacity: int) -> int:
        """Tokens read at most of any row."""
        return min(tokens(self.budget, capacity), capacity)

    def partial_columns(self, head_dim: int) -> int:
        each = max(int(self.partial * head_dim), 1)
        return min(2 * each, head_dim) if self.columns == "union" else each

    # ------------------------------------------------------------------------------------------------------------------ what is kept

    def kept_tokens(self, prompt_length: Any) -> Any:
        return None if self.pool is None else tokens(self.pool, prompt_length)

    def observe_use(self, score: Float[Array, "B h C"], used: Bool[Array, "B h C"], length: Int[Array, "B 1 1"]) -> Float[Array, "B h C"]:
        return jnp.where(used, score + 1 if self.victim == "counter" else length.astype(jnp.float32), score)

    def priority(self, slots: Slots):
        age = slots.position.astype(jnp.float32)
        if self.victim == "fifo":
            return age
        ranked = slots.score + age / (slots.length + 1)  # scores are whole numbers: between equals the newer stays
        return jnp.where(slots.position == slots.length - 1, PROTECTED, ranked)  # the newcomer takes the place of another
