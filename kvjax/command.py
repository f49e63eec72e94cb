"""What the command lines share: flags that end in one line when they are wrong, and that line."""

import sys
from typing import NoReturn

from absl import flags


def parse_flags(argv: list[str]) -> list[str]:
    """Sets FLAGS and returns what is no flag. A flag that is unknown, missing or out of range ends the program like any other bad input."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()) + "; see --help")


def fail(message: object, code: int = 2) -> NoReturn:
    """Says what is wrong, in one line, and ends the program."""
    print(f"kvjax: {message}", file=sys.stderr)
    sys.exit(code)
