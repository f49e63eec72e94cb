"""Latency and throughput of requests, by the definitions and under the JSON keys of `vllm bench serve`."""

import dataclasses
from collections.abc import Sequence

import numpy as np

TPOT_DEFINITION = "(e2el - ttft) / (output_tokens - 1) per request; requests with one token left out"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One finished request; times in seconds on a common clock.

    Attributes:
      start: when it was sent.
      token_times: when each output token was known to the client.
    """

    start: float
    token_times: tuple[float, ...]
    input_tokens: int

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        steps = len(self.token_times) - 1
        return (self.e2el - self.ttft) / steps if steps else None

    @property
    def itls(self) -> list[float]:
        """Gaps between successive tokens."""
        return list(np.diff(self.token_times))


def summarise(timelines: Sequence[Timeline], duration: float | None = None, percentiles: Sequence[float] = (99,)) -> dict[str, float | int]:
    """The summary keys of `vllm bench serve` for finished requests.

    Args:
      duration: seconds; None: from the first start to the last token.
    """
    if not timelines:
        return {"completed": 0}
    if duration is None:
        duration = max(t.token_times[-1] for t in timelines) - min(t.start for t in timelines)
    inputs, outputs = sum(t.input_tokens for t in timelines), sum(len(t.token_times) for t in timelines)
    samples = {
        "ttft": [t.ttft for t in timelines],
        "tpot": [t.tpot for t in timelines if t.tpot is not None],
        "itl": [gap for t in timelines for gap in t.itls],
        "e2el": [t.e2el for t in timelines],
    }
    result: dict[str, float | int] = {
        "duration": duration,
        "completed": len(timelines),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(timelines) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    for name, seconds in samples.items():
        ms = np.asarray(seconds or [0.0]) * 1e3
        result |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms)), f"std_{name}_ms": float(ms.std())}
        result |= {f"p{p:g}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}
    return result
