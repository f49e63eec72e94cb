"""Text to token ids and back: bytes for the bundled models, tokenizer.json for everything else."""

import pathlib
from collections.abc import Sequence
from typing import Protocol

import tokenizers

from kvjax.errors import ModelError


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte, ids 0 to 255."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, with the special tokens its post-processor adds."""

    def __init__(self, path: pathlib.Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ModelError(f"{path} is not a readable tokenizer.json: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])
