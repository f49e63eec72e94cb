"""H2O's accounts and eviction behind a decode step: one launch, in place."""

from .api import h2o_evict

__all__ = ["h2o_evict"]
