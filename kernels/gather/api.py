"""The public functions of gathering, and which implementations there are.

The pool is N rows of any shape: a token is a row of its kv head, a page is a row that has dims of its own. On a TPU the XLA form is all
there is; it is handed the rows in their own shape, because to flatten them there would copy the pool.
"""

import jax
import jax.numpy as jnp

from ..dispatch import Implementation, Name, Operation
from . import mosaic_gpu, xla

OPERATION = Operation(
    "gather",
    (Implementation("mosaic_gpu", mosaic_gpu.gather_rows, mosaic_gpu.supports), Implementation("xla", xla.gather_rows)),
)


def gather_rows(pool: jax.Array, index: jax.Array, *, implementation: Name | None = None) -> jax.Array:
    """Row `index[m]` of the pool at place m; zeros where there is no such row.

    Args:
      pool: [N, ...], any type; fewer than 2**31 rows.
      index: int32 [M]; negative numbers and numbers from N on name no row.
      implementation: forces "mosaic_gpu" or "xla".

    Returns:
      [M, ...], of the pool's type; bit for bit what stands in the pool, NaN included.

    Raises:
      ValueError: shapes or types that do not fit.
      UnsupportedError: the implementation asked for cannot run this.
    """
    if pool.ndim < 2 or index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"a pool is [N, ...] and an index integers [M]; got {pool.shape} and {index.dtype}{index.shape}")
    return OPERATION(pool, index.astype(jnp.int32), implementation=implementation)


def gather_tokens(pool: jax.Array, slots: jax.Array, *, implementation: Name | None = None) -> jax.Array:
    """Selected slots of every row and kv head: pool [B, Hkv, C, D], slots int32 [B, Hkv, K] -> [B, Hkv, K, D]; zeros for slots beyond C."""
    if pool.ndim != 4 or slots.shape[:2] != pool.shape[:2] or slots.ndim != 3:
        raise ValueError(f"a pool is [B, Hkv, C, D] and slots [B, Hkv, K]; got {pool.shape} and {slots.shape}")
    batch, heads, capacity, dim = pool.shape
    first = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1) * capacity
    index = jnp.where((slots < 0) | (slots >= capacity), -1, slots + first)
    rows = gather_rows(pool.reshape(-1, dim), index.reshape(-1), implementation=implementation)
    return rows.reshape(*slots.shape, dim)


def gather_pages(pages: jax.Array, numbers: jax.Array, *, implementation: Name | None = None) -> jax.Array:
    """Whole pages: pages [P, ...], numbers int32 [...] -> [..., ...], in the order of the numbers; zeros for numbers beyond P."""
    rows = gather_rows(pages, numbers.reshape(-1), implementation=implementation)
    return rows.reshape(*numbers.shape, *pages.shape[1:])
