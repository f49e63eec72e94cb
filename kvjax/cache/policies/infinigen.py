"""InfiniGen (OSDI'24): keep everything in host memory, guess one layer ahead which tokens will matter, fetch those alone."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.policies.base import NO_GUIDE, PROTECTED, Amount, NearTop, Policy, Seen, Selection, Slots, View, check_amount, tokens
from kvjax.cache.state import CacheShape
from kvjax.errors import SpecError
from kvjax.kernels.attention import NEG_INF
from kvjax.kernels.speculate.base import log_mass

Columns = Literal["product", "sum", "query", "union"]
Count = Literal["request", "batch"]
GroupJoin = Literal["mass", "max", "mean"]
Victim = Literal["counter", "lru", "fifo"]

SET_ASIDE = 2.0**100
"""The least priority of a token that stays in a pool whatever its statistic says."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Books:
    """What InfiniGen keeps of every slot.

    Attributes:
      partial: partial keys; None in layers that read everything.
      use: how often, or when last, a token was fetched; None without a pool that is bounded by it.
    """

    partial: Float[Array, "B Hkv P C"] | None
    use: Float[Array, "B Hkv C"] | None


@dataclasses.dataclass(frozen=True)
class InfiniGen(Policy):
    """Reads, per kv head, the first tokens, the last, and of the others those that are guessed to receive attention.

    The guess for a layer is made while the layer before it is computed, from that layer's attention input: a projection of the next layer's
    queries to a few columns, `partial` of them, times as many columns of every key (section 4.2 and 4.3 of the paper; kvjax.calibrate
    finds them). How many tokens are read is the mean over the kv heads of a request, between one token and `budget`; which ones, each kv
    head decides for itself. The token that is being decoded is read besides. The first `full_layers` layers read everything.

    It differs from the published rule (InfiniGenPaper) in what a real language model, with grouped queries and attention sinks, asks for:

      A model parks attention on its first token, whose logit is then the highest, and a threshold below the highest leaves out nearly
      everything else. So the first `sinks` tokens and the last `recent` are always read, and neither set the threshold nor are counted
      against it. They are part of `budget` and take half of it at most: `sinks` first, then as many of the `recent` as there is room for.
      What matters is attention, not logits: a head that looks at the sink alone has a maximum, too. With group="mass" query heads are
      joined by the attention they are guessed to give, and a token is read that receives at least exp(-alpha) of it: where attention is
      spread out, more is read than where it is not.
      Columns are chosen for the products of queries and keys (columns="product"), and the queries are guessed with a `correction`.

    Attributes:
      alpha: a token is read if its guessed share of attention, the mean over the query heads of its kv head, is over exp(-alpha). With the
        other ways to join heads: how far below the highest guessed logit of the tokens not set aside it may be (logits are scaled, so
        exp(-alpha) of their largest weight); the paper takes 4 for OPT and 5 for Llama-2. Default: 8 (infinigen_paper: 4), without a loss.
      partial: columns of a head, as a fraction of its width.
      budget: tokens read at most, or that fraction of the tokens held; with the sinks and the recent, without the one being decoded.
      sinks: tokens at the start that are always read.
      recent: tokens before the one being decoded that are always read.
      columns: which columns: those of the projections that lose least of the products; the largest of |Q| + |K| summed over tokens (the
        paper), of |Q| alone (the artifact's speed code), or the union of the largest of either (its accuracy code).
      skew: turn queries and keys so that few columns matter; False takes them as they are, for comparison. Without meaning for "product".
      correction: whether the guessed queries are corrected for being made from the input of the layer before.
      count: whether every request counts for itself or, as in the artifact, one mean serves the whole batch.
      group: how the query heads of a kv head are joined: by the attention they give, the one that wants most ("max"), or the mean of their
        logits. The paper, being about multi-head attention, leaves it open.
      pool: tokens the pool holds, or that fraction of the prompt; None: no limit. Sinks and recent stay in it, within half of it.
      victim: what gives way when the pool is full: the token fetched least often, least recently, or the oldest.
      full_layers: layers at the bottom that read everything, because outliers only emerge behind them.
      loss: instead of alpha, the share of attention that may be missed on the calibration's sample, the mean over the layers that guess.
        Nothing can run before kvjax.calibrate.for_loss has put an alpha in its place.
    """

    alpha: float | None = None
    partial: float = 0.5
    budget: Amount = 0.2
    sinks: int = 4
    recent: int = 16
    columns: Columns = "product"
    skew: bool = True
    correction: bool = True
    count: Count = "request"
    group: GroupJoin = "mass"
    pool: Amount | None = None
    victim: Victim = "counter"
    full_layers: int = dataclasses.field(default=2, metadata=dict(switch=True))
    loss: float | None = None

    selects = "ahead"
    fetches = True
    usual_alpha: ClassVar[float] = 8.0

    def __post_init__(self):
        if self.loss is not None:
            self._check_loss(self.loss)
        elif self.alpha is None:
            object.__setattr__(self, "alpha", self.usual_alpha)
        check_amount("infinigen", "budget", self.budget)
        if not self.budget:
            raise SpecError("infinigen: budget=0 reads nothing; give at least 1 token, for example infinigen(budget=0.2)")
        if self.loss is None and (isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha >= 0):
            raise SpecError(f"infinigen: alpha={self.alpha!r} is not a number of at least 0")
        for name, what in (("full_layers", "layers"), ("sinks", "tokens, 0 or more"), ("recent", "tokens, 0 or more")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SpecError(f"infinigen: {name}={value!r} is not a number of {what}")
        if isinstance(self.partial, bool) or not isinstance(self.partial, int | float) or not 0 < self.partial <= 1:
            raise SpecError(f"infinigen: partial={self.partial!r} is not a fraction of the columns above 0 and up to 1")
        for name in ("skew", "correction"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"infinigen: {name}={getattr(self, name)!r} is not True or False")
        if self.pool is not None:
            check_amount("infinigen", "pool", self.pool)
            if not self.pool:
                raise SpecError("infinigen: pool=0 keeps nothing; give tokens or a fraction of the prompt, or leave it out")
        for name, kind in (("columns", Columns), ("count", Count), ("group", GroupJoin), ("victim", Victim)):
            if getattr(self, name) not in get_args(kind):
                raise SpecError(f"infinigen: {name}={getattr(self, name)} does not exist; choose from {', '.join(get_args(kind))}")

    def _check_loss(self, loss: Any) -> None:
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 < loss < 1:
            raise SpecError(f"infinigen: loss={loss!r} is not a share of attention between 0 and 1, for example 0.02")
        if self.alpha is not None:
            raise SpecError(f"infinigen: alpha={self.alpha!r} and loss={loss!r} both set the threshold; give one of them")
        if self.pool is not None:
            raise SpecError(f"infinigen: loss={loss!r} says nothing of what leaves a pool (pool={self.pool!r}); give alpha with it")

    @property
    def threshold(self) -> float:
        """alpha. Raises SpecError where it has not been found for a loss yet."""
        if self.alpha is None:
            raise SpecError(f"{self.describe()}: alpha is still to be found for this loss; `kvjax calibrate --loss={self.loss}` prints it")
        return self.alpha

    @property
    def tracks_use(self) -> bool:
        return self.pool is not None and self.victim != "fifo"

    def with_budget(self, amount: Amount) -> "InfiniGen":
        return dataclasses.replace(self, budget=amount)

    def total_budget(self) -> Amount:
        return self.budget

    def with_kept(self, amount: int | None) -> "InfiniGen":
        return dataclasses.replace(self, pool=amount)

    def most_read(self, prompt_length: int, held: int) -> int:
        return min(tokens(self.budget, held), held)

    def unbounded(self) -> "InfiniGen":
        return dataclasses.replace(self, budget=1.0)

    def before_reading(self) -> "InfiniGen":
        plain = InfiniGen()
        only_read = ["alpha", "budget", "count", "group", "correction"] + (["sinks", "recent"] if self.pool is None else [])
        return dataclasses.replace(self, **{name: getattr(plain, name) for name in only_read})

    def ample(self, amount: int) -> "InfiniGen":
        return dataclasses.replace(self, budget=amount, alpha=math.inf, loss=None, pool=None)

    # ------------------------------------------------------------------------------------------------------------------ what is read

    def init_own(self, shape: CacheShape, rows: int, slots: int, layer: int) -> Books:
        size = (rows, shape.num_kv_heads, self.partial_columns(shape.head_dim), slots)
        partial = jnp.zeros(size, shape.dtype) if layer >= self.full_layers else None
        return Books(partial, jnp.zeros((rows, shape.num_kv_heads, slots), jnp.float32) if self.tracks_use else None)

    def initial(self, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], guide: Any) -> Books:
        if guide is None:
            raise SpecError(f"{self.describe()} {NO_GUIDE}")
        partial = jnp.einsum("bsnd,ndp->bnps", k, guide.key).astype(k.dtype)
        return Books(partial, jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32) if self.tracks_use else None)

    def selects_by(self, own: Books) -> bool:
        return own.partial is not None

    def guess(self, view: View) -> Float[Array, "B Hkv G C"]:
        if view.queries is None:
            raise SpecError(f"{self.describe()} {NO_GUIDE}")
        return jnp.einsum("bngp,bnpc->bngc", view.queries, view.own.partial, preferred_element_type=jnp.float32)

    def choose(
        self, logits: Float[Array, "B Hkv G C"], position: Int[Array, "B h C"], length: Int[Array, " B"], prompt_length: Int[Array, " B"]
    ) -> Selection:
        always = self.always_read(position, length)
        open_slots = (position >= 0) & ~always
        joined = jnp.where(open_slots, self._joined(logits, position >= 0), NEG_INF)
        if self.group == "mass":
            near = open_slots & (joined > -self.threshold)
        else:
            near = open_slots & (joined > joined.max(-1, keepdims=True) - self.threshold)
            near |= open_slots & (joined == joined.max(-1, keepdims=True))  # with alpha=0 the highest alone
        counts = (near | always).sum(-1)
        mean = counts.sum(-1) // counts.shape[-1] if self.count == "request" else jnp.full(counts.shape[:1], counts.sum() // counts.size)
        most = self._most(position)
        count = jnp.clip(mean, jnp.minimum(1, most), most)
        _, slot = jax.lax.top_k(jnp.where(always, jnp.inf, joined), self._limit(logits.shape[-1]))
        return Selection(slot.astype(jnp.int32), count.astype(jnp.int32))

    def _joined(self, guess: Float[Array, "B Hkv G C"], visible: Bool[Array, "B h C"]) -> Float[Array, "B Hkv C"]:
        """What the query heads of a kv head want together; anything where there is no token."""
        if self.group == "mass":
            return log_mass(jnp.where(visible[:, :, None], guess, -jnp.inf))
        return guess.max(2) if self.group == "max" else guess.mean(2)

    def always_read(self, position: Int[Array, "B h C"], length: Int[Array, " B"]) -> Bool[Array, "B h C"]:
        return (position >= 0) & self._set_aside(position, length[:, None, None], self._most(position)[:, None, None])

    def near_top(self, view: View) -> NearTop | None:
        """For counts of every request, and heads joined as the kernel can; with alpha=0 equals count here, and not in the kernel."""
        if self.count != "request" or self.group == "mean" or not self.threshold or view.queries is None:
            return None
        always = self.always_read(view.position, view.length) if self.sinks or self.recent else None
        most, limit = self._most(view.position), self._limit(view.position.shape[-1])
        return NearTop(view.queries, view.own.partial, float(self.threshold), most, limit, always, self.group)

    def _set_aside(self, position: Int[Array, "B h C"], length: Int[Array, "B 1 1"], most: Int[Array, "B 1 1"]) -> Bool[Array, "B h C"]:
        """The first and the last of `length` tokens that are to stay, where `most` may: half of those at most are set aside."""
        sinks = jnp.minimum(self.sinks, most // 2)
        recent = jnp.minimum(self.recent, most // 2 - sinks)
        return (position < sinks) | (position >= length - recent)

    def _most(self, position: Int[Array, "B h C"]) -> Int[Array, " B"]:
        """Tokens read at most of every row."""
        held = (position >= 0).sum(-1).min(-1)
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

    def observe(self, own: Books, seen: Seen) -> Books:
        if own.use is None or seen.used is None:
            return own
        fresh = own.use + 1 if self.victim == "counter" else seen.length.astype(jnp.float32)
        return dataclasses.replace(own, use=jnp.where(seen.used, fresh, own.use))

    def priority(self, slots: Slots):
        age = slots.position.astype(jnp.float32)
        newer = age / (slots.length + 1)
        ranked = age if slots.own.use is None else slots.own.use + newer  # uses are whole numbers: between equals the newer stays
        if self.sinks or self.recent:
            aside = self._set_aside(slots.position, slots.length, self.kept_tokens(slots.prompt_length))
            ranked = jnp.where(aside, SET_ASIDE * (1 + newer), ranked)
        return jnp.where(slots.position == slots.length - 1, PROTECTED, ranked)  # the newcomer takes the place of another


@dataclasses.dataclass(frozen=True)
class InfiniGenPaper(InfiniGen):
    """The rule as published: no token is set aside, the threshold lies `alpha` below the highest guessed logit."""

    partial: float = 0.3
    budget: Amount = 0.2
    sinks: int = 0
    recent: int = 0
    columns: Columns = "sum"
    correction: bool = False
    group: GroupJoin = "max"

    usual_alpha = 4.0
    name = "infinigen_paper"
