"""One call of the decoder, its layers strung together in one of two ways that give the same outputs.

  unroll   all layers in one program. XLA compiles every layer anew, so compile time grows with depth.
  calls    one program for every kind of layer, called once a layer by the host, and small ones for the embedding and the head. Compile time
           does not grow with depth. The price is a dispatch a layer, which a CPU hides behind the layer before as long as layers are large.

`calls` is what a CPU takes for deep models (kvjax.models.decoder.default_stringing). Inside another program (a trace) it means the same as
`unroll`.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, Self

import jax
from jaxtyping import Array, Float, Int

from kvjax.models.decoder import Block, Decoder, Step


class State(Protocol):
    """What goes through the layers: per layer a part of its own, what they share, and what one hands to the next."""

    @property
    def layers(self) -> tuple[Any, ...]: ...

    @property
    def ahead(self) -> Any: ...

    def over(self, layers: tuple[Any, ...]) -> Self: ...

    def handed(self, ahead: Any) -> Self: ...


def forward[KV: State](
    decoder: Decoder, params: Any, tokens: Int[Array, "B S"], kv: KV, step: Step[KV]
) -> tuple[Float[Array, "B T V"], KV]:
    """Runs `tokens` through every layer, as `decoder.stringing` says.

    Args:
      params: the Flax variables of `decoder`; a collection "guide" beside "params" goes to the layers too.
      kv: the state. With `calls`, outside a trace, the memory of its layers is taken over, as of a donated argument.

    Returns float32 logits for the positions `step.hidden` selects, and the new state.
    """
    if decoder.stringing == "unroll":
        result: Any = decoder.apply(params, tokens, kv, step)
        return result
    ends = _ends(params)
    frame, layers, ahead = kv.over(()), list(kv.layers), kv.ahead
    x, rotation = _embed(decoder, ends, tokens, frame, step)
    for i in range(len(layers)):
        following = tuple(layers[i + 1 : i + 2])  # which a layer may look at
        x, layers[i], ahead = _block(decoder, layer_variables(params, i), x, rotation, layers[i], following, frame.handed(ahead), step)
    logits, frame = _head(decoder, ends, x, frame, step, tokens.shape[1])
    return logits, frame.over(tuple(layers))


def warm(decoder: Decoder, params: Any, tokens: Int[Array, "B S"], kv: Any, step: Any) -> Float[Array, "B T V"]:
    """Compiles what `forward` runs by calls, with one layer of every kind. Takes the memory of `kv` over; the logits mean nothing."""
    ends = _ends(params)
    frame, layers, ahead = kv.over(()), list(kv.layers), kv.ahead
    x, rotation = _embed(decoder, ends, tokens, frame, step)
    seen = set()
    for i in range(len(layers)):
        variables, following = layer_variables(params, i), tuple(layers[i + 1 : i + 2])
        if (kind := _kind((variables, layers[i], following, ahead))) not in seen:
            seen.add(kind)
            x, layers[i], ahead = _block(decoder, variables, x, rotation, layers[i], following, frame.handed(ahead), step)
    return _head(decoder, ends, x, frame, step, tokens.shape[1])[0]


def _kind(tree: Any) -> Any:
    """What distinguishes programs: structure, shapes and types."""
    return jax.tree.structure(tree), tuple((a.shape, a.dtype) for a in jax.tree.leaves(tree))


def layer_variables(params: Any, index: int) -> dict[str, Any]:
    """The Flax variables of one layer."""
    name = f"layer_{index}"
    return {collection: values[name] for collection, values in params.items() if name in values}


def embed(decoder: Decoder, params: Any, tokens: Int[Array, "B S"], frame: Any, step: Any) -> tuple[Float[Array, "B S M"], Any]:
    """Hidden states before the first layer, and the rotation of the positions (None without RoPE). `frame`: a state without layers."""
    return _embed(decoder, _ends(params), tokens, frame, step)


def head(
    decoder: Decoder, params: Any, x: Float[Array, "B S M"], frame: Any, step: Any, num_tokens: int
) -> tuple[Float[Array, "B T V"], Any]:
    """Logits from the hidden states behind the last layer, and the state, without layers, after all have seen the tokens."""
    return _head(decoder, _ends(params), x, frame, step, num_tokens)


def _ends(params: Any) -> dict[str, Any]:
    """The parameters before the first layer and behind the last."""
    return {name: value for name, value in params["params"].items() if not name.startswith("layer_")}


@partial(jax.jit, static_argnums=0)
def _embed(decoder: Decoder, ends, tokens, frame, step):
    part: Any = dataclasses.replace(decoder, part="embed")
    return part.apply({"params": ends}, tokens, frame, step)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 4))
def _block(decoder: Decoder, variables, x: Float[Array, "B S M"], rotation, layer, following: tuple, frame, step):
    """One layer, and the next one beside it, if there is one, to look at. Returns the layer, and what is handed to the next."""
    block: Any = Block(decoder.config, 0, decoder.dtype)
    x, kv = block.apply(variables, x, rotation, frame.over((layer, *following)), step)
    return x, kv.layers[0], kv.ahead


@partial(jax.jit, static_argnums=(0, 5))
def _head(decoder: Decoder, ends, x: Float[Array, "B S M"], frame, step, num_tokens: int):
    part: Any = dataclasses.replace(decoder, part="head")
    logits, _ = part.apply({"params": ends}, x, None, step)
    return logits, step.finish(frame, num_tokens)


def scratch(decoder: Decoder, params: Any, tokens: Any, kv: Any, step: Any) -> int | None:
    """Bytes a call needs beside its arguments and the state: the most that any of its programs takes. Compiles them once more.

    Args: as of `forward`; shapes (jax.ShapeDtypeStruct) do.

    Returns None where the compiler does not say.
    """
    kv, tokens, params = (jax.tree.map(jax.typeof, tree) for tree in (kv, tokens, params))
    ends = _ends(params)
    frame, layers, ahead = kv.over(()), list(kv.layers), kv.ahead
    sizes: dict[Any, int | None] = {}
    x, rotation = jax.eval_shape(partial(_embed, decoder), ends, tokens, frame, step)
    for i in range(len(layers)):
        following = tuple(layers[i + 1 : i + 2])
        arguments = layer_variables(params, i), x, rotation, layers[i], following, frame.handed(ahead), step
        if (kind := _kind(arguments)) not in sizes:
            sizes[kind] = _beside(_block.lower(decoder, *arguments))
        x, layers[i], ahead = jax.eval_shape(partial(_block, decoder), *arguments)
    sizes["head"] = _beside(_head.lower(decoder, ends, x, frame, step, tokens.shape[1]))
    known = [size for size in sizes.values() if size is not None]
    return max(known) if len(known) == len(sizes) else None


def _beside(lowered: jax.stages.Lowered) -> int | None:
    """Scratch and fresh results of a program, bytes."""
    memory = lowered.compile().memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
