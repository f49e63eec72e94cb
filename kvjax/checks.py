"""What a number has to be before anything is computed with it: one rule for the command line, the library and data files.

A whole number is a Python or NumPy integer; True, 3.0 and "3" are none. Sizes, token counts and seeds fit 32 bits, signed, because that is
what programs compute with. Every check returns the value in Python's own type and raises a KvjaxError of one line.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax.errors import InputError, KvjaxError, SpecError

LARGEST = 2**31 - 1
"""Of 32 bits, signed."""


def whole(name: str, value: Any, least: int = 0, most: int = LARGEST, error: type[KvjaxError] = SpecError) -> int:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise error(f"{name}={_shown(value)} is not a whole number; give {_range(least, most)}")
    if not least <= value <= most:
        raise error(f"{name}={_shown(value)} is out of range; give {_range(least, most)}")
    return int(value)


def optional_whole(name: str, value: Any, least: int = 0, most: int = LARGEST, error: type[KvjaxError] = SpecError) -> int | None:
    """The same, or None."""
    return None if value is None else whole(name, value, least, most, error)


def number(name: str, value: Any, least: float, most: float = math.inf, error: type[KvjaxError] = SpecError) -> float:
    """A number from `least` to `most`, never NaN; infinite only where `most` is."""
    plain = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        result = float(value) if plain else math.nan
    except OverflowError:
        result = math.inf
    if not least <= result <= most:
        if math.isinf(least):
            raise error(f"{name}={_shown(value)} is not a number")
        raise error(f"{name}={_shown(value)} is not a number {f'>= {least:g}' if math.isinf(most) else f'from {least:g} to {most:g}'}")
    return result


def seed(name: str, value: Any, count: int = 1, error: type[KvjaxError] = InputError) -> int:
    """A seed with `count - 1` successors, all from 0 to 2^31 - 1."""
    return whole(name, value, 0, LARGEST + 1 - max(count, 1), error)


def seeds(value: Any, rows: int) -> Int[np.ndarray, " B"]:
    """The seeds of `rows` rows: consecutive ones from an int, or one each. Raises InputError."""
    if not isinstance(value, list | tuple | np.ndarray):
        return np.arange(rows, dtype=np.int32) + np.int32(seed("seed", value, rows))
    if len(value) != rows:
        raise InputError(f"{len(value)} seeds for {rows} prompts; give one each, or a single one")
    return np.array([seed("seed", one) for one in np.asarray(value).tolist()], np.int32)


def token_set(name: str, values: Any) -> tuple[int, ...]:
    """Token ids that stand for themselves, such as those that end a request. Raises InputError."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{name}={_shown(values)} is not a list of token ids; write for example [2], or [] for none")
    return tuple(whole(name, value, error=InputError) for value in np.asarray(list(values), object).tolist())


def token_ids(name: str, values: Any) -> Int[np.ndarray, " N"]:
    """A prompt's token ids, int32: a flat, non-empty sequence of whole numbers. Raises InputError."""
    problem = InputError(f"{name} is not a non-empty list of token ids")
    if not isinstance(values, Sequence | np.ndarray) and not hasattr(values, "__array__"):
        raise problem
    try:
        row = np.asarray(values)
    except (ValueError, OverflowError):
        raise problem from None
    if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
        raise problem
    if int(row.min()) < 0 or int(row.max()) > LARGEST:
        raise InputError(f"{name}: token ids from {row.min()} to {row.max()}; they are 0 or more, and fit 32 bits")
    return row.astype(np.int32)


def text(name: str, value: str) -> str:
    """Text that has a UTF-8 form: halves of surrogate pairs have none. Raises InputError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise InputError(f"{name} holds {half} at character {error.start}, half of a surrogate pair, which is no text") from None
    return value


def _range(least: int, most: int) -> str:
    return f"one of at least {least}" if most == LARGEST else f"one from {least} to {most}"


def _shown(value: Any) -> str:
    """A value in a message of one line."""
    try:
        shown = repr(value.item() if isinstance(value, np.generic) else value)
    except ValueError:  # an int of more digits than Python writes
        return "an enormous number"
    shown = " ".join(shown.split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
