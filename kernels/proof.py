"""How implementations are proven: the same cases, on a card where there is one and in the interpreter where there is none.

Every operation's folder lists its own in `cases.py`: `CASES`, and `verify(case, rng, implementation)`, which raises AssertionError. Random
inputs come from the generator given, so that a seed brings a failure back.
"""

import contextlib

from . import dispatch
from .dispatch import Name


def somehow(implementation: Name, *, threads: int = 1) -> contextlib.AbstractContextManager[None]:
    """Within it, an implementation runs: as it is where the device has it, else in its interpreter, where races are errors.

    Args:
      threads: of a block, for the interpreter (`dispatch.interpreted`).
    """
    if implementation == "xla" or dispatch.unavailable(implementation, dispatch.current_device()) is None:
        return contextlib.nullcontext()
    return dispatch.interpreted(implementation, threads=threads)
