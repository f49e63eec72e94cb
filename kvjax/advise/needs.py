"""What a user needs of a KV cache, and the error for what the data cannot say."""

import dataclasses
import math
from typing import Any

from kvjax.errors import KvjaxError, SpecError

OBJECTIVES = ("throughput", "latency", "memory")


class OutsideData(KvjaxError):
    """A question the results do not cover. Says the range they have."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What has to hold, and what is to be best. None: no requirement, or for the last four, what the data has most of (and it is said).

    Attributes:
      ttft, tpot: milliseconds that `attainment` of the requests stay within, each.
      kv_memory: bytes of device memory for the cache, its metadata and staging.
      min_recall: the least share of facts recalled; max_kld: the most divergence from the full cache, nats.
      objective: throughput (tokens/s, or of requests within ttft and tpot where these are given), latency (mean end to end) or memory.
      request_rate: requests/s offered; None: offline, whole batches.
      input_len: tokens of a prompt.
      batch_size: offline; None: each strategy at the batch that suits it best.
    """

    ttft: float | None = None
    tpot: float | None = None
    kv_memory: int | None = None
    min_recall: float | None = None
    max_kld: float | None = None
    objective: str = "throughput"
    attainment: float = 0.9
    request_rate: float | None = None
    input_len: int | None = None
    model: str | None = None
    batch_size: int | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise SpecError(f"objective={self.objective} does not exist; choose from {', '.join(OBJECTIVES)}")
        for name in ("ttft", "tpot", "kv_memory", "request_rate", "input_len", "batch_size"):
            wanted = getattr(self, name)
            if wanted is not None and not wanted > 0:
                raise SpecError(f"{name}={wanted:g} is not above 0")
        for name in ("ttft", "tpot", "max_kld"):
            wanted = getattr(self, name)
            if wanted is not None and not (math.isfinite(wanted) and wanted >= 0):
                raise SpecError(f"{name}={wanted:g} is not a finite number of at least 0; leave it out where there is no requirement")
        if self.min_recall is not None and not 0 <= self.min_recall <= 1:
            raise SpecError(f"min_recall={self.min_recall:g} is not a share between 0 and 1, such as 0.9")
        if not 0 < self.attainment < 1:
            raise SpecError(f"attainment={self.attainment:g} is not a share between 0 and 1, such as 0.9")
        if self.batch_size is not None and self.request_rate is not None:
            raise SpecError("batch_size has no meaning under load; leave it out, or request_rate")

    def record(self) -> dict[str, Any]:
        """As JSON; an infinite rate is "inf", as in records."""
        return {
            name: "inf" if isinstance(wanted, float) and math.isinf(wanted) else wanted for name, wanted in dataclasses.asdict(self).items()
        }
