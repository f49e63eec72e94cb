"""What a decode step cannot do without, by arithmetic from the configuration alone: bytes read, operations, bytes from the host.

All at the end of the context, where a step reads most. Dims as in ModelConfig.
"""

import dataclasses

import jax.numpy as jnp

from kvjax.cache.ledger import nbytes, pool_bytes
from kvjax.models.config import OPT_POSITION_OFFSET
from kvjax.plan.devices import Device
from kvjax.plan.programs import Setting, state


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one decode step of the whole batch.

    Attributes:
      weight_bytes: parameters read once; of an embedding table that is not the head as well, rows alone.
      cache_bytes: keys, values and metadata read on the device.
      flops: two for a multiplication and an addition.
      from_host: bytes that cross over, at most (InfiniGen's choice ends at its budget; what it wants depends on the text).
      to_host: the new token's keys and values.
    """

    weight_bytes: float
    cache_bytes: float
    flops: float
    from_host: float = 0.0
    to_host: float = 0.0

    @property
    def read(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def roofline(self, device: Device, dtype: str) -> float | None:
        """Seconds at the card's bandwidth or its peak rate, whichever takes longer; None without a bandwidth."""
        if device.bandwidth is None:
            return None
        peak = device.flops.get(dtype)
        return max(self.read / device.bandwidth, self.flops / peak if peak else 0.0)


def decode_work(setting: Setting) -> Work:
    """The work of the last decode step of a setting."""
    config, strategy, batch = setting.config, setting.strategy, setting.batch
    policy, tier = strategy.policy, strategy.store.tier
    item, held = jnp.dtype(setting.dtype).itemsize, min(strategy.slots(setting.prompt, setting.context), setting.context)
    token = 2 * config.num_kv_heads * config.head_dim * item  # of one layer
    width = config.embedding_size or config.hidden_size
    table = 0 if config.tie_embeddings else config.vocab_size * width
    learned = (config.max_position + OPT_POSITION_OFFSET) * config.hidden_size if config.rope is None else 0
    used = config.parameter_count - table - learned
    flops = 2.0 * used * batch
    weight_bytes = used * item
    kv = state(setting, batch)
    metadata = nbytes(kv.layers) - pool_bytes(kv)
    per_query = 4 * config.num_heads * config.head_dim  # logits and values of one token and layer
    if not tier.fetches:
        cache = batch * config.num_layers * held * token + metadata
        return Work(weight_bytes, cache, flops + batch * config.num_layers * held * per_query)
    read = [held] * config.num_layers
    if policy.guesses:
        columns, selected = policy.partial_columns(config.head_dim), policy.most_read(setting.prompt, held)
        speculating = max(config.num_layers - policy.full_layers, 0)
        read = [held] * (config.num_layers - speculating) + [selected] * speculating
        flops += 2 * batch * speculating * config.num_heads * columns * held
        rows = config.num_heads * (columns if config.rope is None and not config.qk_norm else config.head_dim)
        flops += 2 * batch * speculating * rows * config.hidden_size
        weight_bytes += speculating * rows * config.hidden_size * item
    moved = batch * sum(read) * token
    flops += batch * sum(read) * per_query
    crossing = (float(moved), float(batch * config.num_layers * token)) if tier.in_host else (0.0, 0.0)
    return Work(weight_bytes, moved + metadata, flops, *crossing)
