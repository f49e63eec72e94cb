"""The benchmark's prompts: the same token ids for every engine, from arithmetic alone, so that no file has to be shared."""

_MODULUS = 2**31 - 1
_MULTIPLIER = 48_271
_ROW_SEED = 7_919
_WARM_UP = 4


def prompt(batch: int, context: int, vocab_size: int) -> list[list[int]]:
    """`batch` rows of `context` token ids in [0, vocab_size).

    A row depends only on its index: the first tokens are the same for a longer context or a larger batch.
    """
    return [_row(row, context, vocab_size) for row in range(batch)]


def _row(row: int, context: int, vocab_size: int) -> list[int]:
    state = _ROW_SEED * (row + 1)
    tokens = []
    for i in range(_WARM_UP + context):
        state = state * _MULTIPLIER % _MODULUS
        if i >= _WARM_UP:
            tokens.append(state % vocab_size)
    return tokens
