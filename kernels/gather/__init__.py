"""Rows of a pool, named by their numbers, copied to a compact block: selected tokens or pages."""

from .api import gather_pages, gather_rows, gather_tokens

__all__ = ["gather_pages", "gather_rows", "gather_tokens"]
