"""Speculation on Hopper: one pass over the partial keys, a block of 128 threads for every row, kv head and span of slots.

A thread owns slots and walks down their dims, with one multiply-add per query head of the group: for G query heads that is G of them a
number read, far from a tensor core's tile of 64 and fast enough for G up to 8 (a number of 2 bytes allows for 7 multiply-adds at 4.8 TB/s
on 132 multiprocessors). It writes the joined logits, 4 bytes a slot where it read 2 d', and each block's maximum. Counting against the
maximum of all blocks and choosing is left to XLA (`base.select`), which reads those 4 bytes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuned
from ..dispatch import current_device
from .base import GroupJoin, Speculation, candidates, select, select_by_mass

LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """What a block does.

    Attributes:
      span: its slots; halved until it divides a row.
      together: dims whose loads are under way at a time.
    """

    span: int = 512
    together: int = 8


def config_for(group: int, dim: int, device: str) -> Config:
    """What was tuned for the device, else the one above."""
    return Config(**tuned.find("speculate", device, tuning_key(group, dim)))


def tuning_key(group: int, dim: int) -> str:
    """What the best configuration depends on; `dim` is that of the partial keys."""
    return f"g{group} d{dim}"


def supports(q, partial_keys, visible, cap, always, alpha: float, limit: int, group: GroupJoin) -> str | None:
    """Why the kernel cannot run this, or None."""
    capacity = partial_keys.shape[-1]
    if capacity % LANES:
        return f"a row has {capacity} slots, which is no multiple of {LANES}"
    if q.shape[2] > 16:
        return f"{q.shape[2]} query heads a kv head are more than 16"
    return None


def speculate(
    q, partial_keys, visible, cap, always, alpha: float, limit: int, group: GroupJoin = "max", config: Config | None = None
) -> Speculation:
    """See api.py."""
    config = config or config_for(q.shape[2], q.shape[3], current_device().kind)
    if group == "mass":
        return select_by_mass(_guess_each(q, partial_keys, visible, config), visible, cap, always, alpha, limit)
    logits, maximum = _guess(q, partial_keys, candidates(visible, always), config)
    maximum = maximum.max(-1)
    return select(logits, maximum, maximum, visible, cap, always, alpha, limit)


def _guess(q, partial_keys, visible, config: Config):
    """The highest logits of a group [B, Hkv, C], -inf where not visible, and their maximum over each span [B, Hkv, C / span]."""
    return _run(q, partial_keys, visible, config, joined=True)


def _guess_each(q, partial_keys, visible, config: Config):
    """The logits of every query head [B, Hkv, G, C], -inf where not visible."""
    return _run(q, partial_keys, visible, config, joined=False)[0]


def _run(q, partial_keys, visible, config: Config, joined: bool):
    batch, heads, dim, capacity = partial_keys.shape
    group = q.shape[2]
    span, together = config.span, config.together
    while capacity % span:
        span //= 2
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, -dim % 4)))  # a bulk copy moves multiples of 16 bytes

    def body(q, partial_keys, visible, logits, maximum, q_smem, arrived):
        row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("span")
        here = pl.ds(part * span, span)
        plgpu.copy_gmem_to_smem(q.at[row, head], q_smem, arrived)
        plgpu.barrier_wait(arrived)

        def add(first, products, count):
            numbers = [plgpu.load(partial_keys.at[row, head, first + i, here]).astype(jnp.float32) for i in range(count)]
            for i, number in enumerate(numbers):
                products = [product + q_smem[g, first + i] * number for g, product in enumerate(products)]
            return products

        products = [jnp.zeros((span,), jnp.float32)] * group
        whole = dim // together
        products = lax.fori_loop(0, whole, lambda i, products: add(i * together, products, together), products)
        products = add(whole * together, products, dim % together)
        seen = plgpu.load(visible.at[row, head if visible.shape[1] > 1 else 0, here]).astype(jnp.int32) > 0
        highest = products[0]
        for product in products[1:]:
            highest = jnp.maximum(highest, product)
        highest = jnp.where(seen, highest, -jnp.inf)
        maximum[row, head, part] = highest.max()
        if joined:
            plgpu.store(logits.at[row, head, here], highest)
            return
        for g, product in enumerate(products):
            plgpu.store(logits.at[row, head, g, here], jnp.where(seen, product, -jnp.inf))

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, capacity) if joined else (batch, heads, group, capacity), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, capacity // span), jnp.float32),
        ),
        scratch_types=(plgpu.SMEM(q.shape[2:], jnp.float32), plgpu.Barrier()),
        grid=(batch, heads, capacity // span),
        grid_names=("row", "head", "span"),
        kernel_name=f"speculate_g{group}_d{dim}_c{capacity}" + ("" if joined else "_each"),
    )(q, partial_keys, visible.astype(jnp.int8))
