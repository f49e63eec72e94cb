"""The public functions of paged decode attention, and which implementations there are.

Dims: B rows, H query heads, Hkv kv heads, G = H / Hkv, D head dim, P pages of the pool, J kv heads of a page, Z slots of a page, T pages
of a row at most, C = T * Z slots of a row.

The pool is `[P, J, Z, D]` for keys and for values. What one kv head holds in one page is then one contiguous block of Z * D elements,
which a TMA unit (or a TPU's DMA engine) fetches with one transfer, and both matrix products of a tile read it as it lies: keys with D
contiguous are the K-major operand of a tensor core, values with D contiguous its M-major one. The CPU stores keep keys transposed, which
suits XLA's CPU backend and costs a GPU half of every memory sector at small pages.

A TPU keeps D in 128 lanes. XLA avoids the padding of a smaller D by a layout with pages innermost, which every call would copy; so there
the pool is allocated with D rounded up to 128 and zeros behind (`pool_dim`), which costs what the padding would. Everywhere the pool's D
may be larger than the queries'.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..dispatch import Implementation, Name, Operation
from . import mosaic_gpu, mosaic_tpu, xla

OPERATION = Operation(
    "paged_attention",
    (
        Implementation("mosaic_gpu", mosaic_gpu.paged_attention, mosaic_gpu.supports),
        Implementation("mosaic_tpu", mosaic_tpu.paged_attention, mosaic_tpu.supports),
        Implementation("xla", xla.paged_attention),
    ),
)

DENSE_PAGE_SIZES = (128, 64, 32, 16)


def pool_dim(head_dim: int, platform: str) -> int:
    """The D to allocate a pool with on "cpu", "gpu" or "tpu"; elements past the head dim stay zero."""
    return -(-head_dim // mosaic_tpu.LANES) * mosaic_tpu.LANES if platform == "tpu" else head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What softmax saw.

    Attributes:
      logits: scaled logits, float32 [B, Hkv, G, C]; NEG_INF (-1e30) in slots that are not read.
      lse: their log-sum-exp per query, natural logarithm, float32 [B, Hkv, G]; NEG_INF where a row reads nothing.
    """

    logits: jax.Array
    lse: jax.Array


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    visible: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    scale: float | None = None,
    statistics: bool = False,
    implementation: Name | None = None,
) -> jax.Array | tuple[jax.Array, Statistics]:
    """Attention of one query per row over the slots of its pages (PagedAttention, arXiv:2309.06180, with Flash-Decoding's splits).

    Query head h reads kv head h // G. Softmax and sums are float32. What stands in slots that are not read, and in pages that no table
    entry below a row's length names, does not matter, NaN included; table entries past a row's length may be any number.

    Args:
      q: [B, H, D], unscaled; bfloat16, float16 or float32.
      k_pages, v_pages: [P, J, Z, D], of q's type, or int8 with scales; D may be larger than q's, with zeros in slots in use (`pool_dim`).
      block_tables: int32 [B, T], page t of row b, pages holding all kv heads (J = Hkv); or [B, Hkv, T] over pages of one head (J = 1).
      lengths: int32 [B], slots of a row in use: slots 0 .. length - 1 are read, at most C. A row of length 0 gives
        zeros.
      visible: narrows that down per slot, [B, Hkv, C] or, for all heads alike, [B, 1, C]: bool, or integers (positions) whose negative
        values mark empty slots. A policy that evicts passes its positions and the capacity as length.
      k_scales, v_scales: float32 [P, J, Z], for int8 pages: a slot's key is its int8 vector times its scale.
      scale: factor of the logits; default D ** -0.5.
      statistics: return what softmax saw, too.
      implementation: forces one of "mosaic_gpu", "mosaic_tpu", "xla".

    Returns:
      The output [B, H, D] in q's type; with `statistics`, the pair (output, Statistics).

    Raises:
      ValueError: shapes or types that do not fit together.
      UnsupportedError: the implementation asked for cannot run this.
    """
    tables = block_tables[:, None] if block_tables.ndim == 2 else block_tables
    _check(q, k_pages, v_pages, tables, lengths, visible, k_scales, v_scales)
    dim = q.shape[-1]
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, k_pages.shape[-1] - dim)))
    out, logits, lse = OPERATION(
        queries if k_scales is not None else queries.astype(k_pages.dtype),
        k_pages,
        v_pages,
        tables.astype(jnp.int32),
        lengths.astype(jnp.int32),
        visible=visible,
        k_scales=k_scales,
        v_scales=v_scales,
        scale=dim**-0.5 if scale is None else float(scale),
        statistics=statistics,
        implementation=implementation,
    )
    out = out[..., :dim].astype(q.dtype)
    return (out, Statistics(logits, lse)) if statistics else out


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    page_size: int | None = None,
    **options: Any,
) -> jax.Array | tuple[jax.Array, Statistics]:
    """`paged_attention` over one array a row: k, v [B, Hkv, C, D] (scales [B, Hkv, C]), seen as pages of one head with an identity table.

    No copy is made. `page_size` must divide C; default: the largest of 128, 64, 32, 16 that does, or C itself.
    """
    batch, heads, capacity, _ = k.shape
    size = page_size or next((size for size in DENSE_PAGE_SIZES if capacity % size == 0), capacity)
    if capacity % size:
        raise ValueError(f"page_size={size} does not divide the {capacity} slots of a row")
    tables = jnp.arange(batch * heads * (capacity // size), dtype=jnp.int32).reshape(batch, heads, -1)
    k_pages, v_pages = (x.reshape(-1, 1, size, x.shape[-1]) for x in (k, v))
    if k_scales is not None and v_scales is not None:
        options |= dict(k_scales=k_scales.reshape(-1, 1, size), v_scales=v_scales.reshape(-1, 1, size))
    return paged_attention(q, k_pages, v_pages, tables, lengths, **options)


def _check(q, k_pages, v_pages, tables, lengths, visible, k_scales, v_scales) -> None:
    batch, heads, dim = q.shape
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(f"keys {k_pages.shape} {k_pages.dtype} and values {v_pages.shape} {v_pages.dtype} differ")
    if k_pages.ndim != 4 or k_pages.shape[-1] < dim:
        raise ValueError(f"pages are [P, J, Z, D] with D={dim} as in q or more; got {k_pages.shape}")
    if tables.ndim != 3 or tables.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(f"tables are [B, T] or [B, Hkv, T] and lengths [B] with B={batch}; got {tables.shape}, {lengths.shape}")
    page_heads, page_size = k_pages.shape[1:3]
    kv_heads, capacity = tables.shape[1] * page_heads, tables.shape[2] * page_size
    if (tables.shape[1] > 1 and page_heads > 1) or heads % kv_heads:
        raise ValueError(f"{heads} query heads do not fit tables {tables.shape} over pages of {page_heads} heads")
    if visible is not None and visible.shape not in ((batch, 1, capacity), (batch, kv_heads, capacity)):
        raise ValueError(f"visible is [{batch}, 1 or {kv_heads}, {capacity}]; got {visible.shape}")
    if (k_scales is None) != (v_scales is None) or (k_scales is None) != (k_pages.dtype != jnp.int8):
        raise ValueError("int8 pages come with k_scales and v_scales, other pages without")
    if k_scales is not None and v_scales is not None and not k_scales.shape == v_scales.shape == k_pages.shape[:3]:
        raise ValueError(f"scales are {k_pages.shape[:3]}; got {k_scales.shape} and {v_scales.shape}")
