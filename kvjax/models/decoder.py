"""The decoder: one Flax linen module for every family, holding parameters and nothing else.

    logits, kv = Decoder(config).apply(params, tokens, kv, step)

The KV state is a value that goes in and comes out. How attention touches it is the business of `step` (kvjax.cache.steps): the
decoder asks it for the positions of the tokens, and per layer for attention over them.

Weight matrices are stored `[out, in]`, as in Hugging Face checkpoints. On a CPU this orientation is also the faster one for the thin
matrix products of batched decoding.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.models.config import OPT_POSITION_OFFSET, Activation, FactorScaling, LinearScaling, ModelConfig, Norm, Rope
from kvjax.models.guide import Guide, QueryGuide

KV = TypeVar("KV")

Stringing = Literal["unroll", "calls"]
"""How the layers become programs (kvjax.runtime.forward): all in one, or one for every kind of layer, called once a layer."""
UNROLLED_LAYERS = 8
"""Up to so many layers are unrolled on a CPU: below, dispatching them one by one costs more than compiling them."""


def default_stringing(config: ModelConfig) -> Stringing:
    """How the layers of a model are strung together on this machine's device unless someone says otherwise."""
    return "calls" if jax.default_backend() == "cpu" and config.num_layers > UNROLLED_LAYERS else "unroll"


class Step(Protocol[KV]):
    """What one call of the decoder does with the cache."""

    def positions(self, kv: KV, num_tokens: int) -> Int[Array, "B S"]:
        """True position of every token of this call."""
        ...

    def look_ahead(self, layer: int, queries: Callable[[], Float[Array, "B Hkv G P"] | None], kv: KV) -> Any:
        """What layer `layer + 1` is going to read, of which `queries` guesses partial queries (scaled, of the first token; None without a
        guide); None where nothing is chosen ahead."""
        ...

    def attend(
        self, layer: int, q: Float[Array, "B S H D"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], kv: KV,
        guide: Guide | None, ahead: Any,
    ) -> tuple[Float[Array, "B S H D"], KV]:  # fmt: skip
        """Store `k` and `v` (keys already rotated) and attend; q is not scaled yet.

        Args:
          guide: this layer's, if the model has one.
          ahead: what `look_ahead` gave, for the next layer.
        """
        ...

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B T M"]:
        """The positions whose logits are wanted."""
        ...

    def finish(self, kv: KV, num_tokens: int) -> KV:
        """The state after all layers have seen the tokens."""
        ...


class Decoder(nn.Module):
    """A decoder-only transformer (see ModelConfig for the families it covers).

    Attributes:
      part: `all`, or for whoever runs the layers one by one: `embed` gives hidden states and rotation, `head` takes hidden states and gives
        logits.
      stringing: how kvjax.runtime runs the layers; the module itself, applied, is one program.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    stringing: Stringing = "unroll"
    part: Literal["all", "embed", "head"] = "all"

    @nn.compact
    def __call__(self, tokens: Any, kv: KV, step: Step[KV]) -> tuple[Float[Array, "B T V"], KV]:
        """Runs `tokens` through every layer.

        Returns float32 logits for the positions `step.hidden` selects, and the new KV state.
        """
        config = self.config
        width = config.embedding_size or config.hidden_size
        table = self.param("embed", nn.initializers.normal(0.02), (config.vocab_size, width), self.dtype)
        if self.part == "head":
            return self._logits(tokens, table, step), kv
        x = table[tokens]
        if width != config.hidden_size:
            x = Linear(config.hidden_size, False, self.dtype, name="project_in")(x)

        positions = step.positions(kv, tokens.shape[1])
        if config.rope is None:
            shape = (config.max_position_rows, config.hidden_size)
            x += self.param("embed_positions", nn.initializers.normal(0.02), shape, self.dtype)[positions + OPT_POSITION_OFFSET]
            rotation = None
        else:
            rotation = rope_angles(config.rope, config.head_dim, positions)
        if self.part == "embed":
            return x, rotation  # type: ignore[return-value]

        for i in range(config.num_layers):
            x, kv = Block(config, i, self.dtype, name=f"layer_{i}")(x, rotation, kv, step)
        kv = step.finish(kv, tokens.shape[1])
        return self._logits(x, table, step), kv

    def _logits(self, x: Float[Array, "B S M"], table: Float[Array, "V E"], step: Step[KV]) -> Float[Array, "B T V"]:
        config, width = self.config, table.shape[1]
        x = step.hidden(x)
        if config.norm_first:
            x = Normalise(config, self.dtype, name="final_norm")(x)
        if width != config.hidden_size:
            x = Linear(width, False, self.dtype, name="project_out")(x)
        with jax.named_scope("lm_head"):
            head = table
            if not config.tie_embeddings:
                head = self.param("lm_head", nn.initializers.normal(0.02), (config.vocab_size, width), self.dtype)
            return matmul(x, head, jnp.float32)


class Block(nn.Module):
    """Attention and MLP, each with its norm and residual."""

    config: ModelConfig
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, rotation, kv, step):
        first = self.config.norm_first
        attention_norm = Normalise(self.config, self.dtype, name="attention_norm")
        mlp_norm = Normalise(self.config, self.dtype, name="mlp_norm")

        out, kv = Attention(self.config, self.layer, self.dtype, name="attention")(attention_norm(x) if first else x, rotation, kv, step)
        x = x + out if first else attention_norm(x + out)
        out = Mlp(self.config, self.dtype, name="mlp")(mlp_norm(x) if first else x)
        x = x + out if first else mlp_norm(x + out)
        return x, kv


class Attention(nn.Module):
    """Projections around `step.attend`; the only place where a layer meets the cache."""

    config: ModelConfig
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, rotation, kv, step):
        config = self.config
        guide = self.get_variable("guide", "guide") if self.has_variable("guide", "guide") else None
        following = None if guide is None else guide.following
        ahead = step.look_ahead(self.layer, lambda: None if following is None else guess_queries(config, following, x, rotation), kv)

        def project(name: str, heads: int):
            y = Linear(heads * config.head_dim, config.qkv_bias, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, config.head_dim)

        q, k, v = project("q", config.num_heads), project("k", config.num_kv_heads), project("v", config.num_kv_heads)
        if config.qk_norm:
            q = rms_norm(q, self.param("q_norm", nn.initializers.ones, (config.head_dim,), self.dtype), config.norm_eps)
            k = rms_norm(k, self.param("k_norm", nn.initializers.ones, (config.head_dim,), self.dtype), config.norm_eps)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)

        out, kv = step.attend(self.layer, q, k, v, kv, guide, ahead)
        out = out.reshape(*out.shape[:-2], config.num_heads * config.head_dim)
        return Linear(config.hidden_size, config.output_bias, self.dtype, name="o")(out), kv


def guess_queries(config: ModelConfig, guide: QueryGuide, x: Float[Array, "B S M"], rotation) -> Float[Array, "B Hkv G P"]:
    """Partial queries of a layer from the attention input of the layer before it (InfiniGen, section 4.2), scaled; of the first token."""
    y = matmul(x[:, :1], guide.weight, x.dtype)
    if guide.down is not None and guide.up is not None:
        y += matmul(matmul(x[:, :1], guide.down, x.dtype), guide.up, x.dtype)
    if guide.bias is not None:
        y += guide.bias
    heads, groups = config.num_kv_heads, config.group_size
    if guide.project is None:
        partial = y.reshape(y.shape[0], heads, groups, -1)
    else:
        q = y.reshape(y.shape[0], 1, config.num_heads, config.head_dim)
        if guide.norm is not None:
            q = rms_norm(q, guide.norm, config.norm_eps)
        if rotation is not None:
            q = rotate(q, rotation)
        partial = jnp.einsum("bngd,ndp->bngp", q.reshape(q.shape[0], heads, groups, -1), guide.project)
    return partial * config.head_dim**-0.5


class Mlp(nn.Module):
    """SiLU-gated (Llama) or ReLU (OPT)."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        config = self.config
        up = Linear(config.intermediate_size, config.mlp_bias, self.dtype, name="up")(x)
        if config.activation is Activation.SILU_GATED:
            up = nn.silu(Linear(config.intermediate_size, config.mlp_bias, self.dtype, name="gate")(x)) * up
        else:
            up = nn.relu(up)
        return Linear(config.hidden_size, config.mlp_bias, self.dtype, name="down")(up)


class Linear(nn.Module):
    """y = x W^T + b with W stored `[out, in]`."""

    features: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.lecun_normal(in_axis=-1, out_axis=-2), (self.features, x.shape[-1]), self.dtype)
        y = matmul(x, weight, self.dtype)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return y


THIN_ROWS, THIN_BLOCKS = range(2, 33), 8


def matmul(x: Float[Array, "B S I"], weight: Float[Array, "O I"], dtype: DTypeLike) -> Float[Array, "B S O"]:
    """x W^T, accumulated in at least float32 and returned as `dtype`.

    For a few rows XLA's CPU backend is faster when the outputs form a batch of blocks (BUILD_NOTES.md has the measurements).
    """

    def plain(x, weight):
        return jnp.einsum("bsi,oi->bso", x, weight, preferred_element_type=dtype)

    def blocked(x, weight):
        blocks = weight.reshape(THIN_BLOCKS, -1, weight.shape[1])
        y = jnp.einsum("ri,noi->nro", x.reshape(-1, x.shape[-1]), blocks, preferred_element_type=dtype)
        return y.swapaxes(0, 1).reshape(*x.shape[:-1], weight.shape[0])

    if x.shape[0] * x.shape[1] in THIN_ROWS and weight.shape[0] % THIN_BLOCKS == 0:
        return jax.lax.platform_dependent(x, weight, cpu=blocked, default=plain)
    return plain(x, weight)


class Normalise(nn.Module):
    """RMSNorm or LayerNorm over the hidden size, computed in float32."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        if self.config.norm is Norm.RMS:
            return rms_norm(x, scale, self.config.norm_eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.config.norm_eps)
        return wide.astype(x.dtype) * scale + bias


def rms_norm(x: Float[Array, "... M"], scale: Float[Array, " M"], eps: float) -> Float[Array, "... M"]:
    """x / rms(x) * scale, the mean square taken in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale


def rope_frequencies(rope: Rope, head_dim: int) -> Float[Array, " half"]:
    """Radians per position for each pair of a head's two halves."""
    frequency = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling is None:
        return frequency
    if isinstance(rope.scaling, LinearScaling):
        return frequency / rope.scaling.factor
    if isinstance(rope.scaling, FactorScaling):
        return frequency / jnp.array(rope.scaling.factors, jnp.float32)
    scaling = rope.scaling
    turns = scaling.original_max_position * frequency / (2 * jnp.pi)  # rotations inside the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)  # 0: stretch fully (slow pairs), 1: leave alone (fast pairs)
    return frequency * (smooth + (1 - smooth) / scaling.factor)


def rope_angles(rope: Rope, head_dim: int, positions: Int[Array, "B S"]) -> tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]]:
    """Cosine and sine of every rotation, float32, with an axis for the heads."""
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S H D"], rotation) -> Float[Array, "B S H D"]:
    """Applies RoPE: pairs are (i, i + D/2)."""
    cos, sin = rotation
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = jnp.flip(halves, -2) * jnp.array([[-1.0], [1.0]])  # (a, b) -> (-b, a)
    return (halves * cos[..., None, :] + turned * sin[..., None, :]).reshape(x.shape).astype(x.dtype)
