"""Files are whole or not there; JSON is strict; streams that cannot show, or take, a thing end nothing."""

import dataclasses
import errno
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvjax import command, files
from kvjax.errors import InputError
from kvjax.interrupts import held
from kvjax.lock import NAME, locked


def strict(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@dataclasses.dataclass(frozen=True)
class Pair:
    x: float
    y: np.ndarray


def test_json_is_strict_whatever_it_is_made_of():
    value = {
        "nan": float("nan"), "inf": float("inf"), "low": -np.inf, "f": np.float32("nan"), "i": np.int64(3), "b": np.bool_(True),
        "list": [1.5, (np.nan,)], "array": np.array([1.0, np.nan]), "pair": Pair(np.nan, np.arange(2)), 4: None,
    }  # fmt: skip
    assert strict(files.dumps(value)) == {
        "nan": None, "inf": "inf", "low": "-inf", "f": None, "i": 3, "b": True,
        "list": [1.5, [None]], "array": [1.0, None], "pair": {"x": None, "y": [0, 1]}, "4": None,
    }  # fmt: skip
    assert [strict(line) for line in files.json_lines([{"a": np.nan}, 2]).splitlines()] == [{"a": None}, 2]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process can become longer than 1,000 bytes, which is an OSError as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, small_disk):
    old, new = tmp_path / "old.json", tmp_path / "new.jsonl"
    old.write_text("before")
    with pytest.raises(InputError, match=f"cannot write {new}: File too large"):
        files.replace_all({old: "after", new: "x" * 2000})
    assert (os.listdir(tmp_path), old.read_text()) == (["old.json"], "before")


def test_text_is_utf_8_and_halves_of_pairs_do_not_stop_it(tmp_path):
    files.replace_all({tmp_path / "a": "é±\ud83d", tmp_path / "b": b"\x00\xff"})
    assert (tmp_path / "a").read_bytes() == "é±".encode() + rb"\ud83d"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == []


def test_a_directory_without_room_for_a_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there: Not a directory"), locked(tmp_path / "file"):
        pytest.fail("locked")


def test_a_lock_holds_although_its_file_cannot_say_whose_it_is(tmp_path, monkeypatch):
    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path), pytest.raises(InputError, match="is being written by another run"), locked(tmp_path):
        pytest.fail("locked twice")
    assert not (tmp_path / NAME).exists()


# --------------------------------------------------------------------------------------------------------------------------- streams


def stream_of(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"1 +- 2 inf ? x ??"), ("latin-1", "1 ± 2 inf ? × é?".encode("latin-1")), ("utf-8", "1 ± 2 ∞ 語 × é?".encode())],
)
def test_a_stream_shows_what_it_can(monkeypatch, encoding, shown):
    stream = stream_of(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    command.steady_streams()
    print("1 ± 2 ∞ 語 × é\udcff", end="", flush=True)
    assert stream.buffer.getvalue() == shown  # type: ignore[attr-defined]


def test_streams_that_are_closed_take_what_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    command.steady_streams()
    print("nowhere", flush=True)
    with pytest.raises(SystemExit):
        command.fail("nowhere")


def answer(problem: BaseException, capsys) -> tuple[int | str | None, str]:
    """The exit code and what was said of a problem; no code where the program went on."""
    code: int | str | None = None
    try:
        with command.answered():
            raise problem
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err


def test_what_a_program_ends_in(capsys, monkeypatch):
    monkeypatch.setattr(command, "mute", lambda: None)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert answer(InputError("not so"), capsys) == (2, "kvjax: not so\n")
    assert answer(KeyboardInterrupt(), capsys) == (130, "kvjax: interrupted\n")
    assert answer(full, capsys) == (2, "kvjax: cannot write to the standard output: No space left on device\n")
    assert answer(OSError(errno.ENOSPC, "No space left", "/x"), capsys) == (2, "kvjax: cannot write to /x: No space left\n")
    assert answer(MemoryError("all gone"), capsys) == (2, "kvjax: out of memory: all gone\n")
    assert answer(BrokenPipeError(), capsys) == (None, "")
    with pytest.raises(ZeroDivisionError):
        answer(ZeroDivisionError(), capsys)
    monkeypatch.setattr(command, "_received", [signal.SIGTERM])
    for problem in (ValueError("list.remove(x): x not in list"), InputError("a result of the interrupt")):
        assert answer(problem, capsys) == (130, "kvjax: interrupted\n")


# ------------------------------------------------------------------------------------------------------------------------ interrupts


def test_an_interrupt_waits_for_the_end_of_the_block():
    steps: list[object] = []

    def block() -> None:
        with held() as interrupt:
            signal.raise_signal(signal.SIGINT)
            steps.append(interrupt.waiting)
            with held() as inner:
                steps.append(inner.waiting)
            steps.append("inner left")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == [signal.SIGINT, signal.SIGINT, "inner left"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_was_heeded_is_not_raised():
    with held() as interrupt:
        signal.raise_signal(signal.SIGINT)
        interrupt.settle()


def test_the_second_interrupt_does_not_wait():
    def block() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        block()


def test_what_another_handler_does_with_a_signal_it_does_later(monkeypatch):
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with held():
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_in_a_destructor_is_not_lost(monkeypatch):
    class Collected:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", command._unraisable)

    def wait() -> None:
        one = Collected()
        del one  # the interrupt is swallowed here
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        wait()
