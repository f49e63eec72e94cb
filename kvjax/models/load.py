"""From a name or a path to a model that is ready to run."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvjax.errors import ModelError, SpecError
from kvjax.models import checkpoint, gguf, gguf_tokenizer, hugging_face, parameters, progress, public
from kvjax.models.config import BUNDLED, PRESETS, ModelConfig, preset
from kvjax.models.decoder import Decoder, Stringing, default_stringing
from kvjax.models.source import Source
from kvjax.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration, the parameters that go with it, and how text becomes tokens.

    Attributes:
      params: the Flax variables of `decoder`.
      tokenizer: None where nothing says what the token ids mean (presets; a directory without tokenizer.json).
      stringing: how layers become programs (kvjax.runtime.forward); None: by depth and device.
      source: how the weights were stored and on what terms they come; None where nothing says so, and for random ones.
    """

    config: ModelConfig
    params: parameters.Parameters
    tokenizer: Tokenizer | None
    stringing: Stringing | None = None
    source: Source | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of parameters and activations."""
        return self.params["params"]["embed"].dtype

    @property
    def placement(self) -> jax.sharding.Sharding:
        """Where small arrays go that meet the parameters in a program: to their device, or to all of them.

        Arrays that are not placed at all make a program of their own, compiled beside that of placed ones.
        """
        sharding = self.params["params"]["embed"].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return sharding

    @property
    def decoder(self) -> Decoder:
        """The module that `params` belong to."""
        return Decoder(self.config, self.dtype, self.stringing or default_stringing(self.config))


def load_model(
    name_or_path: str | os.PathLike,
    dtype: DTypeLike | None = None,
    random_weights: bool = False,
    seed: int = 0,
    sharding: parameters.Sharding | None = None,
) -> Model:
    """Loads a model by name, a GGUF file, a Hugging Face directory or an orbax checkpoint.

    Nothing is downloaded, but for a name in PUBLIC the first time (see kvjax.models.public.fetch); progress is shown on standard error.

    Args:
      name_or_path: a name in BUNDLED (trained weights ship with kvjax), PUBLIC (they are fetched) or PRESETS (published shapes), else
        a file or a directory. One that bears such a name is reached as "./name".
      dtype: "float32", "bfloat16", "float16" or the jnp dtype of that name; None for float32 on a CPU and bfloat16 elsewhere.
      random_weights: random values instead of trained ones; the only way to have a preset without a directory.
      seed: of the random weights.
      sharding: parameter path, such as ("layer_0", "attention", "q", "weight"), to its `jax.sharding.Sharding` or None.

    Raises:
      SpecError: an unknown name, a path that does not exist, a preset without `random_weights`, an unknown dtype.
      ModelError: weights that are missing, unsupported or damaged.
    """
    kind = parse_dtype(dtype)
    name = os.fspath(name_or_path)
    path = pathlib.Path(name).expanduser()
    if name in BUNDLED:
        return _bundled(name, kind, random_weights, seed, sharding)
    if name in public.PUBLIC and not random_weights:
        return _public(public.PUBLIC[name], kind, sharding)
    if name in PRESETS:
        if not random_weights:
            raise SpecError(
                f"preset {name} comes without weights: give the directory of a checkpoint as the model, or ask for random weights "
                "(random_weights=True, --random_weights)"
            )
        return Model(preset(name), parameters.random(preset(name), kind, seed, sharding), None)
    if not path.exists():
        preset(name)  # raises, listing what exists
    if path.is_file():
        return _gguf(path, kind, random_weights, seed, sharding)
    if (path / hugging_face.CONFIG_FILE).exists():
        config = hugging_face.read_config(path)
        if not random_weights:
            return Model(config, hugging_face.load_parameters(path, config, kind, sharding), _tokenizer(path, config))
    elif (path / checkpoint.MARKER_FILE).exists():
        if not random_weights:
            config, params = checkpoint.restore(path, kind, sharding)
            return Model(config, params, _tokenizer(path, config))
        config, _ = checkpoint.read_config(path)
    else:
        raise ModelError(
            f"{path} is neither a Hugging Face directory ({hugging_face.CONFIG_FILE}) nor an orbax checkpoint ({checkpoint.MARKER_FILE})"
        )
    return Model(config, parameters.random(config, kind, seed, sharding), _tokenizer(path, config))


def _public(model: public.PublicModel, dtype: jnp.dtype, sharding: parameters.Sharding | None) -> Model:
    with progress.shown() as report:
        path = public.fetch(model, report)
    loaded = _gguf(path, dtype, False, 0, sharding)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, name=model.name), source=model.source)


def _gguf(path: pathlib.Path, dtype: jnp.dtype, random_weights: bool, seed: int, sharding: parameters.Sharding | None) -> Model:
    if not gguf.is_gguf(path):
        raise ModelError(f"{path} is no GGUF file; give one, or the directory of a checkpoint")
    file = gguf.read_header(path)
    config = gguf.read_config(file)
    tokenizer = gguf_tokenizer.tokenizer(file)
    if random_weights:
        return Model(config, parameters.random(config, dtype, seed, sharding), tokenizer)
    return Model(config, gguf.load_parameters(file, config, dtype, sharding), tokenizer, source=gguf.source(file))


def parse_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype meant by a name, a dtype or None (see `load_model`). Raises SpecError with the list of names."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise SpecError(f"unknown dtype {getattr(parsed, 'name', dtype)!r}; supported: {', '.join(DTYPES)}")
    return parsed


def _bundled(name: str, dtype: jnp.dtype, random_weights: bool, seed: int, sharding: parameters.Sharding | None) -> Model:
    if random_weights:
        return Model(preset(name), parameters.random(preset(name), dtype, seed, sharding), ByteTokenizer())
    path = ASSETS / name
    if not (path / hugging_face.CONFIG_FILE).exists():
        raise ModelError(f"the trained weights of {name} are not in {ASSETS}; run `python -m kvjax.train --model={name}` to make them")
    config = dataclasses.replace(hugging_face.read_config(path), name=name)
    return Model(config, hugging_face.load_parameters(path, config, dtype, sharding), ByteTokenizer())


def _tokenizer(path: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
    if (path / "tokenizer.json").exists():
        return HuggingFaceTokenizer(path / "tokenizer.json")
    return ByteTokenizer() if config.name in BUNDLED else None
