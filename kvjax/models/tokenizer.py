"""Text to token ids and back: bytes for the bundled models, the `tokenizers` library for everything else.

Text is encoded with the special tokens that the model wants around it (such as a token that begins a sequence), and
special tokens written out in the text are recognised. Decoding leaves special tokens out. A conversation has its
special tokens from the chat template, so that `encode_chat` adds none.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tokenizers

from kvjax.errors import InputError, KvjaxError, ModelError, clipped
from kvjax.models.chat import ChatTemplate, Message
from kvjax.models.hugging_face_config import read_json


class Tokenizer(Protocol):
    """What turns text into token ids."""

    chat_template: ChatTemplate | None
    """How a conversation becomes a text; None where the model has no such thing."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InputError for what is no Unicode text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises InputError for what cannot be a token id."""
        ...

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text (see `ChatTemplate.render`). Raises InputError without a template too."""
        ...

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: only what the template writes. Raises as `apply_chat_template`."""
        ...


def check_text(text: Any) -> str:
    """`text`, if it is one. Raises InputError for another type, and for half of a surrogate pair, which has no UTF-8."""
    if not isinstance(text, str):
        raise InputError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"this is no Unicode text: character {error.start} is {half}, half of a surrogate pair") from None
    return text


class _Chat:
    """The methods that need no more than `encode` and a template."""

    chat_template: ChatTemplate | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        if self.chat_template is None:
            raise InputError("this model has no chat template; give it plain text")
        return self.chat_template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        return self.encode(self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False)


class ByteTokenizer(_Chat):
    """One token per UTF-8 byte, ids 0 to 255; there are no special tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(check_text(text).encode())

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return bytes(int(i) for i in ids).decode(errors="replace")
        except ValueError:
            raise InputError("byte-level token ids are 0 to 255") from None


@contextlib.contextmanager
def _library_errors(kind: type[KvjaxError], what: str) -> Iterator[None]:
    """Turns what the Rust side raises, bare Exceptions and panics (which are no Exceptions), into one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, KvjaxError):
        raise
    except BaseException as error:
        raise kind(f"{what}: {clipped(' '.join(str(error).split()))}") from None


class LibraryTokenizer(_Chat):
    """A tokenizer of the `tokenizers` library, rid of what changes texts unasked: truncation, padding and dropout."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = False
        self._tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        check_text(text)
        with _library_errors(InputError, "the tokenizer of this model cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return self._tokenizer.decode([int(i) for i in ids])
        except OverflowError:
            raise InputError("token ids are whole numbers from 0") from None


class HuggingFaceTokenizer(LibraryTokenizer):
    """A tokenizer.json, with the chat template that lies beside it."""

    def __init__(self, path: pathlib.Path):
        with _library_errors(ModelError, f"{path} is not a readable tokenizer.json"):
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        super().__init__(tokenizer, _template_beside(path.parent))


def _template_beside(directory: pathlib.Path) -> ChatTemplate | None:
    """The template of a directory: chat_template.jinja, else what tokenizer_config.json holds. Raises ModelError."""
    config = directory / "tokenizer_config.json"
    values = read_json(config) if config.exists() else {}
    file, template = directory / "chat_template.jinja", values.get("chat_template")
    if file.exists():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable text: {error}") from None
    elif isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelError(f"{config}: chat_template must be text, or a list of texts with names")
    return ChatTemplate(template, _token_text(values.get("bos_token")), _token_text(values.get("eos_token")))


def _token_text(value: Any) -> str:
    """A special token of tokenizer_config.json: a text, or an object that holds one."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
