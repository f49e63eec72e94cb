"""Strategies asked: tasks put to one model under several strategies, every prompt prefilled once for all of them.

What a strategy loses is told by the same examples under the full cache: differences are paired, and where the full
cache itself fails on more than half of a task (`GATE`) there is nothing to lose, so strategies are not ranked there.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import Decode, Full, KVState, Strategy
from kvjax.errors import SpecError
from kvjax.generation import as_strategy, check_positions, check_vocabulary, commit, feed, left_after, stage_prompts
from kvjax.models import Decoder, Model
from kvjax.quality import fidelity
from kvjax.quality.paired import difference, interval
from kvjax.quality.tasks import Example, Frame, Query, Task, fingerprint
from kvjax.quality.tasks.file import FileTask
from kvjax.runtime.forward import forward

GATE = 0.5
"""Strategies are ranked only where the full cache scores as much."""

STEPS = 8  # per call of the program that feeds questions and writes answers

Progress = Callable[[str], None]
"""Told the name of a strategy when it is through with a batch."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """One strategy on the R examples of a task.

    Attributes:
      scores: per example, the mean over its questions, 0 to 1; None where nothing is scored.
      written: per example and question, what the model wrote; empty for a task that is fed.
      comparison: against the full cache on what was fed; None for a task that is not fed.
      nll: per example, the mean negative log-likelihood of what was fed, in nats per token; None for a task that is not
        fed.
    """

    strategy: str
    scores: Float[np.ndarray, " R"] | None
    written: tuple[tuple[str, ...], ...] = ()
    comparison: fidelity.Comparison | None = None
    nll: Float[np.ndarray, " R"] | None = None

    @property
    def score(self) -> float | None:
        """The mean over examples."""
        return None if self.scores is None else float(self.scores.mean())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A task at one length, one way of asking, and what every strategy made of it.

    Attributes:
      length: tokens of a prompt (of the longest, if a user's file has them of several lengths).
      templated: whether the model's chat template stands around the prompts.
      fingerprint: a digest of all tokens (kvjax.quality.tasks.fingerprint).
      depths: per example, where what is asked for stands.
      full: the full cache.
      answers: the strategies, in the order they were given.
    """

    task: Task
    length: int
    query: Query
    seed: int
    templated: bool
    fingerprint: str
    depths: tuple[tuple[float, ...], ...]
    full: Answers
    answers: tuple[Answers, ...]

    @property
    def gated(self) -> bool:
        """Whether strategies may be ranked: the full cache can do the task, or nothing is scored."""
        return self.full.score is None or self.full.score >= GATE


def ask(
    contenders: Sequence[tuple[Model, str | Strategy]],
    task: Task,
    *,
    length: int,
    count: int,
    query: Query = "after",
    seed: int = 0,
    batch_size: int = 4,
    chat_template: bool = True,
    progress: Progress = lambda what: None,
) -> Outcome:
    """Puts a task to a model under several strategies, and under the full cache in any case.

    Answers are greedy. A host store has its pool in device memory here: where it stands makes no difference to what is
    read.

    Args:
      contenders: strategies, at least one, each with the model as it needs it (kvjax.calibrated); the same model but
        for the guide.
      length: tokens of a prompt, question and chat template included.
      count: examples; a user's file gives its first ones.
      query: `before` and the question is part of the prompt when it is compressed; `after` and it is fed to the
        compressed cache of the context, by decode.
      batch_size: prompts at a time.
      chat_template: applied where the model has one.

    Raises:
      SpecError: a strategy twice, or a way of asking that the task does not know.
      InputError: a length too short for the task or too long for the model, or a tokenizer that is of no use to the
        task.
    """
    model = contenders[0][0]
    names = [as_strategy(strategy).describe() for _, strategy in contenders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"strategy {twice.pop()} is named twice")
    check_query(task, query)
    frame, examples = prompts(model, task, length, count, seed, chat_template)
    full = as_strategy(Strategy(Full()))
    everyone = {full.describe(): (model, full)}
    everyone |= {name: (own, _placed(strategy)) for name, (own, strategy) in zip(names, contenders, strict=True)}
    answers = _asked(everyone, task, frame, examples, query, batch_size, progress)
    return Outcome(
        task, max(len(one.context) if task.fed else len(one.prompt()) for one in examples), query, seed, frame.templated,
        fingerprint(examples), tuple(one.depths for one in examples), answers[full.describe()],
        tuple(answers[name] for name in names),
    )  # fmt: skip


def prompts(model: Model, task: Task, length: int, count: int, seed: int, chat_template: bool = True) -> tuple[Frame, list[Example]]:
    """What `ask` puts to the model. Raises InputError as it does, before anything is computed."""
    frame = Frame.of(model.tokenizer, chat_template and not task.fed)
    examples = task.examples(frame, length, count, seed)
    for one in examples:
        for turn in one.turns:
            check_positions(model, len(one.context) + len(turn.query), turn.max_new)
            check_vocabulary(model, np.concatenate([one.context, turn.query]))
    return frame, examples


def steps_of(task: Task, contenders: int, count: int, batch_size: int) -> int:
    """How often `ask` reports progress, at most; a user's file may have fewer examples."""
    return (1 + contenders) * -(-count // batch_size)


def check_query(task: Task, query: Query) -> None:
    """Raises SpecError for a way of asking that the task does not know."""
    if query not in task.queries:
        raise SpecError(f"task {task.describe()} can only be asked {' or '.join(task.queries)}, not {query}")
    if query == "after" and isinstance(task, FileTask) and not task.pieces:
        raise SpecError(f"{task.path} has prompts in one piece; to ask after the context, give context and question on every line")


def _placed(strategy: str | Strategy) -> Strategy:
    """The strategy with its tokens in device memory."""
    made = as_strategy(strategy)
    return Strategy(made.policy, made.store.on_device())


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts of one shape.

    Attributes:
      prompts, lengths: what is prefilled, right-padded.
      turns: per question, what is fed, right-padded, and how many of it: [B, T], [B].
      real: rows that are no copies.
    """

    prompts: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    turns: tuple[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]], ...]
    real: slice


def _batches(examples: Sequence[Example], query: Query, fed: bool, batch_size: int) -> Iterator[_Batch]:
    """All batches have one shape, so that programs compile once."""
    asked = 1 if query == "before" else max(len(one.turns) for one in examples)
    before = query == "before" and not fed
    prompts = [one.prompt() if before else one.context for one in examples]
    width = max(map(len, prompts))
    fed_width = 0 if before else max(len(turn.query) for one in examples for turn in one.turns)
    size = min(batch_size, len(examples))
    for start in range(0, len(examples), size):
        rows = list(range(start, min(start + size, len(examples))))
        real = slice(start, start + len(rows))
        rows += rows[-1:] * (size - len(rows))
        turns = []
        for number in range(asked):
            queries = [np.zeros(0, np.int32) if before else examples[i].turns[min(number, len(examples[i].turns) - 1)].query for i in rows]
            turns.append((_padded(queries, fed_width), np.asarray([len(one) for one in queries], np.int32)))
        lengths = np.asarray([len(prompts[i]) for i in rows], np.int32)
        yield _Batch(_padded([prompts[i] for i in rows], width), lengths, tuple(turns), real)


def _padded(rows: Sequence[np.ndarray], width: int) -> Int[np.ndarray, "B width"]:
    out = np.zeros((len(rows), width), np.int32)
    for row, target in zip(rows, out, strict=True):
        target[: len(row)] = row
    return out


def _asked(
    contenders: Mapping[str, tuple[Model, Strategy]], task: Task, frame: Frame, examples: Sequence[Example], query: Query,
    batch_size: int, progress: Progress,
) -> dict[str, Answers]:  # fmt: skip
    """Answers by strategy; the first one is the full cache."""
    model = next(iter(contenders.values()))[0]
    room = max(turn.max_new for one in examples for turn in one.turns)
    parts: dict[str, list[Answers]] = {name: [] for name in contenders}
    for batch in _batches(examples, query, task.fed, batch_size):
        few = examples[batch.real]
        staged = stage_prompts(model, [strategy for _, strategy in contenders.values()], batch.prompts, batch.lengths)
        expected = None
        for name, (own, strategy) in contenders.items():
            kv = commit(own, staged, strategy, max(batch.turns[0][0].shape[1] + room, 1))
            if task.fed:
                logits = _teach(own, strategy, staged.logits, kv, batch.turns[0][0])
                expected = logits if expected is None else expected
                parts[name].append(_fed(name, task, few, expected, logits, batch.turns[0][0]))
            else:
                texts = [_write(own, strategy, staged.logits, kv, turn, room, last) for turn, last in _with_last(batch.turns)]
                parts[name].append(_written(name, task, frame, few, texts))
            progress(name)
    return {name: _joined(several) for name, several in parts.items()}


def _fed(
    name: str, task: Task, examples: Sequence[Example], expected: Float[Array, "B T V"], logits: Float[Array, "B T V"],
    fed: Int[np.ndarray, "B T"],
) -> Answers:  # fmt: skip
    """What was predicted of what was fed, against what the full cache `expected`."""
    targets = jnp.asarray(fed)
    compared = fidelity.Comparison(*(np.asarray(x)[: len(examples)] for x in fidelity.compare(expected, logits, targets)))
    nll = np.asarray(_nll(logits, targets), float)[: len(examples)].mean(1)
    guessed = np.asarray(logits.argmax(-1))
    scores = [_share_right(one, row) for one, row in zip(examples, guessed, strict=False)]
    return Answers(name, np.asarray(scores) if task.metric else None, (), compared, nll)


def _written(name: str, task: Task, frame: Frame, examples: Sequence[Example], tokens: Sequence[Sequence[list[int]]]) -> Answers:
    """Answers as text, and their scores. `tokens`: by question, by row."""
    written = tuple(tuple(frame.text(tokens[i][row]) for i in range(min(len(tokens), len(one.turns)))) for row, one in enumerate(examples))
    scores = [
        np.mean([task.score(text, turn) for text, turn in zip(texts, one.turns, strict=False)])
        for texts, one in zip(written, examples, strict=True)
    ]
    return Answers(name, np.asarray(scores, float), written)


def _joined(parts: Sequence[Answers]) -> Answers:
    """The answers of all batches in one."""
    first = parts[0]
    scores = None if first.scores is None else np.concatenate([one.scores for one in parts if one.scores is not None])
    written = tuple(texts for one in parts for texts in one.written)
    if first.comparison is None:
        return Answers(first.strategy, scores, written)
    compared = [one.comparison for one in parts if one.comparison is not None]
    comparison = fidelity.Comparison(
        *(np.concatenate([getattr(one, field.name) for one in compared]) for field in dataclasses.fields(fidelity.Comparison))
    )
    nll = np.concatenate([one.nll for one in parts if one.nll is not None])
    return Answers(first.strategy, scores, written, comparison, nll)


def _with_last(turns: Sequence[tuple]) -> Iterator[tuple[tuple, bool]]:
    return ((turn, number == len(turns) - 1) for number, turn in enumerate(turns))


def _write(
    model: Model, strategy: Strategy, logits: Float[Array, "B V"], kv: KVState, turn: tuple[np.ndarray, np.ndarray], room: int, last: bool
) -> list[list[int]]:
    """Feeds a question to every row and lets it answer; the state is given away at the `last` one, copied before."""
    fed, counts = turn
    stops = tuple(int(token) for token in model.config.stop_tokens)
    rows = _Rows(_likeliest(logits), jax.device_put(np.full(len(counts), room, np.int32), model.placement))
    kv = kv if last else jax.tree.map(jnp.copy, kv)
    parts: list[np.ndarray] = []
    for start in range(0, fed.shape[1] + room, STEPS):
        piece = np.zeros((len(counts), STEPS), np.int32)
        here = fed[:, start : start + STEPS]
        piece[:, : here.shape[1]] = here
        given = start + np.arange(STEPS) < counts[:, None]
        kv, rows, out = _advance(model, strategy, stops, kv, rows, piece, given)
        parts.append(np.asarray(out))
        if not np.asarray(rows.left).any():
            break
    return [[int(token) for token in row if token >= 0 and token not in stops] for row in np.concatenate(parts, axis=1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Where every row stands: what it guessed as its next token, and how many it may still write."""

    guess: Int[Array, " B"]
    left: Int[Array, " B"]


def _advance(
    model: Model, strategy: Strategy, stops: tuple[int, ...], kv: KVState, rows: _Rows, fed: Int[np.ndarray, "B T"],
    given: Bool[np.ndarray, "B T"],
) -> tuple[KVState, _Rows, Int[Array, "B T"]]:  # fmt: skip
    """T steps: a row takes its next token of `fed` where `given`, else what it guessed, as long as it may write.

    Takes the memory of `kv` over. Returns the state, the rows, and what they wrote (-1 where nothing).
    """
    fed, given = (jax.device_put(np.ascontiguousarray(x.T), model.placement) for x in (fed, given))
    if model.decoder.stringing == "unroll":
        return _unrolled(model.decoder, strategy, stops, model.params, kv, rows, fed, given)
    written = []
    for token, is_given in zip(fed, given, strict=True):
        step, column, rows, out = _begin(strategy, stops, rows, token, is_given)
        logits, kv = forward(model.decoder, model.params, column, kv, step)
        rows = _end(rows, logits, step.active)
        written.append(out)
    return kv, rows, jnp.stack(written, axis=1)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _unrolled(decoder: Decoder, strategy: Strategy, stops: tuple[int, ...], params, kv: KVState, rows: _Rows, fed, given):
    """`_advance` in one program."""

    def one(carry, piece):
        kv, rows = carry
        step, column, rows, out = _begin(strategy, stops, rows, *piece)
        logits, kv = forward(decoder, params, column, kv, step)
        return (kv, _end(rows, logits, step.active)), out

    (kv, rows), out = jax.lax.scan(one, (kv, rows), (fed, given))
    return kv, rows, out.T


@partial(jax.jit, static_argnums=(0, 1))
def _begin(strategy: Strategy, stops: tuple[int, ...], rows: _Rows, token: Int[Array, " B"], given: Bool[Array, " B"]):
    """What a step does, its tokens as a column, the rows after it, and what it writes."""
    writes = ~given & (rows.left > 0)
    token = jnp.where(given, token, rows.guess)
    after = dataclasses.replace(rows, left=jnp.where(writes, left_after(rows.left, token, stops), rows.left))
    return Decode(given | writes, strategy), token[:, None], after, jnp.where(writes, token, -1)


@jax.jit
def _end(rows: _Rows, logits: Float[Array, "B 1 V"], active: Bool[Array, " B"]) -> _Rows:
    return dataclasses.replace(rows, guess=jnp.where(active, _likeliest(logits[:, 0]), rows.guess))


@jax.jit
def _likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return logits.argmax(-1).astype(jnp.int32)


def _teach(model: Model, strategy: Strategy, logits: Float[Array, "B V"], kv: KVState, fed: np.ndarray) -> Float[Array, "B T V"]:
    """The logits that predict every token of what is fed."""
    following, _ = feed(model, strategy, kv, fed[:, :-1])
    return jnp.concatenate([logits[:, None], following], axis=1)


@jax.jit
def _nll(logits: Float[Array, "R T V"], targets: Int[Array, "R T"]) -> Float[Array, "R T"]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def _share_right(example: Example, guessed: Int[np.ndarray, " T"]) -> float:
    """Share of the questions within what was fed whose every token was predicted (kvjax.quality.recall.answered)."""
    turn = example.turns[0]
    return 0.0 if turn.asked is None else float((guessed[turn.asked] == turn.query[turn.asked]).all(-1).mean())


def records(outcome: Outcome) -> list[dict[str, Any]]:
    """What each strategy made of a task, as flat records: the keys begin with `task_` or `fidelity_`.

    `task_score` is 0 to 1; differences are paired by example, to the full cache (`task_loss`, positive where the
    strategy is worse) and to the first strategy (`task_gain_over_first`), with 95 % intervals (`_low`, `_high`).
    `task_ranked` says whether the full cache passed the gate.
    """
    first = outcome.answers[0]
    common = {
        "task": outcome.task.describe(),
        "task_metric": outcome.task.metric or None,
        "task_length": outcome.length,
        "task_query": outcome.query,
        "task_seed": outcome.seed,
        "task_examples": len(outcome.depths),
        "task_chat_template": outcome.templated,
        "task_fingerprint": outcome.fingerprint,
        "task_full_score": outcome.full.score,
        "task_gate": None if outcome.full.score is None else GATE,
        "task_ranked": outcome.gated,
    }
    return [{"strategy": one.strategy, **common, **_quality(one, outcome.full, first)} for one in outcome.answers]


def _quality(one: Answers, full: Answers, first: Answers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if one.scores is not None and full.scores is not None and first.scores is not None:
        found |= interval(one.scores).record("task_score")
        found |= difference(full.scores, one.scores).record("task_loss")
        found |= difference(one.scores, first.scores).record("task_gain_over_first")
        found["task_scores"] = one.scores.tolist()
    if one.comparison is not None and one.nll is not None and first.nll is not None:
        found |= {"task_nll": float(one.nll.mean()), "task_perplexity": float(np.exp(one.nll.mean())), "task_nlls": one.nll.tolist()}
        found |= {f"fidelity_{name}": estimate.value for name, estimate in one.comparison.summary().items()}
        found |= {f"fidelity_{name}_se": estimate.error for name, estimate in one.comparison.summary().items()}
        found |= difference(one.nll, first.nll, bounded=False).record("task_nll_over_first")
    return found
