"""The errors kvjax raises on bad input.

Each carries one line that says what is wrong and what would be right. The command line prints that line and exits with code 2.
"""


class KvjaxError(Exception):
    """Base of every error that a user of kvjax can cause."""


class SpecError(KvjaxError, ValueError):
    """A strategy, store, model name or option that does not exist or does not fit the others."""


class ModelError(KvjaxError):
    """A checkpoint that cannot be loaded: unsupported, incomplete, of the wrong shape, or in an unsafe format."""


class NotFiniteError(ModelError):
    """Weights or logits that are infinite or no numbers, so that nothing that follows from them means anything."""


class InputError(KvjaxError, ValueError):
    """Tokens, prompts or lengths that the model cannot take."""


class MemoryLimitError(InputError):
    """Something that does not fit into the memory it was given."""


def clipped(message: str, longest: int = 300) -> str:
    """A message with a value of someone else's in it, which may be very long, at a readable length."""
    return message if len(message) <= longest else message[: longest - 3] + "..."
