"""InfiniGen's offline calibration: where the magnitude of queries and keys lies, and a rotation that gathers it in few columns.

    python -m kvjax.calibrate --model=kvjax-4m --output_dir=runs/calibration-4m
    python -m kvjax.calibrate --model=smollm2-135m --loss=0.02 --strategy="infinigen(budget=0.5)"

    calibration = calibrate(model)
    model = prepare(model, calibration, partial=0.3)

With --loss it also finds how much has to be read so that no more than this share of the attention is missed (kvjax.thresholds).

InfiniGen (arXiv:2406.19707) guesses which cached tokens matter from a few columns of queries and keys. The guess is good where those
columns hold most of the magnitude. An orthogonal matrix A per kv head, the right singular vectors of sample queries, makes it so and
leaves attention as it is: (Q A)(K A)^T = Q K^T. A model without rotary positions (OPT) takes A into its weights, at no cost when it runs.
With them, A is applied after the rotation, on the way of the guess alone.

Kept columns are those with the largest sum of |Q A| + |K A| over the sample, 30 % of them by default, as in the paper. Its published code
differs, and both of its ways are options: 20 % by |Q A| alone (the speed measurements), the union of 20 % by either (the accuracy ones).

Two further steps are not in the paper; both cost nothing but a product with a few columns when the model runs (BUILD_NOTES.md has what
they are worth):

  columns="product"  queries and keys get a projection each, which together lose least of the products q . k that the sample has, in the
                     mean square: with second moments C_q and C_k, the singular vectors of C_q^(1/2) C_k^(1/2).
  correction         the paper takes a layer's input for the next one's. A map of low rank, fitted to the sample (reduced-rank ridge
                     regression), predicts what the difference does to the queries.

One A serves a kv head and all query heads that read it (grouped-query attention is not in the paper): their queries are stacked for the
decomposition, and their magnitudes added for the choice of columns.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from jaxtyping import Array, Float, Int

from kvjax import compilation
from kvjax.cache import Strategy, parse_strategy
from kvjax.cache.policies import InfiniGen
from kvjax.command import answered, start
from kvjax.errors import InputError, ModelError, NotFiniteError, SpecError
from kvjax.kernels.attention import attention, tokens
from kvjax.models import Decoder, Model, ModelConfig, load_model, public
from kvjax.models.checkpoint import MARKER_FILE
from kvjax.models.decoder import Attention, Block
from kvjax.models.guide import Guide, QueryGuide
from kvjax.quality import recall
from kvjax.runtime.forward import embed, layer_variables
from kvjax.thresholds import ALPHAS, Curves, alpha_by_layer, alpha_for, late, measured_like, read_and_missed

FLAGS = flags.FLAGS
SAMPLE_TOKENS, SAMPLE_ROW = 2048, 1024
PARTIAL = 0.3
RANK = 16
"""Of a correction: few directions of the input tell nearly all that is missing (BUILD_NOTES.md)."""

RIDGE = 1e-2
"""Of a correction, over the mean square of an input's dims: enough for samples little longer than an input is wide."""

Columns = Literal["product", "sum", "query", "union"]
_MASSES = ("query_mass", "key_mass", "plain_query_mass", "plain_key_mass")
_TURNS = ("skew", "product_query", "product_key")
_ARRAYS = (*_TURNS, *_MASSES, "down", "up")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured on a model; float32.

    Queries and keys are taken as they meet in the product: after RoPE and the norm of Qwen3, before the scale 1 / sqrt(D).

    Attributes:
      model_id: name of the model.
      weights: fingerprint of its weights, the same in every dtype they are cast to.
      num_tokens: tokens of the sample.
      skew: the orthogonal matrix A of each layer and kv head; its columns in descending order of the singular values of the queries.
      query_mass: sum of |Q A| per column, over the tokens and the G query heads of the kv head.
      key_mass: sum of |K A| per column, over the tokens.
      plain_query_mass, plain_key_mass: the same without A.
      product_query, product_key: projections of queries and keys whose first P columns lose least of the products, for every P.
      down, up: the correction of each layer's query weight (before norm and rotation) where it meets the attention input of the layer
        before; zeros in layer 0, which has none.
      curves: what thresholds read and miss, by kvjax.thresholds.measured_like of a policy (`with_curves`).
    """

    model_id: str
    weights: str
    num_tokens: int
    skew: Float[np.ndarray, "L Hkv D D"]
    query_mass: Float[np.ndarray, "L Hkv D"]
    key_mass: Float[np.ndarray, "L Hkv D"]
    plain_query_mass: Float[np.ndarray, "L Hkv D"]
    plain_key_mass: Float[np.ndarray, "L Hkv D"]
    product_query: Float[np.ndarray, "L Hkv D D"]
    product_key: Float[np.ndarray, "L Hkv D D"]
    down: Float[np.ndarray, "L r M"]
    up: Float[np.ndarray, "L O r"]
    curves: Mapping[str, Curves] = dataclasses.field(default_factory=dict)


Captured = tuple
"""(queries, keys) of the layers so far: the state of `Capture`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """A step (kvjax.models.decoder.Step): whole rows without a cache."""

    token_positions: Int[Array, "B S"]

    def positions(self, kv: Captured, num_tokens: int) -> Int[Array, "B S"]:
        return self.token_positions

    def look_ahead(self, layer: int, queries, kv: Captured) -> None:
        return None

    def attend(self, layer: int, q, k, v, kv: Captured, guide=None, ahead=None):
        out = attention(q, tokens(k, v)).out
        return out, (*kv, (q, k))

    def hidden(self, x: Float[Array, "B S M"]) -> Float[Array, "B 1 M"]:
        return x[:, -1:]

    def finish(self, kv: Captured, num_tokens: int) -> Captured:
        return kv


def sample_tokens(model: Model, num_tokens: int = SAMPLE_TOKENS) -> Int[np.ndarray, "B S"]:
    """About `num_tokens` tokens of Python source that ships with the interpreter, in rows the model has positions for.

    Random ids where the model has no tokenizer.
    """
    if model.tokenizer is None:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens)
    else:
        source = recall.standard_library(held_out=True)
        text = source[len(source) // 2 :][: 16 * num_tokens].tobytes().decode(errors="ignore")  # no tokenizer takes 16 bytes a token
        ids = np.array(model.tokenizer.encode(text)[:num_tokens])
    rows = -(-len(ids) // min(model.config.max_position, SAMPLE_ROW))
    return ids[: len(ids) // rows * rows].reshape(rows, -1).astype(np.int32)


def calibrate(model: Model, tokens: Int[Array | np.ndarray, "B S"] | None = None) -> Calibration:
    """Runs `tokens` through the model and decomposes the queries of every kv head.

    Args:
      tokens: rows of a sample that resembles what the model will read, all tokens valid; None for `sample_tokens`.

    Raises:
      InputError: fewer tokens than the head dim has columns, rows too long, ids outside the vocabulary.
      SpecError: a model that `prepare` changed.
      ModelError: queries or keys that are not finite.
    """
    _refuse_skewed(model)
    rows = _checked(model, sample_tokens(model) if tokens is None else np.asarray(tokens))
    config = model.config
    found: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
    pairs, inputs = captured(model, rows)
    below = None
    for layer, (q, k) in enumerate(pairs):
        queries = _by_kv_head(np.asarray(q, np.float32), config.num_kv_heads)
        keys = _by_kv_head(np.asarray(k, np.float32), config.num_kv_heads)
        if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
            raise ModelError(f"model {config.name}: queries or keys of layer {layer} are not finite in {model.dtype}; try another dtype")
        skew = _skew(queries)
        own = np.asarray(inputs[layer], np.float32).reshape(rows.size, -1)
        weight = np.asarray(model.params["params"][f"layer_{layer}"]["attention"]["q"]["weight"], np.float32)
        correction = _correction(own if below is None else below, own, weight)
        below = own
        masses = (_mass(queries @ skew), _mass(keys @ skew), _mass(queries), _mass(keys))
        values = (skew, *_product_projections(queries, keys), *masses, *correction)
        for name, value in zip(_ARRAYS, values, strict=True):
            found[name].append(value)
    arrays: dict[str, Any] = {name: np.stack(values) for name, values in found.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise NotFiniteError(f"{config.name} in {model.dtype}: queries and keys of the sample are not finite; nothing follows from them")
    return Calibration(config.name, _fingerprint(model), rows.size, **arrays)


def with_curves(
    model: Model, calibration: Calibration, policy: InfiniGen, tokens: Int[Array | np.ndarray, "B S"] | None = None
) -> Calibration:
    """The calibration with what `policy` would read and miss under every alpha; costs about what `calibrate` does.

    Args:
      model: the one that was calibrated, as it was loaded.
      tokens: rows of a sample, as for `calibrate`; None for `sample_tokens`.

    Raises:
      InputError: rows the model cannot take, or of a single token.
      SpecError: the calibration of another model, or a policy that reads everything in all layers.
      NotFiniteError: attention that is no number.
    """
    rows, config = _checked(model, sample_tokens(model) if tokens is None else np.asarray(tokens)), model.config
    if rows.shape[1] < 2:
        raise InputError("calibration rows of 1 token have nothing to read; give rows of 2 tokens or more")
    layers = tuple(range(max(policy.full_layers, 1), config.num_layers))
    if not layers:
        raise SpecError(f"{policy.describe()}: all {config.num_layers} layers of {config.name} read everything; there is nothing to choose")
    ready = _guided(model, calibration, policy)
    (pairs, inputs), at = captured(ready, rows), late(rows.shape[1])
    guides = [ready.params["guide"][f"layer_{i}"]["attention"]["guide"] for i in range(config.num_layers)]
    rule = dataclasses.replace(policy, alpha=0.0, loss=None)  # whatever is given, one program
    found = []
    for i in layers:
        (q, k), before = pairs[i], inputs[i - 1]
        found.append(read_and_missed(config, rule, guides[i - 1].following, guides[i].key, before[:, at], q[:, at], k, jnp.asarray(at)))
    read, missed = (np.stack([np.asarray(x, np.float64) for x in values]) for values in zip(*found, strict=True))
    if not np.isfinite(missed).all():
        raise NotFiniteError(f"{config.name} in {model.dtype}: the attention of the sample is not finite; nothing follows from it")
    curves = Curves(layers, ALPHAS, float(at.mean()), read, missed)
    return dataclasses.replace(calibration, curves={**calibration.curves, measured_like(policy): curves})


def curves_of(calibration: Calibration, policy: InfiniGen) -> Curves:
    """Those that `with_curves` measured for a policy. Raises SpecError where it did not."""
    name = measured_like(policy)
    if name not in calibration.curves:
        has = f"only of {', '.join(calibration.curves)}" if calibration.curves else "none"
        raise SpecError(
            f"{policy.describe()}: this calibration lacks its curves (has {has}); calibrate with --loss and --strategy for this one"
        )
    return calibration.curves[name]


def for_loss(strategy: Strategy, calibration: Calibration) -> Strategy:
    """The strategy with the alpha that misses as much as it states, or as it is where it states no loss.

    Raises:
      SpecError: a calibration without the curves of its policy (`with_curves`), or a loss that its budget cannot meet.
    """
    policy: Any = strategy.policy
    if getattr(policy, "loss", None) is None:
        return strategy
    alpha = alpha_for(curves_of(calibration, policy), policy.loss)
    return dataclasses.replace(strategy, policy=dataclasses.replace(policy, alpha=alpha, loss=None))


def _checked(model: Model, tokens: np.ndarray) -> Int[np.ndarray, "B S"]:
    config = model.config
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"calibration tokens of shape {tokens.shape} and type {tokens.dtype}; give whole numbers [B, S]")
    if tokens.size < config.head_dim:
        raise InputError(f"{tokens.size} calibration tokens; the {config.head_dim} columns of a head need at least as many")
    if tokens.shape[1] > config.max_position:
        raise InputError(f"calibration rows of {tokens.shape[1]} tokens; model {config.name} has {config.max_position} positions")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        last = config.vocab_size - 1
        raise InputError(f"calibration token ids from {tokens.min()} to {tokens.max()}; model {config.name} has ids 0 to {last}")
    return tokens.astype(np.int32)


def queries_and_keys(model: Model, tokens: Int[Array | np.ndarray, "B S"]) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Of every layer: q [B, S, H, D] and k [B, S, Hkv, D], as they meet in the product, in the model's dtype."""
    return captured(model, tokens)[0]


def captured(
    model: Model, tokens: Int[Array | np.ndarray, "B S"]
) -> tuple[tuple[tuple[jax.Array, jax.Array], ...], list[Float[Array, "B S M"]]]:
    """`queries_and_keys`, and the attention input of every layer (normalised, where norms come first). One layer is one program."""
    decoder = model.decoder
    rows: Any = jax.device_put(np.asarray(tokens, np.int32), model.placement)
    step = Capture(jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape))
    x, rotation = embed(decoder, model.params, rows, Captured(), step)
    pairs, inputs = [], []
    for i in range(model.config.num_layers):
        x, (q, k, own) = _captured_layer(decoder, layer_variables(model.params, i), x, rotation, step)
        pairs.append((q, k))
        inputs.append(own)
    return tuple(pairs), inputs


@functools.partial(jax.jit, static_argnames=("decoder",))
def _captured_layer(decoder: Decoder, variables: Any, x: Float[Array, "B S M"], rotation, step: Capture):
    inputs = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            inputs.append(args[0])
        return call(*args, **kwargs)

    block: Any = Block(decoder.config, 0, decoder.dtype)
    with nn.intercept_methods(look):
        x, (met,) = block.apply(variables, x, rotation, Captured(), step)
    return x, (*met, *inputs)


def _by_kv_head(x: Float[np.ndarray, "B S H D"], kv_heads: int) -> Float[np.ndarray, "Hkv N D"]:
    """The rows of all tokens, and of all heads that belong to it, below each kv head."""
    dim = x.shape[-1]
    return x.reshape(-1, kv_heads, x.shape[2] // kv_heads, dim).swapaxes(0, 1).reshape(kv_heads, -1, dim)


def _skew(queries: Float[np.ndarray, "Hkv N D"]) -> Float[np.ndarray, "Hkv D D"]:
    """V of Q = U S V^T, each column with the sign that makes its largest entry positive.

    The paper orders columns by the product of the singular values of Q and K. Each decomposition sorts its own in descending order, so the
    order of V is that order already. V comes from Q^T Q in double precision, which is as good as a decomposition of Q in single precision.
    """
    wide = queries.astype(np.float64)
    right = np.linalg.eigh(wide.swapaxes(-1, -2) @ wide)[1][..., ::-1].astype(np.float32)
    largest = np.take_along_axis(right, np.abs(right).argmax(-2, keepdims=True), axis=-2)
    return right * np.where(largest < 0, np.float32(-1), np.float32(1))


def _product_projections(
    queries: Float[np.ndarray, "Hkv N D"], keys: Float[np.ndarray, "Hkv T D"]
) -> tuple[Float[np.ndarray, "Hkv D D"], Float[np.ndarray, "Hkv D D"]]:
    """X and Y with the first P columns of which E (q X Y^T k - q . k)^2 is least, over pairs of a query and a key of the sample.

    With roots of the second moments R_q and R_k, the error is |R_q (X Y^T - I) R_k|^2, so X Y^T is R_q^-1 times the best approximation of
    R_q R_k times R_k^-1.
    """
    root_q, inverse_q = _roots(queries)
    root_k, inverse_k = _roots(keys)
    left, size, right = np.linalg.svd(root_q @ root_k)
    scale = np.sqrt(size)[:, None]
    projected = (inverse_q @ left * scale, inverse_k @ right.swapaxes(-1, -2) * scale)
    signs = np.take_along_axis(projected[1], np.abs(projected[1]).argmax(-2, keepdims=True), axis=-2)
    return tuple((x * np.where(signs < 0, -1.0, 1.0)).astype(np.float32) for x in projected)  # type: ignore[return-value]


def _roots(x: Float[np.ndarray, "Hkv N D"]) -> tuple[Float[np.ndarray, "Hkv D D"], Float[np.ndarray, "Hkv D D"]]:
    """The root of the second moments, and its inverse; directions that hardly occur count as a little more than they do."""
    wide = x.astype(np.float64)
    value, vector = np.linalg.eigh(wide.swapaxes(-1, -2) @ wide / x.shape[-2])
    value = np.maximum(value, 1e-6 * value[:, -1:] + np.finfo(np.float64).tiny)[:, None]
    back = vector.swapaxes(-1, -2)
    return (vector * np.sqrt(value)) @ back, (vector / np.sqrt(value)) @ back


def _correction(
    before: Float[np.ndarray, "N M"], own: Float[np.ndarray, "N M"], weight: Float[np.ndarray, "O M"]
) -> tuple[Float[np.ndarray, "r M"], Float[np.ndarray, "O r"]]:
    """The map of rank RANK that with `weight` best makes the queries of a layer's `own` inputs from those of the layer before.

    Ridge regression of what is missing, cut to the directions of the queries in which most of what it predicts lies; those by subspace
    iteration.
    """
    before, own, weight = (x.astype(np.float64) for x in (before, own, weight))
    rank = min(RANK, *weight.shape)
    moments = before.T @ before / len(before)
    missing = before.T @ ((own - before) @ weight.T) / len(before)
    whole = np.linalg.solve(moments + RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments)), missing)  # [M, O]
    seen = whole.T @ moments @ whole
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((len(seen), rank)))[0]
    for _ in range(16):
        basis = np.linalg.qr(seen @ basis)[0]
    return (whole @ basis).T.astype(np.float32), basis.astype(np.float32)


def _mass(x: Float[np.ndarray, "Hkv N D"]) -> Float[np.ndarray, "Hkv D"]:
    return np.abs(x).sum(-2)


def _fingerprint(model: Model) -> str:
    """A hash of the signs of some weights, which no cast changes."""
    weight = model.params["params"][f"layer_{model.config.num_layers - 1}"]["attention"]["o"]["weight"]
    signs = np.asarray(weight[:64, :64].astype(jnp.float32)) < 0
    return hashlib.sha256(np.packbits(signs).tobytes()).hexdigest()[:16]


def save(calibration: Calibration, directory: str | os.PathLike) -> None:
    """Writes `calibration` to a new directory, with orbax. Raises ModelError when that is not possible."""
    path = _new_directory(directory)
    described = {name: getattr(calibration, name) for name in ("model_id", "weights", "num_tokens")}
    described["shape"] = list(calibration.query_mass.shape)
    described["curves"] = {name: curves.plain() for name, curves in calibration.curves.items()}
    described["widths"] = [calibration.down.shape[1], calibration.down.shape[2], calibration.up.shape[1]]
    arrays = {name: getattr(calibration, name) for name in _ARRAYS}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(calibration=ocp.args.JsonSave(described), arrays=ocp.args.StandardSave(arrays))
        checkpointer.save(path, args=items)


def load(directory: str | os.PathLike, model: Model | None = None) -> Calibration:
    """What `save` wrote.

    Args:
      model: the model it is meant for; None leaves that to `prepare`.

    Raises:
      ModelError: not a calibration, or a damaged one.
      SpecError: the calibration of another model.
    """
    path = pathlib.Path(directory).absolute()
    if not (path / MARKER_FILE).exists() or not (path / "calibration").is_dir() or not (path / "arrays").is_dir():
        raise ModelError(f"{path} is not a calibration; `python -m kvjax.calibrate --model=NAME --output_dir={path}` makes one")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            described = dict(checkpointer.restore(path, args=ocp.args.Composite(calibration=ocp.args.JsonRestore())).calibration)
            shape = tuple(described.pop("shape"))
            rank, inputs, outputs = described.pop("widths")
            described["curves"] = {name: Curves.from_plain(x) for name, x in described.get("curves", {}).items()}
            shapes = dict.fromkeys(_MASSES, shape) | dict.fromkeys(_TURNS, (*shape, shape[-1]))
            shapes |= {"down": (shape[0], rank, inputs), "up": (shape[0], outputs, rank)}
            placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            wanted = {name: jax.ShapeDtypeStruct(size, jnp.float32, sharding=placed) for name, size in shapes.items()}
            arrays = checkpointer.restore(path, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))).arrays
            values: dict[str, Any] = described | {name: np.asarray(array) for name, array in arrays.items()}
            calibration = Calibration(**values)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            raise ModelError(f"{path}: the calibration cannot be restored: {_first_line(error)}") from None
    if model is not None:
        check(model, calibration)
    return calibration


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _new_directory(directory: str | os.PathLike) -> pathlib.Path:
    """The absolute path, which does not exist and has a parent that does. Raises ModelError."""
    path = pathlib.Path(directory).absolute()
    if path.exists():
        raise ModelError(f"{path} exists already; a calibration is written to a new directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot write there: {error.strerror}") from None
    return path


def check(model: Model, calibration: Calibration) -> None:
    """Raises SpecError unless `calibration` was made on the weights of `model`, in whatever dtype."""
    config, shape = model.config, calibration.query_mass.shape
    own = (config.num_layers, config.num_kv_heads, config.head_dim)
    if (config.name, own, _fingerprint(model)) != (calibration.model_id, shape, calibration.weights):
        what = "other weights" if (config.name, own) == (calibration.model_id, shape) else f"{calibration.model_id} {list(shape)}"
        raise SpecError(f"model {config.name} {list(own)} (layers, kv heads, head dim): the calibration belongs to {what}; calibrate anew")


def columns_kept(head_dim: int, partial: float = PARTIAL, columns: Columns = "sum") -> int:
    """P, the number of columns kept of every head: `int(partial * head_dim)`, at least 1.

    "union" keeps twice as many (at most all), the most that the union of two such sets can have. Where they overlap, and the union is
    smaller, the next best by the sum fill it up, so that every layer and head has the same shape.

    Raises:
      SpecError: an unknown rule, or `partial` outside (0, 1].
    """
    if columns not in get_args(Columns):
        raise SpecError(f"unknown choice of columns {columns!r}; choose from {', '.join(get_args(Columns))}")
    if not 0 < partial <= 1:
        raise SpecError(f"partial={partial}: give the fraction of a head's columns to keep, above 0 and at most 1")
    count = max(1, int(partial * head_dim))
    return min(head_dim, 2 * count) if columns == "union" else count


def kept_columns(
    calibration: Calibration, partial: float = PARTIAL, columns: Columns = "sum", skew: bool = True
) -> Int[np.ndarray, "L Hkv P"]:
    """Which columns of each layer and kv head are kept, in ascending order (see `prepare`)."""
    query, key = _masses(calibration, skew)
    kept = columns_kept(query.shape[-1], partial, columns)
    if columns == "product":
        return np.broadcast_to(np.arange(kept), (*query.shape[:2], kept))
    if columns == "query":
        order = np.argsort(-query, axis=-1, kind="stable")
    elif columns == "sum":
        order = np.argsort(-(query + key), axis=-1, kind="stable")
    else:
        each = columns_kept(query.shape[-1], partial)
        outside = (_rank(query) >= each) & (_rank(key) >= each)
        order = np.lexsort((-(query + key), outside), axis=-1)
    return np.sort(order[..., :kept], axis=-1)


def _rank(mass: Float[np.ndarray, "L Hkv D"]) -> Int[np.ndarray, "L Hkv D"]:
    """0 for the largest of a head, 1 for the next."""
    return np.argsort(np.argsort(-mass, axis=-1, kind="stable"), axis=-1)


def _masses(calibration: Calibration, skew: bool) -> tuple[Float[np.ndarray, "L Hkv D"], Float[np.ndarray, "L Hkv D"]]:
    if skew:
        return calibration.query_mass, calibration.key_mass
    return calibration.plain_query_mass, calibration.plain_key_mass


def concentration(
    calibration: Calibration, partial: float = PARTIAL, columns: Columns = "sum", skew: bool = True
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """Share of the magnitude of queries, and of keys, that the kept columns hold: per layer, the mean over its kv heads."""
    kept = kept_columns(calibration, partial, columns, skew)
    query, key = (np.take_along_axis(mass, kept, axis=-1).sum(-1) / mass.sum(-1) for mass in _masses(calibration, skew))
    return query.mean(-1), key.mean(-1)


def prepare(
    model: Model, calibration: Calibration, *, partial: float = PARTIAL, columns: Columns = "sum", skew: bool = True,
    correction: bool = False,
) -> Model:  # fmt: skip
    """The model with a guide in every layer (kvjax.models.guide), in the model's dtype. Its logits are the same.

    With rotary positions, the parameters are those of `model`, and a guide that is there already is replaced. Without, the query and key
    weights of every layer are new arrays with A inside (with `skew`), and the rows of the kept columns a copy.

    Args:
      partial: fraction of a head's columns that speculation sees.
      columns: ranked by the sum of both magnitudes (the paper), by the queries' alone, or the union of the best by either; or "product", a
        projection each for queries and keys (see the module).
      skew: False leaves A out, as an ablation: the columns are those of the head itself. Without meaning for "product".
      correction: correct the queries that are guessed.

    Raises:
      SpecError: the calibration of another model, a bad option, or a model without rotary positions that is prepared already.
    """
    _refuse_skewed(model)
    check(model, calibration)
    config, dtype = model.config, model.dtype
    kept = kept_columns(calibration, partial, columns, skew)[:, :, None]
    identity = np.broadcast_to(np.eye(config.head_dim, dtype=np.float32), calibration.skew.shape)
    turn = of_keys = calibration.skew if skew else identity
    if columns == "product":
        turn, of_keys = calibration.product_query, calibration.product_key
    params = model.params["params"]
    folds = _folds(config)
    of_keys, of_queries = (np.take_along_axis(x, kept, axis=-1) for x in (of_keys, turn))  # [L, Hkv, D, P]
    if folds and skew and columns != "product":
        params = _fold(config, params, turn)
        of_keys = np.take_along_axis(identity, kept, axis=-1)
    keys = [jnp.asarray(matrix, dtype) for matrix in of_keys]

    def queries(layer: int) -> QueryGuide:
        attention = params[f"layer_{layer}"]["attention"]
        weight, bias = attention["q"]["weight"], attention["q"].get("bias")
        down, up = (x[layer] if correction else None for x in (calibration.down, calibration.up))
        if folds:
            original = model.params["params"][f"layer_{layer}"]["attention"]["q"]
            return QueryGuide(*_cut(original, of_queries[layer], config, dtype, down, up), None, None)
        project = keys[layer] if of_queries is of_keys or columns != "product" else jnp.asarray(of_queries[layer], dtype)
        low_rank = (None if x is None else jnp.asarray(x, dtype) for x in (down, up))
        return QueryGuide(weight, bias, attention.get("q_norm"), project, *low_rank)

    last = config.num_layers - 1
    guides = {
        f"layer_{i}": {"attention": {"guide": Guide(keys[i], queries(i + 1) if i < last else None)}} for i in range(config.num_layers)
    }
    return dataclasses.replace(model, params=model.params | {"params": params, "guide": guides})


def calibrated(model: Model, strategy: Strategy, calibration: Calibration | None = None) -> Model:
    """The model as `strategy` needs it: with a guide for a policy that speculates, as it is for any other.

    Args:
      calibration: of this model; None: `calibrate` on the default sample, which takes a few seconds.

    Raises:
      SpecError: the calibration of another model, or a policy that states a loss and has no alpha yet (`for_loss`).
    """
    policy: Any = strategy.policy
    if not policy.guesses:
        return model
    if getattr(policy, "loss", None) is not None:
        raise SpecError(f"{policy.describe()}: alpha is still to be found for this loss; kvjax.calibrate.for_loss does it")
    return _guided(model, calibrate(model) if calibration is None else calibration, policy)


def _guided(model: Model, calibration: Calibration, policy: Any) -> Model:
    return prepare(model, calibration, partial=policy.partial, columns=policy.columns, skew=policy.skew, correction=policy.correction)


def _cut(
    projection: dict[str, jax.Array], select: Float[np.ndarray, "Hkv D P"], config: ModelConfig, dtype, down, up
) -> tuple[jax.Array, jax.Array | None]:
    """The query weight [H * P, M] and bias that give partial queries at once."""
    weight = np.asarray(projection["weight"], np.float32)
    if down is not None:
        weight = weight + up @ down

    def cut(x: np.ndarray) -> jax.Array:
        heads = x.reshape(config.num_kv_heads, config.group_size, config.head_dim, -1)
        return jnp.asarray(np.einsum("ndp,ngdm->ngpm", select, heads).reshape(-1, *x.shape[1:]), dtype)

    bias = projection.get("bias")
    return cut(weight), None if bias is None else cut(np.asarray(bias, np.float32))


def _folds(config: ModelConfig) -> bool:
    """Nothing stands between the projections and the product of queries and keys, so A can go into the weights."""
    return config.rope is None and not config.qk_norm


def _refuse_skewed(model: Model) -> None:
    """The weights do not tell whether A is in them already, so the model must come as it was loaded."""
    if _folds(model.config) and "guide" in model.params:
        raise SpecError(f"model {model.config.name} is prepared already, perhaps with a skew; start from the model as it was loaded")


def _fold(config: ModelConfig, params: dict[str, Any], skew: Float[np.ndarray, "L Hkv D D"]) -> dict[str, Any]:
    """The parameters with A in the rows of every query and key weight, and in the biases."""

    def turned(projection: dict[str, jax.Array], matrices: Float[np.ndarray, "Hkv D D"]) -> dict[str, jax.Array]:
        def turn(x: jax.Array) -> jax.Array:
            grouped = x.astype(jnp.float32).reshape(config.num_kv_heads, -1, config.head_dim, x[0].size)  # [Hkv, G or 1, D, M or 1]
            product = jnp.einsum("ndc,ngdm->ngcm", matrices, grouped, precision=jax.lax.Precision.HIGHEST)
            return jax.device_put(product.reshape(x.shape).astype(x.dtype), x.sharding)

        return {name: turn(x) for name, x in projection.items()}

    layers = {}
    for i in range(config.num_layers):
        layer = params[f"layer_{i}"]
        attention = {name: turned(layer["attention"][name], skew[i]) for name in ("q", "k")}
        layers[f"layer_{i}"] = layer | {"attention": layer["attention"] | attention}
    return params | layers


def define_flags() -> None:
    """Called once, when this module is the program."""
    compilation.define_flag()
    flags.DEFINE_string("model", "kvjax-4m", public.CHOICE)
    flags.DEFINE_string("output_dir", None, "The directory to write; it must not exist. Required, but with --loss.")
    flags.DEFINE_integer("num_tokens", SAMPLE_TOKENS, "Tokens of the sample.", lower_bound=1)
    flags.DEFINE_float(
        "loss", None,
        "Find the alpha of --strategy with which this share of the attention, such as 0.02, is on tokens that are not read: the mean over "
        "the sample's queries, their heads, and the layers that guess.",
    )  # fmt: skip
    flags.DEFINE_string("strategy", "infinigen", "What --loss is for, such as infinigen(budget=0.5); its alpha means nothing here.")
    flags.DEFINE_bool("random_weights", False, "Random weights: the model that kvjax.run has under the same flag.")
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")


def stated_loss() -> Strategy | None:
    """What --loss and --strategy ask for; None without a loss. Raises SpecError."""
    if FLAGS.loss is None:
        if FLAGS["strategy"].present:
            raise SpecError(f"--strategy={FLAGS.strategy} has no meaning without a loss; add for example --loss=0.02")
        if FLAGS.output_dir is None:
            raise SpecError("nothing to do; give --output_dir, for example --output_dir=runs/calibration, or --loss, or both")
        return None
    strategy = parse_strategy(FLAGS.strategy)
    if not isinstance(strategy.policy, InfiniGen):
        raise SpecError(f"--loss has no meaning for {strategy.describe()}, which guesses nothing; give --strategy=infinigen(...)")
    if strategy.policy.loss is not None:
        raise SpecError(f"--strategy={FLAGS.strategy} states a loss of its own beside --loss={FLAGS.loss}; state it once, as --loss")
    return dataclasses.replace(strategy, policy=dataclasses.replace(strategy.policy, alpha=None, loss=FLAGS.loss))


def run() -> None:
    """Loads, calibrates, writes, prints."""
    compilation.apply_flag()
    stated = stated_loss()
    directory = None if FLAGS.output_dir is None else _new_directory(FLAGS.output_dir)
    model = load_model(FLAGS.model, dtype=FLAGS.dtype, random_weights=FLAGS.random_weights)
    tokens = sample_tokens(model, FLAGS.num_tokens)
    calibration = calibrate(model, tokens)
    if stated is not None:
        policy: Any = stated.policy
        calibration = with_curves(model, calibration, policy, tokens)
    if directory is not None:
        save(calibration, directory)
    about = f"{model.config.name} ({model.dtype}), {calibration.num_tokens} tokens:"
    if stated is None:
        show_columns(about, calibration, model.config.head_dim)
    else:
        show_loss(about, calibration, stated)
    if directory is not None:
        print(f"\nwrote {directory}")


def show_columns(about: str, calibration: Calibration, dim: int) -> None:
    """How much of the magnitude the kept columns hold, by layer."""
    print(f"{about} magnitude in {columns_kept(dim)} of {dim} columns, before and after the skew\n")
    print(f"{'layer':<8}{'|Q| before':>12}{'after':>8}{'|K| before':>14}{'after':>8}")
    shares = zip(*concentration(calibration, skew=False), *concentration(calibration), strict=True)
    for layer, (query, key, skewed_query, skewed_key) in enumerate(shares):
        print(f"{layer:<8}{query:>12.1%}{skewed_query:>8.1%}{key:>14.1%}{skewed_key:>8.1%}")


def show_loss(about: str, calibration: Calibration, stated: Strategy) -> None:
    """What is read and missed with the alpha for a loss, by layer, beside an alpha of its own for every layer. Raises SpecError."""
    policy: Any = stated.policy
    curves, found = curves_of(calibration, policy), for_loss(stated, calibration)
    chosen: Any = found.policy
    own = alpha_by_layer(curves, policy.loss)
    (read, missed), (own_read, own_missed) = curves.at(chosen.alpha), curves.at(own)
    print(f"{about} tokens read of {curves.held:.0f} held, and attention missed\n")
    print(f"{'':<8}{'one alpha for all':^24}{'an alpha for each layer':^26}")
    print(f"{'layer':<8}{'alpha':>8}{'read':>8}{'missed':>8}{'alpha':>10}{'read':>8}{'missed':>8}")
    for layer, *values in zip(curves.layers, read, missed, own, own_read, own_missed, strict=True):
        print(f"{layer:<8}{_cells(chosen.alpha, values[0], values[1])}  {_cells(*values[2:])}")
    print(f"{'mean':<8}{_cells(chosen.alpha, read.mean(), missed.mean())}  {_cells(own.mean(), own_read.mean(), own_missed.mean())}")
    saved = 1 - own_read.mean() / read.mean()
    print(f"\nan alpha for each layer would read {saved:.1%} less for the same loss; one for all is what strategies take:\n")
    print(f'    --strategy="{found.describe()}"')


def _cells(alpha: float, read: float, missed: float) -> str:
    return f"{alpha:>8.2f}{read:>8.1f}{missed:>8.2%}"


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run()


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
