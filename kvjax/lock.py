"""A directory that one run at a time writes to.

The lock is the kernel's (flock), taken on a file that says who holds it. It goes with the process that took it, however that ends: a file
that a killed one has left behind is stale by itself, and the next run takes it over.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from kvjax.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Holds the directory. Raises InputError, which names the holder, when another process does, or when nothing can be written there."""
    path = directory / NAME
    try:
        handle = _taken(path)
    except OSError as error:
        raise InputError(f"{directory}: cannot write there: {error.strerror or error}") from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds, it only does not say whose it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _taken(path: pathlib.Path) -> int:
    """A handle of the file at `path` that holds its lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        except BlockingIOError:
            raise InputError(f"{path.parent} is being written by {_holder(handle)}; wait for it, or use another directory") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it meanwhile: this is no longer the file that others will see


def _holder(handle: int) -> str:
    try:
        held = json.loads(os.pread(handle, 1000, 0))
        return f"process {held['pid']} on {held['host']}, since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
    finally:
        os.close(handle)
