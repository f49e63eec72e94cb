"""Chat templates: the Jinja programs that models carry, run in a sandbox: they come with files from anywhere."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvjax.errors import InputError, ModelError

Message = Mapping[str, Any]
"""`role` and `content`, both text, and whatever else a template reads."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens it may refer to.

    Attributes:
      source: the Jinja program, as transformers understands it.
      bos_token, eos_token: the texts of these tokens; empty when the model has none.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, special tokens written out.

        Args:
          add_generation_prompt: end with what opens the model's own turn.

        Raises:
          InputError: no messages, or ones that the template does not take.
          ModelError: the template itself is broken.
        """
        _check(messages)
        template = _compiled(self.source)
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except Exception as error:  # templates raise what they like, Python's own errors included
            raise InputError(f"the chat template does not take these messages: {_line(error)}") from None


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError("chat messages must be a list such as [{'role': 'user', 'content': 'Hello'}]")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"chat message {index} needs the texts 'role' and 'content'")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is broken, line {error.lineno}: {_line(error)}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ModelError(f"the chat template is broken: {_line(error)}") from None


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark the model's own words for training: here just its body."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as it is: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
