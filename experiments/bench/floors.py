"""What a step cannot be faster than: the bytes it has to read, the operations it has to do. Arithmetic on a configuration only."""

import dataclasses

from kvjax.cache import Strategy
from kvjax.models.config import Activation, ModelConfig

F32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine was measured to do.

    Attributes:
      bandwidth: bytes read plus bytes written per second of a large copy.
      flops: float32 operations per second of a large matrix product.
    """

    bandwidth: float
    flops: float


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of float32 weights a decode step reads: all but the embedding table, of which it reads rows, unless it is the head as well."""
    table = 0 if config.tie_embeddings else config.vocab_size * (config.embedding_size or config.hidden_size)
    return F32_BYTES * (config.parameter_count - table)


def attended_tokens(strategy: Strategy, context: int, steps: int) -> float:
    """Tokens a row attends to, the new one included, averaged over `steps` decode steps after a prompt of `context` tokens."""
    growing = context + (steps + 1) / 2
    budget = strategy.policy.kept_tokens(context)
    return growing if budget is None else min(budget + 1, growing)


def decode_bytes(config: ModelConfig, strategy: Strategy, batch: int, context: int, steps: int) -> float:
    """Bytes an average decode step of the batch has to read: weights once, and the live keys and values of every row."""
    kv = F32_BYTES * config.kv_elements_per_token * attended_tokens(strategy, context, steps)
    return weight_bytes(config) + batch * kv


def prefill_flops(config: ModelConfig, batch: int, context: int) -> float:
    """Operations of a prompt: matrix products of every token, causal attention, and the head for the last token only."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = (3 if config.activation is Activation.SILU_GATED else 2) * config.intermediate_size
    dense = config.hidden_size * (2 * q + 2 * kv + matrices) * context
    attention = 2 * q * context * (context + 1) / 2
    head = config.vocab_size * (config.embedding_size or config.hidden_size)
    return 2 * batch * (config.num_layers * (dense + attention) + head)


def decode_floor(config: ModelConfig, strategy: Strategy, batch: int, context: int, steps: int, rates: Rates) -> float:
    """Seconds a decode step takes at the measured bandwidth."""
    return decode_bytes(config, strategy, batch, context, steps) / rates.bandwidth


def prefill_floor(config: ModelConfig, batch: int, context: int, rates: Rates) -> float:
    """Seconds a prompt takes at the measured matrix product rate."""
    return prefill_flops(config, batch, context) / rates.flops
