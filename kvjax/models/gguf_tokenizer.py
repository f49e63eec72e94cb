"""The tokenizer inside a GGUF file: byte-level BPE, with the pre-tokenizer that `tokenizer.ggml.pre` names."""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kvjax.models.chat import ChatTemplate
from kvjax.models.gguf_file import GgufFile
from kvjax.models.tokenizer import LibraryTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # of the token types; the others are ordinary, unused or single bytes

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Pieces at every match of each pattern in turn, then bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(digits: str) -> str:
    """Words with the character before them, numbers, runs of signs up to the end of the line, space."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _tekken() -> pre_tokenizers.PreTokenizer:
    upper, lower, before = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+|{before}{upper}+{lower}*"
    return _split(rf"{words}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}")


def _default() -> pre_tokenizers.PreTokenizer:
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    return _split(r"[\p{P}\$\+<=>\^~\|]+", gpt2, r"\p{N}+", "[0-9][0-9][0-9]")


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split(_words(r"\p{N}{1,3}"))


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split(_words(r"\p{N}"))


_PRE: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_then_gpt2, "starcoder": _digits_then_gpt2, "gpt-2": _gpt2, "llama-bpe": _llama3, "llama3": _llama3,
    "llama-v3": _llama3, "smaug-bpe": _llama3, "qwen2": _qwen2, "tekken": _tekken, "default": _default,
}  # fmt: skip
"""What the names mean, as llama.cpp and the tokenizers that they were taken from have it."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""A word of the vocabulary is one token there, whether merges lead to it or not; and unless metadata deny it, a token begins every text."""
_COMPOSED = ("qwen2",)
"""Text is brought to normal form C first."""


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
    if kind != "gpt2":
        name = " (SentencePiece)" if kind == "llama" else ""
        raise file.error(f"tokenizer {kind!r}{name} is not supported; supported: 'gpt2' (byte-level BPE)")
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in tuple(_PRE):
        raise file.error(f"pre-tokenizer {pre!r} is not supported; supported: {', '.join(_PRE)}")
    tokens, types = _tokens(file)
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    merges = [_merge(file, merge, vocabulary) for merge in _list(file, "tokenizer.ggml.merges", str)]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _COMPOSED:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _PRE[pre]()
    made.decoder = decoders.ByteLevel()
    made.add_tokens(_added(vocabulary, tokens, types, _USER_DEFINED, special=False))
    made.add_special_tokens(_added(vocabulary, tokens, types, _CONTROL, special=True))
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    around = _around(file, pre, bos, eos)
    if around is not None:
        made.post_processor = around
    return LibraryTokenizer(made, _template(file, bos, eos))


def _added(vocabulary: Mapping[str, int], tokens: list[str], types: list[int], kind: int, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for index, token in enumerate(tokens)
        if types[index] == kind and token and vocabulary[token] == index
    ]


def _around(file: GgufFile, pre: str, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> Any:
    """What puts tokens before and after every text; None for none."""
    before = bos if file.metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS) else None
    after = eos if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return None
    parts = [*([] if before is None else [before[0]]), "$A", *([] if after is None else [after[0]])]
    return processors.TemplateProcessing(single=parts, special_tokens=list({token for token in (before, after) if token is not None}))


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
    """The two tokens that become one. They are looked up here, because the library would panic over one that does not exist."""
    at = merge.find(" ", 1)
    left, right = merge[:at], merge[at + 1 :]
    if at < 0 or not all(part in vocabulary for part in (left, right, left + right)):
        raise file.error(f"the merge {merge[:40]!r} of the tokenizer is not of two tokens that make a third")
    return left, right
