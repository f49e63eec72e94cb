"""From texts to the tokens of a prompt: what stands around a message, and how a prompt gets its exact length.

A prompt is put together from pieces that begin where a word or a line does, which is where tokenizers cut anyway: its
tokens are those that the tokenizer makes of the whole text. The cut between context and question is one of these
places, so that the question costs the same tokens whether it is compressed with the context or comes later.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from kvjax.errors import InputError

_MESSAGE = "kvjax-message"
_PADS = (" .", " -", " and", " the", " a", ".")


@dataclasses.dataclass(frozen=True)
class Frame:
    """A tokenizer, and the chat template around a message if it is applied.

    Attributes:
      head, tail: what the template writes before and after the message; a bare line end after it without a template.
      templated: whether there is a template.
    """

    tokenizer: Any
    head: str = ""
    tail: str = "\n"
    templated: bool = False

    @classmethod
    def of(cls, tokenizer: Any, chat_template: bool = True) -> "Frame":
        """The frame of a tokenizer: its chat template where it has one and `chat_template` says so.

        Raises InputError for a model without a tokenizer, and for a template that does not repeat the message.
        """
        if tokenizer is None:
            raise InputError("tasks are made of text, and this model has no tokenizer; give a model with one")
        if not chat_template or getattr(tokenizer, "chat_template", None) is None:
            return cls(tokenizer)
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MESSAGE}], add_generation_prompt=True)
        head, message, tail = text.partition(_MESSAGE)
        if not message or _MESSAGE in tail:
            raise InputError("the model's chat template does not write a user's message once, as it is; use --nochat_template")
        return cls(tokenizer, head, tail, templated=True)

    def ids(self, text: str) -> list[int]:
        """Tokens of the text alone, without those that a tokenizer adds around every text."""
        before, after = self._added
        ids = self.tokenizer.encode(text)
        return ids[len(before) : len(ids) - len(after)]

    def begin(self, text: str) -> list[int]:
        """Tokens of a prompt's beginning: what a template or the tokenizer writes first, and the text."""
        return self.ids(self.head + text) if self.templated else [*self._added[0], *self.ids(text)]

    def end(self, question: str, opening: str = "") -> list[int]:
        """Tokens of a prompt's end: the question, what closes the message, and how the answer begins."""
        return self.ids(question + self.tail + opening)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(ids)

    def alike(self, words: Sequence[str]) -> list[str]:
        """Those of the words that are as many tokens as most of them are."""
        sizes = [len(self.ids(" " + word)) for word in words]
        usual = Counter(sizes).most_common(1)[0][0]
        return [word for word, size in zip(words, sizes, strict=True) if size == usual]

    def pad(self, count: int) -> list[int]:
        """`count` tokens that say nothing: dots, or a short word again and again, whatever is one token."""
        for unit in _PADS:
            ids = self.ids(unit * count)
            if len(ids) == count:
                return ids
        return [self.ids(".")[0]] * count

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after every text."""
        added, some = self.tokenizer.encode(""), self.tokenizer.encode("a")
        count = next(n for n in range(len(added) + 1) if n == len(added) or added[n] != some[n])
        return added[:count], added[count:]
