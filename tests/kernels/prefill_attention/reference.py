"""Attention and column mass with every score at once, in NumPy and float32: what every implementation is tested against."""

import numpy as np


def prefill_attention(q, k, v, start, count, scale: float | None = None):
    """See kernels/prefill_attention/api.py. Takes NumPy arrays; [B, S, H, D] and [B, H, S], float32."""
    batch, size, heads, _ = q.shape
    out, lse = np.zeros(q.shape, np.float32), np.full((batch, heads, size), np.inf, np.float32)
    for b in range(batch):
        for h in range(heads):
            logits = scores(q, k, start, count, scale, b, h)
            weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
            total = weights.sum(-1)
            values = v[b, : logits.shape[1], h * k.shape[2] // heads].astype(np.float32)
            out[b, : count[b], h] = weights @ values / total[:, None]
            lse[b, h, : count[b]] = logits.max(-1, initial=-np.inf) + np.log(total)
    return out, lse


def column_mass(q, k, lse, start, count, scale: float | None = None):
    """See kernels/prefill_attention/api.py. Takes NumPy arrays; [B, Hkv, K], float32."""
    batch, _, heads, _ = q.shape
    mass = np.zeros((batch, k.shape[2], k.shape[1]), np.float32)
    for b in range(batch):
        for h in range(heads):
            logits = scores(q, k, start, count, scale, b, h)
            mass[b, h * k.shape[2] // heads, : logits.shape[1]] += np.exp(logits - lse[b, h, : count[b], None]).sum(0)
    return mass


def scores(q, k, start, count, scale, b: int, h: int) -> np.ndarray:
    """Scaled logits of one head's queries over the keys there are, -inf where a key comes after the query; [count, start + count]."""
    end = start[b] + count[b]
    queries = q[b, : count[b], h].astype(np.float32)
    keys = k[b, :end, h * k.shape[2] // q.shape[2]].astype(np.float32)
    seen = np.arange(start[b], end)[:, None] >= np.arange(end)
    return np.where(seen, queries @ keys.T * np.float32(q.shape[-1] ** -0.5 if scale is None else scale), -np.inf)
