"""What kvjax writes: files that are whole or not there, in UTF-8 whatever the locale, and JSON that any parser reads."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kvjax.errors import InputError


def plain(value: Any) -> Any:
    """The same in JSON's own types: arrays are lists, an infinite number is "inf", what is no number is None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON in the strict sense, of any value that `plain` takes."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def json_lines(values: Iterable[Any]) -> str:
    """One JSON value a line."""
    return "".join(dumps(value) + "\n" for value in values)


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes one file (`replace_all`)."""
    replace_all({path: content})


def replace_all(contents: Mapping[pathlib.Path, str | bytes]) -> None:
    """Writes files, all of them or none: what a disk has no room for leaves no pieces behind, and the files that were there stay.

    They are on the disk when this returns. Text is written in UTF-8. Raises InputError, which names the file.
    """
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in contents}
    path = next(iter(parts), None)
    try:
        for path, part in parts.items():
            content = contents[path]
            data = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
