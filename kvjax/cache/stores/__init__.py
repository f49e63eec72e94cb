"""Stores: where the bytes of kept tokens live. One file each."""

from kvjax.cache.stores.base import Store
from kvjax.cache.stores.dense import DenseLayer, DenseStore
from kvjax.cache.stores.paged import PagedLayer, PagedStore, PageTable, page_table

STORES: dict[str, type[DenseStore] | type[PagedStore]] = {"dense": DenseStore, "paged": PagedStore}

__all__ = ["STORES", "DenseLayer", "DenseStore", "PageTable", "PagedLayer", "PagedStore", "Store", "page_table"]
