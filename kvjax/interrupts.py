"""Ctrl-C and its like, held back while something must not be left half done.

    with held() as interrupt:
        while not interrupt.waiting:
            step()

An interrupt is one of SIGNALS for which the process has a handler of Python's own. Inside `held` the first one only waits: whoever holds it
may end early, and has it raised, by the handler that was there before, when the block is left. The second one does not wait.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass
class Interrupt:
    """The signal that waits; None as long as there is none."""

    waiting: int | None = None

    def settle(self) -> None:
        """It has been heeded: it is not raised any more."""
        self.waiting = None


_holding: Interrupt | None = None


@contextlib.contextmanager
def held() -> Iterator[Interrupt]:
    """Holds interrupts back. Inside another `held`, and off the main thread, which alone is interrupted, nothing changes."""
    global _holding
    if threading.current_thread() is not threading.main_thread():
        yield Interrupt()
        return
    if _holding is not None:
        yield _holding
        return
    interrupt = Interrupt()
    before: dict[int, Callable[[int, Any], Any]] = {}

    def note(signum: int, frame: Any) -> None:
        if interrupt.waiting is None:
            interrupt.waiting = signum
        else:
            before[signum](signum, frame)

    for signum in SIGNALS:
        handler = signal.getsignal(signum)
        if callable(handler):
            before[signum] = handler
    _holding = interrupt
    try:
        for signum in before:
            signal.signal(signum, note)
        yield interrupt
    finally:
        _holding = None
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if interrupt.waiting is not None:
            before[interrupt.waiting](interrupt.waiting, None)
