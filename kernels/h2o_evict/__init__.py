"""H2O's eviction between two decode steps, with the write of the new token: one launch, in place."""

from .api import h2o_evict
from .base import Attention, H2OCache, Token

__all__ = ["Attention", "H2OCache", "Token", "h2o_evict"]
