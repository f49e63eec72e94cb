"""kvjax in the benchmark: the library's own path (strategy, state, ragged rows), timed like the peers time themselves.

    kvjax          kvjax.generation.decode_steps, all steps in one call
    kvjax-step     one step a call, each call's tokens fetched: what `stream` and the runner do
    kvjax-h2o      as kvjax, with h2o(heavy=0.1,recent=0.1)
    kvjax-h2o-256  as kvjax, with h2o(heavy=128,recent=128): the same slots at any context

A prompt is prefilled once per strategy and cell. Decoding takes over the memory of the state it is given, so every turn gets a copy, made
before the clock starts.
"""

import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments.bench.peers import prompts
from experiments.bench.timing import Sample
from kvjax.cache import Strategy
from kvjax.generation import as_strategy, decode_steps, first_token, run_prefill
from kvjax.models import Model
from kvjax.models.hugging_face import save_directory
from kvjax.models.parameters import map_with_path

PRESET = "bench-32m"
STRATEGIES = {
    "kvjax": "full",
    "kvjax-step": "full",
    "kvjax-h2o": "h2o(heavy=0.1,recent=0.1)",
    "kvjax-h2o-256": "h2o(heavy=128,recent=128)",
}
_EMBEDDING_SCALE = 50.0
"""Brings the embeddings' standard deviation from 0.02 to 1, the size of what layers add: then each token depends on the one before."""


def model_directory(work_dir: pathlib.Path) -> pathlib.Path:
    """The directory with the benchmark's weights, written the first time; every engine loads these very weights from it."""
    directory = work_dir / PRESET
    if not directory.exists():
        model = kvjax.load_model(PRESET, dtype="float32", random_weights=True)
        params = map_with_path(lambda path, leaf: leaf * _EMBEDDING_SCALE if path == ("embed",) else leaf, model.params)
        part = directory.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        save_directory(part, model.config, params, dtype=jnp.float32)
        part.rename(directory)
    return directory


class Prompts:
    """The model and the prompts of the cell at hand, prefilled once per strategy."""

    def __init__(self, model: Model, steps: int):
        self.model, self.steps = model, steps
        self._prefilled: dict[tuple[str, int, int], tuple] = {}

    def tokens(self, batch: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and the length of every row."""
        rows = prompts.prompt(batch, context, self.model.config.vocab_size)
        return np.array(rows, np.int32), np.full(batch, context, np.int32)

    def prefilled(self, strategy: Strategy, batch: int, context: int) -> tuple:
        """The state, the prompt's next token, and what each row still wants. Not to be donated."""
        key = (strategy.describe(), batch, context)
        if key not in self._prefilled:
            logits, kv = run_prefill(self.model, strategy, *self.tokens(batch, context), self.steps)
            token = first_token(logits, kv.length)
            self._prefilled[key] = jax.block_until_ready((kv, token, jnp.full(batch, self.steps, jnp.int32)))
        return self._prefilled[key]

    def release(self) -> None:
        self._prefilled.clear()


class Decode:
    """`steps` greedy tokens after a prompt; a sample is seconds per step."""

    def __init__(self, source: Prompts, name: str, batch: int, context: int):
        self.name, self.batch, self.context = name, batch, context
        self.strategy = as_strategy(STRATEGIES[name])
        self.pid = os.getpid()
        self._source = source
        self._run = self._step_by_step if name == "kvjax-step" else self._at_once

    def prepare(self) -> None:
        original = self._source.prefilled(self.strategy, self.batch, self.context)
        self._first = np.asarray(original[1])
        self._given = jax.block_until_ready(jax.tree.map(jnp.copy, original))

    def sample(self) -> Sample:
        given, self._given = self._given, None
        began = time.perf_counter()
        out, end = self._run(*given)
        jax.block_until_ready(end)
        seconds = time.perf_counter() - began
        return Sample(seconds / self._source.steps, _rows(self._first, out))

    def _at_once(self, kv, token, remaining):
        kv, token, remaining, out = self._call(self._source.steps, kv, token, remaining)
        return np.asarray(out), (kv, token, remaining)

    def _step_by_step(self, kv, token, remaining):
        outs = []
        while bool(np.asarray(remaining).any()):  # as kvjax.stream
            kv, token, remaining, out = self._call(1, kv, token, remaining)
            outs.append(np.asarray(out))
        return np.concatenate(outs, axis=1), (kv, token, remaining)

    def _call(self, steps, kv, token, remaining):
        model = self._source.model
        return decode_steps(model.decoder, self.strategy, (), steps, model.params, kv, token, remaining)


class Prefill:
    """A prompt, from token ids to its next token on the host, the cache's allocation included; a sample is seconds."""

    def __init__(self, source: Prompts, name: str, batch: int, context: int):
        self.name, self.batch, self.context = name, batch, context
        self.strategy = as_strategy(STRATEGIES[name])
        self.pid = os.getpid()
        self._source = source
        self._tokens, self._lengths = source.tokens(batch, context)

    def prepare(self) -> None:
        return

    def sample(self) -> Sample:
        began = time.perf_counter()
        logits, kv = run_prefill(self._source.model, self.strategy, self._tokens, self._lengths, self._source.steps)
        token = np.asarray(first_token(logits, kv.length))
        jax.block_until_ready(kv)
        seconds = time.perf_counter() - began
        return Sample(seconds, _rows(token, np.empty((self.batch, 0), np.int32)))


def _rows(first: np.ndarray, rest: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple((int(token), *(int(t) for t in row)) for token, row in zip(first, rest, strict=True))
