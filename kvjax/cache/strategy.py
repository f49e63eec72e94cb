"""A strategy: a policy (which tokens) over a store (where their bytes live), as pure functions over the KV state.

The decoder meets it per layer, in `prefill`, `decode` and `look_ahead` (what the next layer will want, for stores that have to fetch it);
around them stand `init` (allocate), `stage` and `settle` (a prompt that comes in chunks but is compressed only once it is complete).

A policy that speculates comes with a guide per layer (kvjax.calibrate): it turns keys into partial keys, which go to the store with them.

What happens to a prompt:
  whole    one call sees it all; each layer attends, then keeps what the policy keeps. Only one layer's full keys and values exist at
           a time.
  staged   chunks go into a state that holds everything (`stage`), statistics add up, `settle` compresses. Same result as whole.
  bounded  after every chunk the kept set is cut back to the budget. Memory never exceeds the budget plus one chunk of one layer; the
           result is an approximation, because a token may be dropped before the queries that would have wanted it were seen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import GroupMass, chunk_attention, prompt_attention, summed_mass
from kvjax.cache.identity import DEFAULT_STORE, Identity, store_options, store_spec
from kvjax.cache.policies import Full, Policy, Slots, policy_name
from kvjax.cache.policies.base import arguments
from kvjax.cache.state import CacheShape, KVState, LayerState
from kvjax.cache.stores import DenseStore, HostLayer, HostStore, KernelDenseStore, KernelHostStore, KernelStore, Store, native_store
from kvjax.cache.stores.dense import select_rows
from kvjax.cache.stores.kernels import attend_prompt
from kvjax.errors import InputError, SpecError
from kvjax.kernels.dispatch import Device
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.speculate import speculate

ALIASES = {"vllm": ("full", "paged"), "offload": ("full", "host")}
"""Names for a policy in a store."""

NO_GUIDE = "guesses the next layer's queries, which takes a calibrated model: pass it through kvjax.calibrated(model, strategy) first"


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Static under jit; all state is in the KVState."""

    policy: Policy
    store: Store = DenseStore()

    def __post_init__(self):
        if self.policy.keeps_score and not self.policy.per_head:
            raise SpecError(f"{self.policy.describe()}: a policy that keeps scores keeps them per kv head; set per_head = True")
        if self.policy.home not in (None, self.store.name):
            raise SpecError(
                f"{self.policy.describe()} fetches the tokens it has chosen from a {self.policy.home} store; the {self.store.name} store "
                f"has nothing to fetch from (--store={self.policy.home}; with --transfer=device its pool is device memory)"
            )

    def native(self, device: Device) -> "Strategy":
        """This strategy over the store that a device computes with: the same one on a CPU, one with kernels where there are some for it.

        Entry points call it once (kvjax.generation.as_strategy); below them a strategy is taken as it is.
        """
        return dataclasses.replace(self, store=native_store(self.store, device))

    @property
    def staging(self) -> DenseStore:
        """Where a prompt stands that comes in chunks and is compressed once it is complete."""
        return KernelDenseStore(self.store.platform) if isinstance(self.store, KernelStore | KernelHostStore) else DenseStore()

    def describe(self) -> str:
        """The spec string, which parses to this very strategy; what is at its default is left out."""
        keep, store = self.policy.describe(), store_spec(self.store)
        if store == (self.policy.home or DEFAULT_STORE):
            return keep
        names = {pair: alias for alias, pair in ALIASES.items()}
        return names.get((keep, store), f"{keep}+{store}")

    def identity(self) -> Identity:
        """This strategy as data."""
        policy, store = self.policy, self.store.name
        alias = next((name for name, pair in ALIASES.items() if pair == (policy.describe(), store)), None)
        return Identity(
            label=self.describe(),
            keep=policy.describe(),
            policy=policy_name(type(policy)),
            arguments=arguments(policy),
            store=store,
            options=store_options(self.store),
            codec=None,
            family=alias or policy.family or policy_name(type(policy)),
            variant=None if alias or store == (policy.home or DEFAULT_STORE) else store,
            budget=policy.total_budget(),
            unlimited=policy.unlimited and policy.exact,
        )

    def slots(self, prompt_length: int, max_length: int) -> int:
        """Slots a row needs for a prompt of `prompt_length` tokens and `max_length` tokens in total.

        A policy that evicts needs its budget and one slot for the token at hand, and no more than there will be tokens.
        """
        budget = self.policy.kept_tokens(prompt_length)
        if budget is None:
            return max_length
        if self.policy.evicts_in_decode:
            return min(budget + 1, max_length)
        return min(budget, prompt_length) + max_length - prompt_length

    def init(self, shape: CacheShape, prompt_lengths, max_prompt: int, max_new: int, fill: float = 0.0) -> KVState:
        """An empty state for rows with these prompt lengths.

        Args:
          prompt_lengths: tokens of each row's prompt; [B] int.
          max_prompt: at least the longest of them (static).
          max_new: tokens each row may generate (static).
          fill: what the memory holds before anything is written; tests use NaN.
        """
        lengths = jnp.asarray(prompt_lengths, jnp.int32)
        capacity = self.slots(max_prompt, max_prompt + max_new)
        batch = lengths.shape[0]
        layers = []
        for index in range(shape.num_layers):
            store = self.with_partial(self.store.init(shape, batch, capacity, fill), index, batch, fill)
            layers.append(self.with_metadata(store, shape, batch, capacity))
        return KVState(tuple(layers), jnp.zeros_like(lengths), lengths, self.store.share(batch, capacity))

    def with_partial(self, store: Any, index: int, rows: int, fill: float = 0.0) -> Any:
        """What the store has for layer `index`, with room for the partial keys of `rows` rows where this policy speculates."""
        if not self._speculates(index):
            return store
        assert isinstance(self.store, HostStore)
        return self.store.with_partial(store, rows, self.policy.partial_columns(store.k.shape[-1]), fill)

    def with_metadata(self, store: Any, shape: CacheShape, batch: int, capacity: int) -> LayerState:
        """A layer over `store` with the (empty) slots this policy keeps books of, for `batch` rows of up to `capacity` slots."""
        if self.policy.kept_tokens(1) is None:
            return LayerState(store)
        heads, capacity = shape.num_kv_heads if self.policy.per_head else 1, self.store.rounded(capacity)
        return LayerState(
            store=store,
            position=jnp.full((batch, heads, capacity), -1, jnp.int32),
            score=jnp.zeros((batch, heads, capacity), jnp.float32) if self.policy.keeps_score else None,
            next_slot=jnp.zeros((batch, heads), jnp.int32),
        )

    def stage(self, shape: CacheShape, prompt_lengths, max_prompt: int, fill: float = 0.0) -> KVState:
        """An empty state that holds a whole prompt and the policy's statistics, for `settle` to compress."""
        lengths = jnp.asarray(prompt_lengths, jnp.int32)
        batch, slots = lengths.shape[0], self.staging.rounded(max_prompt)
        layers = []
        for _ in range(shape.num_layers):
            score = jnp.zeros((batch, shape.num_kv_heads, slots), jnp.float32) if self.policy.keeps_score else None
            layers.append(LayerState(self.staging.init(shape, batch, slots, fill), score=score))
        return KVState(tuple(layers), jnp.zeros_like(lengths), lengths)

    def settle(self, staged: KVState, empty: KVState, guides: tuple = ()) -> KVState:
        """Compresses a staged prompt into the (bounded) state `empty`. `guides`: per layer, for a policy that speculates."""
        layers = []
        for index, (source, target) in enumerate(zip(staged.layers, empty.layers, strict=True)):
            layers.append(self.settle_layer(source, target, staged.length, empty, guides[index] if guides else None))
        return dataclasses.replace(empty, layers=tuple(layers), length=staged.length, prompt_length=staged.prompt_length)

    def settle_layer(
        self, source: LayerState, target: LayerState, length: Int[Array, " B"], empty: KVState, guide: Any = None
    ) -> LayerState:
        """`settle` of one layer: `source`, with `length` tokens, into `target`, a layer of `empty`."""
        k, v = self.staging.tokens(source.store, None, length.shape[0])
        return self._keep_prompt(target, k, v, source.score, length, empty, guide)

    def prefill(
        self,
        layer: LayerState,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S Hkv D"],
        v: Float[Array, "B S Hkv D"],
        kv: KVState,
        valid: Bool[Array, "B S"],
        first: bool,
        context: int | None = None,
        guide: Any = None,
    ) -> tuple[Float[Array, "B S H D"], LayerState]:
        """Attends to a prompt, or the next chunk of it, and keeps what the policy keeps.

        Args:
          layer: this layer of `kv`; with positions, it is cut to the budget now, without, it collects everything.
          valid: tokens that are part of the prompt; a row's valid tokens come first.
          first: nothing is in the cache yet (static).
          context: no row is longer than this after the chunk (static; None: no bound but the capacity). Slots beyond are not read.
          guide: of this layer, for a policy that speculates.
        """
        bounded = layer.position is not None
        group_mass = self._group_mass() if bounded or layer.score is not None else None
        if first:
            with jax.named_scope("attend"):
                out, masses = self._attend_prompt(q, k, v, valid, () if group_mass is None else (group_mass,))
                mass = masses[0] if masses else None
            with jax.named_scope("evict" if bounded else "write"):
                score = self._scored(k, v, mass)
                if bounded:
                    return out, self._keep_prompt(layer, k, v, score, valid.sum(-1, dtype=jnp.int32), kv, guide)
                store = self._holding(layer).fill(layer.store, kv.shared, self._with_partial(layer, k, guide), v, valid)
                return out, dataclasses.replace(layer, store=store, score=_padded(score, layer.score))
        if bounded:
            return self._prefill_bounded(layer, q, k, v, kv, valid, group_mass, guide)
        holding = self._holding(layer)
        with jax.named_scope("write"):
            store = holding.write_chunk(layer.store, kv.shared, kv.length, self._with_partial(layer, k, guide), v, valid)
        with jax.named_scope("attend"):
            out, mass = holding.attend_chunk(store, kv.shared, q, kv.length, valid, context, group_mass)
        score = layer.score
        if score is not None:
            score = _scatter(score, kv.length, self.policy.initial_score(k, v), valid)
            score = score if mass is None else self.policy.observe(score, _padded(mass, score))
        return out, dataclasses.replace(layer, store=store, score=score)

    def decode(
        self,
        layer: LayerState,
        q: Float[Array, "B 1 H D"],
        k: Float[Array, "B 1 Hkv D"],
        v: Float[Array, "B 1 Hkv D"],
        kv: KVState,
        active: Bool[Array, " B"],
        guide: Any = None,
    ) -> tuple[Float[Array, "B 1 H D"], LayerState]:
        """Writes the new token, attends, updates the statistics, chooses the next victim. Rows that are not active stay as they are."""
        if isinstance(layer.store, HostLayer) and layer.store.staged is None:
            layer = self._fetch(layer, None, kv, active)  # nothing looked ahead for this layer: the first one
        if isinstance(self.store, KernelStore) and layer.score is not None:
            rule = self.policy.fused_eviction(kv.prompt_length)
            if rule is not None:
                return self._decode_fused(layer, q[:, 0], k[:, 0], v[:, 0], kv, active, *rule)
        capacity = self.store.capacity(layer.store, kv.shared)
        slot = kv.length[:, None] if layer.next_slot is None else layer.next_slot
        with jax.named_scope("write"):
            keys = self._with_partial(layer, k, guide)[:, 0]
            store = self.store.write(layer.store, kv.shared, jnp.minimum(slot, capacity - 1), keys, v[:, 0], active)
            here = (jnp.arange(capacity) == slot[..., None]) & active[:, None, None]
            position = None if layer.position is None else jnp.where(here, kv.length[:, None, None], layer.position)
        with jax.named_scope("attend"):
            options = self._readable(kv), None if position is None else self._group_mass()
            if isinstance(self.store, KernelStore):
                out, mass = self.store.attend_first(store, kv.shared, q[:, 0], self._in_use(slot, kv, active), position, *options)
            else:
                visible = jnp.arange(capacity) <= slot[..., None] if position is None else position >= 0
                out, mass = self.store.attend(store, kv.shared, q[:, 0], visible, *options)
        layer = dataclasses.replace(layer, store=store, position=position)
        if position is not None:
            with jax.named_scope("evict"):
                layer = self._evict(layer, slot, here, k, v, mass, kv, active)
        if isinstance(self.store, HostStore):
            layer = dataclasses.replace(layer, store=self.store.cleared(layer.store))
        return out[:, None], layer

    def _decode_fused(
        self, layer: LayerState, q: Float[Array, "B H D"], k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"], kv: KVState,
        active: Bool[Array, " B"], budget: Int[Array, " B"], recent: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 H D"], LayerState]:  # fmt: skip
        """`decode` of a policy whose eviction is one kernel; what is kept is the same."""
        store, slot, position, score = self.store, layer.next_slot, layer.position, layer.score
        assert isinstance(store, KernelStore)
        assert slot is not None
        assert position is not None
        assert score is not None
        batch, heads, capacity = position.shape
        with jax.named_scope("write"):
            tokens = store.write(layer.store, kv.shared, slot, k, v, active)
            here = jnp.arange(batch)[:, None], jnp.arange(heads), jnp.where(active[:, None], slot, capacity)
            position = position.at[here].set(kv.length[:, None], mode="drop", unique_indices=True)
            score = score.at[here].set(0.0, mode="drop", unique_indices=True)
        with jax.named_scope("attend"):
            out, statistics = store.attend_with_statistics(tokens, kv.shared, q, self._in_use(slot, kv, active), position)
        with jax.named_scope("evict"):
            seen = kv.length + 1
            position, score, following = h2o_evict(position, score, statistics, seen, budget, recent, active)
            following = jnp.where(active[:, None], following, slot)
        return out[:, None], LayerState(tokens, position, score, following)

    def _in_use(self, slot: Int[Array, "B h"], kv: KVState, active: Bool[Array, " B"]) -> Int[Array, " B"]:
        """How many slots at the front of every row hold all its tokens, the one just put into `slot` included; 0 for a row that rests."""
        count = slot.max(-1) + 1
        if self.policy.kept_tokens(1) is not None and self.policy.evicts_in_decode:  # any of the budget's slots may have been free
            count = jnp.minimum(self.policy.kept_tokens(kv.prompt_length), kv.length) + 1
        return jnp.where(active, count, 0)

    def _attend_prompt(self, q, k, v, valid, rules: tuple[GroupMass, ...]):
        attend = attend_prompt if isinstance(self.store, KernelStore | KernelHostStore) else prompt_attention
        return attend(q, k, v, valid, rules)

    def _group_mass(self) -> GroupMass | None:
        """How a policy that observes joins attention mass; the plain sum under the name that kernels know it by."""
        if not self.policy.observes:
            return None
        return summed_mass if self.policy.sums_mass else self.policy.group_mass

    def look_ahead(
        self, index: int, queries: Callable[[], Float[Array, "B Hkv G P"] | None], kv: KVState, active: Bool[Array, " B"]
    ) -> KVState:
        """While layer `index` is computed, fetches what layer `index + 1` will read, where the store has to fetch it.

        Args:
          queries: makes the guessed partial queries of layer `index + 1`, scaled; returns None without a guide.
        """
        following = index + 1
        if not isinstance(self.store, HostStore) or following == len(kv.layers):
            return kv
        layer = kv.layer(following)
        choice = None
        if layer.store.partial is not None:
            with jax.named_scope("speculate"):
                guessed = queries()
                if guessed is None:
                    raise SpecError(f"{self.policy.describe()} {NO_GUIDE}")
                choice = self.choose(layer, guessed, kv, active)
        return kv.with_layer(following, self._fetch(layer, choice, kv, active))

    def choose(self, layer: LayerState, queries: Float[Array, "B Hkv G P"], kv: KVState, active: Bool[Array, " B"]):
        """The slots a policy that speculates wants of a layer, most wanted first, and how many of them: [B, Hkv, K] and [B]."""
        assert isinstance(self.store, HostStore)
        partial_keys = self.store.partial_keys(layer.store, kv.shared)
        capacity, position = partial_keys.shape[-1], self._positions(layer, kv)
        rule = self.policy.fused_selection(position, kv.length) if isinstance(self.store, KernelHostStore) else None
        if rule is not None:
            how: Any = dict(alpha=rule.alpha, limit=rule.limit, group=rule.group)
            found = speculate(queries, partial_keys, position >= 0, rule.most, rule.always, **how)
            return jnp.minimum(found.index, capacity - 1), jnp.where(active, found.count, 0)
        guess = jnp.einsum("bngp,bnpc->bngc", queries, partial_keys, preferred_element_type=jnp.float32)
        slot, count = self.policy.select(guess, position, kv.length)
        return slot, jnp.where(active, count, 0)

    def _fetch(self, layer: LayerState, choice, kv: KVState, active: Bool[Array, " B"]) -> LayerState:
        """The layer with these tokens staged; without a choice, with all of them."""
        assert isinstance(self.store, HostStore)
        with jax.named_scope("fetch"):
            held, in_use = self.held(layer, kv, active)
            slot, count = choice or (None, in_use)
            return dataclasses.replace(layer, store=self.store.prefetch(layer.store, kv.shared, slot, count, held))

    def held(self, layer: LayerState, kv: KVState, active: Bool[Array, " B"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Tokens of every active row, and how many of its first slots hold them all: a freed slot may lie between."""
        stored = (self._positions(layer, kv) >= 0) & active[:, None, None]
        ends = jnp.arange(1, stored.shape[-1] + 1, dtype=jnp.int32)
        return stored.sum(-1, dtype=jnp.int32).max(-1), jnp.where(stored, ends, 0).max((1, 2))

    def _positions(self, layer: LayerState, kv: KVState) -> Int[Array, "B h C"]:
        """True position of the token in each slot, -1 where there is none."""
        if layer.position is not None:
            return layer.position
        slots = jnp.arange(self.store.capacity(layer.store, kv.shared))
        return jnp.where(slots < kv.length[:, None, None], slots, -1)

    def _speculates(self, index: int) -> bool:
        return self.policy.speculates and index >= self.policy.full_layers

    def _with_partial(self, layer: LayerState, k: Float[Array, "B S Hkv D"], guide: Any) -> Float[Array, "B S Hkv D+P"]:
        """Keys as the store wants them: followed by their partial columns where the layer has room for those."""
        if getattr(layer.store, "partial", None) is None:
            return k
        if guide is None:
            raise SpecError(f"{self.policy.describe()} {NO_GUIDE}")
        return jnp.concatenate([k, jnp.einsum("bsnd,ndp->bsnp", k, guide.key).astype(k.dtype)], axis=-1)

    def _evict(self, layer: LayerState, slot, here, k, v, mass, kv: KVState, active) -> LayerState:
        """After a token went into `slot`: update the scores, free a slot if the row is over its budget, name the next slot."""
        policy, position, score = self.policy, layer.position, layer.score
        assert position is not None
        length = kv.length + 1
        if score is not None:
            stored = jnp.where(here, self.policy.initial_score(k, v), score)
            stored = stored if mass is None else policy.observe(stored, mass)
            if isinstance(self.store, HostStore) and layer.store.partial is not None:  # to read everything tells nothing of use
                stored = policy.observe_use(stored, self.store.used(layer.store), length[:, None, None])
            score = jnp.where(active[:, None, None], stored, score)
        following = slot + 1
        if policy.evicts_in_decode:
            held = position >= 0
            over = held.sum(-1) > policy.kept_tokens(kv.prompt_length)[:, None]
            priority = policy.priority(Slots(position, score, length[:, None, None], kv.prompt_length[:, None, None]))
            victim = lowest(jnp.where(held, priority, jnp.inf), jnp.where(held, position, -1))
            following = jnp.where(over, victim, following)
            freed = (jnp.arange(held.shape[-1]) == victim[..., None]) & over[..., None] & active[:, None, None]
            position = jnp.where(freed, -1, position)
        following = jnp.where(active[:, None], following, slot)
        return dataclasses.replace(layer, position=position, score=score, next_slot=following)

    def _prefill_bounded(self, layer: LayerState, q, k, v, kv: KVState, valid, group_mass, guide):
        """Attend to the kept slots and the chunk, then cut both together back to the budget."""
        assert layer.position is not None
        batch, size = valid.shape
        position = kv.length[:, None] + jnp.arange(size, dtype=jnp.int32)
        fresh = jnp.broadcast_to(jnp.where(valid, position, -1)[:, None], (batch, layer.position.shape[1], size))
        where = jnp.concatenate([layer.position, fresh], axis=-1)
        held_k, held_v = self.store.tokens(layer.store, kv.shared, batch)
        keys, values = jnp.concatenate([held_k.astype(k.dtype), k], 1), jnp.concatenate([held_v.astype(v.dtype), v], 1)
        with jax.named_scope("attend"):
            out, mass = chunk_attention(q, keys, values, position, where, valid, group_mass)
        with jax.named_scope("evict"):
            score = layer.score
            if score is not None:
                score = jnp.concatenate([score, self.policy.initial_score(k, v)], -1)
                score = score if mass is None else self.policy.observe(score, mass)
            return out, self._keep(layer, keys, values, score, where, kv.length + valid.sum(-1, dtype=jnp.int32), kv, guide, valid.any(-1))

    def _keep_prompt(self, layer: LayerState, k, v, score, length, kv: KVState, guide=None) -> LayerState:
        """Fills the layer from the first `length` tokens of (k, v), which stand in the order of their positions."""
        index = jnp.arange(k.shape[1], dtype=jnp.int32)
        valid = index < length[:, None]
        if layer.position is None:  # nothing is ever dropped
            return dataclasses.replace(layer, store=self.store.fill(layer.store, kv.shared, self._with_partial(layer, k, guide), v, valid))
        position = jnp.broadcast_to(jnp.where(valid, index, -1)[:, None], (*layer.position.shape[:2], k.shape[1]))
        return self._keep(layer, k, v, score, position, length, kv, guide)

    def _keep(
        self, layer: LayerState, k, v, score, position, length, kv: KVState, guide=None, rows: Bool[Array, " B"] | None = None
    ) -> LayerState:
        """Fills the slots of these rows (None: all) with the tokens the policy keeps, in the order of their positions."""
        capacity = self.store.capacity(layer.store, kv.shared)
        ranked = self.policy.priority(Slots(position, score, length[:, None, None], kv.prompt_length[:, None, None]))
        index = highest(ranked, position, self.policy.kept_tokens(kv.prompt_length), capacity)
        padded = jnp.pad(position, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        kept = jnp.take_along_axis(padded, index, axis=-1)
        if score is not None:
            score = jnp.where(kept >= 0, jnp.take_along_axis(jnp.pad(score, ((0, 0), (0, 0), (0, 1))), index, axis=-1), 0)
        next_slot = jnp.minimum((kept >= 0).sum(-1), capacity - 1).astype(jnp.int32)
        keys = self._with_partial(layer, k, guide)
        new = LayerState(self.store.fill_selected(layer.store, kv.shared, keys, v, index, rows), kept, score, next_slot)
        if rows is None:
            return new
        stay = (layer.position, layer.score, layer.next_slot)
        metadata = jax.tree.map(partial(select_rows, rows), (kept, score, next_slot), stay)
        return LayerState(new.store, *metadata)

    def _holding(self, layer: LayerState) -> Store:
        """The store of a layer that keeps all it is given: a staged prompt's, or this strategy's own."""
        return self.store if self.policy.kept_tokens(1) is None else self.staging

    def _readable(self, kv: KVState) -> Callable[[Float[Array, "B Hkv G C"]], Bool[Array, "B Hkv 1 C"]] | None:
        if type(self.policy).readable is Policy.readable:
            return None

        def readable(logits):
            chosen = self.policy.readable(logits, kv.prompt_length)
            return jnp.ones((1, 1, 1, logits.shape[-1]), bool) if chosen is None else chosen

        return readable

    def _scored(self, k, v, mass):
        if not self.policy.keeps_score:
            return None
        score = self.policy.initial_score(k, v)
        return score if mass is None else self.policy.observe(score, mass)


def stage_for(strategies: Sequence[Strategy], shape: CacheShape, prompt_lengths, max_prompt: int) -> KVState:
    """An empty state that holds a whole prompt for several strategies; a layer's `score` has an entry for each of them."""
    kv = Strategy(Full(), strategies[0].store).stage(shape, prompt_lengths, max_prompt)
    return kv.over(tuple(dataclasses.replace(layer, score=(None,) * len(strategies)) for layer in kv.layers))


def prefill_for(
    strategies: Sequence[Strategy], layer: LayerState, q: Float[Array, "B S H D"], k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"], kv: KVState, valid: Bool[Array, "B S"],
) -> tuple[Float[Array, "B S H D"], LayerState]:  # fmt: skip
    """Attends to a prompt once and stages it, with the statistics that each of `strategies` chooses by."""
    first = strategies[0]
    by_strategy = [s._group_mass() if s.policy.keeps_score else None for s in strategies]
    rules = tuple(dict.fromkeys(rule for rule in by_strategy if rule is not None))
    with jax.named_scope("attend"):
        out, masses = first._attend_prompt(q, k, v, valid, rules)
    with jax.named_scope("write"):
        store = first.staging.fill(layer.store, kv.shared, k, v, valid)
        spare = first.staging.capacity(store, kv.shared) - k.shape[1]
        mass = {None: None} | dict(zip(rules, masses, strict=True))
        scores = [s._scored(k, v, mass[rule]) for s, rule in zip(strategies, by_strategy, strict=True)]
        scores = [None if score is None else jnp.pad(score, ((0, 0), (0, 0), (0, spare))) for score in scores]
    return out, dataclasses.replace(layer, store=store, score=tuple(scores))


def highest(priority: Float[Array, "B h K"], position: Int[Array, "B h K"], budget: Int[Array, " B"], capacity: int) -> Int[Array, "B h C"]:
    """Indices of each row's `budget` tokens of highest priority, in the order of their positions; K where a slot stays empty.

    Empty candidates (position -1) are never chosen; between equal priorities the lower position wins.
    """
    size = position.shape[-1]
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), position.shape)
    empty = position < 0
    *_, where, order = jax.lax.sort((empty, -priority.astype(jnp.float32), position, index), num_keys=3)
    rank = jnp.arange(min(capacity, size))
    chosen = (where >= 0)[..., : len(rank)] & (rank < budget[:, None, None])
    order = jnp.where(chosen, order[..., : len(rank)], size)
    by_position = jnp.where(chosen, where[..., : len(rank)], jnp.iinfo(jnp.int32).max)
    _, order = jax.lax.sort((by_position, order), num_keys=1)
    return jnp.pad(order, ((0, 0), (0, 0), (0, capacity - len(rank))), constant_values=size)


def lowest(priority: Float[Array, "B h C"], position: Int[Array, "B h C"]) -> Int[Array, "B h"]:
    """The slot of lowest priority; between equals the one with the highest position."""
    slots = jnp.broadcast_to(jnp.arange(position.shape[-1], dtype=jnp.int32), position.shape)

    def worse(a, b):
        first = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))
        return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))

    start = (jnp.float32(jnp.inf), jnp.int32(-2), jnp.int32(0))  # whatever a policy ranks by, and JAX_ENABLE_X64 makes of it
    operands = (priority.astype(jnp.float32), position.astype(jnp.int32), slots)
    return jax.lax.reduce(operands, start, worse, (2,))[2]


def check_capacity(strategy: Strategy, kv: KVState, steps: int) -> None:
    """Raises InputError when `steps` more tokens would not fit (a policy that evicts always has room). Reads the lengths: not for jit."""
    layer = kv.layers[0]
    if layer.next_slot is not None and strategy.policy.evicts_in_decode:
        return
    capacity = strategy.store.capacity(layer.store, kv.shared)
    used = kv.length if layer.next_slot is None else layer.next_slot.max(-1)
    if int(used.max()) + steps > capacity:
        raise InputError(f"{steps} more tokens do not fit: {int(used.max())} of {capacity} slots are used; start with a larger max_new")


def _padded(score, like):
    return None if like is None else jnp.pad(score, ((0, 0), (0, 0), (0, like.shape[-1] - score.shape[-1])))


def _scatter(score, start, new, valid):
    """`score` with `new[..., s]` at `start + s` where valid."""
    batch, heads, capacity = score.shape
    slot = start[:, None] + jnp.arange(valid.shape[1])
    slot = jnp.where(valid, slot, capacity + slot)[:, None]
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    return score.at[rows, columns, slot].set(new, mode="drop", unique_indices=True)
