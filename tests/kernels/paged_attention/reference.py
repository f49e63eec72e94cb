"""Paged decode attention, as it is defined: one row, one query head and one slot after the other, float32, NumPy."""

import numpy as np
from kvjax.kernels.paged_attention.base import NEG_INF


def paged_attention(q, k_pages, v_pages, block_tables, lengths, *, visible=None, k_scales=None, v_scales=None, scale, statistics=False):
    """Arguments and results as in kernels/paged_attention/api.py, tables `[B, h, T]`; concrete arrays only."""
    q, k_pages, v_pages = (np.asarray(x).astype(np.float32) for x in (q, k_pages, v_pages))
    block_tables, lengths = np.asarray(block_tables), np.asarray(lengths)
    batch, heads, dim = q.shape
    page_heads, page_size = k_pages.shape[1:3]
    kv_heads = block_tables.shape[1] * page_heads
    group, capacity = heads // kv_heads, block_tables.shape[2] * page_size
    out = np.zeros((batch, heads, dim), np.float32)
    logits = np.full((batch, kv_heads, group, capacity), NEG_INF, np.float32)
    lse = np.full((batch, kv_heads, group), NEG_INF, np.float32)
    for row in range(batch):
        for kv_head in range(kv_heads):
            table, head = block_tables[row, kv_head // page_heads], kv_head % page_heads
            slots = np.arange(min(lengths[row], capacity))
            if visible is not None:
                seen = np.asarray(visible)[row, kv_head if visible.shape[1] > 1 else 0]
                slots = slots[(seen if seen.dtype == bool else seen >= 0)[slots]]
            if not len(slots):
                continue
            pages, offsets = table[slots // page_size], slots % page_size
            keys, values = k_pages[pages, head, offsets], v_pages[pages, head, offsets]
            if k_scales is not None:
                keys = keys * np.asarray(k_scales)[pages, head, offsets][:, None]
                values = values * np.asarray(v_scales)[pages, head, offsets][:, None]
            for query in range(group):
                scores = keys @ q[row, kv_head * group + query] * np.float32(scale)
                weights = np.exp(scores - scores.max())
                out[row, kv_head * group + query] = weights @ values / weights.sum()
                logits[row, kv_head, query, slots] = scores
                lse[row, kv_head, query] = scores.max() + np.log(weights.sum())
    return (out, logits, lse) if statistics else (out, None, None)
