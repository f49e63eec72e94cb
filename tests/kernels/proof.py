"""How implementations are proven: the same cases, on a card where there is one and in the interpreter where there is none.

Every operation's folder here lists its own in `cases.py`: `CASES`, and `verify(case, rng, implementation)`, which raises AssertionError
where an implementation differs from `reference.py`. Random inputs come from the generator given, so that a seed brings a failure back.
The tests run them in the interpreters, `python -m experiments.gpu_suite --part=correctness` on a card.
"""

import contextlib
from typing import Any

from kvjax.kernels import dispatch
from kvjax.kernels.dispatch import Name

TOLERANCE: dict[str, dict[str, Any]] = {
    "float32": dict(rtol=1e-5, atol=1e-5),
    "bfloat16": dict(rtol=2**-7, atol=2**-8),
    "float16": dict(rtol=2**-10, atol=2**-11),
}
"""How far the output of attention may be from the reference, by its type. Relative: it is rounded to this type, twice that is allowed.
Absolute: so are the weights, which add up to one, before they meet values of standard deviation one."""


def somehow(implementation: Name, *, threads: int = 1) -> contextlib.AbstractContextManager[None]:
    """Within it, an implementation runs: as it is where the device has it, else in its interpreter, where races are errors.

    Args:
      threads: of a block, for the interpreter (`dispatch.interpreted`).
    """
    if implementation == "xla" or dispatch.unavailable(implementation, dispatch.current_device()) is None:
        return contextlib.nullcontext()
    return dispatch.interpreted(implementation, threads=threads)
