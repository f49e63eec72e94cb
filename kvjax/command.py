"""What the command lines share: flags that end in one line when they are wrong, that line, and how a program ends.

Exit codes: 2 for bad input and for what cannot be written, 130 for an interrupt (Ctrl-C, SIGTERM or SIGHUP). A reader that closes the pipe
early changes nothing: the program ends as it would have ended.
"""

import codecs
import contextlib
import errno
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from jax.errors import JaxRuntimeError
from rich.console import Console

from kvjax.errors import KvjaxError
from kvjax.interrupts import SIGNALS

INTERRUPTED = 130
WIDTH = 150
"""Columns of a table that does not go to a terminal."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EBADF)
"""What a disk or a stream that takes no more answers."""

PLAINER = {"±": "+-", "∞": "inf", "…": "...", "μ": "u", "µ": "u", "–": "-", "·": "*", "×": "x"}
"""What stands for a sign that a stream cannot show; for others a question mark."""

AGAIN = 0.01
"""Seconds."""

_received: list[int] = []
"""Signals that the program has got."""


def start(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a program that has flags: `main` with the arguments that are none. Ends the process."""
    end_well(lambda: app.run(main, flags_parser=parse_flags))


def end_well(program: Callable[[], Any]) -> NoReturn:
    """Runs a program, and ends the process as this module says."""
    steady_streams()
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    sys.unraisablehook = _unraisable
    code: Any = 0
    try:
        with answered():
            program()
    except SystemExit as ended:
        code = ended.code
    with answered(quietly=True):
        sys.stdout.flush()
    sys.exit(code)


@contextlib.contextmanager
def answered(quietly: bool = False) -> Iterator[None]:
    """Ends the program in one line when the block ends in bad input, an interrupt, or a stream or disk that takes no more.

    `quietly`: what happens after the last word has no line, and ends nothing.
    """
    try:
        yield
    except BrokenPipeError:
        mute()
    except (Exception, KeyboardInterrupt) as error:
        if _received or isinstance(error, KeyboardInterrupt):  # whatever the interrupt has turned into on its way
            fail("interrupted", INTERRUPTED)
        if isinstance(error, KvjaxError):
            fail(error)
        if isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
            fail(f"out of memory: {' '.join(str(error).split())[:200]}")
        if not isinstance(error, OSError) or error.errno not in UNWRITABLE:
            raise
        if error.filename is None:
            mute()
        if not quietly:
            fail(f"cannot write to {error.filename or 'the standard output'}: {error.strerror}")


def parse_flags(argv: list[str]) -> list[str]:
    """Sets FLAGS and returns what is no flag. A flag that is unknown, missing or out of range ends the program like any other bad input."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()) + "; see --help")
    for name in flags.FLAGS:
        value, least = flags.FLAGS[name].value, getattr(flags.FLAGS[name].parser, "lower_bound", None)
        if isinstance(value, float) and math.isnan(value):
            fail(f"flag --{name}=nan is not a number" + ("" if least is None else f" >= {least:g}") + "; see --help")
    return rest


def fail(message: object, code: int = 2) -> NoReturn:
    """Says what is wrong, in one line, and ends the program."""
    notice(message)
    sys.exit(code)


def notice(message: object) -> None:
    """Says something beside the results, in a line of the standard error."""
    with contextlib.suppress(OSError, ValueError):
        print(f"kvjax: {message}", file=sys.stderr, flush=True)


class Printer(Console):
    """A console for a standard output that may be closed at any time: it then says nothing more."""

    def __init__(self, width: int = WIDTH):
        """`width`: in columns, of what does not go to a terminal."""
        super().__init__(width=None if sys.stdout.isatty() else width)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute()


def steady_streams() -> None:
    """Makes the standard streams such that printing does not fail for want of one, or of a sign in its encoding."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its place, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the program runs)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PLAINER_ERRORS)


def mute() -> None:
    """What is printed from here on, and what waits to be, goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAINER.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


_PLAINER_ERRORS = "kvjax.plainer"
codecs.register_error(_PLAINER_ERRORS, _plainer)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    _received.append(signum)
    raise KeyboardInterrupt


def _unraisable(problem: Any) -> None:
    """An interrupt that came while the garbage was collected, where nothing can be raised, comes again a little later."""
    if not issubclass(problem.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(problem)
        return
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), _received[-1] if _received else signal.SIGINT))
    again.daemon = True
    again.start()
