"""The ledger: every byte of a KV state, by tier and purpose, computed from the arrays themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.state import KVState, LayerState
from kvjax.cache.strategy import Strategy


@dataclasses.dataclass(frozen=True)
class Tier:
    """Bytes of one kind of memory.

    Attributes:
      live: keys and values of tokens that are kept.
      metadata: positions, scores, next slots, lengths; partial keys, which policies guess with.
      empty: allocated for keys and values, holding no token.
      fragmentation: inside pages that are in use but not full (none where a page is a row).
    """

    live: int = 0
    metadata: int = 0
    empty: int = 0
    fragmentation: int = 0

    @property
    def total(self) -> int:
        return self.live + self.metadata + self.empty + self.fragmentation


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Where the bytes of a KV state are, and what a decode step moves.

    Attributes:
      device, host: by tier. Their totals together are the nbytes of every array of the state.
      logical: bytes the full cache would need for the same tokens (keys and values alone, nothing allocated ahead).
      fetched: per layer, of a tier that fetches: the share of the tokens held that crossed over, per decode step so far.
      wanted: likewise, the share that was asked for; the rest of `fetched` is rounding up to the sizes a fetch can have.
      transient: scratch memory of the decode step beyond its inputs and outputs, from the compiled program; None when it was not asked for.
      kept_fraction: stored (token, kv head) pairs over those seen.
      bytes_read_per_token: cache bytes a decode step reads, per active row.
      bytes_moved_per_token: bytes that cross from host to device, per active row.
    """

    device: Tier
    host: Tier
    logical: int
    kept_fraction: float
    bytes_read_per_token: float
    bytes_moved_per_token: float
    transient: int | None = None
    fetched: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """Fraction removed: 1 - kept_fraction (the convention of kvpress)."""
        return 1.0 - self.kept_fraction

    def record(self) -> dict[str, float | int | None]:
        """Flat keys for records: `kv_<tier>_<purpose>_bytes` and the rest."""
        flat: dict[str, float | int | None] = {}
        for name in ("device", "host"):
            tier = getattr(self, name)
            for purpose in ("live", "metadata", "empty", "fragmentation", "total"):
                flat[f"kv_{name}_{purpose}_bytes"] = getattr(tier, purpose)
        return flat | {
            "kv_logical_bytes": self.logical,
            "kv_transient_bytes": self.transient,
            "kv_bytes_read_per_token": self.bytes_read_per_token,
            "kv_bytes_moved_per_token": self.bytes_moved_per_token,
            "kept_fraction": self.kept_fraction,
            "compression_ratio": self.compression_ratio,
            **self._fetch_record(),
        }

    def _fetch_record(self) -> dict[str, float]:
        if not self.fetched:
            return {}
        layers = {f"kv_fetched_fraction_layer_{i}": share for i, share in enumerate(self.fetched)}
        mean = {f"kv_{name}_fraction": float(np.mean(getattr(self, name))) for name in ("fetched", "wanted")}
        return mean | layers


def ledger(strategy: Strategy, kv: KVState, transient: int | None = None) -> Ledger:
    """The ledger of a state. Reads the positions, so it waits for the device."""
    batch, tier = kv.length.shape[0], strategy.store.tier
    seen = int(kv.length.sum())
    stored_bytes = pool_bytes(kv)
    live = logical = pairs_kept = pairs_seen = in_use = 0
    for layer in kv.layers:
        heads, token_bytes = layer.pool.num_heads, layer.pool.token_bytes
        kept = kept_tokens(layer, kv, heads)
        live += kept * token_bytes
        in_use += _slots_in_use(layer, kv) * heads * token_bytes
        logical += seen * heads * token_bytes
        pairs_kept += kept
        pairs_seen += seen * heads
    in_use = max(in_use, live)
    metadata = nbytes(kv) - stored_bytes
    tokens = Tier(live=live, empty=stored_bytes - in_use, fragmentation=in_use - live)
    read, moved = sum(nbytes(layer) for layer in kv.layers) / batch, 0.0  # a step reads every array once
    fetched: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()
    if tier.fetches:
        moved = sum(traffic_bytes(layer) for layer in kv.layers)
        read = moved + metadata / batch
        shares = [traffic_shares(layer) for layer in kv.layers]
        fetched, wanted = tuple(share for share, _ in shares), tuple(share for _, share in shares)
    device, host = (Tier(metadata=metadata), tokens) if tier.in_host else (dataclasses.replace(tokens, metadata=metadata), Tier())
    return Ledger(
        device=device,
        host=host,
        logical=logical,
        kept_fraction=pairs_kept / pairs_seen if pairs_seen else 1.0,
        bytes_read_per_token=read,
        bytes_moved_per_token=moved if tier.in_host else 0.0,
        transient=transient,
        fetched=fetched,
        wanted=wanted,
    )


def device_bytes(strategy: Strategy, kv: KVState) -> int:
    """Device memory of a state, which may be one of shapes alone."""
    return nbytes(kv) - (pool_bytes(kv) if strategy.store.tier.in_host else 0)


def pool_bytes(kv: KVState) -> int:
    """Bytes for keys and values of tokens, used or not."""
    return sum(nbytes((layer.pool.k, layer.pool.v)) for layer in kv.layers)


def traffic_shares(layer: LayerState) -> tuple[float, float]:
    """Moved and wanted rows over those held, of all decode steps so far."""
    _, held, wanted, moved = (float(x) for x in np.asarray(layer.traffic))
    return (moved / held, wanted / held) if held else (0.0, 0.0)


def traffic_bytes(layer: LayerState) -> float:
    """Bytes that `layer` has brought to the device per token decoded so far."""
    decoded, _, _, moved = (float(x) for x in np.asarray(layer.traffic))
    return moved * layer.pool.token_bytes / decoded if decoded else 0.0


def _slots_in_use(layer: LayerState, kv: KVState) -> int:
    """Slots of the pages that hold at least one token; 0 where a page is a row."""
    if kv.table is None:
        return 0
    size = layer.pool.page_size
    if layer.position is None:
        return int((-(-np.asarray(kv.length) // size)).sum()) * size
    held = np.asarray(layer.position) >= 0
    return int(held.reshape(*held.shape[:2], -1, size).any((1, 3)).sum()) * size


def kept_tokens(layer: LayerState, kv: KVState, heads: int) -> int:
    """(token, kv head) pairs a layer holds."""
    if layer.position is None:
        return int(kv.length.sum()) * heads
    held = int((np.asarray(layer.position) >= 0).sum())
    return held * heads // layer.position.shape[1]


def nbytes(tree) -> int:
    """Bytes of every array in a pytree (abstract arrays count as if they were real)."""
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
