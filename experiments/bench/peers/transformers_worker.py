"""transformers on the CPU, float32, sdpa attention, as a worker process (see protocol).

Variants of decoding:
    hf-dynamic-loop    DynamicCache, a plain greedy loop around the model
    hf-static-eager    StaticCache of context + steps slots, the same loop
    hf-generate        model.generate as a user types it, continuing from the prompt's DynamicCache
    hf-static-compile  hf-static-eager with the decode step under torch.compile (fixed shapes, one graph)
    hf-static-freeze   and with inductor's weight freezing
Prefill is timed for the first three; the compiled ones compile only the decode step. The prompt's forward computes logits of the last
position only, and starts with a fresh cache, whose allocation is part of its time. Compilation happens when a cell is first seen,
outside every timing.
"""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from experiments.bench.peers import prompts
from experiments.bench.peers.protocol import RequestError, Stopwatch, check_prompt, choose, serve

Forward = Callable[..., Any]
_PREFILL_ROOM = 32  # tokens of a static cache beyond the prompt when only the prefill is timed
_COMPILED_SHAPES = 256  # batch and context pairs torch.compile may specialise on


class Decoding(abc.ABC):
    """The state behind a prompt, from which the same greedy steps can be run any number of times.

    Attributes:
        prompt: token ids, [B, C].
        first: the token the prompt gives, [B, 1].
    """

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor, steps: int):
        self.model, self.prompt, self.steps = model, prompt, steps
        self.cache = self.new_cache(model, prompt.shape[1] + steps)
        self.first = greedy(model, prompt, self.cache)

    @staticmethod
    @abc.abstractmethod
    def new_cache(model: LlamaForCausalLM, capacity: int) -> Any:
        """An empty cache; `capacity` in tokens."""

    def warm_up(self) -> None:
        """What has to happen once before the first timing; may leave tokens in the cache."""
        return

    @abc.abstractmethod
    def rewind(self) -> None:
        """Makes the cache hold the prompt and nothing else. Not timed."""

    @abc.abstractmethod
    def decode(self) -> torch.Tensor:
        """The next `steps` tokens, [B, steps]. Timed."""


class DynamicLoop(Decoding):
    @staticmethod
    def new_cache(model: LlamaForCausalLM, capacity: int) -> DynamicCache:
        return DynamicCache(config=model.config)

    def rewind(self) -> None:
        self.cache.crop(-(self.cache.get_seq_length() - self.prompt.shape[1]))

    def decode(self) -> torch.Tensor:
        return greedy_loop(self.model, self.first, self.cache, self.steps)


class Generate(DynamicLoop):
    """generate() sees prompt and first token, finds the prompt in the cache, and so runs `steps` single-token forwards."""

    def decode(self) -> torch.Tensor:
        ids = torch.cat([self.prompt, self.first], dim=1)
        return generate(self.model, ids, self.steps, past_key_values=self.cache)


class StaticLoop(Decoding):
    """`forward` is the decode step: the model itself or a compiled form of it. The prompt always runs eagerly."""

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor, steps: int, forward: Forward | None = None):
        super().__init__(model, prompt, steps)
        self.forward = model if forward is None else forward

    @staticmethod
    def new_cache(model: LlamaForCausalLM, capacity: int) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=capacity)

    def warm_up(self) -> None:
        if self.forward is not self.model:
            greedy(self.forward, self.first, self.cache)

    def rewind(self) -> None:
        for layer in self.cache.layers:  # slots beyond the length are masked, and overwritten in turn
            layer.cumulative_length.fill_(self.prompt.shape[1])

    def decode(self) -> torch.Tensor:
        return greedy_loop(self.forward, self.first, self.cache, self.steps)


def greedy(forward: Forward, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """The most likely next token, [B, 1], after `tokens` [B, S] on top of `cache`, which takes them in."""
    logits = forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def greedy_loop(forward: Forward, token: torch.Tensor, cache: Any, steps: int) -> torch.Tensor:
    out = []
    for _ in range(steps):
        token = greedy(forward, token, cache)
        out.append(token)
    return torch.cat(out, dim=1)


def generate(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int, **inputs: Any) -> torch.Tensor:
    """The `new_tokens` greedy tokens after `ids`, [B, new_tokens], by model.generate.

    The mask of ones is what a tokenizer gives; without it generate() would take ids equal to the padding token for padding.
    """
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **inputs)
    return out[:, ids.shape[1] :]


class TransformersWorker:
    """Holds the model and one Decoding per (variant, batch, context, steps)."""

    def __init__(self) -> None:
        self._model: LlamaForCausalLM | None = None
        self._decodings: dict[tuple[str, int, int, int], Decoding] = {}
        self._forwards: dict[bool, Forward] = {}
        self.decode_variants: dict[str, Callable[[LlamaForCausalLM, torch.Tensor, int], Decoding]] = {
            "hf-dynamic-loop": DynamicLoop,
            "hf-static-eager": StaticLoop,
            "hf-generate": Generate,
            "hf-static-compile": lambda model, ids, steps: StaticLoop(model, ids, steps, self._compiled(freezing=False)),
            "hf-static-freeze": lambda model, ids, steps: StaticLoop(model, ids, steps, self._compiled(freezing=True)),
        }
        self.prefill_variants: dict[str, type[Decoding]] = {
            "hf-dynamic-loop": DynamicLoop,
            "hf-static-eager": StaticLoop,
            "hf-generate": Generate,
        }

    @property
    def model(self) -> LlamaForCausalLM:
        if self._model is None:
            raise RequestError("no model loaded yet")
        return self._model

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Loads a directory, replacing the one before; `threads` is torch's intra-op thread count."""
        torch.set_num_threads(threads)
        self.release()
        self._forwards.clear()
        loaded = LlamaForCausalLM.from_pretrained(Path(model), dtype=torch.float32, attn_implementation="sdpa").eval()
        loaded.generation_config.eos_token_id = None
        loaded.generation_config.pad_token_id = 0
        self._model = loaded
        return {
            "engine": "transformers",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "decode": list(self.decode_variants),
            "prefill": list(self.prefill_variants),
            "vocab_size": loaded.config.vocab_size,
        }

    @torch.inference_mode()
    def decode(self, engine: str, batch: int, context: int, steps: int, tokens: list[list[int]] | None = None) -> dict[str, Any]:
        ids = self._prompt(batch, context, tokens)
        new = choose(self.decode_variants, engine)
        key = (engine, batch, context, steps)
        decoding = self._decodings.get(key)
        if decoding is None or not torch.equal(decoding.prompt, ids):
            decoding = self._decodings[key] = new(self.model, ids, steps)
            decoding.warm_up()
        decoding.rewind()
        with Stopwatch() as watch:
            out = decoding.decode()
        return watch.reply(first=decoding.first[:, 0].tolist(), tokens=out.tolist())

    @torch.inference_mode()
    def prefill(self, engine: str, batch: int, context: int, tokens: list[list[int]] | None = None) -> dict[str, Any]:
        ids = self._prompt(batch, context, tokens)
        kind = choose(self.prefill_variants, engine)
        with Stopwatch() as watch:
            if kind is Generate:
                first = generate(self.model, ids, 1)
            else:
                first = greedy(self.model, ids, kind.new_cache(self.model, context + _PREFILL_ROOM))
        return watch.reply(first=first[:, 0].tolist())

    def release(self) -> dict[str, Any]:
        self._decodings.clear()
        return {}

    def _compiled(self, freezing: bool) -> Forward:
        torch._dynamo.config.recompile_limit = _COMPILED_SHAPES
        if freezing not in self._forwards:
            options: dict[str, Any] | None = {"freezing": True} if freezing else None
            self._forwards[freezing] = torch.compile(self.model, dynamic=False, fullgraph=True, options=options)
        return self._forwards[freezing]

    def _prompt(self, batch: int, context: int, tokens: list[list[int]] | None) -> torch.Tensor:
        vocab_size = self.model.config.vocab_size
        if tokens is None:
            tokens = prompts.prompt(batch, context, vocab_size)
        check_prompt(tokens, batch, context, vocab_size)
        return torch.tensor(tokens, dtype=torch.long)


def main() -> None:
    worker = TransformersWorker()
    serve({"load": worker.load, "decode": worker.decode, "prefill": worker.prefill, "release": worker.release})


if __name__ == "__main__":
    main()
