"""What the implementations share. Dims: B rows, S queries, K keys, H query heads, Hkv kv heads, G = H / Hkv, D head dim."""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634
NEG_INF = -1e30  # finite, so that what nobody sees gives zeros and not NaN


def check(name: str, q: jax.Array, k: jax.Array, start: jax.Array, count: jax.Array) -> None:
    """Raises ValueError where shapes do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{name}: queries {q.shape} and keys {k.shape} do not fit together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{name}: {q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads")
    if start.shape != q.shape[:1] or count.shape != q.shape[:1]:
        raise ValueError(f"{name}: start {start.shape} and count {count.shape} are not one number for each of {q.shape[0]} rows")


def check_lse(name: str, q: jax.Array, lse: jax.Array) -> None:
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"{name}: lse {lse.shape} does not fit queries {q.shape}")


def scale_of(q: jax.Array, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def padded(x, axis: int, multiple: int):
    """With zeros behind it on one axis, up to a multiple."""
    more = -x.shape[axis] % multiple
    return x if not more else jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])
