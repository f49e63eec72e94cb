"""Offline measurement: whole batches from start to end under one strategy, timed, weighed and compared with the full cache."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kvjax.cache import KVState, Ledger, Strategy, ledger
from kvjax.engine.metrics import Timeline, summarise
from kvjax.errors import InputError
from kvjax.generation import PrefillPlan, as_strategy, check_vocabulary, decode_scratch, score, stream
from kvjax.host_driven import is_driven
from kvjax.models import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.quality import fidelity, recall
from kvjax.quality.speculation import Speculation, audit
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
    """The workload that suits a model: recall documents for a byte tokenizer, Python source for another, random ids without one.

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
    rows = np.stack([_text_row(model, rng, total) for _ in range(num_prompts)])
    return Workload("text", rows[:, :input_len], rows[:, input_len:])


def _text_row(model: Model, rng: np.random.Generator, total: int) -> Int[np.ndarray, " S"]:
    """`total` tokens of Python source."""
    size = 8 * total
    while size <= 512 * total:
        ids = model.tokenizer.encode(recall.filler(rng, size, held_out=True).decode(errors="ignore"))  # type: ignore[union-attr]
        if len(ids) >= total:
            return np.asarray(ids[:total], np.int32)
        size *= 2
    raise InputError(f"the tokenizer of {model.config.name} makes fewer than {total} tokens of {size} bytes of Python source")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One strategy on one workload.

    Attributes:
      store: where the cache stood.
      timelines: one per request; a batch's requests start together, when the batch does.
      latency: the summary of the timelines (kvjax.engine.metrics).
      ledger: of the cache of the last batch, when its last token was written.
      fidelity: against the full cache, by name; empty if not asked for.
      recall: share of questions answered, by the depth of the fact; empty unless the workload asks.
      samples: generated token ids per request.
      transfer: how tokens come from a host store; None for another.
      speculation: how good the guesses of a policy that speculates are; None for another, or if that was not asked for.
      per_prompt: quality of every prompt: `recall` (share of its questions answered), `kld` and `nll_delta` (means over its tokens, nats).
    """

    strategy: str
    store: str
    timelines: tuple[Timeline, ...]
    latency: dict[str, float | int]
    ledger: Ledger
    fidelity: dict[str, fidelity.Estimate]
    recall: dict[float, float]
    samples: list[list[int]]
    transfer: str | None = None
    speculation: Speculation | None = None
    per_prompt: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def recall_mean(self) -> float | None:
        return float(np.mean(list(self.recall.values()))) if self.recall else None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The full cache's logits on the continuation, batch by batch."""

    logits: tuple[jax.Array, ...]


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


def reference(model: Model, full: Strategy, workload: Workload, batch_size: int, output_len: int, plan: PrefillPlan) -> Reference:
    """What the full cache predicts on the continuation: the yardstick of `measure`."""
    prompt_len = workload.prompts.shape[1]
    return Reference(
        tuple(
            score(model, rows, prompt_len=prompt_len, strategy=full, prefill=plan, reserve=output_len)[:, :-1]
            for _, rows, _ in batches(workload, batch_size)
        )
    )


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
    against: Reference | None = None,
    audits: bool = True,
    weighs: bool = True,
    progress: Progress = lambda what: None,
) -> Measurement:
    """Runs a workload under a strategy: generation for the times, then the continuation, teacher-forced, for the quality.

    The guesses of a policy that speculates are judged on the first batch alone: every step of every row gives many of them.
    Every request generates `output_len` tokens whatever they are. A first, untimed batch compiles the programs.

    Args:
      against: the full cache's logits; None: no fidelity.
      audits: whether guesses are judged, where there are any and quality is asked for.
      weighs: whether the scratch of a decode step goes into the ledger, which takes another compilation of its program.
    """
    strategy = as_strategy(strategy)
    prompt_len, longest = workload.prompts.shape[1], max(output_len, workload.continuation.shape[1])
    check_vocabulary(model, workload.prompts)

    def run(rows: np.ndarray, tokens: int):
        start = time.perf_counter()
        parts, times = [], []
        with jax.profiler.TraceAnnotation("generate"):
            for emitted in stream(
                model, rows[:, :prompt_len], strategy=strategy, max_new_tokens=tokens, sampling=sampling, seed=seed,
                stop_tokens=(), prefill=plan, reserve=longest,
            ):  # fmt: skip
                parts.append(emitted.tokens)
                times.append(time.perf_counter())
        return start, times, np.concatenate(parts, axis=1), emitted.state

    _, rows, _ = next(batches(workload, batch_size))
    run(rows, min(2, output_len))
    progress("compiled")
    timelines: list[Timeline] = []
    samples: list[list[int]] = []
    busy = 0.0
    for _, rows, real in batches(workload, batch_size):
        start, times, tokens, state = run(rows, output_len)
        busy += times[-1] - start
        timelines += [Timeline(start, tuple(times), prompt_len)] * real
        samples += tokens[:real].tolist()
        progress("generated")
    transient = None
    if weighs and output_len > 1 and not is_driven(strategy):  # the scratch of the one program a step is, where it is one
        transient = _scratch(model, strategy, sampling, state)
    books = ledger(strategy, state, transient)

    parts: list[tuple[np.ndarray, ...]] = []
    hits: list[np.ndarray] = []
    for index, (where, rows, real) in enumerate(batches(workload, batch_size)):
        if against is None and not workload.tests:
            break
        logits = score(model, rows, prompt_len=prompt_len, strategy=strategy, prefill=plan, reserve=output_len)[:, :-1]
        if against is not None:
            parts.append(tuple(np.asarray(x)[:real] for x in fidelity.compare(against.logits[index], logits, rows[:, prompt_len:])))
        if workload.tests:
            host = np.asarray(logits)
            hits += [recall.answered(host[i], test) for i, test in enumerate(workload.tests[where])]
        progress("scored")
    guesses = None
    if audits and strategy.policy.speculates and (against is not None or workload.tests):
        _, rows, _ = next(batches(workload, batch_size))
        guesses = audit(model, strategy, rows, prompt_len=prompt_len, prefill=plan)
    compared = fidelity.Comparison(*(np.concatenate(x) for x in zip(*parts, strict=True))) if parts else None
    per_prompt = {"recall": [float(hit.mean()) for hit in hits]} if hits else {}
    if compared is not None:
        per_prompt |= {"kld": compared.kld.mean(1).tolist(), "nll_delta": compared.nll_delta.mean(1).tolist()}
    return Measurement(
        strategy.describe(),
        strategy.store.name,
        tuple(timelines),
        summarise(timelines, busy),
        books,
        {} if compared is None else compared.summary(seed),
        _by_depth(workload, hits),
        samples,
        getattr(strategy.store, "transfer", None),
        guesses,
        per_prompt,
    )


_scratches: dict[Any, int | None] = {}
"""Of decode programs seen before: to ask is to compile once more."""


def _scratch(model: Model, strategy: Strategy, sampling: Sampling, state: KVState) -> int | None:
    """Bytes a decode step needs beside its arguments and results; None where XLA does not say."""
    key = (model.decoder, strategy, sampling, jax.tree.structure(state), tuple((x.shape, x.dtype) for x in jax.tree.leaves(state)))
    if key not in _scratches:
        _scratches[key] = decode_scratch(model, strategy, sampling, state)
    return _scratches[key]


def without_questions(workload: Workload) -> Workload:
    """The same prompts with nothing asked."""
    return dataclasses.replace(workload, tests=())


def steps_of(workload: Workload, batch_size: int, asks: bool) -> int:
    """How often `measure` reports progress."""
    count = sum(1 for _ in batches(workload, batch_size))
    return 1 + count * (2 if asks else 1)


def _by_depth(workload: Workload, hits: list[np.ndarray]) -> dict[float, float]:
    """Share answered per depth, shallowest first."""
    found: dict[float, list[bool]] = {}
    for test, hit in zip(workload.tests, hits, strict=True):
        for depth, right in zip(test.depths, hit, strict=True):
            found.setdefault(round(float(depth), 4), []).append(bool(right))
    return {depth: float(np.mean(found[depth])) for depth in sorted(found)}
