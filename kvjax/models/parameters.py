"""The parameters of a Decoder as a tree: their shapes without memory, random values, and where each is placed.

A parameter is named by its path below "params", such as `("layer_0", "attention", "q", "weight")`. A `Sharding` maps that path to a
placement; None, for the whole function or for one path, means the default device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvjax.cache.steps import Forward
from kvjax.errors import NotFiniteError
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

Parameters = Any
"""The Flax variables of a Decoder: `{"params": {...}}` with arrays (or ShapeDtypeStructs) as leaves."""
Path = tuple[str, ...]
Sharding = Callable[[Path], jax.sharding.Sharding | None]


def abstract(config: ModelConfig, dtype: DTypeLike = jnp.float32, sharding: Sharding | None = None) -> Parameters:
    """The tree with a `jax.ShapeDtypeStruct` (shape, dtype, placement) for every parameter; allocates nothing."""
    return map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, sharding)), _shapes(config, jnp.dtype(dtype))
    )


@functools.lru_cache(maxsize=32)
def _shapes(config: ModelConfig, dtype: jnp.dtype) -> Parameters:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(functools.partial(Decoder(config, dtype).init, kv=None, step=Forward(tokens)), jax.random.key(0), tokens)


def random(config: ModelConfig, dtype: DTypeLike = jnp.float32, seed: int = 0, sharding: Sharding | None = None) -> Parameters:
    """Random parameters: the same for the same configuration, dtype and seed.

    Matrices are normal with variance 1 / fan-in, embeddings and head normal with standard deviation 0.02, norm scales one, biases zero.
    Every parameter is made by a program of its own, in `dtype` and in its place: the peak above the result is the random bits of one.
    """
    key = jax.random.key(seed)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(config, dtype, sharding))
    made = [_random_leaf(jax.random.fold_in(key, i), _path(keys), leaf) for i, (keys, leaf) in enumerate(leaves)]
    return jax.tree_util.tree_unflatten(structure, made)


def map_with_path(function: Callable[..., Any], tree: Parameters, *rest: Parameters) -> Parameters:
    """`function(path, leaf, ...)` over the leaves of one or several parameter trees."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(_path(keys), *leaves), tree, *rest)


def check_finite(parameters: Parameters, name: str) -> None:
    """Raises NotFiniteError, which names the parameter, when one of `parameters` (of the model `name`) is infinite or no number."""

    def check(path: Path, leaf: jax.Array) -> None:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(_all_finite(leaf)):
            raise NotFiniteError(
                f"model {name}: {'/'.join(path)} is not finite in {leaf.dtype}; its weights are damaged, or too large for this dtype "
                "(float32 and bfloat16 reach further)"
            )

    map_with_path(check, parameters)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def place(path: Path, sharding: Sharding | None) -> jax.sharding.Sharding:
    """The placement of one parameter."""
    chosen = sharding(path) if sharding else None
    return chosen or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _path(keys) -> Path:
    return tuple(key.key for key in keys[1:])


def _random_leaf(key: jax.Array, path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if path[-1] in ("scale", "q_norm", "k_norm"):
        return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
    if path[-1] == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    deviation = leaf.shape[-1] ** -0.5 if path[-1] == "weight" else 0.02
    return _normal(leaf.shape, leaf.dtype, deviation, leaf.sharding)(key)


@functools.cache
def _normal(shape: tuple[int, ...], dtype: jnp.dtype, deviation: float, sharding: jax.sharding.Sharding):
    return jax.jit(lambda key: deviation * jax.random.normal(key, shape, dtype), out_shardings=sharding)
