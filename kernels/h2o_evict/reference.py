"""H2O's eviction as the loop that api.py describes, in NumPy and float32: what every implementation is tested against."""

import dataclasses
from typing import Any

import numpy as np

from .base import Attention, H2OCache, Token


def h2o_evict(cache: H2OCache, attention: Attention | None, token: Token | None, length, budget, recent, active):
    """See api.py. Takes and returns NumPy arrays; nothing is changed in place."""
    copies: Any = {field.name: np.array(getattr(cache, field.name)) for field in dataclasses.fields(cache)}
    cache = dataclasses.replace(cache, **copies)
    batch, heads, capacity = cache.position.shape
    size = cache.k_pages.shape[2]
    chosen = np.zeros((batch, heads), np.int32)
    for b in np.flatnonzero(active):
        for h in range(heads):
            position, score = cache.position[b, h], cache.score[b, h]
            held = position >= 0
            if attention is not None:
                weights = np.exp(attention.logits[b, h][:, held] - attention.lse[b, h][:, None], dtype=np.float32)
                score[held] += weights.sum(0, dtype=np.float32)
            over = held.sum() > budget[b]
            if over:
                older = held & (position < length[b] - recent[b])
                slot = min((int(c) for c in np.flatnonzero(older)), key=lambda c: (score[c], -position[c]))
            else:
                slot = capacity if held.all() else int(np.flatnonzero(~held)[0])
            chosen[b, h] = slot
            if token is None:
                if over:
                    position[slot] = -1
            elif slot < capacity:
                page = cache.block_tables[b, slot // size]
                cache.k_pages[page, h, slot % size] = token.k[b, h]
                cache.v_pages[page, h, slot % size] = token.v[b, h]
                position[slot], score[slot] = length[b], 0
    return cache, chosen
