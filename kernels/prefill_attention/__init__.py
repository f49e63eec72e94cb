"""Attention over a prompt with its log-sum-exp, and the attention mass of every key: what H2O's scores of a prompt are made of."""

from .api import column_mass, prefill_attention

__all__ = ["column_mass", "prefill_attention"]
