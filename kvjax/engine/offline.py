"""Offline measurement: whole batches from start to end under one strategy, timed, weighed and compared with the full cache."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.cache import Full, KVState, Ledger, Strategy, ledger
from kvjax.cache.identity import Identity
from kvjax.engine.metrics import Timeline, summarise
from kvjax.errors import NotFiniteError
from kvjax.generation import (
    PrefillPlan,
    as_strategy,
    check_positions,
    check_vocabulary,
    commit,
    decode_scratch,
    feed,
    run_prefill,
    stage_prompts,
    stream,
    warm_up,
)  # fmt: skip
from kvjax.models import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.quality import fidelity, recall
from kvjax.quality.fidelity import Estimate
from kvjax.quality.speculation import Speculation, audited_feed, speculation_of
from kvjax.quality.tasks.frame import Frame
from kvjax.quality.tasks.texts import passage
from kvjax.sampling import Sampling

Progress = Callable[[str], None]
"""Told after every batch what was done."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts of one length, and what is fed after them to see what the cache still knows.

    Attributes:
      kind: `recall`, `text` or `random`.
      prompts: token ids.
      continuation: token ids; in a recall workload the questions with their answers.
      tests: what was asked, per prompt; empty unless `recall`.
    """

    kind: str
    prompts: Int[np.ndarray, "R N"]
    continuation: Int[np.ndarray, "R T"]
    tests: tuple[recall.RecallTest, ...] = ()


def make_workload(model: Model, num_prompts: int, input_len: int, seed: int, num_facts: int = 8, continuation_len: int = 64) -> Workload:
    """The workload that suits a model: recall documents for a byte tokenizer, prose for another, random ids without one.

    Raises InputError when `input_len` is too short for the facts.
    """
    rng = np.random.default_rng(seed)
    if isinstance(model.tokenizer, ByteTokenizer):
        tests = tuple(recall.recall_test(rng, input_len, num_facts) for _ in range(num_prompts))
        prompts, continuation = (np.stack([getattr(t, part) for t in tests]).astype(np.int32) for part in ("prompt", "continuation"))
        return Workload("recall", prompts, continuation, tests)
    total = input_len + continuation_len
    if model.tokenizer is None:
        rows = rng.integers(0, model.config.vocab_size, (num_prompts, total)).astype(np.int32)
        return Workload("random", rows[:, :input_len], rows[:, input_len:])
    frame = Frame(model.tokenizer)
    rows = np.asarray([passage(frame, "prose", rng, total) for _ in range(num_prompts)], np.int32)
    return Workload("text", rows[:, :input_len], rows[:, input_len:])


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a strategy says on a workload's continuation, fed token by token through its decode path.

    Attributes:
      fidelity: against the full cache, by name.
      recall: share of questions answered, by the depth of the fact; empty unless the workload asks.
      per_prompt: of every prompt: `recall` (share of its questions answered), `kld` and `nll_delta` (means over its tokens, nats).
      speculation: how good the guesses of a policy that speculates are, on the first batch; None for another.
    """

    fidelity: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    recall: dict[float, float] = dataclasses.field(default_factory=dict)
    per_prompt: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    speculation: Speculation | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One strategy on one workload.

    Attributes:
      identity: the strategy.
      timelines: one per request; a batch's requests start together, when the batch does.
      latency: the summary of the timelines (kvjax.engine.metrics).
      ledger: of the cache of the last batch, when its last token was written.
      samples: generated token ids per request.
      quality: what `judge` says of the strategy; empty if nobody asked.
    """

    identity: Identity
    timelines: tuple[Timeline, ...]
    latency: dict[str, float | int]
    ledger: Ledger
    samples: list[list[int]]
    quality: Quality = Quality()

    @property
    def strategy(self) -> str:
        """The spec string."""
        return self.identity.label

    @property
    def fidelity(self) -> dict[str, Estimate]:
        return self.quality.fidelity

    @property
    def recall(self) -> dict[float, float]:
        return self.quality.recall

    @property
    def per_prompt(self) -> dict[str, list[float]]:
        return self.quality.per_prompt

    @property
    def speculation(self) -> Speculation | None:
        return self.quality.speculation

    @property
    def recall_mean(self) -> float | None:
        return float(np.mean(list(self.recall.values()))) if self.recall else None


def batches(workload: Workload, batch_size: int) -> Iterator[tuple[slice, Int[np.ndarray, "B S"], int]]:
    """Rows of prompt and continuation in batches of one size; the last is filled up with copies of its last row.

    Yields the slice of requests, the tokens, and how many rows are real.
    """
    whole = np.concatenate([workload.prompts, workload.continuation], axis=1)
    for start in range(0, len(whole), batch_size):
        rows = whole[start : start + batch_size]
        real = len(rows)
        rows = np.concatenate([rows, np.repeat(rows[-1:], min(batch_size, len(whole)) - real, axis=0)])
        yield slice(start, start + real), rows, real


def judge(
    contenders: Sequence[tuple[Model, Strategy]],
    workload: Workload,
    *,
    batch_size: int,
    reserve: int = 0,
    plan: PrefillPlan = PrefillPlan(),
    seed: int = 0,
    audits: bool = True,
    progress: Progress = lambda what: None,
) -> list[Quality]:
    """Feeds the continuation of every prompt, teacher-forced, and compares with what the full cache predicts.

    A prompt goes through the model once for all contenders, unless it goes in by chunks. The guesses of a policy that speculates are judged
    on the first batch alone: every step of every row gives many of them.

    Args:
      contenders: strategies, each with the model as it needs it (kvjax.calibrated); the same model but for the guide.
      reserve: allocate room for at least this many new tokens, to share programs with who generates as many.
      audits: whether guesses are judged, where there are any.

    Raises NotFiniteError for logits that mean nothing.
    """
    prompt_len, new = workload.prompts.shape[1], max(workload.continuation.shape[1], reserve, 1)
    contenders = [(model, as_strategy(_on_device(strategy))) for model, strategy in contenders]
    for model, _ in contenders:
        check_vocabulary(model, workload.prompts)
        check_positions(model, prompt_len, new)
    full = as_strategy(Strategy(Full()))
    judged = [(contenders[0][0], full), *contenders]
    apart = plan.chunk is not None and plan.chunk < prompt_len
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in contenders]
    hits: list[list[np.ndarray]] = [[] for _ in contenders]
    guesses: list[Speculation | None] = [None] * len(contenders)
    for where, rows, real in batches(workload, batch_size):
        lengths = np.full(len(rows), prompt_len, np.int32)
        prompts, targets = rows[:, :prompt_len], rows[:, prompt_len:]
        staged = None if apart else stage_prompts(judged[0][0], [strategy for _, strategy in judged], prompts, lengths)
        progress("prompts")
        expected = None
        for index, (model, strategy) in enumerate(judged, -1):
            if staged is None:
                first, kv = run_prefill(model, strategy, prompts, lengths, new, plan)
            else:
                first, kv = staged.logits, commit(model, staged, strategy, new)
            following = targets[:, :-1]
            if index >= 0 and audits and where.start == 0 and strategy.policy.guesses:
                after, _, measures = audited_feed(model, strategy, kv, following)
                guesses[index] = speculation_of(measures)
            else:
                after, _ = feed(model, strategy, kv, following)
            logits = _finite(model, strategy, jnp.concatenate([first[:, None], after], axis=1))
            if index < 0:
                expected = logits
                continue
            parts[index].append(tuple(np.asarray(x)[:real] for x in fidelity.compare(expected, logits, targets)))
            if workload.tests:
                host = np.asarray(logits)
                hits[index] += [recall.answered(host[i], test) for i, test in enumerate(workload.tests[where])]
            progress(strategy.describe())
    return [_quality(workload, *each, seed) for each in zip(parts, hits, guesses, strict=True)]


def _finite(model: Model, strategy: Strategy, logits: jax.Array) -> jax.Array:
    """The logits. Raises NotFiniteError."""
    if not bool(jnp.isfinite(logits).all()):
        raise NotFiniteError(
            f"{model.config.name} in {model.dtype} under {strategy.describe()}: logits are not finite, so there is nothing to compare; its "
            "weights are damaged, or too large for this dtype (float32 and bfloat16 reach further)"
        )
    return logits


def _on_device(strategy: Strategy) -> Strategy:
    """The strategy with a host store's pool in device memory, where what it reads is the same: an audit needs all keys there."""
    return Strategy(strategy.policy, strategy.store.on_device())


def _quality(
    workload: Workload, parts: list[tuple[np.ndarray, ...]], hits: list[np.ndarray], guesses: Speculation | None, seed: int
) -> Quality:
    compared = fidelity.Comparison(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    per_prompt = {"recall": [float(hit.mean()) for hit in hits]} if hits else {}
    per_prompt |= {"kld": compared.kld.mean(1).tolist(), "nll_delta": compared.nll_delta.mean(1).tolist()}
    return Quality(compared.summary(seed), _by_depth(workload, hits), per_prompt, guesses)


def measure(
    model: Model,
    strategy: Strategy,
    workload: Workload,
    *,
    batch_size: int,
    output_len: int,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    plan: PrefillPlan = PrefillPlan(),
    quality: Quality = Quality(),
    weighs: bool = True,
    progress: Progress = lambda what: None,
) -> Measurement:
    """Generates after every prompt of a workload under a strategy, timed, batch by batch.

    Every request generates `output_len` tokens whatever they are; request i samples with seed + i. Programs are compiled before anything is
    timed. Raises NotFiniteError for logits that mean nothing.

    Args:
      quality: what `judge` says of the strategy, to stand beside the times.
      weighs: whether the scratch of a decode step goes into the ledger, which takes another compilation of its program.
    """
    strategy = as_strategy(strategy)
    prompt_len, longest = workload.prompts.shape[1], max(output_len, workload.continuation.shape[1])
    check_vocabulary(model, workload.prompts)
    size = min(batch_size, len(workload.prompts))
    warm_up(model, strategy, batch=size, prompt_len=prompt_len, max_new=longest, sampling=sampling, stop_tokens=(), prefill=plan)
    progress("compiled")
    timelines: list[Timeline] = []
    samples: list[list[int]] = []
    busy = 0.0
    for where, rows, real in batches(workload, batch_size):
        seeds = seed + np.minimum(np.arange(where.start, where.start + len(rows)), where.stop - 1)  # a request's own, whatever its batch
        start = time.perf_counter()
        parts, times = [], []
        with jax.profiler.TraceAnnotation("generate"):
            for emitted in stream(
                model, rows[:, :prompt_len], strategy=strategy, max_new_tokens=output_len, sampling=sampling, seed=seeds,
                stop_tokens=(), prefill=plan, reserve=longest,
            ):  # fmt: skip
                parts.append(emitted.tokens)
                times.append(time.perf_counter())
        busy += times[-1] - start
        timelines += [Timeline(start, tuple(times), prompt_len)] * real
        samples += np.concatenate(parts, axis=1)[:real].tolist()
        progress("generated")
    transient = None
    if (
        weighs and output_len > 1 and not strategy.store.tier.driven
    ):  # the scratch of a step, where it is not the host that drives the layers
        transient = _scratch(model, strategy, sampling, emitted.state)
    return Measurement(
        strategy.identity(),
        tuple(timelines),
        summarise(timelines, busy),
        ledger(strategy, emitted.state, transient),
        samples,
        quality,
    )


_scratches: dict[Any, int | None] = {}
"""Of decode programs seen before: to ask is to compile once more."""


def _scratch(model: Model, strategy: Strategy, sampling: Sampling, state: KVState) -> int | None:
    """Bytes a decode step needs beside its arguments and results; None where XLA does not say."""
    shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(state))
    key = (model.decoder, strategy, sampling.temperature > 0, jax.tree.structure(state), shapes)
    if key not in _scratches:
        _scratches[key] = decode_scratch(model, strategy, sampling, state)
    return _scratches[key]


def steps_of(workload: Workload, batch_size: int) -> int:
    """How often `measure` reports progress; `judge` does so once a batch, and once a batch for every contender."""
    return 1 + sum(1 for _ in batches(workload, batch_size))


def _by_depth(workload: Workload, hits: list[np.ndarray]) -> dict[float, float]:
    """Share answered per depth, shallowest first."""
    found: dict[float, list[bool]] = {}
    for test, hit in zip(workload.tests, hits, strict=True):
        for depth, right in zip(test.depths, hit, strict=True):
            found.setdefault(round(float(depth), 4), []).append(bool(right))
    return {depth: float(np.mean(found[depth])) for depth in sorted(found)}
