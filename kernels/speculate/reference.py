"""Speculation as the loop that api.py describes, in NumPy and float32: what every implementation is tested against."""

from typing import Any

import numpy as np

from .base import Speculation


def speculate(q, partial_keys, visible, cap, alpha: float, limit: int) -> Speculation:
    """See api.py. Takes and returns NumPy arrays."""
    batch, heads, _, capacity = partial_keys.shape
    index = np.full((batch, heads, limit), capacity, np.int32)
    count, above = np.zeros(batch, np.int32), np.zeros((batch, heads), np.int32)
    maximum = np.full((batch, heads), -np.inf, np.float32)
    for b in range(batch):
        seen = [np.flatnonzero(visible[b, h % visible.shape[1]]) for h in range(heads)]
        logits = [guess(q[b, h], partial_keys[b, h][:, seen[h]]) for h in range(heads)]
        for h in range(heads):
            if len(seen[h]):
                maximum[b, h] = logits[h].max()
                above[b, h] = (logits[h] > maximum[b, h] - np.float32(alpha)).sum()
        if any(map(len, seen)):
            count[b] = max(1, min(int(above[b].mean()), cap[b], limit))
        for h in range(heads):
            order = np.lexsort((seen[h], -logits[h]))[: count[b]]
            index[b, h, : len(order)] = seen[h][order]
    result: Any = (index, count, above, maximum)
    return Speculation(*result)


def guess(q, keys) -> np.ndarray:
    """The logits of one kv head, joined over its group; [slots]."""
    return (q.astype(keys.dtype).astype(np.float32) @ keys.astype(np.float32)).max(0)
