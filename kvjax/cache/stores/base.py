"""What a store is: where the bytes of a layer's tokens live, as pure functions over the store's own arrays."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.state import CacheShape

Readable = Callable[[Float[Array, "B Hkv G C"]], Bool[Array, "B Hkv 1 C"]]
"""Policy.readable of a step: logits -> the slots to read."""

GroupMass = Callable[[Float[Array, "... G Q C"], Float[Array, "... G Q"]], Float[Array, "... C"]]
"""Policy.group_mass: unnormalised weights and the factor of each query -> attention mass per key."""


class Store(Protocol):
    """Frozen and hashable. `layer` is what `init` returns, `shared` what `share` returns; a row has `capacity` slots, C of them."""

    name: ClassVar[str]

    def init(self, shape: CacheShape, batch: int, capacity: int, fill: float = 0.0) -> Any:
        """One layer's arrays, with room for `capacity` slots of every row; `fill` is what they hold before anything is written."""
        ...

    def share(self, batch: int, capacity: int) -> Any:
        """What is kept once for all layers."""
        ...

    def rounded(self, capacity: int) -> int:
        """The slots a row gets that asks for `capacity`."""
        ...

    def capacity(self, layer: Any, shared: Any) -> int:
        """Slots of a row."""
        ...

    def token_bytes(self, layer: Any, batch: int) -> tuple[int, int]:
        """kv heads, and bytes one token takes in one of them."""
        ...

    def fill(self, layer: Any, shared: Any, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], valid: Bool[Array, "B S"]) -> Any:
        """Tokens 0..S-1 of every row in its slots 0..S-1; those that are not valid count as empty."""
        ...

    def fill_selected(
        self, layer: Any, shared: Any, k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"], index: Int[Array, "B h C"],
        rows: Bool[Array, " B"] | None = None,
    ) -> Any:  # fmt: skip
        """Slot c holds token `index[..., c]` of (k, v), zeros where the index is S or more, in these rows (None: all)."""
        ...

    def write_chunk(
        self, layer: Any, shared: Any, start: Int[Array, " B"], k: Float[Array, "B S Hkv D"], v: Float[Array, "B S Hkv D"],
        valid: Bool[Array, "B S"],
    ) -> Any:  # fmt: skip
        """Token s of row b in slot `start[b] + s`, where valid."""
        ...

    def write(
        self, layer: Any, shared: Any, slot: Int[Array, "B h"], k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"],
        active: Bool[Array, " B"],
    ) -> Any:  # fmt: skip
        """One token per active row in `slot`; the other rows stay as they are."""
        ...

    def attend(
        self, layer: Any, shared: Any, q: Float[Array, "B H D"], visible: Bool[Array, "B h C"], readable: Readable | None,
        group_mass: GroupMass | None,
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B Hkv C"] | None]:  # fmt: skip
        """Attention of one query per row over its slots.

        Args:
          q: unscaled.
          visible: slots that hold a token.
          readable: narrows it down given the logits; None: all are read.
          group_mass: how weights become attention mass per slot; None: not wanted.

        Returns:
          The output, and the mass every slot received (float32).
        """
        ...

    def attend_chunk(
        self, layer: Any, shared: Any, q: Float[Array, "B S H D"], length: Int[Array, " B"], valid: Bool[Array, "B S"], context: int | None,
        group_mass: GroupMass | None,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B Hkv K"] | None]:  # fmt: skip
        """Causal attention of a chunk of the prompt that has just been written behind `length` tokens.

        Args:
          context: no row is longer than this after the chunk (static); slots beyond need not be read. None: no bound but the capacity.

        Returns:
          The output, and the attention mass of the first K slots, K being the slots that were read.
        """
        ...

    def tokens(self, layer: Any, shared: Any, batch: int) -> tuple[Float[Array, "B C Hkv D"], Float[Array, "B C Hkv D"]]:
        """All slots as they would come out of a projection: what a later chunk of a bounded prompt attends to, and what tests look at."""
        ...

    def poison(self, layer: Any, shared: Any, empty: Bool[Array, "B Hkv C"]) -> Any:
        """NaN in what must not matter, for tests: the keys of the slots marked empty."""
        ...
