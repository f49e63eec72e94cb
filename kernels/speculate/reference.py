"""Speculation as the loop that api.py describes, in NumPy and float32: what every implementation is tested against."""

from typing import Any

import numpy as np

from .base import Speculation


def speculate(q, partial_keys, visible, cap, always, alpha: float, limit: int) -> Speculation:
    """See api.py. Takes and returns NumPy arrays."""
    batch, heads, _, capacity = partial_keys.shape
    index = np.full((batch, heads, limit), capacity, np.int32)
    count, above = np.zeros(batch, np.int32), np.zeros((batch, heads), np.int32)
    maximum = np.full((batch, heads), -np.inf, np.float32)
    for b in range(batch):
        first, seen = [], []
        for h in range(heads):
            stored = np.flatnonzero(visible[b, h % visible.shape[1]])
            fixed = [] if always is None else [slot for slot in stored if always[b, h % always.shape[1], slot]]
            first.append(np.array(fixed, int))
            seen.append(np.array([slot for slot in stored if slot not in fixed], int))
        logits = [guess(q[b, h], partial_keys[b, h][:, seen[h]]) for h in range(heads)]
        for h in range(heads):
            if len(seen[h]):
                maximum[b, h] = logits[h].max()
                above[b, h] = (logits[h] > maximum[b, h] - np.float32(alpha)).sum()
        if any(map(len, seen)) or any(map(len, first)):
            count[b] = max(1, min((sum(map(len, first)) + int(above[b].sum())) // heads, cap[b], limit))
        for h in range(heads):
            order = np.concatenate([first[h], seen[h][np.lexsort((seen[h], -logits[h]))]])[: count[b]]
            index[b, h, : len(order)] = order
    result: Any = (index, count, above, maximum)
    return Speculation(*result)


def guess(q, keys) -> np.ndarray:
    """The logits of one kv head, joined over its group; [slots]."""
    return (q.astype(keys.dtype).astype(np.float32) @ keys.astype(np.float32)).max(0)
