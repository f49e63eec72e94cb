"""The real programs of a run, compiled from shapes alone: no weights, no cache, no card.

A decoder unrolls its layers, so compiling forty of them takes long. Layers repeat: two depths are compiled, and all of them lie on the line
through the two. Both depths have every kind of layer that the model has (the first ones of InfiniGen read everything).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.cache import CacheShape, KVState, Prefill, Stage, Strategy, stage
from kvjax.cache.ledger import nbytes
from kvjax.calibrate import RANK
from kvjax.errors import SpecError
from kvjax.generation import compress_layer, unrolled_prefill, unrolled_steps
from kvjax.kernels.dispatch import current_device
from kvjax.models import Decoder, ModelConfig, parameters
from kvjax.models.guide import Guide, QueryGuide, guides
from kvjax.plan.devices import Device, PlanError

DEPTHS = (2, 4)
"""Layers that are compiled. Where a policy speculates, beside its `full_layers` and two more: only behind them does scratch settle."""

Depths = Literal["two", "all"]
"""Which depths are compiled: two, with the others on the line through them, or the model's own."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned.

    Attributes:
      batch: rows of a decode step.
      context: tokens a row holds in the end, prompt and output.
      output_len: of them, generated.
      prefill_batch: prompts that go in together, while the caches of the other rows stand beside them.
      prefill_chunk: tokens of a prompt per call; None: whole. An evicting policy stages a prompt that comes in chunks, as the engine does.
    """

    config: ModelConfig
    strategy: Strategy
    batch: int
    context: int
    output_len: int = 128
    dtype: str = "bfloat16"
    prefill_batch: int = 1
    prefill_chunk: int | None = 512

    def __post_init__(self):
        if not 1 <= self.output_len < self.context:
            raise SpecError(f"output_len={self.output_len}: a context of {self.context} tokens has room for 1 to {self.context - 1}")
        if self.batch < 1 or self.prefill_batch < 1 or (self.prefill_chunk is not None and self.prefill_chunk < 1):
            raise SpecError("batch, prefill_batch and prefill_chunk are at least 1")
        if self.strategy.store.tier.driven:
            raise SpecError("transfer=driven is many small programs with the host between them; plan transfer=jit")

    @property
    def prompt(self) -> int:
        return self.context - self.output_len

    @property
    def stages(self) -> bool:
        """Whether prompts stand in a staging state until they are complete."""
        chunked = self.prefill_chunk is not None and self.prefill_chunk < self.prompt
        return chunked and self.strategy.policy.evicts

    def native(self, device: Device) -> "Setting":
        """The same over the store that the device computes with."""
        with device.in_scope():
            return dataclasses.replace(self, strategy=self.strategy.native(current_device()))

    def resized(self, batch: int, context: int) -> "Setting":
        """The same for other sizes; the part of the context that is generated stays within it."""
        return dataclasses.replace(self, batch=batch, context=context, output_len=min(self.output_len, context - 1))

    def with_layers(self, num_layers: int) -> "Setting":
        return dataclasses.replace(self, config=dataclasses.replace(self.config, num_layers=num_layers))

    def depths(self, how: Depths = "two") -> tuple[int, int]:
        """The depths compiled, the same twice for one: the model's own with `all`, and where it is no deeper than the others."""
        policy = self.strategy.policy
        first, second = (depth + (policy.full_layers + 2) * policy.guesses for depth in DEPTHS)
        if how == "all" or second >= self.config.num_layers:
            return self.config.num_layers, self.config.num_layers
        return first, second


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiler says of a program. Bytes; `flops` and `accessed` are XLA's own counts, None where it gives none.

    Attributes:
      temp: scratch.
      results: outputs that do not take the place of an argument.
      padding: what arguments take beyond the bytes of their elements.
    """

    temp: float
    results: float
    padding: float
    flops: float | None = None
    accessed: float | None = None

    @property
    def beside(self) -> float:
        """All that a program needs beside its arguments."""
        return self.temp + self.results + self.padding


def compiled_decode(setting: Setting, device: Device) -> Usage:
    """One decode step."""
    setting = as_compiled(setting, device)
    row = jax.ShapeDtypeStruct((setting.batch,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = placed(device, (_params(setting), state(setting, setting.batch), row, row, None, count))
    with device.in_scope():
        return _usage(unrolled_steps.lower(decoder(setting), setting.strategy, (), 1, *arguments), arguments, device)


def compiled_prefill(setting: Setting, device: Device) -> Usage:
    """The call that puts the last tokens of the prompts in, which needs most, or what compresses a layer of them where that needs more."""
    setting = as_compiled(setting, device)
    rows, prompt, strategy = setting.prefill_batch, setting.prompt, setting.strategy
    chunk = min(setting.prefill_chunk or prompt, prompt)
    params, kv = _params(setting), staged(setting) if setting.stages else state(setting, rows)
    lengths: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, chunk), jnp.int32)
    how: Any = {} if chunk == prompt else dict(first=False, context=prompt)
    stages = Stage(lengths, strategy.store.staging, strategy.observes, **how)
    step = stages if setting.stages else Prefill(lengths, strategy, **how)
    with device.in_scope():
        arguments = placed(device, (params, tokens, kv, step))
        chunked = _usage(unrolled_prefill.lower(decoder(setting), *arguments), arguments, device)
        if not setting.stages:
            return chunked
        empty, guide, layers = state(setting, rows), guides(params, setting.config.num_layers), setting.config.num_layers
        index = jax.ShapeDtypeStruct((), jnp.int32)
        arguments = placed(device, (kv.layers[-1], empty.layers[-1], kv.length, empty.over(()), guide[-1] if guide else None, index))
        compressed = _usage(compress_layer.lower(strategy, layers, *arguments), arguments, device)
    return max(chunked, compressed, key=lambda usage: usage.beside)


def _usage(lowered: jax.stages.Lowered, arguments: Any, device: Device) -> Usage:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
        raise PlanError(f"the compiler for {device.name} refuses: {reason}") from None
    memory = program.memory_analysis()
    if memory is None:
        raise PlanError(f"the compiler for {device.name} reports no memory")
    costs: Any = program.cost_analysis() or {}
    taken = memory.argument_size_in_bytes + memory.host_argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Usage(memory.temp_size_in_bytes, results, max(taken - nbytes(arguments), 0), costs.get("flops"), costs.get("bytes accessed"))


# ------------------------------------------------------------------------------------------------------------------------------- shapes


def decoder(setting: Setting) -> Decoder:
    return Decoder(setting.config, jnp.dtype(setting.dtype))


def cache_shape(setting: Setting) -> CacheShape:
    config = setting.config
    return CacheShape(config.num_layers, config.num_kv_heads, config.group_size, config.head_dim, jnp.dtype(setting.dtype))


@functools.lru_cache(maxsize=256)
def state(setting: Setting, rows: int) -> KVState:
    """The shapes of a cache for `rows` rows; those of a host store's pool say that they are host memory."""
    strategy, shape = setting.strategy, cache_shape(setting)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return jax.eval_shape(lambda x: strategy.init(shape, x, setting.prompt, setting.output_len), lengths)


@functools.lru_cache(maxsize=256)
def staged(setting: Setting) -> KVState:
    """The shapes of what holds whole prompts until they are compressed."""
    lengths = jax.ShapeDtypeStruct((setting.prefill_batch,), jnp.int32)
    return jax.eval_shape(
        lambda x: stage(setting.strategy.store, setting.strategy.observes, cache_shape(setting), x, setting.prompt), lengths
    )


def as_compiled(setting: Setting, device: Device) -> Setting:
    """The setting that is compiled. For a card that is not here, arguments do not stay in host memory (its kind is lost), so the pool
    of a host store is compiled as device memory, and taken off the bytes afterwards."""
    if device.mesh is None:
        return setting
    return dataclasses.replace(setting, strategy=Strategy(setting.strategy.policy, setting.strategy.store.on_device()))


def placed(device: Device, tree: Any) -> Any:
    """Abstract arguments on the device; as they are where it is this machine."""
    return tree if device.mesh is None else device.abstract(tree)


def _params(setting: Setting) -> parameters.Parameters:
    """The shapes of the parameters, with the guide that a policy needs which speculates (kvjax.calibrate.prepare)."""
    return _abstract_params(setting.config, setting.dtype, setting.strategy)


@functools.lru_cache(maxsize=64)
def _abstract_params(config: ModelConfig, dtype: str, strategy: Strategy) -> parameters.Parameters:
    params = parameters.abstract(config, dtype)
    if not strategy.policy.guesses:
        return params
    policy: Any = strategy.policy
    columns, kind = policy.partial_columns(config.head_dim), jnp.dtype(dtype)
    key: Any = jax.ShapeDtypeStruct((config.num_kv_heads, config.head_dim, columns), kind)

    def following(layer: int) -> QueryGuide:
        attention = params["params"][f"layer_{layer}"]["attention"]
        weight, bias = attention["q"]["weight"], attention["q"].get("bias")
        if config.rope is not None or config.qk_norm:
            project: Any = jax.ShapeDtypeStruct(key.shape, kind) if policy.columns == "product" else key
            rank = min(RANK, *weight.shape) if policy.correction else 0
            down, up = (jax.ShapeDtypeStruct(size, kind) for size in ((rank, weight.shape[1]), (weight.shape[0], rank)))
            low_rank: Any = (down, up) if rank else (None, None)
            return QueryGuide(weight, bias, attention.get("q_norm"), project, *low_rank)
        rows = config.num_heads * columns
        cut: Any = jax.ShapeDtypeStruct((rows, config.hidden_size), kind)
        cut_bias: Any = None if bias is None else jax.ShapeDtypeStruct((rows,), kind)
        return QueryGuide(cut, cut_bias, None, None)

    last = config.num_layers - 1
    found = {f"layer_{i}": {"attention": {"guide": Guide(key, following(i + 1) if i < last else None)}} for i in range(config.num_layers)}
    return params | {"guide": found}


def weight_bytes(setting: Setting) -> tuple[int, int]:
    """Of the parameters, and of what a guide has beside them.

    Where a guide projects queries, its weights are the model's own and its projection may be the next layer's `key`: no memory twice.
    """
    params = _params(setting)
    guide, every = 0, guides(params, setting.config.num_layers)
    for layer, above in zip(every, (*every[1:], None), strict=False):
        guide += nbytes(layer.key)
        following = layer.following
        if following is None:
            continue
        if following.project is None:
            guide += nbytes(following)
            continue
        assert above is not None
        guide += nbytes((following.down, following.up)) + (0 if following.project is above.key else nbytes(following.project))
    return nbytes(params["params"]), guide
