"""kvjax: KV-cache strategies for LLM inference in JAX. Choose one, measure it, write your own.

The front door:

    model = kvjax.load_model("kvjax-4m")
    kvjax.generate(model, ["import os\n"], strategy="h2o(heavy=0.1,recent=0.1)", max_new_tokens=64)
    kvjax.score(model, token_ids, prompt_len=512, strategy="streaming(sinks=4,window=252)")
"""

from typing import TYPE_CHECKING

from kvjax.cache import Policy, Slots, Store, Strategy, dense, host, paged, parse_strategy
from kvjax.engine.engine import Engine
from kvjax.errors import InputError, KvjaxError, ModelError, NotFiniteError, SpecError
from kvjax.generation import Generation, PrefillPlan, generate, score, stream
from kvjax.models import Model, load_model
from kvjax.sampling import Sampling

if TYPE_CHECKING:
    from kvjax.calibrate import calibrated


def __getattr__(name: str):
    """`calibrated` comes on demand: kvjax.calibrate is a program too, and a program should not be imported before it runs."""
    if name == "calibrated":
        from kvjax.calibrate import calibrated

        return calibrated
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Engine", "Generation", "InputError", "KvjaxError", "Model", "ModelError", "NotFiniteError", "Policy", "PrefillPlan", "Sampling",
    "Slots", "SpecError", "Store", "Strategy", "calibrated", "dense", "generate", "host", "load_model", "paged", "parse_strategy", "score",
    "stream",
]  # fmt: skip
