"""SentencePiece tokenizers of GGUF files: pieces with scores, the best pair merging first; bytes for the rest.

Space is written as a piece character of its own, U+2581, and one is put before a text and after every special token
(that is what llama.cpp and the first Llama tokenizers do). BPE of the `tokenizers` library does the same from a list of
merges in the order of the scores.
"""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\u2581"


def sentencepiece(
    vocabulary: Mapping[str, int], scores: Sequence[float], ordinary: Sequence[bool], unknown: str | None, prefix: bool
) -> Tokenizer:
    """A SentencePiece tokenizer, without added tokens.

    Args:
      vocabulary: piece to token id.
      scores: by token id; higher merges earlier.
      ordinary: by token id; whether it is a piece of text (not a byte, nor a special token).
      unknown: the piece for what has no other; None when there is none.
      prefix: put a space before a text.
    """
    made = Tokenizer(
        models.BPE(dict(vocabulary), _merges(vocabulary, scores, ordinary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    before = [normalizers.Prepend(SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return made


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], ordinary: Sequence[bool]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        if not ordinary[index]:
            continue
        for at in range(1, min(len(piece), _LONGEST)):
            left, right = vocabulary.get(piece[:at]), vocabulary.get(piece[at:])
            if left is not None and right is not None and ordinary[left] and ordinary[right]:
                ranked.append((-scores[index], left, right, piece[:at], piece[at:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


_LONGEST = 256
"""Characters of a piece up to which its halves are looked for: a hostile one would take the square of its length."""
