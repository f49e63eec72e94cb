"""Attention in one operation (api.py)."""

from .api import OPERATION, attention, scores
from .base import NEG_INF, Attended, Keys, Mask, Observe, PageTable, page_table, softmax_weights, tokens
from .xla import rows

__all__ = [
    "NEG_INF", "OPERATION", "Attended", "Keys", "Mask", "Observe", "PageTable", "attention", "page_table", "rows", "scores",
    "softmax_weights", "tokens",
]  # fmt: skip
