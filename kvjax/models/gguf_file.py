"""GGUF containers: the header, checked against the file's size, and tensors, read a block of rows at a time.

The layout is the one that the ggml project documents for versions 2 and 3, little-endian. The header is parsed here
rather than by the `gguf` package, whose reader trusts every count in it; that package says what the quantised types are
and dequantises them.
"""

import dataclasses
import io
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from kvjax.errors import ModelError, clipped

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
"""Metadata entries, and tensors, that a file may have."""
MAX_HEADER = 1 << 26
"""Bytes of metadata and tensor descriptions together; the largest vocabularies take a quarter of it."""
_MAX_NAME = 1 << 16
_MAX_DIMS = 4
_MAX_NESTING = 2
_BLOCK_ELEMENTS = 1 << 18  # of a tensor that are dequantised at once

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, str] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""GGUF's value types, but for strings and arrays, as NumPy spells them."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    Attributes:
      shape: slowest axis first, as NumPy and Hugging Face have it (GGUF writes the fastest first).
      kind: the name of its type in ggml, such as "Q4_1".
      start: byte of the file at which it begins.
      num_bytes: its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: metadata by key (numbers, booleans, strings, lists of them) and tensors by name."""

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def error(self, message: str) -> ModelError:
        """An error that names the file."""
        return ModelError(f"{self.path}: {clipped(message)}")

    def read(self, tensor: TensorInfo, dtype: DTypeLike, rows: np.ndarray | None = None) -> Shaped[np.ndarray, "..."]:
        """One tensor, dequantised and cast to `dtype`; a few MB are in memory besides.

        Args:
          rows: where each row (of all axes but the last) goes in the result; None keeps the order.

        Raises:
          ModelError: the file has become shorter, or holds a type that cannot be dequantised.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[tensor.kind]
        width = tensor.shape[-1]
        count = tensor.num_elements // width
        row_bytes = tensor.num_bytes // count
        result = np.empty((count, width), dtype)
        step = max(1, _BLOCK_ELEMENTS // width)
        try:
            with open(self.path, "rb") as handle, np.errstate(all="ignore"):
                handle.seek(tensor.start)
                for first in range(0, count, step):
                    some = min(step, count - first)
                    raw = handle.read(some * row_bytes)
                    if len(raw) < some * row_bytes:
                        raise self.error(f"ends inside tensor {tensor.name}")
                    values = dequantize(np.frombuffer(raw, np.uint8).reshape(some, row_bytes), kind)
                    result[slice(first, first + some) if rows is None else rows[first : first + some]] = values
        except NotImplementedError:
            raise self.error(f"tensor {tensor.name} is {tensor.kind}, which cannot be dequantised") from None
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}") from None
        return result.reshape(tensor.shape)


def read_header(path: str | os.PathLike) -> GgufFile:
    """The checked header of a GGUF file; no tensor is read.

    Raises:
      ModelError: not a GGUF file of version 2 or 3, a truncated one, or one whose header contradicts itself or the
        file's size.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as handle:
            return _read_header(_Cursor(path, handle, os.fstat(handle.fileno()).st_size))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


@dataclasses.dataclass
class _Cursor:
    """A position in the header."""

    path: pathlib.Path
    handle: io.BufferedReader
    size: int
    at: int = 0

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path} is not a readable GGUF file: {clipped(message)}")

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > self.size - self.at:
            raise self.error(f"{what} goes beyond the end of the file")
        if self.at + count > MAX_HEADER:
            raise self.error(f"{what} makes the header larger than {MAX_HEADER >> 20} MiB")
        data = self.handle.read(count)
        if len(data) < count:
            raise self.error(f"{what} goes beyond the end of the file")
        self.at += count
        return data

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def string(self, what: str, longest: int = MAX_HEADER) -> str:
        length = self.integer(8, what)
        if length > longest:
            raise self.error(f"{what} of {length} bytes")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, nesting)
        if kind not in _SCALARS:
            raise self.error(f"{what} has the unknown type {kind}")
        return self._scalars(kind, 1, what)[0]

    def _array(self, what: str, nesting: int) -> list[Any]:
        kind, count = self.integer(4, what), self.integer(8, what)
        if nesting >= _MAX_NESTING:
            raise self.error(f"{what} is nested too deep")
        if kind in _SCALARS:
            return self._scalars(kind, count, what)
        self._check_room(count, 8, what)  # a string or an array takes 8 bytes at least
        return [self.value(kind, what, nesting + 1) for _ in range(count)]

    def _check_room(self, count: int, size: int, what: str) -> None:
        if count > (min(self.size, MAX_HEADER) - self.at) // size:
            raise self.error(f"{what} has {count} elements, more than there is room for; is the file truncated?")

    def _scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        self._check_room(count, dtype.itemsize, what)
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        return (values.astype(bool) if kind == _BOOL else values).tolist()


def _read_header(cursor: _Cursor) -> GgufFile:
    if cursor.take(min(4, cursor.size), "the magic number") != MAGIC:
        raise cursor.error("it does not begin with GGUF")
    version = cursor.integer(4, "the version")
    if version not in VERSIONS:
        (swapped,) = struct.unpack(">I", struct.pack("<I", version))
        kind = "big-endian" if swapped in VERSIONS else f"version {version}"
        raise cursor.error(f"{kind} files are not supported; supported: little-endian, versions {' and '.join(map(str, VERSIONS))}")
    num_tensors, num_entries = cursor.integer(8, "the tensor count"), cursor.integer(8, "the metadata count")
    for what, count in (("tensors", num_tensors), ("metadata entries", num_entries)):
        if count > MAX_ENTRIES:
            raise cursor.error(f"it claims {count} {what}")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string("a metadata key", _MAX_NAME)
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r} stands there twice")
        metadata[key] = cursor.value(cursor.integer(4, f"the type of {key!r}"), f"metadata {key!r}")
    described = [_read_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two, not {alignment!r}")
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dims, number, offset in described:
        if name in tensors:
            raise cursor.error(f"tensor {name!r} stands there twice")
        tensors[name] = _placed(cursor, name, dims, number, data + offset)
    return GgufFile(cursor.path, metadata, tensors)


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape (slowest axis first), number of its type, and offset from the start of the data."""
    name = cursor.string("a tensor name", _MAX_NAME)
    num_dims = cursor.integer(4, f"tensor {name!r}")
    if not 0 < num_dims <= _MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {num_dims} axes; 1 to {_MAX_DIMS} are possible")
    dims = tuple(cursor.integer(8, f"tensor {name!r}") for _ in range(num_dims))[::-1]
    return name, dims, cursor.integer(4, f"tensor {name!r}"), cursor.integer(8, f"tensor {name!r}")


def _placed(cursor: _Cursor, name: str, dims: tuple[int, ...], number: int, start: int) -> TensorInfo:
    """The tensor, once its bytes are known to lie in the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.error(f"tensor {name!r} has the unknown type {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not all(dims) or dims[-1] % block:
        raise cursor.error(f"tensor {name!r} has shape {list(dims)}, which {kind.name} cannot have")
    num_bytes = math.prod(dims) // block * block_bytes
    if start + num_bytes > cursor.size:
        raise cursor.error(f"tensor {name!r} goes beyond the end of the file; is it truncated?")
    return TensorInfo(name, dims, kind.name, start, num_bytes)
