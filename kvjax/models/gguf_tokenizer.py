"""The tokenizer inside a GGUF file: byte-level BPE or SentencePiece, with special tokens and the chat template."""

import math
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from kvjax.models.chat import ChatTemplate
from kvjax.models.gguf_byte_level import PRE, WHOLE_WORDS, byte_level
from kvjax.models.gguf_file import GgufFile
from kvjax.models.gguf_sentencepiece import sentencepiece
from kvjax.models.tokenizer import LibraryTokenizer

_ORDINARY, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Types of tokens; others are unused ones and single bytes."""
_KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}


def control_tokens(file: GgufFile) -> dict[str, int]:
    """The texts and ids of tokens that stand for no text. Raises ModelError as `tokenizer`."""
    tokens, types = _tokens(file)
    return {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL}


def tokenizer(file: GgufFile) -> LibraryTokenizer | None:
    """The tokenizer of a file; None if it has none.

    Raises:
      ModelError: a kind of tokenizer or pre-tokenizer that is not supported, or metadata that contradict themselves.
    """
    kind = file.metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in tuple(_KINDS):
        supported = ", ".join(f"{name!r} ({what})" for name, what in _KINDS.items())
        raise file.error(f"tokenizer {kind!r} is not supported; supported: {supported}")
    tokens, types = _tokens(file)
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    made = _byte_level(file, vocabulary) if kind == "gpt2" else _sentencepiece(file, vocabulary, tokens, types)
    made.add_tokens(_added(vocabulary, tokens, types, (_USER_DEFINED,), special=False))
    made.add_special_tokens(_added(vocabulary, tokens, types, (_CONTROL, _UNKNOWN), special=True))
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    begins = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    before = bos if file.metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    after = eos if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before is not None or after is not None:
        made.post_processor = _around(before, after)
    return LibraryTokenizer(made, _template(file, bos, eos))


def _byte_level(file: GgufFile, vocabulary: Mapping[str, int]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in tuple(PRE):
        raise file.error(f"pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE)}")
    merges = [_merge(file, merge, vocabulary) for merge in _list(file, "tokenizer.ggml.merges", str)]
    return byte_level(vocabulary, merges, pre)


def _sentencepiece(file: GgufFile, vocabulary: Mapping[str, int], tokens: list[str], types: list[int]) -> Tokenizer:
    if file.metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise file.error("a SentencePiece tokenizer with a table of normalisations (precompiled_charsmap) is not supported")
    if file.metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise file.error("a SentencePiece tokenizer that removes spaces (remove_extra_whitespaces) is not supported")
    scores = _list(file, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise file.error(f"the tokenizer has {len(tokens)} tokens, but {len(scores)} scores")
    if not all(math.isfinite(score) for score in scores):
        raise file.error("the scores of the tokenizer must be finite numbers")
    ordinary = [kind in (_ORDINARY, _USER_DEFINED) for kind in types]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece(vocabulary, scores, ordinary, unknown, prefix)


def _added(vocabulary: Mapping[str, int], tokens: list[str], types: list[int], kinds: tuple[int, ...], special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for index, token in enumerate(tokens)
        if types[index] in kinds and token and vocabulary[token] == index
    ]


def _around(before: tuple[str, int] | None, after: tuple[str, int] | None) -> processors.TemplateProcessing:
    """What puts tokens before and after every text."""
    named = [(name, token) for name, token in (("bos", before), ("eos", after)) if token is not None]
    parts = [*(["bos"] if before else []), "$A", *(["eos"] if after else [])]
    return processors.TemplateProcessing(
        single=parts, special_tokens=[{"id": name, "ids": [index], "tokens": [text]} for name, (text, index) in named]
    )


def _special(file: GgufFile, tokens: list[str], name: str) -> tuple[str, int] | None:
    """Text and id of the token that metadata name; None without one."""
    key = f"tokenizer.ggml.{name}_token_id"
    index = file.metadata.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise file.error(f"{key} must be a token id below {len(tokens)}, not {index!r}")
    return tokens[index], index


def _template(file: GgufFile, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> ChatTemplate | None:
    text = file.metadata.get("tokenizer.chat_template")
    if text is None:
        return None
    if not isinstance(text, str):
        raise file.error("tokenizer.chat_template must be text")
    return ChatTemplate(text, "" if bos is None else bos[0], "" if eos is None else eos[0])


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """Text and type of every token; empty without a tokenizer."""
    tokens = _list(file, "tokenizer.ggml.tokens", str)
    types = _list(file, "tokenizer.ggml.token_type", int) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise file.error(f"the tokenizer has {len(tokens)} tokens, but {len(types)} token types")
    return tokens, types


def _list(file: GgufFile, key: str, kind: type) -> list[Any]:
    values = file.metadata.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise file.error(f"{key} must be a list of {kind.__name__}")
    return values


def _merge(file: GgufFile, merge: str, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    """The two tokens that become one. Looked up, because the library panics over one that does not exist."""
    at = merge.find(" ", 1)
    left, right = merge[:at], merge[at + 1 :]
    if at < 0 or not all(part in vocabulary for part in (left, right, left + right)):
        raise file.error(f"the merge {merge[:40]!r} of the tokenizer is not of two tokens that make a third")
    return left, right
