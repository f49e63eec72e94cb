"""What a decoder looks like: one configuration for every supported family, and the named presets."""

import dataclasses
import enum

from kvjax.errors import SpecError
from kvjax.models.public import PUBLIC


class Norm(enum.Enum):
    RMS = "rms"
    LAYER = "layer"


class Activation(enum.Enum):
    SILU_GATED = "silu_gated"
    RELU = "relu"


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent RoPE scaling of Llama 3.1 and later (all in tokens, except the factors)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` before rotation."""

    factor: float


@dataclasses.dataclass(frozen=True)
class FactorScaling:
    """A divisor for the frequency of every pair of columns: any scaling, worked out beforehand (GGUF's rope_freqs)."""

    factors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the two halves of a head (the Hugging Face convention)."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | FactorScaling | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Dims used everywhere: B batch, S sequence, H query heads, Hkv kv heads, G = H / Hkv, D head dim, M hidden size, V vocabulary.
    Query head h reads kv head h // G.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    activation: Activation = Activation.SILU_GATED
    rope: Rope | None = dataclasses.field(default_factory=Rope)  # None: learned positions (OPT)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_first: bool = True  # False: OPT-350m normalises after the residual sum and has no final norm
    embedding_size: int | None = None  # OPT-350m: embeddings narrower than the hidden state, projected in and out
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"model {self.name}: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def group_size(self) -> int:
        """G, the query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        m, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        e = self.embedding_size or m
        norm = m * (2 if self.norm_bias else 1)
        attention = m * (q + 2 * kv) + q * m
        attention += (q + 2 * kv if self.qkv_bias else 0) + (m if self.output_bias else 0) + (2 * d if self.qk_norm else 0)
        gated = self.activation is Activation.SILU_GATED
        mlp = (3 if gated else 2) * m * f + ((2 * f if gated else f) + m if self.mlp_bias else 0)
        total = self.num_layers * (attention + mlp + 2 * norm) + self.vocab_size * e * (1 if self.tie_embeddings else 2)
        total += norm if self.norm_first else 0
        total += self.max_position_rows * m if self.rope is None else 0
        return total + (2 * e * m if e != m else 0)

    @property
    def max_position_rows(self) -> int:
        """Rows of the learned position table: OPT keeps two unused rows in front."""
        return self.max_position + OPT_POSITION_OFFSET

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V one token adds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


OPT_POSITION_OFFSET = 2


def _opt(size: str, hidden: int, layers: int, heads: int, **changes) -> ModelConfig:
    return ModelConfig(
        name=f"opt-{size}", vocab_size=50272, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers,
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, max_position=2048, norm=Norm.LAYER,
        activation=Activation.RELU, rope=None, qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True,
        tie_embeddings=True, stop_tokens=(2,), **changes,
    )  # fmt: skip


def _llama(name: str, vocab: int, hidden: int, ff: int, layers: int, heads: int, kv_heads: int, context: int, **changes) -> ModelConfig:
    fields: dict = dict(
        name=name, vocab_size=vocab, hidden_size=hidden, intermediate_size=ff, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=hidden // heads, max_position=context, stop_tokens=(2,),
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


_LLAMA3_STOP = (128_001, 128_009)
_LLAMA31 = Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
_LLAMA32 = Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
_QWEN_STOP = (151_645, 151_643)
_QWEN2 = dict(rope=Rope(1e6), qkv_bias=True, norm_eps=1e-6, stop_tokens=_QWEN_STOP)
_QWEN3 = dict(rope=Rope(1e6), qk_norm=True, norm_eps=1e-6, head_dim=128, stop_tokens=_QWEN_STOP)

BUNDLED: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _llama("kvjax-1m", 256, 128, 384, 5, 4, 2, 2048, rope=Rope(100_000.0), tie_embeddings=True, stop_tokens=()),
        _llama("kvjax-4m", 256, 256, 768, 5, 8, 2, 2048, rope=Rope(100_000.0), tie_embeddings=True, stop_tokens=()),
    )
}
"""The byte-level models whose trained weights ship with kvjax."""

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _llama("bench-32m", 8192, 512, 1408, 8, 8, 4, 8192, stop_tokens=()),
        _opt("125m", 768, 12, 12),
        _opt("350m", 1024, 24, 16, norm_first=False, embedding_size=512),
        _opt("1.3b", 2048, 24, 32),
        _opt("2.7b", 2560, 32, 32),
        _opt("6.7b", 4096, 32, 32),
        _opt("13b", 5120, 40, 40),
        _opt("30b", 7168, 48, 56),
        _opt("66b", 9216, 64, 72),
        _llama("llama-2-7b", 32_000, 4096, 11_008, 32, 32, 32, 4096),
        _llama("llama-2-13b", 32_000, 5120, 13_824, 40, 40, 40, 4096),
        _llama("llama-2-70b", 32_000, 8192, 28_672, 80, 64, 8, 4096),
        _llama("llama-3-8b", 128_256, 4096, 14_336, 32, 32, 8, 8192, rope=Rope(500_000.0), stop_tokens=_LLAMA3_STOP),
        _llama("llama-3-70b", 128_256, 8192, 28_672, 80, 64, 8, 8192, rope=Rope(500_000.0), stop_tokens=_LLAMA3_STOP),
        _llama("llama-3.1-8b", 128_256, 4096, 14_336, 32, 32, 8, 131_072, rope=_LLAMA31, stop_tokens=_LLAMA3_STOP),
        _llama("llama-3.1-70b", 128_256, 8192, 28_672, 80, 64, 8, 131_072, rope=_LLAMA31, stop_tokens=_LLAMA3_STOP),
        _llama("llama-3.2-1b", 128_256, 2048, 8192, 16, 32, 8, 131_072, rope=_LLAMA32, tie_embeddings=True, stop_tokens=_LLAMA3_STOP),
        _llama("llama-3.2-3b", 128_256, 3072, 8192, 28, 24, 8, 131_072, rope=_LLAMA32, tie_embeddings=True, stop_tokens=_LLAMA3_STOP),
        _llama("smollm2-135m", 49_152, 576, 1536, 30, 9, 3, 8192, rope=Rope(100_000.0), tie_embeddings=True, stop_tokens=(2, 0)),
        _llama("mistral-7b-v0.3", 32_768, 4096, 14_336, 32, 32, 8, 32_768, rope=Rope(1e6)),
        _llama("qwen2-0.5b", 151_936, 896, 4864, 24, 14, 2, 131_072, tie_embeddings=True, **_QWEN2),
        _llama("qwen2-7b", 152_064, 3584, 18_944, 28, 28, 4, 131_072, **_QWEN2),
        _llama("qwen3-0.6b", 151_936, 1024, 3072, 28, 16, 8, 40_960, tie_embeddings=True, **_QWEN3),
        _llama("qwen3-8b", 151_936, 4096, 12_288, 36, 32, 8, 40_960, **_QWEN3),
    )
}
"""Published shapes (random weights on request; real weights from a local file or directory), plus the benchmark shape."""


def preset(name: str) -> ModelConfig:
    """The named configuration, bundled or preset. Raises SpecError with the list of names."""
    found = BUNDLED.get(name) or PRESETS.get(name)
    if found is None:
        public, presets = ", ".join(PUBLIC), ", ".join(name for name in PRESETS if name not in PUBLIC)
        raise SpecError(
            f"unknown model {name!r}; bundled: {', '.join(BUNDLED)}; fetched by name: {public}; presets: {presets}; or a directory, or a "
            ".gguf file"
        )
    return found
