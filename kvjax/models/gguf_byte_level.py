"""Byte-level BPE of GGUF files: what `tokenizer.ggml.pre` means, as llama.cpp and the models' own tokenizers have it."""

from collections.abc import Callable, Mapping, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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


PRE: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_then_gpt2, "starcoder": _digits_then_gpt2, "gpt-2": _gpt2, "llama-bpe": _llama3, "llama3": _llama3,
    "llama-v3": _llama3, "smaug-bpe": _llama3, "qwen2": _qwen2, "tekken": _tekken, "default": _default,
}  # fmt: skip
"""What the names mean, as llama.cpp and the tokenizers that they were taken from have it."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""There a word of the vocabulary is one token, whether merges lead to it or not; and a token begins every text, unless
metadata deny it."""
_COMPOSED = ("qwen2",)
"""Text is brought to normal form C first."""


def byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: str) -> Tokenizer:
    """A byte-level tokenizer, without added tokens.

    `pre` is one of PRE; tokens that merge, and what they make, are in `vocabulary`.
    """
    made = Tokenizer(models.BPE(dict(vocabulary), list(merges), ignore_merges=pre in WHOLE_WORDS))
    if pre in _COMPOSED:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = PRE[pre]()
    made.decoder = decoders.ByteLevel()
    return made
