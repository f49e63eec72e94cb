"""Stores: where the bytes of kept tokens live. One file each."""

from kvjax.cache.stores.base import Store
from kvjax.cache.stores.dense import DenseLayer, DenseStore
from kvjax.cache.stores.host import TRANSFERS, HostLayer, HostStore, Seats, Transfer
from kvjax.cache.stores.kernels import KernelDenseStore, KernelHostStore, KernelPagedStore, KernelStore, native_store, stored_dim
from kvjax.cache.stores.paged import PagedLayer, PagedStore, PageTable, page_table

STORES: dict[str, type[DenseStore] | type[PagedStore] | type[HostStore]] = {"dense": DenseStore, "paged": PagedStore, "host": HostStore}

__all__ = [
    "STORES", "TRANSFERS", "DenseLayer", "DenseStore", "HostLayer", "HostStore", "KernelDenseStore", "KernelHostStore", "KernelPagedStore",
    "KernelStore", "PageTable", "PagedLayer", "PagedStore", "Seats", "Store", "Transfer", "native_store", "page_table", "stored_dim",
]  # fmt: skip
