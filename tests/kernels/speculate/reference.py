"""Speculation as the loop that kernels/speculate/api.py describes, in NumPy and float32: what every implementation is tested against."""

from typing import Any

import numpy as np
from kvjax.kernels.speculate import Speculation


def speculate(q, partial_keys, visible, cap, always, alpha: float, limit: int, group="max") -> Speculation:
    """See kernels/speculate/api.py. Takes and returns NumPy arrays."""
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
        if group == "mass":
            both = [np.concatenate(pair) for pair in zip(seen, first, strict=True)]
            logits = [log_mass(q[b, h], partial_keys[b, h][:, both[h]])[: len(seen[h])] for h in range(heads)]
        else:
            logits = [guess(q[b, h], partial_keys[b, h][:, seen[h]]) for h in range(heads)]
        for h in range(heads):
            if len(seen[h]):
                maximum[b, h] = logits[h].max()
                above[b, h] = (logits[h] > (0 if group == "mass" else maximum[b, h]) - np.float32(alpha)).sum()
        if any(map(len, seen)) or any(map(len, first)):
            count[b] = max(1, min((sum(map(len, first)) + int(above[b].sum())) // heads, cap[b], limit))
        for h in range(heads):
            order = np.concatenate([first[h], seen[h][np.lexsort((seen[h], -logits[h]))]])[: count[b]]
            index[b, h, : len(order)] = order
    result: Any = (index, count, above, maximum)
    return Speculation(*result)


def log_mass(q, keys) -> np.ndarray:
    """Log of the mean over the group of each query head's softmax over these slots, in float64; [slots]."""
    logits = q.astype(keys.dtype).astype(np.float64) @ keys.astype(np.float64)
    if not logits.shape[1]:
        return np.zeros(0)
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    highest = shifted.max(0)
    return highest + np.log(np.exp(shifted - highest).mean(0))


def guess(q, keys) -> np.ndarray:
    """The logits of one kv head, joined over its group; [slots]."""
    return (q.astype(keys.dtype).astype(np.float32) @ keys.astype(np.float32)).max(0)
