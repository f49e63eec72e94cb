"""A headless Chromium, driven over the DevTools protocol on a pair of pipes: the standard library is all it takes.

Messages are JSON ended by a zero byte; the browser reads them from file descriptor 3 and writes to 4 (`--remote-debugging-pipe`).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT = 60.0
"""Seconds a browser on a busy machine may take to answer."""

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip


def found() -> str | None:
    """Where a browser is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab of a browser.

    Attributes:
      events: what it has told so far, in order: (method, parameters).
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._reader, self._writer = reader, writer
        self._buffer, self._count, self._session = b"", 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Asks for something and waits for the answer. Raises RuntimeError with the browser's message."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, path: pathlib.Path) -> None:
        """Loads a file and waits until it is there, with all it asks for."""
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + TIMEOUT
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            assert time.monotonic() < deadline, "the page does not load"
            self._receive()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises RuntimeError for one that throws."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Clicks with a mouse in the middle of an element; what lies over it gets the click instead, as for a reader."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Types into a field, in place of what it holds."""
        self.run(f"(f => {{ f.focus(); f.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.send("Input.insertText", text=text)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], TIMEOUT)
            assert ready, "the browser does not answer"
            part = os.read(self._reader, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message.get("params", {})))
        return message


@contextlib.contextmanager
def opened(program: str) -> Iterator[Page]:
    """A browser with one tab; it and its profile are gone at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        theirs_in, writer = (_high(end) for end in os.pipe())
        reader, theirs_out = (_high(end) for end in os.pipe())

        def hand_over() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        environment = os.environ | {"HOME": profile, "XDG_CONFIG_HOME": profile, "XDG_CACHE_HOME": profile}
        process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=hand_over, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = Page(reader, writer)
            yield page
            with contextlib.suppress(Exception):
                page._session = None
                page.send("Browser.close")
        finally:
            os.close(writer)
            os.close(reader)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _high(end: int) -> int:
    """The same end of a pipe under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
