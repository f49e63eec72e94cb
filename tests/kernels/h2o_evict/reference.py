"""H2O's eviction as the loop that kernels/h2o_evict/api.py describes, in NumPy and float32: what every implementation is tested against."""

import numpy as np
from kvjax.kernels.paged_attention import Statistics


def h2o_evict(position, score, statistics: Statistics, length, budget, recent, active):
    """Arguments and results as there, NumPy arrays; nothing is changed in place."""
    positions, scores = np.array(position), np.array(score)
    batch, heads, capacity = positions.shape
    chosen = np.zeros((batch, heads), np.int32)
    for b in np.flatnonzero(active):
        for h in range(heads):
            position, score = positions[b, h], scores[b, h]
            held = position >= 0
            weights = np.exp(statistics.logits[b, h][:, held] - statistics.lse[b, h][:, None], dtype=np.float32)
            score[held] += weights.sum(0, dtype=np.float32)
            if held.sum() > budget[b]:
                older = held & (position < length[b] - recent[b])
                chosen[b, h] = min((int(c) for c in np.flatnonzero(older)), key=lambda c: (score[c], -position[c]))
                position[chosen[b, h]] = -1
            else:
                chosen[b, h] = capacity if held.all() else int(np.flatnonzero(~held)[0])
    return positions, scores, chosen
