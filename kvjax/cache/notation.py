"""The notation of spec strings, `keep[+store[(options)]][+codec]`: how it is cut into calls, and how calls and arguments are written.

What names and arguments mean is not known here (kvjax.cache.spec).
"""

import ast
import dataclasses
import keyword
import math
from collections.abc import Mapping
from typing import Any, Literal

from kvjax.errors import SpecError

EXAMPLES = {"strategy": "h2o(heavy=0.1,recent=0.1)", "store": "paged(16)"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A name with arguments, as it is written.

    Attributes:
      text: all of it.
      module: of a class of a user's own, `my_policies` in `my_policies:KeyNorm`; "" for what kvjax has.
      values: arguments without a name; arguments: those with one.
    """

    text: str
    module: str
    name: str
    values: tuple[Any, ...]
    arguments: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Module and name."""
        return f"{self.module}:{self.name}" if self.module else self.name


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand outside parentheses and quotes, without the space around them."""
    parts, depth, quote, escaped, current = [], 0, "", False, ""
    for char in text:
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == separator and depth <= 0 and not quote:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()]


def read_call(text: str, what: Literal["strategy", "store"] = "strategy") -> Call:
    """A name, or a name with arguments; an argument is a number, a quoted or bare word, True, False or None. Raises SpecError.

    Args:
      what: it is, for the error.
    """
    example = EXAMPLES[what]
    problem = SpecError(f"cannot read {what} {text!r}; write a name, or a name with arguments like {example}")
    head, bracket, rest = text.partition("(")
    module, _, name = head.strip().rpartition(":")
    try:
        tree = ast.parse(name + bracket + rest, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem from None
    values: list[Any] = []
    arguments: dict[str, Any] = {}
    if isinstance(tree, ast.Call):
        for value in tree.args:
            values.append(_value(value, text, what))
        for one in tree.keywords:
            if one.arg is None:
                raise SpecError(f"{what} {text!r}: arguments need names, like {example}")
            if one.arg in arguments:
                raise SpecError(f"{what} {text!r} gives {one.arg} twice")
            arguments[one.arg] = _value(one.value, text, what)
        tree = tree.func
    if not isinstance(tree, ast.Name):
        raise problem
    return Call(text, module.strip(), tree.id, tuple(values), arguments)


def _value(node: ast.expr, text: str, what: str) -> Any:
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name) and node.operand.id == "inf":
        return -math.inf
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise SpecError(f"{what} {text!r}: an argument is a number, a word, True or False") from None


def written(name: str, arguments: Mapping[str, Any]) -> str:
    """`name(a=1,b=word)`, or the name alone where there are no arguments."""
    return f"{name}({','.join(f'{key}={argument(value)}' for key, value in arguments.items())})" if arguments else name


def argument(value: Any) -> str:
    """An argument as it is written: text without quotes where it reads as the same word."""
    if not isinstance(value, str):
        return str(value)
    bare = value.isidentifier() and value.isascii() and not keyword.iskeyword(value) and value != "inf"
    return value if bare else repr(value)
