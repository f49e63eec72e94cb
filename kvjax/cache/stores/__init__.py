"""Stores: where the bytes of kept tokens live. One file each."""

from kvjax.cache.stores.dense import DenseLayer, DenseStore

STORES = {"dense": DenseStore}

__all__ = ["STORES", "DenseLayer", "DenseStore"]
