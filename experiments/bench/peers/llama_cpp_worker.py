"""llama.cpp on the CPU, float32 weights and KV cache, as a worker process (see protocol), through its low-level interface.

Variants, for decoding and prefill alike:
    llama.cpp-f32     flash attention off
    llama.cpp-f32-fa  flash attention on: llama.cpp then casts the float32 cache to float16 in every layer of every step, so this variant is
                      neither float32 nor fast (logits of the benchmark's shape with random weights are off by about 5e-3, against
                      2e-5 with flash attention off), and near ties among its greedy tokens may fall the other way
A batch is B sequences, each with a KV stream of its own (llama.cpp's default), advanced by one llama_decode of B tokens a step. A
context, and with it the KV cache, is allocated once per (variant, batch, capacity) and outside every timing, as llama.cpp does. The
next token is the argmax over the logits that llama.cpp hands out. Prompts go in llama.cpp's default chunks of n_batch tokens.
"""

import ctypes
import dataclasses
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from experiments.bench.peers import prompts
from experiments.bench.peers.make_model import write_gguf
from experiments.bench.peers.protocol import RequestError, Stopwatch, check_prompt, choose, serve

_GGML_TYPE_F32 = 0
_PREFILL_ROOM = 32  # tokens of context beyond the prompt when only the prefill is timed
_LOG_LEVEL_WARN = 3

FLASH_ATTENTION: dict[str, int] = {
    "llama.cpp-f32": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "llama.cpp-f32-fa": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Passes warnings and errors to stderr; llama.cpp is chatty below that."""
    if level >= _LOG_LEVEL_WARN and text.strip(b".\n"):
        sys.stderr.write(text.decode(errors="replace"))


class Sequences:
    """A llama.cpp context for `batch` sequences of up to `capacity` tokens each.

    Owns the C context and one C token batch; `close` frees both.
    """

    def __init__(self, model: Any, flash_attention: int, batch: int, capacity: int, threads: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * capacity
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash_attention
        params.type_k = params.type_v = _GGML_TYPE_F32
        params.kv_unified = False
        self.batch, self.capacity, self.vocab_size = batch, capacity, vocab_size(model)
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {batch} sequences of {capacity} tokens")
        if llama_cpp.llama_n_ctx_seq(self._context) < capacity:
            raise RuntimeError(f"llama.cpp gives {llama_cpp.llama_n_ctx_seq(self._context)} tokens a sequence, {capacity} asked for")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.chunk = llama_cpp.llama_n_batch(self._context)
        size = max(self.chunk, batch)
        self._tokens = llama_cpp.llama_batch_init(size, 0, 1)
        fields = {"token": np.int32, "pos": np.int32, "n_seq_id": np.int32, "logits": np.int8}
        views = {name: np.ctypeslib.as_array(getattr(self._tokens, name), (size,)) for name in fields}
        self._token, self._pos, self._wanted = views["token"], views["pos"], views["logits"]
        views["n_seq_id"][:] = 1

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._tokens)
        llama_cpp.llama_free(self._context)

    def truncate(self, length: int) -> None:
        """Forgets every position from `length` on, in every sequence."""
        for sequence in range(self.batch):
            if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1):
                raise RuntimeError(f"llama.cpp cannot truncate sequence {sequence} to {length} tokens")

    def prefill(self, prompt: np.ndarray) -> np.ndarray:
        """Takes in `prompt` [B, C] from position 0 and returns the next token of each row, [B]."""
        return np.array([self._prefill_row(sequence, row) for sequence, row in enumerate(prompt)], np.int32)

    def decode(self, first: np.ndarray, position: int, steps: int) -> np.ndarray:
        """Feeds `first` [B] at `position` and `steps` - 1 of its successors after it; returns the successors, [B, steps]."""
        out = np.empty((self.batch, steps), np.int32)
        self._tokens.n_tokens = self.batch
        self._wanted[: self.batch] = 1
        for sequence in range(self.batch):
            self._tokens.seq_id[sequence][0] = sequence
        token = first
        for i in range(steps):
            self._token[: self.batch] = token
            self._pos[: self.batch] = position + i
            token = out[:, i] = self._run(self.batch).argmax(-1)
        return out

    def _prefill_row(self, sequence: int, row: np.ndarray) -> int:
        for start in range(0, len(row), self.chunk):
            part = row[start : start + self.chunk]
            self._tokens.n_tokens = len(part)
            self._token[: len(part)] = part
            self._pos[: len(part)] = np.arange(start, start + len(part))
            self._wanted[: len(part)] = 0
            for i in range(len(part)):
                self._tokens.seq_id[i][0] = sequence
            last = start + len(part) == len(row)
            self._wanted[len(part) - 1] = last
            logits = self._run(1 if last else 0)
        return int(logits[0].argmax())

    def _run(self, outputs: int) -> np.ndarray:
        """Decodes the token batch; returns a view of its logits, [outputs, V], valid until the next call."""
        status = llama_cpp.llama_decode(self._context, self._tokens)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        if not outputs:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (outputs, self.vocab_size))


def vocab_size(model: Any) -> int:
    return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


@dataclasses.dataclass
class Prompted:
    """Sequences that hold `prompt` [B, C]; `first` [B] is what follows it."""

    sequences: Sequences
    prompt: np.ndarray
    first: np.ndarray


class LlamaCppWorker:
    """Holds the model, one Prompted per decode cell and one Sequences per prefill cell."""

    def __init__(self) -> None:
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model: Any = None
        self._threads = 0
        self._prompted: dict[tuple[str, int, int, int], Prompted] = {}
        self._empty: dict[tuple[str, int, int], Sequences] = {}

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Loads DIR/model.gguf, writing it first where it is missing or older than the weights."""
        self.release()
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
        path = write_gguf(Path(model))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RequestError(f"llama.cpp cannot load {path.name}")
        self._threads = threads
        return {
            "engine": "llama.cpp",
            "versions": {"llama_cpp_python": metadata.version("llama_cpp_python"), "gguf": metadata.version("gguf")},
            "decode": list(FLASH_ATTENTION),
            "prefill": list(FLASH_ATTENTION),
            "vocab_size": vocab_size(self._model),
        }

    def decode(self, engine: str, batch: int, context: int, steps: int, tokens: list[list[int]] | None = None) -> dict[str, Any]:
        prompt = self._prompt(batch, context, tokens)
        key = (engine, batch, context, steps)
        state = self._prompted.get(key)
        if state is None or not np.array_equal(state.prompt, prompt):
            sequences = state.sequences if state else self._sequences(engine, batch, context + steps)
            sequences.truncate(0)
            state = self._prompted[key] = Prompted(sequences, prompt, sequences.prefill(prompt))
        state.sequences.truncate(context)
        with Stopwatch() as watch:
            out = state.sequences.decode(state.first, context, steps)
        return watch.reply(first=state.first.tolist(), tokens=out.tolist())

    def prefill(self, engine: str, batch: int, context: int, tokens: list[list[int]] | None = None) -> dict[str, Any]:
        prompt = self._prompt(batch, context, tokens)
        key = (engine, batch, context)
        if key not in self._empty:
            self._empty[key] = self._sequences(engine, batch, context + _PREFILL_ROOM)
        sequences = self._empty[key]
        sequences.truncate(0)
        with Stopwatch() as watch:
            first = sequences.prefill(prompt)
        return watch.reply(first=first.tolist())

    def release(self) -> dict[str, Any]:
        for sequences in [*self._empty.values(), *(state.sequences for state in self._prompted.values())]:
            sequences.close()
        self._empty.clear()
        self._prompted.clear()
        return {}

    def _sequences(self, engine: str, batch: int, capacity: int) -> Sequences:
        return Sequences(self._model, choose(FLASH_ATTENTION, engine), batch, capacity, self._threads)

    def _prompt(self, batch: int, context: int, tokens: list[list[int]] | None) -> np.ndarray:
        if self._model is None:
            raise RequestError("no model loaded yet")
        size = vocab_size(self._model)
        if tokens is None:
            tokens = prompts.prompt(batch, context, size)
        check_prompt(tokens, batch, context, size)
        return np.array(tokens, np.int32)


def main() -> None:
    worker = LlamaCppWorker()
    serve({"load": worker.load, "decode": worker.decode, "prefill": worker.prefill, "release": worker.release})


if __name__ == "__main__":
    main()
