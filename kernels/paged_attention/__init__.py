"""Attention of one query per row over keys and values that stand in pages: the decode step of every strategy."""

from .api import Statistics, dense_attention, paged_attention, pool_dim

__all__ = ["Statistics", "dense_attention", "paged_attention", "pool_dim"]
