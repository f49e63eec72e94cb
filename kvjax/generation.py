"""Offline generation and scoring: a batch of prompts, one strategy, the whole batch from start to end.

For example:

    model = kvjax.load_model("kvjax-4m")
    result = kvjax.generate(model, ["def main():"], strategy="h2o(heavy=0.1,recent=0.1)", max_new_tokens=64)
    logits = kvjax.score(model, token_ids, prompt_len=512, strategy="streaming")
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import checks, host_driven
from kvjax.cache import CacheShape, Decode, KVState, LayerState, Ledger, Prefill, Stage, Strategy, ledger, parse_strategy, stage
from kvjax.errors import InputError, NotFiniteError, SpecError
from kvjax.kernels.attention import Observe
from kvjax.kernels.dispatch import current_device
from kvjax.models import Decoder, Model
from kvjax.models.guide import Guide, guides
from kvjax.runtime.forward import forward, scratch, warm
from kvjax.sampling import NOT_FINITE, Sampling, SamplingArrays, as_arrays, choose, per_row

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray
PrefillMode = Literal["faithful", "bounded"]
PREFILL_MODES = get_args(PrefillMode)


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """How a prompt goes in.

    Attributes:
      chunk: tokens per call; None: the whole prompt at once.
      mode: with chunks, when an evicting policy cuts back: `faithful` once the prompt is complete (same result as one call; needs room
        for the whole prompt meanwhile), `bounded` after every chunk (never more than the budget plus one chunk of one layer).
    """

    chunk: int | None = None
    mode: PrefillMode = "faithful"

    def __post_init__(self):
        if self.chunk is not None and checks.whole("prefill chunk", self.chunk, -checks.LARGEST) < 1:
            raise SpecError(f"prefill chunk of {self.chunk} tokens; give at least 1, or None for the whole prompt at once")
        if self.mode not in PREFILL_MODES:
            raise SpecError(f"unknown prefill mode {self.mode!r}; choose from {', '.join(PREFILL_MODES)}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: generated ids per row, a stop token included when one ended the row.
      texts: the same as text, or None without a tokenizer.
      ledger: the cache's bytes at the end.
      times: seconds since the call at which each decode call's tokens were on the host; the first is the time to first token.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    ledger: Ledger
    times: list[float]


@dataclasses.dataclass(frozen=True)
class Emitted:
    """Tokens that have just become known: [B, n], -1 where a row has finished; `state` is the cache after them."""

    tokens: Int[np.ndarray, "B n"]
    state: KVState


def generate(
    model: Model,
    prompts: Prompts,
    *,
    strategy: str | Strategy = "full",
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seed: int | Sequence[int] | np.ndarray = 0,
    stop_tokens: Sequence[int] | None = None,
    prefill: PrefillPlan = PrefillPlan(),
    steps_per_call: int = 16,
) -> Generation:
    """Generates up to `max_new_tokens` after every prompt.

    Args:
      prompts: texts, or token ids; rows may differ in length.
      strategy: a spec string such as `h2o(heavy=0.1,recent=0.1)`, or a Strategy of your own.
      sampling: how to choose tokens: one for all rows, or one each; rows that sample may stand beside greedy ones.
      seed: row b samples with seed + b, or with entry b of several; whole numbers from 0 that fit 32 bits with a sign.
      stop_tokens: ids that end a row; None: the model's own.
      steps_per_call: decode steps per call of the compiled program; tokens become known that many at a time.

    Lengths are rounded up (`bucket`), so that prompts of similar lengths share compiled programs: up to an eighth of the prompt more is
    computed, and room allocated, than the longest row needs. What a row keeps and generates does not depend on it.

    Raises:
      SpecError: an unknown strategy or option.
      InputError: no prompts, an empty prompt, ids outside the vocabulary, more tokens than the model has positions for, or a number of
        seeds or samplings that is not that of the prompts.
      NotFiniteError: logits that are infinite or no numbers: what is chosen from them means nothing.
    """
    began = time.perf_counter()
    strategy = as_strategy(strategy)
    parts, times = [], []
    for emitted in stream(
        model, prompts, strategy=strategy, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
        stop_tokens=stop_tokens, prefill=prefill, steps_per_call=steps_per_call, buckets=True,
    ):  # fmt: skip
        parts.append(emitted.tokens)
        times.append(time.perf_counter() - began)
    tokens = [[int(t) for t in row if t >= 0] for row in np.concatenate(parts, axis=1)]
    texts = None if model.tokenizer is None else [model.tokenizer.decode(row) for row in tokens]
    return Generation(tokens, texts, ledger(strategy, emitted.state), times)


def stream(
    model: Model,
    prompts: Prompts,
    *,
    strategy: str | Strategy = "full",
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seed: int | Sequence[int] | np.ndarray = 0,
    stop_tokens: Sequence[int] | None = None,
    prefill: PrefillPlan = PrefillPlan(),
    steps_per_call: int = 1,
    reserve: int = 0,
    buckets: bool = False,
) -> Iterator[Emitted]:
    """Like `generate`, but yields tokens as they become known: first the prompt's next token, then `steps_per_call` at a time.

    Args (beyond those of `generate`):
      reserve: allocate room for at least this many new tokens, so that calls of different lengths share compiled programs.
      buckets: round lengths up, as `generate` does; False: to the token.

    The state inside an Emitted is valid until the next one is asked for: the following call takes over its memory.
    """
    strategy = as_strategy(strategy)
    max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, 1, error=InputError)
    steps_per_call = checks.whole("steps_per_call", steps_per_call, 1, error=InputError)
    room = max(max_new_tokens, checks.whole("reserve", reserve, error=InputError))
    tokens, lengths = encode(model, prompts)
    check_positions(model, int(lengths.max()), max_new_tokens)
    stops = tuple(model.config.stop_tokens) if stop_tokens is None else checks.token_set("stop_tokens", stop_tokens)
    arrays = as_arrays(per_row(sampling, len(lengths), "prompts"), checks.seeds(seed, len(lengths)))
    if buckets and prefill.chunk is None:
        longest = min(bucket(tokens.shape[1]), model.config.max_position - room)
        tokens = np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1])))
        room = min(bucket(room), model.config.max_position - longest)
    return _stream(model, tokens, lengths, strategy, max_new_tokens, arrays, stops, prefill, steps_per_call, room)


def _stream(
    model: Model, tokens: Int[np.ndarray, "B N"], lengths: Int[np.ndarray, " B"], strategy: Strategy, max_new_tokens: int,
    sampling: SamplingArrays | None, stops: tuple[int, ...], prefill: PrefillPlan, steps_per_call: int, room: int,
) -> Iterator[Emitted]:  # fmt: skip
    """`stream`, once its arguments are known to be good."""
    sampling = jax.device_put(sampling, model.placement)
    logits, kv = run_prefill(model, strategy, tokens, lengths, room, prefill)
    token = first_token(logits, kv.length, sampling)
    remaining = left_after(jax.device_put(np.full(token.shape, max_new_tokens, np.int32), model.placement), token, stops)
    yield Emitted(_finite(model, strategy, np.asarray(token)[:, None], 0), kv)
    done = 1
    while done < max_new_tokens and bool(np.asarray(remaining).any()):
        steps = min(steps_per_call, max_new_tokens - done)
        if strategy.store.tier.driven:
            kv, token, remaining, out = driven_steps(model, strategy, stops, steps, kv, token, remaining, sampling)
        else:
            arguments = (model.params, kv, token, remaining, sampling, steps)
            kv, token, remaining, out = decode_steps(model.decoder, strategy, stops, steps_per_call, *arguments)
        yield Emitted(_finite(model, strategy, np.asarray(out)[:, :steps], done), kv)
        done += steps


def _finite(model: Model, strategy: Strategy, tokens: Int[np.ndarray, "B n"], before: int) -> Int[np.ndarray, "B n"]:
    """Tokens that were all chosen from finite logits; `before`: how many went before them. Raises NotFiniteError."""
    failed = np.argwhere(tokens == NOT_FINITE)
    if len(failed):
        row, step = failed[0]
        raise NotFiniteError(
            f"{model.config.name} in {model.dtype} under {strategy.describe()}: the logits of prompt {row} are not finite after "
            f"{before + step} generated tokens; its weights are damaged, or too large for this dtype (float32 and bfloat16 reach further)"
        )
    return tokens


def score(
    model: Model,
    token_ids: Int[Array, "B S"] | np.ndarray,
    *,
    prompt_len: int,
    strategy: str | Strategy = "full",
    prefill: PrefillPlan = PrefillPlan(),
    reserve: int = 0,
) -> Float[Array, "B T V"]:
    """Teacher-forced logits through a strategy's own decode path: what fidelity is measured with.

    The first `prompt_len` tokens are prefilled, the rest are fed one by one as if the model had produced them. `reserve`: as in `stream`.

    Returns:
      float32 logits [B, S - prompt_len + 1, V]: entry t predicts token prompt_len + t.
    """
    strategy = as_strategy(strategy)
    prompt_len, reserve = checks.whole("prompt_len", prompt_len, error=InputError), checks.whole("reserve", reserve, error=InputError)
    try:
        token_ids = np.asarray(token_ids)
    except ValueError:
        raise InputError("token_ids has rows of different lengths; give [B, S]") from None
    if not np.issubdtype(token_ids.dtype, np.integer):
        raise InputError(f"token_ids are {token_ids.dtype}; give whole numbers")
    if token_ids.ndim != 2 or not 1 <= prompt_len <= token_ids.shape[1] or not len(token_ids):
        raise InputError(f"token_ids of shape {token_ids.shape} with prompt_len={prompt_len}: give [B, S] with 1 <= prompt_len <= S")
    check_vocabulary(model, token_ids)
    batch, total = token_ids.shape
    check_positions(model, prompt_len, total - prompt_len)
    lengths = np.full(batch, prompt_len, np.int32)
    logits, kv = run_prefill(model, strategy, token_ids[:, :prompt_len], lengths, max(1, total - prompt_len, reserve), prefill)
    following, _ = feed(model, strategy, kv, token_ids[:, prompt_len:])
    return jnp.concatenate([logits[:, None], following], axis=1)


def feed(model: Model, strategy: Strategy, kv: KVState, token_ids: Int[Array, "B T"] | np.ndarray) -> tuple[Float[Array, "B T V"], KVState]:
    """Feeds tokens one by one through the strategy's decode path, whatever the model predicts.

    Takes the memory of `kv` over, as of a donated argument. Returns the float32 logits after every token, and the state behind them.
    """
    tokens = jax.device_put(np.asarray(token_ids, np.int32), model.placement)
    if not strategy.store.tier.driven and model.decoder.stringing == "unroll":
        return _feed(model.decoder, strategy, model.params, kv, tokens)
    everyone = jax.device_put(np.ones(tokens.shape[0], bool), model.placement)
    parts = []
    for t in range(tokens.shape[1]):
        if strategy.store.tier.driven:
            logits, kv = host_driven.decode(model, strategy, kv, tokens[:, t], everyone)
        else:
            logits, kv = forward(model.decoder, model.params, tokens[:, t : t + 1], kv, Decode(everyone, strategy))
        parts.append(logits)
    empty = jnp.zeros((tokens.shape[0], 0, model.config.vocab_size), jnp.float32)
    return jnp.concatenate(parts, axis=1) if parts else empty, kv


def bucket(length: int) -> int:
    """`length` rounded up: to a multiple of 16, and to one of eight steps between powers of two, so by less than an eighth from 128 on."""
    step = max(16, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


def as_strategy(strategy: str | Strategy) -> Strategy:
    """The strategy that is meant, over the store that this machine's device computes with: where every entry point begins."""
    return (parse_strategy(strategy) if isinstance(strategy, str) else strategy).native(current_device())


def encode(model: Model, prompts: Prompts) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, " B"]]:
    """Right-padded token ids and the length of every row."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        one = "one string" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise InputError(f"prompts is {one}; give a list of prompts, for example [prompt]")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise InputError(f"model {model.config.name} has no tokenizer; give token ids instead of text")
            prompt = model.tokenizer.encode(checks.text(f"prompt {i}", prompt))
        row = checks.token_ids(f"prompt {i}", prompt)
        check_vocabulary(model, row)
        rows.append(row)
    if not rows:
        raise InputError("no prompts; give at least one")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, out in zip(rows, tokens, strict=True):
        out[: len(row)] = row
    return tokens, lengths


def check_vocabulary(model: Model, tokens: np.ndarray) -> None:
    size = model.config.vocab_size
    if tokens.size and not (0 <= tokens.min() and tokens.max() < size):
        raise InputError(f"token ids from {tokens.min()} to {tokens.max()}; model {model.config.name} has ids 0 to {size - 1}")


def check_positions(model: Model, prompt: int, new: int) -> None:
    if prompt + new > model.config.max_position:
        limit = model.config.max_position
        raise InputError(f"{prompt} prompt tokens and {new} new ones exceed the {limit} positions of model {model.config.name}")


def cache_shape(model: Model) -> CacheShape:
    config = model.config
    return CacheShape(config.num_layers, config.num_kv_heads, config.group_size, config.head_dim, jnp.dtype(model.dtype))


def run_prefill(
    model: Model,
    strategy: Strategy,
    tokens: Int[np.ndarray, "B N"],
    lengths: Int[np.ndarray, " B"],
    max_new: int,
    plan: PrefillPlan = PrefillPlan(),
) -> tuple[Float[Array, "B V"], KVState]:
    """Allocates the cache and puts the prompts in. Returns the logits of every row's last prompt token."""
    shape, longest = cache_shape(model), tokens.shape[1]
    allocate = partial(_allocated, model, strategy, lengths, longest, max_new)
    if plan.chunk is None or plan.chunk >= longest:
        whole = Prefill(jax.device_put(lengths, model.placement), strategy)
        return prefill(model.decoder, model.params, jax.device_put(tokens, model.placement), allocate(), whole)
    staged = plan.mode == "faithful" and strategy.policy.evicts
    kv = placed(model, stage(strategy.store, strategy.observes, shape, lengths, longest)) if staged else allocate()
    logits = jax.device_put(np.zeros((len(lengths), model.config.vocab_size), np.float32), model.placement)
    for start in range(0, longest, plan.chunk):
        piece = tokens[:, start : start + plan.chunk]
        inside = np.clip(lengths - start, 0, piece.shape[1]).astype(np.int32)
        how: Any = dict(first=start == 0, context=start + piece.shape[1])
        inside = jax.device_put(inside, model.placement)
        staging = Stage(inside, strategy.store.staging, strategy.observes, **how)
        step = staging if staged else Prefill(inside, strategy, **how)
        fresh, kv = prefill(model.decoder, model.params, jax.device_put(piece, model.placement), kv, step)
        ends_here = (lengths > start) & (lengths <= start + plan.chunk)
        logits = jnp.where(ends_here[:, None], fresh, logits)
    return logits, compress(strategy, kv, allocate(), guides(model.params, shape.num_layers)) if staged else kv


def placed[T](model: Model, tree: T) -> T:
    """Arrays where the model's parameters are; those in host memory in the host memory of that place."""

    def place(x):
        in_host_memory = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, model.placement.with_memory_kind(x.sharding.memory_kind) if in_host_memory else model.placement)

    return jax.tree.map(place, tree)


def _allocated(model: Model, strategy: Strategy, lengths, longest: int, max_new: int) -> KVState:
    return placed(model, strategy.init(cache_shape(model), lengths, longest, max_new))


def warm_up(
    model: Model, strategy: Strategy, *, batch: int, prompt_len: int, max_new: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(), stop_tokens: Sequence[int] | None = None,
    prefill: PrefillPlan = PrefillPlan(), steps_per_call: int = 1,
) -> None:  # fmt: skip
    """Compiles all that `stream` runs for a batch of prompts of this length; where layers are called one by one, without computing it."""
    strategy = as_strategy(strategy)
    stops = tuple(int(t) for t in (model.config.stop_tokens if stop_tokens is None else stop_tokens))
    tokens, lengths = np.zeros((batch, prompt_len), np.int32), np.full(batch, prompt_len, np.int32)
    if model.decoder.stringing == "unroll" or (prefill.chunk is not None and prefill.chunk < prompt_len):
        logits, kv = run_prefill(model, strategy, tokens, lengths, max_new, prefill)
    else:
        step = Prefill(jax.device_put(lengths, model.placement), strategy)
        kv = _allocated(model, strategy, lengths, prompt_len, max_new)
        logits = warm(model.decoder, model.params, jax.device_put(tokens, model.placement), kv, step)[:, 0]
        kv = _allocated(model, strategy, lengths, prompt_len, max_new)
    arrays = jax.device_put(as_arrays(per_row(sampling, batch, "rows"), np.arange(batch, dtype=np.int32)), model.placement)
    token = first_token(logits, kv.length, arrays)
    remaining = left_after(jax.device_put(np.full(batch, 3, np.int32), model.placement), token, stops)
    for _ in range(2 if max_new > 1 else 0):
        if strategy.store.tier.driven:
            kv, token, remaining, _ = driven_steps(model, strategy, stops, 1, kv, token, remaining, arrays)
        else:
            arguments = model.params, kv, token, remaining, arrays, 1
            kv, token, remaining, _ = decode_steps(model.decoder, strategy, stops, steps_per_call, *arguments)


@dataclasses.dataclass(frozen=True)
class StagedPrompts:
    """Prompts that went through the model once, for several strategies to start from.

    Attributes:
      observes: what attention was asked to show of every token; a layer of `kv` has it in `observed`, in this order.
      logits: after every row's last prompt token.
      kv: every key and value of the prompts.
      length: tokens of the longest prompt (static shapes follow from it).
    """

    observes: tuple[Observe, ...]
    logits: Float[Array, "B V"]
    kv: KVState
    length: int


def stage_prompts(
    model: Model, strategies: Sequence[Strategy], tokens: Int[np.ndarray, "B N"], lengths: Int[np.ndarray, " B"]
) -> StagedPrompts:
    """Runs prompts through the model once for all `strategies` (results of `as_strategy` that share a device).

    What attention computes in a prompt does not depend on the strategy: they differ in what they keep of it, and in the statistics they
    choose by, which are all gathered in the one pass. `commit` gives what `run_prefill` would have.
    """
    observes = tuple(dict.fromkeys(what for strategy in strategies for what in strategy.observes))
    store, shape, longest = strategies[0].store, cache_shape(model), tokens.shape[1]
    kv = placed(model, stage(store, observes, shape, lengths, longest))
    step = Stage(jax.device_put(np.asarray(lengths, np.int32), model.placement), store.staging, observes)
    logits, kv = prefill(model.decoder, model.params, jax.device_put(tokens, model.placement), kv, step)
    return StagedPrompts(observes, logits, kv, longest)


def commit(model: Model, staged: StagedPrompts, strategy: Strategy, max_new: int) -> KVState:
    """The state of `strategy`, one of those staged for, after the prompts. `staged` stays as it is. `model`: with the strategy's guide."""
    which = [staged.observes.index(what) for what in strategy.observes]
    layers = tuple(dataclasses.replace(layer, observed=tuple(layer.observed[i] for i in which)) for layer in staged.kv.layers)
    empty = _allocated(model, strategy, staged.kv.length, staged.length, max_new)
    return compress(strategy, staged.kv.over(layers), empty, guides(model.params, model.config.num_layers))


def prefill(decoder: Decoder, params, tokens, kv: KVState, step: Prefill | Stage) -> tuple[Float[Array, "B V"], KVState]:
    """Puts a prompt, or a chunk of it, in. Takes the memory of `kv` over. Returns the logits of every row's last valid token."""
    if decoder.stringing == "unroll":
        return unrolled_prefill(decoder, params, tokens, kv, step)
    logits, kv = forward(decoder, params, tokens, kv, step)
    return logits[:, 0], kv


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def unrolled_prefill(decoder: Decoder, params, tokens, kv: KVState, step: Prefill | Stage):
    """`prefill` in one program."""
    result: Any = decoder.apply(params, tokens, kv, step)
    logits, kv = result
    return logits[:, 0], kv


def compress(strategy: Strategy, staged: KVState, empty: KVState, guides: tuple[Guide, ...] = ()) -> KVState:
    """Commits a staged prompt to `empty`, whose memory it takes over, layer by layer (Strategy.commit). `staged` stays as it is."""
    layers = []
    for i, (source, target) in enumerate(zip(staged.layers, empty.layers, strict=True)):
        guide = guides[i] if guides else None
        layers.append(compress_layer(strategy, len(empty.layers), source, target, staged.length, empty.over(()), guide, np.int32(i)))
    length, prompt_length = jnp.copy(staged.length), jnp.copy(staged.prompt_length)  # its own: a state is donated
    return dataclasses.replace(empty, layers=tuple(layers), length=length, prompt_length=prompt_length)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def compress_layer(
    strategy: Strategy, num_layers: int, source: LayerState, target: LayerState, length: Int[Array, " B"], empty: KVState,
    guide: Guide | None, index: Int[Array, ""],
) -> LayerState:  # fmt: skip
    """`compress` of one layer; `empty` without layers."""
    return strategy.commit(source, target, length, empty, guide, index=index, num_layers=num_layers)


@jax.jit
def first_token(logits, positions, sampling: SamplingArrays | None = None) -> Int[Array, " B"]:
    return choose(logits, positions, sampling)


def left_after(remaining: Int[Array, " B"], token: Int[Array, " B"], stops: tuple[int, ...]) -> Int[Array, " B"]:
    """Tokens a row still wants after it produced `token`."""
    stopped = jnp.isin(token, jnp.asarray(stops, jnp.int32)) if stops else jnp.zeros_like(token, bool)
    return jnp.where(stopped | (token == NOT_FINITE), 0, jnp.maximum(remaining - 1, 0))


def decode_steps(
    decoder: Decoder,
    strategy: Strategy,
    stops: tuple[int, ...],
    most: int,
    params,
    kv: KVState,
    token: Int[Array, " B"],
    remaining: Int[Array, " B"],
    sampling: SamplingArrays | None = None,
    steps: int | None = None,
) -> tuple[KVState, Int[Array, " B"], Int[Array, " B"], Int[Array, "B most"]]:
    """Up to `most` tokens for every row that still wants some, with the cache updated in place; `steps`: only so many this time.

    Takes the memory of `kv`, `token` and `remaining` over. One program serves all `steps`; without `sampling` (all rows greedy) it is one
    that does not draw, and with it one that serves every setting.

    Returns the state, the last token of each row, what each row still wants, and the tokens (-1 where a row had finished).
    """
    steps = most if steps is None else steps
    if decoder.stringing == "unroll":
        return unrolled_steps(decoder, strategy, stops, most, params, kv, token, remaining, sampling, np.int32(steps))
    out = []
    for _ in range(steps):
        step, column = _decode_step(strategy, token, remaining)
        logits, kv = forward(decoder, params, column, kv, step)
        token, remaining, fresh = _next_token(stops, logits, token, remaining, kv.length, sampling)
        out.append(fresh)
    return kv, token, remaining, out[0][:, None] if most == 1 else jnp.stack(out + [out[-1]] * (most - steps), axis=1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6, 7))
def unrolled_steps(
    decoder: Decoder, strategy: Strategy, stops: tuple[int, ...], most: int, params, kv: KVState,
    token: Int[Array, " B"], remaining: Int[Array, " B"], sampling: SamplingArrays | None, steps: Int[Array, ""],
) -> tuple[KVState, Int[Array, " B"], Int[Array, " B"], Int[Array, "B most"]]:  # fmt: skip
    """`decode_steps` in one program, which ends early when no row wants more."""

    def one(kv, token, remaining):
        active = remaining > 0
        result: Any = decoder.apply(params, token[:, None], kv, Decode(active, strategy))
        logits, kv = result
        token = jnp.where(active, choose(logits[:, 0], kv.length, sampling), token)
        return kv, token, left_after(remaining, token, stops), jnp.where(active, token, -1)

    if most == 1:  # no loop around a host store: XLA does not move host memory through loops everywhere
        *carry, fresh = one(kv, token, remaining)
        return *carry, fresh[:, None]  # type: ignore[return-value]

    def wanted(carry):
        i, _, _, remaining, _ = carry
        return (i < steps) & (remaining > 0).any()

    def turn(carry):
        i, kv, token, remaining, out = carry
        kv, token, remaining, fresh = one(kv, token, remaining)
        return i + 1, kv, token, remaining, out.at[:, i].set(fresh)

    out = jnp.full((token.shape[0], most), -1, jnp.int32)
    _, kv, token, remaining, out = jax.lax.while_loop(wanted, turn, (jnp.int32(0), kv, token, remaining, out))
    return kv, token, remaining, out


def driven_steps(
    model: Model, strategy: Strategy, stops: tuple[int, ...], steps: int, kv: KVState, token: Int[Array, " B"],
    remaining: Int[Array, " B"], sampling: SamplingArrays | None = None,
) -> tuple[KVState, Int[Array, " B"], Int[Array, " B"], Int[Array, "B steps"]]:  # fmt: skip
    """`decode_steps` for a host that drives the layers."""
    out = []
    for _ in range(steps):
        logits, kv = host_driven.decode(model, strategy, kv, token, remaining > 0)
        token, remaining, fresh = _next_token(stops, logits, token, remaining, kv.length, sampling)
        out.append(fresh)
    return kv, token, remaining, jnp.stack(out, axis=1)


@partial(jax.jit, static_argnums=0)
def _decode_step(strategy: Strategy, token: Int[Array, " B"], remaining: Int[Array, " B"]) -> tuple[Decode, Int[Array, "B 1"]]:
    return Decode(remaining > 0, strategy), token[:, None]


@partial(jax.jit, static_argnums=0)
def _next_token(stops: tuple[int, ...], logits, token, remaining, length, sampling: SamplingArrays | None):
    active = remaining > 0
    token = jnp.where(active, choose(logits[:, 0], length, sampling), token)
    return token, left_after(remaining, token, stops), jnp.where(active, token, -1)


def decode_program(model: Model, strategy: Strategy, sampling: Sampling, kv: KVState, steps: int = 1) -> jax.stages.Compiled:
    """The compiled program of a decode step, unrolled, for states like `kv`: its memory analysis, its text.

    Takes shapes alone, so `kv` may be in use.
    """
    batch = kv.length.shape[0]
    row, count = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    abstract = jax.tree.map(jax.typeof, kv)  # which tells host memory from the device's
    arrays = as_arrays([sampling] * batch, np.zeros(batch, np.int32))
    return unrolled_steps.lower(model.decoder, strategy, (), steps, model.params, abstract, row, row, arrays, count).compile()


def decode_scratch(model: Model, strategy: Strategy, sampling: Sampling, kv: KVState) -> int | None:
    """Bytes a decode step needs beside its arguments and results, as it is run here; None where XLA does not say. Compiles it once more."""
    if model.decoder.stringing == "unroll":
        analysis = decode_program(model, strategy, sampling, kv).memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes
    batch = kv.length.shape[0]
    step = Decode(jax.ShapeDtypeStruct((batch,), bool), strategy)  # type: ignore[arg-type]
    return scratch(model.decoder, model.params, jax.ShapeDtypeStruct((batch, 1), jnp.int32), kv, step)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _feed(decoder: Decoder, strategy: Strategy, params, kv: KVState, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], KVState]:
    everyone: Bool[Array, " B"] = jnp.ones(tokens.shape[0], bool)

    def one(kv, token):
        result: Any = decoder.apply(params, token[:, None], kv, Decode(everyone, strategy))
        logits, kv = result
        return kv, logits[:, 0]

    kv, logits = jax.lax.scan(one, kv, tokens.T)
    return logits.swapaxes(0, 1), kv
