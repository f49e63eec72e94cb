"""PyTorch's attention and transformers' generate on the card, in a process of their own. Imports torch, and transformers where asked for.

    python experiments/gpu/torch_peer.py '{"what": "copy", "size": 1073741824}'

Prints one JSON object. Times are of the device, by its events: the median of several runs of twenty calls, which take turns on sets of
arguments that exceed its caches together. `generate` is timed by the host's clock, a long answer less a short one.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

CACHE_BYTES, CALLS, REPETITIONS = 256 << 20, 20, 7


def main() -> None:
    request = json.loads(sys.argv[1])
    what = request.pop("what")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers: dict[str, Callable[..., dict]] = {"attention": attention, "copy": copy, "generate": generate}
    with torch.inference_mode():
        found = answers[what](device, **request)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps(found | {"torch_version": torch.__version__, "peer_device": name}))


def attention(device: str, batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> dict:
    """scaled_dot_product_attention, causal where there is more than one query."""
    dtype = torch.bfloat16
    size = 2 * batch * kv_heads * keys * dim * 2
    sets = max(2, min(16, -(-CACHE_BYTES // size)))
    q = torch.randn(batch, heads, queries, dim, dtype=dtype, device=device)
    kv = [[torch.randn(batch, kv_heads, keys, dim, dtype=dtype, device=device) for _ in "kv"] for _ in range(sets)]

    def call(i: int):
        k, v = kv[i % sets]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=heads != kv_heads)

    return timed(device, call) | {"moved_bytes": size}


def copy(device: str, size: int) -> dict:
    source = torch.randn(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return timed(device, lambda i: target.copy_(source)) | {"moved_bytes": 2 * size}


def timed(device: str, call) -> dict:
    for i in range(3):
        call(i)
    samples = []
    for _ in range(REPETITIONS):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for i in range(CALLS):
                call(i)
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) * 1e-3 / CALLS)
        else:
            began = time.perf_counter()
            call(0)
            samples.append(time.perf_counter() - began)
    return {"median_seconds": statistics.median(samples), "samples_seconds": samples}


def generate(device: str, config: dict, batch: int, context: int, tokens: int) -> dict:
    """Seconds a step of model.generate, which ends with `context` tokens in every row. Random weights in bfloat16."""
    import transformers

    kind = {"opt": transformers.OPTConfig, "llama": transformers.LlamaConfig}[config.pop("family")](**config)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(1, kind.vocab_size, (batch, context - tokens), device=device)

    def seconds(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False)
        if device == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == ids.shape[1] + count
        return time.perf_counter() - began

    seconds(2)
    samples = [(seconds(tokens) - seconds(1)) / (tokens - 1) for _ in range(3)]
    return {"median_seconds": statistics.median(samples), "samples_seconds": samples, "transformers_version": transformers.__version__}


if __name__ == "__main__":
    main()
