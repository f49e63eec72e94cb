"""Trains the bundled byte-level models.

    python -m kvjax.train --model=kvjax-4m --output_dir=runs/train-4m

Half of each batch is Python source from the standard library, half recall documents (kvjax.quality.recall). Contexts grow over the stages
of the recipe; short rows stand in for long ones by jumping positions. A run resumes from its last checkpoint: start the same command again.
It ends by writing the model as a Hugging Face Llama directory, in bfloat16, with its scores and loss curve beside it.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags, logging
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax import checks, command
from kvjax.cache.steps import Forward
from kvjax.errors import InputError, NotFiniteError, SpecError
from kvjax.files import dumps, replace
from kvjax.lock import locked
from kvjax.models import hugging_face
from kvjax.models.config import BUNDLED, preset
from kvjax.models.decoder import Decoder, rope_frequencies
from kvjax.quality import recall

FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_enum("model", "kvjax-1m", list(BUNDLED), "Which bundled model to train.")
    flags.DEFINE_string("output_dir", None, "Where checkpoints, the loss curve and the trained model go.", required=True)
    flags.DEFINE_float("scale", 1.0, "Multiplies the number of steps of every stage.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of weights and data.")
    flags.DEFINE_integer("checkpoint_every", 200, "Steps between checkpoints.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of a run at one context length (bytes); every step sees `rows * context` bytes."""

    context: int
    rows: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the seed.

    Attributes:
      stages: run one after the other under one learning-rate schedule.
      learning_rate: peak for Muon (the matrices inside the layers; updates scaled to an RMS of 0.2).
      adam_learning_rate: peak for AdamW (embedding, norms).
      max_position: position jumps reach this far.
      recall_share, copy_share: shares of rows that are recall and copy documents; the rest is text.
    """

    stages: tuple[Stage, ...]
    learning_rate: float = 8e-3
    adam_learning_rate: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.4
    weight_decay: float = 0.05
    clip: float = 1.0
    max_position: int = 2048
    recall_share: float = 0.4
    copy_share: float = 0.2

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def schedule(self, peak: float) -> optax.Schedule:
        """Linear warm-up, constant, then linear decay to zero over the last `decay_share` of the steps."""
        decay = max(1, int(self.steps * self.decay_share))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, self.warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, decay),
            ],
            [self.warmup, self.steps - decay],
        )

    def scaled(self, scale: float) -> "Recipe":
        stages = tuple(dataclasses.replace(s, steps=max(1, round(s.steps * scale))) for s in self.stages)
        return dataclasses.replace(self, stages=stages, warmup=min(self.warmup, sum(s.steps for s in stages) // 5))


RECIPES = {
    "kvjax-1m": Recipe((Stage(64, 64, 300), Stage(128, 32, 160), Stage(384, 12, 140), Stage(1280, 4, 80)), 4e-3, 4e-3),
    "kvjax-4m": Recipe((Stage(64, 64, 150), Stage(128, 32, 250), Stage(384, 12, 250), Stage(1280, 4, 110)), 4e-3, 4e-3),
}


def initialise(model: Decoder, seed: int):
    """Random parameters, except that some heads of the first layer start out looking a fixed number of tokens back.

    Looking something up by name needs, in one layer, keys that know which bytes came before them, and in a later one a match on that. A
    small model takes very long to find the first half by itself and little time for the second. So dimension 0 of the embedding starts as
    a constant, and the queries and keys of kv head 0 (of every kv head, where there are few query heads) read it alone: with RoPE a
    constant query turned back by n positions peaks n tokens before itself, in the fast rotations at least. Training is free to change all
    of it.
    """
    config = model.config
    assert config.rope is not None
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens, None, Forward(tokens))
    inner = params["params"]
    attention = inner["layer_0"]["attention"]
    half = config.head_dim // 2
    pairs = min(5, half)
    frequency = rope_frequencies(config.rope, config.head_dim)[:pairs]

    def reading_constant(angle):
        rows = jnp.zeros((config.head_dim, config.hidden_size))
        return rows.at[:pairs, 0].set(jnp.cos(angle)).at[half : half + pairs, 0].set(jnp.sin(angle))

    heads = config.num_heads if config.num_heads <= 4 else config.group_size
    looking = jnp.concatenate([reading_constant(-frequency * (back + 1)) for back in range(heads)])
    standing = jnp.concatenate([reading_constant(0 * frequency)] * (heads // config.group_size))
    new = {"q": {"weight": attention["q"]["weight"].at[: len(looking)].set(looking)}}
    new |= {"k": {"weight": attention["k"]["weight"].at[: len(standing)].set(standing)}}
    embed = inner["embed"].at[:, 0].set(6 * inner["embed"].std())
    return {"params": inner | {"embed": embed, "layer_0": inner["layer_0"] | {"attention": attention | new}}}


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embedding and norms, clipped by global norm."""

    def is_matrix(path, leaf):
        inside = any(getattr(key, "key", "").startswith("layer_") for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0) if inside and leaf.ndim == 2 else None

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.contrib.muon(
            recipe.schedule(recipe.learning_rate),
            adam_learning_rate=recipe.schedule(recipe.adam_learning_rate),
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
        ),
    )


def batch_at(recipe: Recipe, seed: int, step: int) -> dict[str, np.ndarray]:
    """The batch of one step; depends on the seed and the step alone, so a resumed run sees the same data."""
    stage = recipe.stage_at(step)
    rng = np.random.default_rng((seed, step))
    rows = []
    for i in range(stage.rows):
        place = (i + 0.5) / stage.rows
        if place < recipe.recall_share:
            rows.append(recall.training_document(rng, stage.context, recipe.max_position))
        elif place < recipe.recall_share + recipe.copy_share:
            rows.append(recall.copy_document(rng, stage.context))
        else:
            rows.append(recall.text_document(rng, stage.context))
    return {
        "tokens": np.stack([row.tokens for row in rows]).astype(np.int32),
        "positions": np.stack([row.positions for row in rows]),
        "weights": np.stack([row.weights for row in rows]),
        "answers": np.stack([row.answers for row in rows]),
    }


def ahead[T](make: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """`make(step)` for every step, the next one prepared in a thread while the caller works on this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


LONG = 512
"""Tokens of a row beyond which the attention of a block is computed again in the backward pass; before, keeping all scores is cheaper."""


def loss_fn(model: Decoder, params, batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted next-byte loss (nats), and what the progress line shows."""
    logits, _ = model.apply(params, batch["tokens"], None, Forward(batch["positions"], blocked=batch["tokens"].shape[1] > LONG))
    targets = batch["tokens"][:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    weights = batch["weights"][:, 1:]
    answers = batch["answers"][:, 1:]
    text = weights == 1.0
    right = (logits[:, :-1].argmax(-1) == targets) | ~answers
    asked = answers.sum() / recall.VALUE_DIGITS
    wrong = _runs_with_a_miss(right, answers)
    return (weights * nll).sum() / weights.sum(), {
        "bits_per_byte": (nll * text).sum() / text.sum() / jnp.log(2.0),
        "recall": 1.0 - wrong / asked,
    }


def _runs_with_a_miss(right: jax.Array, answers: jax.Array) -> jax.Array:
    """Number of answers with at least one wrong byte."""
    n = recall.VALUE_DIGITS
    last = answers & ~jnp.pad(answers[:, 1:], ((0, 0), (0, 1)))
    complete = right
    for shift in range(1, n):
        complete &= jnp.pad(right[:, :-shift], ((0, 0), (shift, 0)), constant_values=True)
    return (last & ~complete).sum()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(model: Decoder, recipe: Recipe, state, batch):
    params, opt_state = state
    (loss, shown), grads = jax.value_and_grad(partial(loss_fn, model), has_aux=True)(params, batch)
    updates, opt_state = optimiser(recipe).update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), shown | {"loss": loss}


def held_out_scores(model: Decoder, params, seed: int = 1, context: int = 1024, rows: int = 32, num_facts: int = 8) -> dict:
    """Scores of full attention on held-out data: bits per byte on standard-library files, recall accuracy by depth.

    Recall: `rows` prompts of `context` bytes less the questions, facts at `num_facts` depths, greedy answers (teacher-forced bytes:
    an answer counts when every byte is the model's first choice). Bits per byte: over the last half of `rows` windows of `context` bytes.
    """
    forward = jax.jit(lambda p, t: model.apply(p, t, None, Forward(jnp.broadcast_to(jnp.arange(t.shape[1]), t.shape)))[0])
    rng = np.random.default_rng(seed)
    hits = np.zeros(num_facts)
    nll, counted = 0.0, 0
    depths = np.zeros(num_facts)
    for start in range(0, rows, 4):
        tests = [recall.recall_test(rng, context - num_facts * recall.STATEMENT_BYTES, num_facts) for _ in range(min(4, rows - start))]
        tokens = np.stack([np.concatenate([t.prompt, t.continuation]) for t in tests]).astype(np.int32)
        guess = np.asarray(forward(params, tokens).argmax(-1))
        for row, test in enumerate(tests):
            at = len(test.prompt) + test.answers
            hit = (guess[row, at - 1] == tokens[row, at]).all(-1)
            order = np.argsort(test.depths)
            hits += hit[order]
            depths = test.depths[order]
        text = np.stack([np.frombuffer(recall.filler(rng, context + 1, held_out=True), np.uint8) for _ in tests]).astype(np.int32)
        logits = forward(params, text[:, :-1])
        losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]))[:, context // 2 :]
        nll, counted = nll + losses.sum(), counted + losses.size
    return {
        "context_bytes": context,
        "bits_per_byte": float(nll / counted / np.log(2)),
        "recall": float(hits.sum() / (rows * num_facts)),
        "recall_by_depth": {f"{depth:.2f}": float(hit / rows) for depth, hit in zip(depths, hits, strict=True)},
        "questions_per_depth": rows,
    }


def train(model_name: str, recipe: Recipe, output_dir: pathlib.Path, seed: int, checkpoint_every: int):
    """Trains to the end of the recipe, resuming from the newest checkpoint in `output_dir`. Returns the parameters (float32)."""
    model = Decoder(preset(model_name))
    output_dir.mkdir(parents=True, exist_ok=True)
    curve = output_dir / "loss.jsonl"
    params = initialise(model, seed)
    state = (params, optimiser(recipe).init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager((output_dir / "checkpoints").absolute(), options=options) as manager:
        first = 0
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            first = latest
            kept = [line for line in curve.read_text("utf-8").splitlines() if json.loads(line)["step"] < first]
            replace(curve, "".join(line + "\n" for line in kept))
            print(f"resuming at step {first} of {recipe.steps}", flush=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        with Progress(*columns) as progress, curve.open("a", encoding="utf-8") as log:
            task = progress.add_task(model_name, total=recipe.steps, completed=first)
            began, seen = time.perf_counter(), 0
            batches = ahead(partial(batch_at, recipe, seed), range(first, recipe.steps))
            for step, batch in zip(range(first, recipe.steps), batches, strict=True):
                state, shown = train_step(model, recipe, state, batch)
                seen += batch["tokens"].size
                if step % 20 == 0 or step == recipe.steps - 1:
                    values = {name: round(float(value), 4) for name, value in shown.items()}
                    if not all(map(math.isfinite, values.values())):
                        raise NotFiniteError(f"training has diverged: at step {step} the loss is not finite; the last checkpoint stays")
                    rate = seen / (time.perf_counter() - began)
                    log.write(dumps({"step": step, "context": batch["tokens"].shape[1], **values, "bytes_per_s": round(rate)}) + "\n")
                    log.flush()
                    text = f"bits/byte {values['bits_per_byte']:.3f}  recall {values['recall']:.2f}  {rate:.0f} bytes/s"
                    progress.update(task, completed=step + 1, description=f"{model_name}  {text}")
                if (step + 1) % checkpoint_every == 0 or step == recipe.steps - 1:
                    manager.save(step + 1, args=ocp.args.StandardSave(state))
            progress.update(task, completed=recipe.steps)
        manager.wait_until_finished()
    return state[0]


def plot_curve(curve: pathlib.Path, picture: pathlib.Path) -> None:
    """Draws bits per byte and recall over the bytes seen, with the stages' contexts marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in curve.read_text("utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot(steps, [row["bits_per_byte"] for row in rows], color="tab:blue", linewidth=1)
    axis.set(xlabel="step", ylabel="bits per byte (training batch)", ylim=(0, 6))
    right = axis.twinx()
    right.plot(steps, [row["recall"] for row in rows], color="tab:orange", linewidth=1)
    right.set(ylabel="recall (training batch)", ylim=(0, 1.02))
    for before, after in itertools.pairwise(rows):
        if before["context"] != after["context"]:
            axis.axvline(after["step"], color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(f" context {after['context']}", (after["step"], 5.6), fontsize=8, color="grey")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    with command.answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        checks.seed("--seed", FLAGS.seed)
        output_dir = pathlib.Path(FLAGS.output_dir)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir={output_dir}: cannot write there: {error.strerror}") from None
        with locked(output_dir):
            run(output_dir)


def run(output_dir: pathlib.Path) -> None:
    """Trains, and writes the model with what is known of it."""
    recipe = RECIPES[FLAGS.model].scaled(FLAGS.scale)
    params = train(FLAGS.model, recipe, output_dir, FLAGS.seed, FLAGS.checkpoint_every)

    config = preset(FLAGS.model)
    directory = output_dir / FLAGS.model
    hugging_face.save_directory(directory, config, params, jnp.bfloat16)
    rounded = hugging_face.load_parameters(directory, config, jnp.float32)
    scores = held_out_scores(Decoder(config), rounded)
    print(dumps(scores, indent=2))
    record = {
        "model": FLAGS.model,
        "parameters": config.parameter_count,
        "recipe": dataclasses.asdict(recipe),
        "bytes_seen": sum(s.steps * s.rows * s.context for s in recipe.stages),
        "seed": FLAGS.seed,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "held_out": scores,
    }
    replace(directory / "training.json", dumps(record, indent=2) + "\n")
    shutil.copy(output_dir / "loss.jsonl", directory / "loss.jsonl")
    plot_curve(directory / "loss.jsonl", directory / "loss.png")
    print(f"wrote {directory}; copy it to kvjax/assets/ to make it the bundled {FLAGS.model}")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    command.start(main)
