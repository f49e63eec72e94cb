"""How good a policy's guesses are (InfiniGen): what a layer was given to read, against what its real queries would have chosen.

    found = audit(calibrated(model, strategy), strategy, token_ids, prompt_len=512)
    found.overall("precision")

A continuation is fed through the strategy's own decode path, mistakes included. Whenever a layer for which tokens were guessed attends,
its real queries meet the whole pool, and its policy is asked to choose once more, with the true logits for its guess. So the truth ranks
tokens as the policy does, the query heads of a kv head joined by its own rule, and a guess that is right scores 1 whatever that rule is;
how good the rule is shows in the attention mass.

  precision     share of the tokens guessed and fetched, m of them, that are among the true top m. With as many on either side it is their
                recall, too.
  recall        share of the true top k that was fetched, where k is what the policy would count without its budget: for InfiniGen the
                tokens within alpha of the true maximum, mean over the kv heads. Falls short by wrong guesses and by m < k alike.
                Tokens that the policy reads whatever it guesses (sinks, the recent ones) are left out of both shares, on either side.
  mass_covered  true attention probability of what is read, the tokens fetched and the newest one; mean over query heads.
  fetched       tokens per kv head, those that are always read included.
  near          k, likewise.

All are means over kv heads (mass_covered: query heads). Layers that read everything count nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import Ahead, Decode, KVState, LayerState, Strategy
from kvjax.cache.strategy import marked, positions
from kvjax.errors import InputError, SpecError
from kvjax.generation import PrefillPlan, as_strategy, check_positions, check_vocabulary, run_prefill
from kvjax.kernels.attention import NEG_INF
from kvjax.models import Decoder, Model
from kvjax.quality.fidelity import Estimate
from kvjax.runtime.forward import forward

MEASURES = ("precision", "recall", "mass_covered", "fetched", "near")

Measures = Mapping[str, Float[Array, " B"]]
"""MEASURES of one layer in one step."""


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What `audit` found: L layers, R rows, T steps.

    Attributes:
      layers: those that tokens were guessed for.
      values: of each of MEASURES.
    """

    layers: tuple[int, ...]
    values: Mapping[str, Float[np.ndarray, "L R T"]]

    def overall(self, measure: str) -> Estimate:
        """Mean over layers, rows and steps."""
        return _mean(self.values[measure].mean((0, 2)))

    def by_layer(self, measure: str) -> dict[int, Estimate]:
        """Mean over rows and steps."""
        return {layer: _mean(values.mean(1)) for layer, values in zip(self.layers, self.values[measure], strict=True)}

    def record(self) -> dict[str, float | None]:
        """Flat keys for records: `speculation_<measure>`, with `_se` and `_layer_<i>`; empty when no layer was guessed for."""
        flat: dict[str, float | None] = {}
        for measure in MEASURES if self.layers else ():
            key, whole = f"speculation_{measure}", self.overall(measure)
            flat |= {key: whole.value, f"{key}_se": whole.error}
            flat |= {f"{key}_layer_{layer}": estimate.value for layer, estimate in self.by_layer(measure).items()}
        return flat


def audit(
    model: Model,
    strategy: Strategy,
    token_ids: Int[Array | np.ndarray, "B S"],
    *,
    prompt_len: int,
    prefill: PrefillPlan = PrefillPlan(),
) -> Speculation:
    """Prefills the first `prompt_len` tokens of every row, feeds the rest one by one, and judges each guess.

    The pool stands in device memory meanwhile, whatever the strategy's transfer: guesses do not depend on it, and the truth needs all keys.

    Args:
      model: calibrated for this strategy (kvjax.calibrated).

    Raises:
      SpecError: a policy that does not speculate, or a model without a guide.
      InputError: nothing after the prompt, ids outside the vocabulary, or more tokens than the model has positions for.
    """
    if not strategy.policy.guesses:
        raise SpecError(f"{strategy.describe()} guesses nothing; an audit takes a strategy that fetches what it guesses, such as infinigen")
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 2 or not 1 <= prompt_len < token_ids.shape[1]:
        raise InputError(f"token_ids of shape {token_ids.shape} with prompt_len={prompt_len}: give [B, S] with 1 <= prompt_len < S")
    check_vocabulary(model, token_ids)
    batch, total = token_ids.shape
    check_positions(model, prompt_len, total - prompt_len)
    strategy = as_strategy(Strategy(strategy.policy, strategy.store.on_device()))
    lengths = np.full(batch, prompt_len, np.int32)
    _, kv = run_prefill(model, strategy, token_ids[:, :prompt_len], lengths, total - prompt_len, prefill)
    return speculation_of(audited_feed(model, strategy, kv, token_ids[:, prompt_len:])[2])


def audit_some(
    model: Model, strategy: Strategy, sequences: Sequence[tuple[Int[np.ndarray, " N"], Sequence[int]]], most: int = 4
) -> Speculation | None:
    """An audit of some of what was served: prompts with what was generated after them, fed once more.

    The longest sequences serve, `most` of them, cut to the length of the shortest of those; None where none has a token after its prompt.
    """
    usable = sorted((x for x in sequences if len(x[1]) > 0), key=lambda x: len(x[0]) + len(x[1]), reverse=True)[:most]
    if not usable:
        return None
    total = min(len(prompt) + len(tokens) for prompt, tokens in usable)
    rows = np.stack([np.concatenate([prompt, tokens])[:total] for prompt, tokens in usable]).astype(np.int32)
    return audit(model, strategy, rows, prompt_len=min(min(len(prompt) for prompt, _ in usable), total - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AuditedLayer:
    """A layer's cache, and how good the guess for it was in the step at hand (None: nothing was guessed, or not yet)."""

    state: LayerState
    measures: Measures | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Audited:
    """The KV state of a step under audit: the strategy's own, layer by layer with what the audit says of it."""

    kv: KVState
    layers: tuple[AuditedLayer, ...]

    def over(self, layers: tuple[AuditedLayer, ...]) -> "Audited":
        """The same rows over other layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def ahead(self) -> Ahead | None:
        """What the next layer is going to read."""
        return self.kv.ahead

    def handed(self, ahead: Ahead | None) -> "Audited":
        """The audit with that."""
        return dataclasses.replace(self, kv=self.kv.handed(ahead))

    @property
    def state(self) -> KVState:
        """The strategy's own state."""
        return self.kv.over(tuple(layer.state for layer in self.layers))

    def after(self, state: KVState) -> "Audited":
        """The audit with the strategy's state moved on."""
        layers = (dataclasses.replace(old, state=new) for old, new in zip(self.layers, state.layers, strict=True))
        return Audited(state.over(()), tuple(layers))

    @staticmethod
    def start(state: KVState) -> "Audited":
        """Nothing judged yet."""
        return Audited(state.over(()), tuple(AuditedLayer(layer) for layer in state.layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Audit:
    """A step (kvjax.models.decoder.Step): a decode step that compares what was fetched for a layer with the truth before it attends."""

    decode: Decode

    def positions(self, audited: Audited, num_tokens: int) -> Int[Array, "B 1"]:
        return self.decode.positions(audited.kv, num_tokens)

    def look_ahead(self, layer: int, queries, audited: Audited) -> Ahead | None:
        return self.decode.look_ahead(layer, queries, audited.state)

    def attend(self, layer: int, q, k, v, audited: Audited, guide=None, ahead=None):
        state, strategy = audited.state, self.decode.strategy
        cached = state.layer(layer)
        if state.ahead is not None and strategy.policy.selects_by(cached.own):
            measures = compare(strategy, cached, state.ahead, q[:, 0], k[:, 0], state)
            layers = list(audited.layers)
            layers[layer] = dataclasses.replace(layers[layer], measures=measures)
            audited = audited.over(tuple(layers))
        out, state = self.decode.attend(layer, q, k, v, state, guide, ahead)
        return out, audited.after(state)

    def hidden(self, x: Float[Array, "B 1 M"]) -> Float[Array, "B 1 M"]:
        return self.decode.hidden(x)

    def finish(self, audited: Audited, num_tokens: int) -> Audited:
        return audited.after(self.decode.finish(audited.state, num_tokens))


def speculation_of(measures: Mapping[int, Mapping[str, Float[Array, "T B"]]]) -> Speculation:
    """What `audited_feed` measured, in one piece."""
    values = {name: np.stack([np.asarray(measures[i][name]).T for i in measures]) if measures else np.zeros((0, 0, 0)) for name in MEASURES}
    return Speculation(tuple(measures), values)


def audited_feed(
    model: Model, strategy: Strategy, kv: KVState, token_ids: Int[Array, "B T"] | np.ndarray
) -> tuple[Float[Array, "B T V"], KVState, dict[int, Mapping[str, Float[Array, "T B"]]]]:
    """`kvjax.generation.feed` under audit: logits, state, and MEASURES by layer, [T, B] each. Takes the memory of `kv` over."""
    tokens = jnp.asarray(token_ids, jnp.int32)
    if model.decoder.stringing == "unroll":
        return _audited_feed(model.decoder, strategy, model.params, kv, tokens)
    step = Audit(Decode(jnp.ones(tokens.shape[0], bool), strategy))
    logits, steps = [], []
    for t in range(tokens.shape[1]):
        after, audited = forward(model.decoder, model.params, tokens[:, t : t + 1], Audited.start(kv), step)
        kv = audited.state
        logits.append(after[:, 0])
        steps.append(_measures(audited))
    return jnp.stack(logits, axis=1), kv, jax.tree.map(lambda *x: jnp.stack(x), *steps)


def _measures(audited: Audited) -> dict[int, Measures]:
    """MEASURES of every layer that was guessed for."""
    return {i: layer.measures for i, layer in enumerate(audited.layers) if layer.measures is not None}


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _audited_feed(decoder: Decoder, strategy: Strategy, params, kv: KVState, tokens: Int[Array, "B T"]):
    step = Audit(Decode(jnp.ones(tokens.shape[0], bool), strategy))

    def one(kv, token):
        logits, audited = forward(decoder, params, token[:, None], Audited.start(kv), step)
        return audited.state, (logits[:, 0], _measures(audited))

    kv, (logits, measures) = jax.lax.scan(one, kv, tokens.T)
    return logits.swapaxes(0, 1), kv, measures  # the state is returned so that the donated memory is reused


def compare(
    strategy: Strategy, layer: LayerState, ahead: Ahead, q: Float[Array, "B H D"], k: Float[Array, "B Hkv D"], kv: KVState
) -> Measures:
    """What is read of a layer against what these queries would have chosen; `k` are the keys of the newest token, not stored yet."""
    batch, _, dim = q.shape
    keys, _ = strategy.store.tokens(layer.pool, kv.table, batch)
    capacity, heads = keys.shape[1:3]
    grouped = (q * dim**-0.5).astype(keys.dtype).reshape(batch, heads, -1, dim)
    logits = jnp.einsum("bngd,bcnd->bngc", grouped, keys, preferred_element_type=jnp.float32)
    newest = jnp.einsum("bngd,bnd->bng", grouped, k.astype(keys.dtype), preferred_element_type=jnp.float32)
    position = positions(layer, kv)
    held = position >= 0

    fetched = marked(ahead.slot, capacity)
    policy = strategy.policy.unbounded()
    slot, near = policy.choose(logits, position, kv.length, kv.prompt_length)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    aside = policy.always_read(position, kv.length)
    rank = jnp.full(fetched.shape, capacity).at[row, head, slot].set(jnp.arange(slot.shape[-1])) - aside.sum(-1)[..., None]
    guessed = fetched & ~aside

    def share_of_top(count: Int[Array, "B h"]) -> Float[Array, " B"]:
        return ((guessed & (rank < count[..., None])).sum(-1) / jnp.maximum(count, 1)).mean(-1)

    true = jnp.concatenate([jnp.where(held[:, :, None], logits, NEG_INF), newest[..., None]], axis=-1)
    read = jnp.pad(fetched, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    mass = (jax.nn.softmax(true) * read[:, :, None]).sum(-1)
    return {
        "precision": share_of_top(guessed.sum(-1)),
        "recall": share_of_top(near[:, None] - aside.sum(-1)),
        "mass_covered": mass.mean((1, 2)),
        "fetched": fetched.sum(-1).mean(-1),
        "near": near.astype(jnp.float32),
    }


def _mean(per_row: Float[np.ndarray, " R"]) -> Estimate:
    rows = len(per_row)
    return Estimate(float(per_row.mean()), float(per_row.std(ddof=1) / np.sqrt(rows)) if rows > 1 else None)
