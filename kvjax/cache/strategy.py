"""A strategy: a policy (which tokens are kept and read) over a store (where their bytes live), as pure functions over the KV state.

The decoder meets it per layer, in `prefill`, `decode` and `look_ahead` (what the next layer is going to read, where that is chosen, or has
to be fetched, ahead); around them stand `init` (allocate) and `commit` (compress a prompt that was staged).

What happens to a prompt:
  whole    one call sees it all; each layer attends, then keeps what the policy keeps. Only one layer's full keys and values exist at
           a time.
  staged   chunks go into a state that holds everything (`stage`, `append`) with what attention has shown of every token, and `commit`
           compresses. Same result as whole. What is staged does not depend on the policy but for the statistics it asks for, so that one
           pass serves several.
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

from kvjax.cache.identity import DEFAULT_STORE, Identity, store_spec
from kvjax.cache.policies import Policy, Seen, Selection, Slots, View, arguments, policy_name
from kvjax.cache.policies import tokens as tokens_of
from kvjax.cache.pool import Pool, select_rows
from kvjax.cache.state import CacheShape, KVState, LayerState, Own
from kvjax.cache.store import Store
from kvjax.cache.tiers import Ahead
from kvjax.errors import SpecError
from kvjax.kernels.attention import NEG_INF, Attended, Keys, Mask, Observe, attention, scores, tokens
from kvjax.kernels.dispatch import Device
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.paged_attention import Statistics
from kvjax.kernels.speculate import speculate

ALIASES = {"vllm": ("full", "paged"), "offload": ("full", "host")}
"""Names for a policy in a store."""


def usual_store(policy: Policy, otherwise: str = DEFAULT_STORE) -> str:
    """The name of the store that a policy stands in unless it is said: one to fetch from, for a policy that chooses what to fetch."""
    return "host" if policy.fetches else otherwise


DENSE = Store()


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Static under jit; all state is in the KVState."""

    policy: Policy
    store: Store = DENSE

    def __post_init__(self):
        if self.policy.fetches and not self.store.tier.fetches:
            raise SpecError(
                f"{self.policy.describe()} fetches the tokens it has chosen from a host store; the {self.store.name} store has nothing to "
                "fetch from (--store=host; with --transfer=device its pool is device memory)"
            )

        if self.store.tier.driven and self.policy.selects in ("step", "last"):
            raise SpecError(
                f"{self.policy.describe()} chooses what it reads by the queries of a step, and the host that drives the layers fetches "
                "before (--transfer=driven); use jit or device"
            )

    def native(self, device: Device) -> "Strategy":
        """This strategy over the store as a device computes with it.

        Entry points call it once (kvjax.generation.as_strategy); below them a strategy is taken as it is.
        """
        return dataclasses.replace(self, store=self.store.native(device))

    def describe(self) -> str:
        """The spec string, which parses to this very strategy; what is at its default is left out."""
        keep, store = self.policy.describe(), store_spec(self.store)
        if store == usual_store(self.policy):
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
            options=self.store.options,
            codec=None,
            family=alias or policy.family or policy_name(type(policy)),
            variant=None if alias or store == usual_store(policy) else store,
            budget=policy.total_budget(),
            unlimited=policy.unlimited and policy.exact,
        )

    # ---------------------------------------------------------------------------------------------------------------------- allocation

    @property
    def observes(self) -> tuple[Observe, ...]:
        """What a prompt that is staged for this strategy has to be asked for."""
        return () if self.policy.observes is None else (self.policy.observes,)

    def slots(self, prompt_length: int, max_length: int, layer: int | None = None, num_layers: int = 1) -> int:
        """Slots a row needs in a layer (None: in any) for a prompt of `prompt_length` tokens and `max_length` tokens in total.

        A policy that evicts needs its budget and one slot for the token at hand, and no more than there will be tokens.
        """
        budget = self.policy.most_kept(prompt_length, layer, num_layers)
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
        batch, longest = lengths.shape[0], max_prompt + max_new
        widest = self.slots(max_prompt, longest)
        layers = []
        for index in range(shape.num_layers):
            own = self.store.page_size is None  # pages are of one table, the same in all layers
            capacity = self.slots(max_prompt, longest, index, shape.num_layers) if own else widest
            layers.append(self.layer(self.store.init(shape, batch, capacity, fill), shape, index, lengths, capacity, fill))
        return KVState(tuple(layers), jnp.zeros_like(lengths), lengths, self.store.table(batch, widest))

    def layer(
        self, pool: Pool, shape: CacheShape, index: int, prompt_lengths: Int[Array, " R"], capacity: int, fill: float = 0.0
    ) -> LayerState:
        """Layer `index`, empty: a pool, and the books of rows of up to `capacity` slots."""
        policy, slots, rows = self.policy, self.store.rounded(capacity), prompt_lengths.shape[0]
        own = policy.init_own(shape, rows, slots, index)
        if not (isinstance(fill, float) and fill == 0):
            own = jax.tree.map(lambda x: jnp.full_like(x, fill) if jnp.issubdtype(x.dtype, jnp.floating) else x, own)
        last = (rows, shape.num_kv_heads * shape.group_size, shape.head_dim)
        layer = LayerState(
            pool,
            own=own,
            queries=jnp.zeros(last, shape.dtype) if policy.selects == "last" else None,
            traffic=jnp.zeros(4, jnp.float32) if self.store.tier.fetches else None,
        )
        if not policy.evicts:
            return layer
        heads = shape.num_kv_heads if policy.per_head else 1
        return dataclasses.replace(
            layer,
            position=jnp.full((rows, heads, slots), -1, jnp.int32),
            next_slot=jnp.zeros((rows, heads), jnp.int32),
            budget=self._budget(prompt_lengths, index, shape.num_layers),
        )

    def _budget(self, prompt_lengths: Int[Array, " B"], index: Any, num_layers: int) -> Int[Array, "B h"] | None:
        budget = self.policy.kept_in_layer(prompt_lengths, index, num_layers)
        return None if budget is None else jnp.asarray(budget, jnp.int32)

    # ------------------------------------------------------------------------------------------------------------------------- prompts

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
        """Attends to a prompt, or the next chunk of it, and keeps what the policy keeps; where it evicts, down to the budget, now.

        Args:
          layer: this layer of `kv`.
          valid: tokens that are part of the prompt; a row's valid tokens come first.
          first: nothing is in the cache yet (static).
          context: no row is longer than this after the chunk (static; None: no bound but the capacity). Slots beyond are not read.
          guide: of this layer, for a policy that guesses.
        """
        if not self.policy.evicts:
            out, layer, masses = append(self.store, self.observes, layer, q, k, v, kv, valid, first, context)
            with jax.named_scope("write"):
                return out, self._appended(layer, k, v, masses, kv, valid, guide)
        if not first:
            return self._prefill_bounded(layer, q, k, v, kv, valid, guide)
        with jax.named_scope("attend"):
            found = attention(q, tokens(k, v), Mask(counted=valid), observe=self.observes)
        with jax.named_scope("evict"):
            return found.out, self._keep_prompt(layer, k, v, found.observed, valid.sum(-1, dtype=jnp.int32), kv, guide)

    def _appended(self, layer: LayerState, k, v, masses, kv: KVState, valid: Bool[Array, "B S"], guide) -> LayerState:
        """The policy's state with tokens that now stand in slots `kv.length` and on, after attention to all."""
        before = layer.rows_of_own()
        if not jax.tree.leaves(before):
            return layer
        slot = kv.length[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)
        layer, own = self._stored(layer, before, self.policy.initial(k, v, guide), slot[:, None], valid[:, None])
        if masses:
            own = self.policy.observe(own, Seen(masses[0], None, (kv.length + valid.sum(-1))[:, None, None]))
        return layer.with_own(own, before)

    def _prefill_bounded(self, layer: LayerState, q, k, v, kv: KVState, valid, guide) -> tuple[Float[Array, "B S H D"], LayerState]:
        """Attend to the kept slots and the chunk, then cut both together back to the budget."""
        assert layer.position is not None
        batch, size = valid.shape
        position = kv.length[:, None] + jnp.arange(size, dtype=jnp.int32)
        fresh = jnp.broadcast_to(jnp.where(valid, position, -1)[:, None], (batch, layer.position.shape[1], size))
        where = jnp.concatenate([layer.position, fresh], axis=-1)
        held_k, held_v = self.store.tokens(layer.pool, kv.table, batch)
        keys, values = jnp.concatenate([held_k.astype(k.dtype), k], 1), jnp.concatenate([held_v.astype(v.dtype), v], 1)
        with jax.named_scope("attend"):
            found = attention(q, tokens(keys, values), Mask(position, where, counted=valid), observe=self.observes)
        with jax.named_scope("evict"):
            own = layer.rows_of_own()
            own = jax.tree.map(lambda old, new: jnp.concatenate([old, new], -1), own, like(own, self.policy.initial(k, v, guide)))
            length = kv.length + valid.sum(-1, dtype=jnp.int32)
            if found.observed:
                own = self.policy.observe(own, Seen(found.observed[0], None, length[:, None, None]))
            return found.out, self._keep(layer, keys, values, own, where, length, kv, valid.any(-1))

    def commit(
        self, source: LayerState, target: LayerState, length: Int[Array, " B"], empty: KVState, guide: Any = None,
        context: int | None = None, index: Any = 0, num_layers: int = 1,
    ) -> LayerState:  # fmt: skip
        """Compresses a layer of a staged prompt of `length` tokens into `target`, a layer of `empty`.

        Args:
          source: with what attention has shown by `observes`.
          context: no more than that many slots of `source` hold anything (static); None: all may.
          index: which layer it is, an int or a traced one.
        """
        k, v = self.store.staging.tokens(source.pool, None, length.shape[0], context)
        if target.budget is not None:
            target = dataclasses.replace(target, budget=self._budget(empty.prompt_length, index, num_layers))
        return self._keep_prompt(target, k, v, tuple(x[..., : k.shape[1]] for x in source.observed), length, empty, guide)

    def _keep_prompt(self, layer: LayerState, k, v, masses, length, kv: KVState, guide=None) -> LayerState:
        """Fills the layer from the first `length` tokens of (k, v), which stand in the order of their positions."""
        index = jnp.arange(k.shape[1], dtype=jnp.int32)
        valid = index < length[:, None]
        if layer.position is None:  # nothing is ever dropped
            pool = self.store.tier.filled(layer.pool, kv.table, k, v, valid)
            start = dataclasses.replace(kv, length=jnp.zeros_like(kv.length))
            padded = tuple(padded_to(x, layer.pool.capacity(kv.table)) for x in masses)
            return self._appended(dataclasses.replace(layer, pool=pool), k, v, padded, start, valid, guide)
        own = like(layer.own, self.policy.initial(k, v, guide))
        if masses:
            own = self.policy.observe(own, Seen(masses[0], None, length[:, None, None]))
        position = jnp.broadcast_to(jnp.where(valid, index, -1)[:, None], (*layer.position.shape[:2], k.shape[1]))
        return self._keep(layer, k, v, own, position, length, kv)

    def _keep(
        self, layer: LayerState, k, v, own: Own, position: Int[Array, "B h S"], length, kv: KVState, rows: Bool[Array, " B"] | None = None
    ) -> LayerState:
        """Fills the slots of these rows (None: all) with the tokens the policy keeps, in the order of their positions."""
        policy, capacity = self.policy, layer.pool.capacity(kv.table)
        slots = Slots(position, own, length[:, None, None], kv.prompt_length[:, None, None])
        ranked, budget = policy.priority(slots), self._may_hold(layer, kv)
        if layer.budget is not None:
            budget = jnp.broadcast_to(policy.allocate(slots, ranked, budget), layer.budget.shape)
            layer = dataclasses.replace(layer, budget=budget if rows is None else jnp.where(rows[:, None], budget, layer.budget))
        index = highest(ranked, position, budget, capacity)
        kept = jnp.take_along_axis(position, index, axis=-1, mode="fill", fill_value=-1)
        next_slot = jnp.minimum((kept >= 0).sum(-1), capacity - 1).astype(jnp.int32)
        own = jax.tree.map(lambda x: _taken(x, index), own)
        pool = self.store.tier.chosen(layer.pool, kv.table, k, v, index, rows)
        before = layer.rows_of_own()
        if rows is not None:
            stay = (layer.position, next_slot if layer.next_slot is None else layer.next_slot, before)
            kept, next_slot, own = jax.tree.map(partial(select_rows, rows), (kept, next_slot, own), stay)
        return dataclasses.replace(layer, pool=pool, position=kept, next_slot=next_slot).with_own(own, before)

    def _may_hold(self, layer: LayerState, kv: KVState) -> Int[Array, "B h"]:
        """Tokens that the kv heads of every row may hold."""
        return self.policy.kept_tokens(kv.prompt_length)[:, None] if layer.budget is None else layer.budget

    # ------------------------------------------------------------------------------------------------------------------- a decode step

    def look_ahead(
        self, index: int, queries: Callable[[], Float[Array, "B Hkv G P"] | None], kv: KVState, active: Bool[Array, " B"]
    ) -> Ahead | None:
        """While layer `index` is computed, what layer `index + 1` is going to read; None where that is all, as it lies, or not known yet.

        Args:
          queries: makes the guessed partial queries of layer `index + 1`, scaled; returns None without a guide.
        """
        policy, tier = self.policy, self.store.tier
        if index + 1 == len(kv.layers):
            return None
        layer = kv.layer(index + 1)
        if policy.selects == "step":
            return None
        if policy.selects == "last":
            return self._chosen(layer, layer.queries, kv, active)
        if policy.selects == "ahead" and policy.selects_by(layer.own):
            with jax.named_scope("select"):
                guessed = queries()
            return self._chosen(layer, guessed, kv, active)
        return self._fetch(layer, None, kv, active) if tier.fetches else None

    def _at_hand(self, layer: LayerState, q: Float[Array, "B H D"], kv: KVState, active: Bool[Array, " B"]) -> Ahead | None:
        """What a layer reads for which nothing looked ahead."""
        if self.policy.selects in ("step", "last"):
            return self._chosen(layer, q if self.policy.selects == "step" else layer.queries, kv, active)
        return self._fetch(layer, None, kv, active) if self.store.tier.fetches else None

    def _chosen(self, layer: LayerState, queries: Any, kv: KVState, active: Bool[Array, " B"]) -> Ahead:
        """What the policy wants to read of a layer by these queries."""
        with jax.named_scope("select"):
            selection = self.select(layer, queries, kv, active)
        return self._fetch(layer, selection, kv, active)

    def select(self, layer: LayerState, queries: Any, kv: KVState, active: Bool[Array, " B"]) -> Selection:
        """The slots a policy wants of a layer, most wanted first, and how many of them: [B, Hkv, K] and [B]."""
        position = positions(layer, kv)
        view = View(layer.rows_of_own(), position, kv.length, kv.prompt_length, queries)
        rule = self.policy.near_top(view) if self.store.platform != "cpu" else None
        if rule is None:
            slot, count = self.policy.select(view)
        else:
            how: Any = dict(alpha=rule.alpha, limit=rule.limit, group=rule.group)
            found = speculate(rule.queries, rule.partial_keys, position >= 0, rule.most, rule.always, **how)
            slot, count = jnp.minimum(found.index, position.shape[-1] - 1), found.count
        return Selection(slot, jnp.where(active, count, 0))

    def _fetch(self, layer: LayerState, selection: Selection | None, kv: KVState, active: Bool[Array, " B"]) -> Ahead:
        """Brings these tokens to where they are read; without a selection, all of them."""
        with jax.named_scope("fetch"):
            held, in_use = self.held(layer, kv, active)
            slot, count = (None, in_use) if selection is None else selection
            return self.store.tier.fetch(layer.pool, kv.table, slot, count, held)

    def held(self, layer: LayerState, kv: KVState, active: Bool[Array, " B"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Tokens of every active row, and how many of its first slots hold them all: a freed slot may lie between."""
        stored = (positions(layer, kv) >= 0) & active[:, None, None]
        ends = jnp.arange(1, stored.shape[-1] + 1, dtype=jnp.int32)
        return stored.sum(-1, dtype=jnp.int32).max(-1), jnp.where(stored, ends, 0).max((1, 2))

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
        """Writes the new token, attends, updates the statistics, chooses the next victim. Rows that are not active stay as they are.

        What is read is `kv.ahead`, if the layer before has looked ahead.
        """
        policy, tier = self.policy, self.store.tier
        ahead = self._at_hand(layer, q[:, 0], kv, active) if kv.ahead is None else kv.ahead
        capacity = layer.pool.capacity(kv.table)
        slot = kv.length[:, None] if layer.next_slot is None else layer.next_slot
        with jax.named_scope("write"):
            if ahead is not None and ahead.k is not None:
                ahead = _joined(ahead, slot, k, v, capacity)
                ahead, k, v, slot = jax.lax.optimization_barrier((ahead, k, v, slot))  # fetched first: or the pool would be copied
            pool = layer.pool
            if pool.v:  # kvjax.host_driven has it elsewhere
                pool = tier.put(pool, kv.table, jnp.minimum(slot, capacity - 1)[:, None], k, v, active[:, None, None])
            here = (jnp.arange(capacity) == slot[..., None]) & active[:, None, None]
            position = None if layer.position is None else jnp.where(here, kv.length[:, None, None], layer.position)
            before = layer.rows_of_own()
            layer = dataclasses.replace(layer, pool=pool, position=position)
            own = before
            if jax.tree.leaves(before):
                layer, own = self._stored(layer, before, policy.initial(k, v, guide), slot[..., None], active[:, None, None])
        with jax.named_scope("attend"):
            found, used = self._attend(layer, q, k, v, slot, kv, active, ahead)
        with jax.named_scope("evict"):
            layer = self._after(layer, own, before, slot, found, used, kv, active)
        if layer.queries is not None:
            layer = dataclasses.replace(layer, queries=jnp.where(active[:, None, None], q[:, 0], layer.queries))
        if layer.traffic is not None and ahead is not None:
            moved = jnp.concatenate([active.sum(keepdims=True).astype(jnp.float32), ahead.traffic])
            layer = dataclasses.replace(layer, traffic=layer.traffic + moved)
        return found.out, layer

    def _attend(
        self, layer: LayerState, q, k, v, slot: Int[Array, "B h"], kv: KVState, active: Bool[Array, " B"], ahead: Ahead | None
    ) -> tuple[Attended, Bool[Array, "B Hkv C"] | None]:
        """A step's attention, its statistics by slot, and the slots that it read where the policy has chosen them and wants to know."""
        capacity = layer.pool.capacity(kv.table)
        if ahead is not None and ahead.k is not None:
            return self._attend_staged(layer, q, kv, ahead)
        keys = layer.pool.keys(kv.table)
        visible: Any = layer.position
        chosen = None
        if ahead is not None or self.policy.selects == "keys":
            where = positions(layer, kv, 1)
            if ahead is not None:
                chosen = marked(ahead.slot, capacity) | (jnp.arange(capacity) == slot[..., None])
            else:
                chosen = self._by_keys(scores(q, keys), where, kv)
            visible = chosen & (where >= 0)
        mask = Mask(kv.length[:, None], visible, self._in_use(layer, slot, kv, active))
        fuses = self._fuses(layer)
        found = attention(q, keys, mask, observe=() if fuses else self.observes, residuals=fuses)
        return found, chosen if self.policy.tracks_use else None

    def _attend_staged(
        self, layer: LayerState, q: Float[Array, "B 1 H D"], kv: KVState, ahead: Ahead
    ) -> tuple[Attended, Bool[Array, "B Hkv C"] | None]:
        """`_attend` over what was fetched, the step's own token in it."""
        capacity, places = layer.pool.capacity(kv.table), ahead.slot
        assert ahead.k is not None
        assert ahead.v is not None
        batch, heads, _ = places.shape
        keys = Keys((ahead.k,), (ahead.v,), None, "rows")
        position = jnp.broadcast_to(positions(layer, kv, 1), (batch, heads, capacity))
        where = jnp.take_along_axis(position, places, axis=-1, mode="fill", fill_value=-1)
        visible: Any = where >= 0
        if self.policy.selects == "keys":
            visible &= self._by_keys(scores(q, keys), where, kv)
        found = attention(q, keys, Mask(kv.length[:, None], visible), observe=self.observes)

        def to_slots(x: Float[Array, "B Hkv K"]) -> Float[Array, "B Hkv C"]:
            row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
            return jnp.zeros((batch, heads, capacity), x.dtype).at[row, head, places].add(x, mode="drop")

        observed = tuple(to_slots(x) for x in found.observed)
        used = marked(places, capacity) if self.policy.tracks_use and self.policy.selects_by(layer.own) else None
        return dataclasses.replace(found, observed=observed), used

    def _by_keys(self, logits: Float[Array, "B Hkv G K"], position: Int[Array, "B h K"], kv: KVState) -> Bool[Array, "B Hkv K"]:
        """What a policy reads that looks at all keys first."""
        logits = jnp.where((position >= 0)[:, :, None], logits, NEG_INF)
        slot, count = self.policy.choose(logits, position, kv.length, kv.prompt_length)
        meant = jnp.where(jnp.arange(slot.shape[-1]) < count[:, None, None], slot, logits.shape[-1])
        return marked(meant, logits.shape[-1])

    def _in_use(self, layer: LayerState, slot: Int[Array, "B h"], kv: KVState, active: Bool[Array, " B"]) -> Int[Array, " B"]:
        """How many slots at the front of every row hold all its tokens, the one just put into `slot` included; 0 for a row that rests."""
        count = slot.max(-1) + 1
        if layer.position is not None and self.policy.evicts_in_decode:  # any of the budget's slots may have been free
            count = jnp.minimum(self._may_hold(layer, kv).max(-1), kv.length) + 1
        return jnp.where(active, count, 0)

    def _stored(
        self, layer: LayerState, own: Own, fresh: Own, slot: Int[Array, "B h S"], valid: Bool[Array, "B 1 S"]
    ) -> tuple[LayerState, Own]:
        """The policy's state with what it says of new tokens at their slots: in the layer for arrays wider than a number a slot, which
        stay where they are, and in `own`, the call's rows of it, for the others."""
        row = jnp.arange(slot.shape[0]) if layer.row is None else layer.row

        def put(full: Array, rows: Array, new: Array) -> tuple[Array, Array]:
            heads, capacity = full.shape[1], full.shape[-1]
            where = jnp.where(valid, jnp.broadcast_to(slot, (slot.shape[0], heads, slot.shape[2])), capacity)
            if full.ndim == 3:
                if new.shape[-1] == 1:
                    return full, jnp.where(jnp.arange(capacity) == where, new.astype(rows.dtype), rows)
                rank = (jnp.arange(len(rows))[:, None, None], jnp.arange(heads)[:, None], where)
                return full, rows.at[rank].set(new.astype(rows.dtype), mode="drop")
            between = (slice(None),) * (full.ndim - 3)
            at = (row[:, None, None], jnp.arange(heads)[:, None], *between, where)
            full = full.at[at].set(jnp.moveaxis(new, -1, 2).astype(full.dtype), mode="drop")
            return full, full if layer.row is None else rows

        pairs = jax.tree.map(put, layer.own, own, like(own, fresh))
        outer, inner = jax.tree.structure(own), jax.tree.structure((0, 0))
        full, own = jax.tree.transpose(outer, inner, pairs)
        return dataclasses.replace(layer, own=full), own

    def _fuses(self, layer: LayerState) -> bool:
        """Whether one kernel does what follows attention."""
        return self.policy.rule is not None and self.store.platform != "cpu" and not self.store.tier.fetches and layer.budget is None

    def _after(
        self, layer: LayerState, own: Own, before: Own, slot, found: Attended, used: Bool[Array, "B Hkv C"] | None, kv: KVState, active
    ) -> LayerState:
        """After a token went into `slot` and was attended from: the policy's state, a freed slot where a row is over its budget, and the
        next slot."""
        policy, position, length = self.policy, layer.position, kv.length + 1
        rests, going = active[:, None], active[:, None, None]
        if found.residuals is not None and policy.rule is not None and position is not None:
            budget, recent = policy.kept_tokens(kv.prompt_length), tokens_of(policy.rule.recent, kv.prompt_length)
            seen = Statistics(*found.residuals)
            position, own, following = h2o_evict(position, own, seen, length, budget, recent, active)
            layer = dataclasses.replace(layer, position=position, next_slot=jnp.where(rests, following, slot))
            return layer.with_own(own, before)
        if found.observed or used is not None:
            mass = found.observed[0] if found.observed else None
            after = policy.observe(own, Seen(mass, used, length[:, None, None]))
            own = jax.tree.map(lambda new, old: new if new is old else jnp.where(_over(going, new), new, old), after, own)
        layer = layer.with_own(own, before)
        if position is None:
            return layer
        following = slot + 1
        if policy.evicts_in_decode:
            held = position >= 0
            over = held.sum(-1) > self._may_hold(layer, kv)
            ranked = policy.priority(Slots(position, own, length[:, None, None], kv.prompt_length[:, None, None]))
            victim = lowest(jnp.where(held, ranked, jnp.inf), jnp.where(held, position, -1))
            following = jnp.where(over, victim, following)
            freed = (jnp.arange(held.shape[-1]) == victim[..., None]) & over[..., None] & going
            position = jnp.where(freed, -1, position)
        return dataclasses.replace(layer, position=position, next_slot=jnp.where(rests, following, slot))


# ------------------------------------------------------------------------------------------------------------------------ a staged prompt


def stage(store: Store, observes: Sequence[Observe], shape: CacheShape, prompt_lengths, max_prompt: int, fill: float = 0.0) -> KVState:
    """An empty state in front of `store` that holds a whole prompt, and what attention shows by `observes`, for `commit` to compress."""
    lengths = jnp.asarray(prompt_lengths, jnp.int32)
    batch, slots = lengths.shape[0], store.staging.rounded(max_prompt)

    def layer() -> LayerState:
        observed = tuple(jnp.zeros((batch, shape.num_kv_heads, slots), jnp.float32) for _ in observes)
        return LayerState(store.staging.init(shape, batch, slots, fill), observed=observed)

    return KVState(tuple(layer() for _ in range(shape.num_layers)), jnp.zeros_like(lengths), lengths)


def append(
    store: Store, observes: Sequence[Observe], layer: LayerState, q: Float[Array, "B S H D"], k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"], kv: KVState, valid: Bool[Array, "B S"], first: bool, context: int | None = None,
) -> tuple[Float[Array, "B S H D"], LayerState, tuple[Float[Array, "B Hkv C"], ...]]:  # fmt: skip
    """Puts a prompt, or the next chunk of it, behind what a layer holds in a store that keeps everything, and attends to it all.

    Arguments as of Strategy.prefill. Returns what attention has shown of every slot by `observes`, too; `layer.observed` adds it up.
    """
    batch, size = valid.shape
    slot = kv.length[:, None] + jnp.arange(size, dtype=jnp.int32)
    capacity = layer.pool.capacity(kv.table)
    if first:
        with jax.named_scope("attend"):
            found = attention(q, tokens(k, v), Mask(counted=valid, last=kv.prompt_length - 1), observe=observes)
        with jax.named_scope("write"):
            pool = store.tier.filled(layer.pool, kv.table, k, v, valid)
    else:
        with jax.named_scope("write"):
            pool = store.tier.put(layer.pool, kv.table, slot[..., None], k, v, valid[..., None])
        with jax.named_scope("attend"):
            most = min(context or capacity, capacity)
            mask = Mask(slot, length=kv.length + valid.sum(-1), counted=valid, last=kv.prompt_length - 1)
            found = attention(q, store.tier.keys(pool, kv.table, batch, most), mask, observe=observes)
    masses = tuple(padded_to(x, capacity) for x in found.observed)
    known = jnp.arange(capacity) < kv.length[:, None, None]  # what was observed of other tokens is that of a prompt before
    before = (jnp.where(known, x, 0) for x in layer.observed)
    observed = tuple(what.add(old, new) for what, old, new in zip(observes, before, masses, strict=True)) if layer.observed else ()
    return found.out, dataclasses.replace(layer, pool=pool, observed=observed), masses


# ---------------------------------------------------------------------------------------------------------------------------------- slots


def positions(layer: LayerState, kv: KVState, more: int = 0) -> Int[Array, "B h C"]:
    """True position of the token in each slot, -1 where there is none; `more`: with so many tokens behind `kv.length`."""
    if layer.position is not None:
        return layer.position
    slots = jnp.arange(layer.pool.capacity(kv.table), dtype=jnp.int32)
    return jnp.where(slots < (kv.length + more)[:, None, None], slots, -1)


def marked(slot: Int[Array, "B Hkv K"], capacity: int) -> Bool[Array, "B Hkv C"]:
    """True in these slots; a slot that does not exist marks nothing."""
    batch, heads, _ = slot.shape
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    return jnp.zeros((batch, heads, capacity), bool).at[row, head, slot].set(True, mode="drop")


def _joined(ahead: Ahead, slot: Int[Array, "B h"], k: Float[Array, "B 1 Hkv D"], v: Float[Array, "B 1 Hkv D"], capacity: int) -> Ahead:
    """What was fetched, and the step's own token behind it: in `slot`, which may be fetched too if it was freed."""
    own = jnp.broadcast_to(slot, ahead.slot.shape[:2])
    places = jnp.where(ahead.slot == own[..., None], capacity, ahead.slot).at[..., -1].set(own)

    def put(staged: Array | None, new: Float[Array, "B 1 Hkv D"]) -> Array:
        assert staged is not None
        return staged.at[:, :, -1].set(new[:, 0].astype(staged.dtype))

    return dataclasses.replace(ahead, slot=places, k=put(ahead.k, k), v=put(ahead.v, v))


def like(own: Own, fresh: Own) -> Own:
    """What a policy says of new tokens without the parts that a layer keeps none of (None)."""
    return jax.tree.map(lambda old, new: None if old is None else new, own, fresh, is_leaf=lambda x: x is None)


def highest(
    priority: Float[Array, "B h K"], position: Int[Array, "B h K"], budget: Int[Array, "B h"], capacity: int
) -> Int[Array, "B h C"]:
    """Indices of each kv head's `budget` tokens of highest priority, in the order of their positions; K where a slot stays empty.

    Empty candidates (position -1) are never chosen; between equal priorities the lower position wins.
    """
    size = position.shape[-1]
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), position.shape)
    empty = position < 0
    *_, where, order = jax.lax.sort((empty, -priority.astype(jnp.float32), position, index), num_keys=3)
    rank = jnp.arange(min(capacity, size))
    chosen = (where >= 0)[..., : len(rank)] & (rank < budget[..., None])
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


def padded_to(x: Float[Array, "... K"], capacity: int) -> Float[Array, "... C"]:
    """With zeros behind."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, capacity - x.shape[-1])])


def _taken(x: Array, index: Int[Array, "B h C"]) -> Array:
    """Slots of a policy's array [B, h, ..., S] by their index, zeros where it is S or more."""
    between = (1,) * (x.ndim - 3)
    index = index.reshape(*index.shape[:2], *between, index.shape[-1])
    return jnp.take_along_axis(x, index, axis=-1, mode="fill", fill_value=0)


def _over(rows: Bool[Array, "B 1 1"], x: Array) -> Bool[Array, "B ..."]:
    return rows.reshape(-1, *[1] * (x.ndim - 1))
