"""The ledger's figures on states whose bytes can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import CacheShape, KVState, ledger, parse_strategy
from kvjax.cache.ledger import Tier, nbytes
from kvjax.testing.driver import SHAPE, random_tokens, run

TOKEN = 2 * SHAPE.head_dim * 4  # bytes of one token in one kv head
HEADS = SHAPE.num_kv_heads


def state(spec: str, lengths: list[int], steps: int) -> tuple:
    strategy = parse_strategy(spec)
    tokens = random_tokens(np.random.default_rng(0), len(lengths), max(lengths) + steps)
    return strategy, run(strategy, tokens, np.array(lengths), steps).states[-1]


def test_full_cache():
    books = ledger(*state("full", [20, 12], 4))
    assert books.device == Tier(live=(24 + 16) * HEADS * TOKEN, metadata=2 * 2 * 4, empty=8 * HEADS * TOKEN)
    assert books.host == Tier()
    assert books.logical == books.device.live
    assert books.kept_fraction == 1.0
    assert books.compression_ratio == 0.0
    assert books.bytes_read_per_token == 24 * HEADS * TOKEN
    assert books.transient is None


def test_h2o():
    books = ledger(*state("h2o(heavy=3,recent=4)", [20, 5], 4))
    slots = 8
    positions_scores_next = 2 * HEADS * (slots * 4 + slots * 4 + 4)
    assert books.device.live == 2 * 7 * HEADS * TOKEN
    assert books.device.empty == 2 * 1 * HEADS * TOKEN
    assert books.device.metadata == positions_scores_next + 2 * 2 * 4
    assert books.logical == (24 + 9) * HEADS * TOKEN
    assert books.kept_fraction == 14 / 33
    assert books.compression_ratio == pytest.approx(19 / 33)


def test_streaming_shares_its_positions_among_heads():
    books = ledger(*state("streaming(sinks=2,window=5)", [20], 4))
    assert books.device.live == 7 * HEADS * TOKEN
    assert books.device.metadata == 8 * 4 + 4 + 2 * 4


def test_oracle_saves_nothing():
    full, oracle = (ledger(*state(spec, [20], 4)) for spec in ("full", "oracle_topk(k=3)"))
    assert oracle == full


def test_full_cache_on_the_host():
    books = ledger(*state("offload", [20, 12], 4))
    traffic = 4 * 4
    assert books.host == Tier(live=(24 + 16) * HEADS * TOKEN, empty=8 * HEADS * TOKEN)
    assert books.device == Tier(metadata=2 * 2 * 4 + traffic)
    assert books.logical == books.host.live
    fetched = 2 * 24  # slots a step moves for both rows: the longer one has 20 to 23 of 24, in sizes of 6
    assert books.bytes_moved_per_token == fetched / 2 * HEADS * TOKEN
    assert books.bytes_read_per_token == books.bytes_moved_per_token + (2 * 2 * 4 + traffic) / 2
    assert books.wanted == (1.0,)
    assert books.fetched == (4 * 2 * 24 / (20 + 21 + 22 + 23 + 12 + 13 + 14 + 15),)


def test_device_pool_moves_nothing():
    strategy, kv = state("offload", [20, 12], 4)
    device = parse_strategy("offload", transfer="device")
    books, on_host = ledger(device, kv), ledger(strategy, kv)
    assert books.host == Tier()
    assert books.device.total == on_host.device.total + on_host.host.total
    assert (books.bytes_moved_per_token, books.bytes_read_per_token) == (0, on_host.bytes_read_per_token)


def test_record_of_a_fetching_store_has_shares_by_layer():
    flat = ledger(*state("offload", [20, 12], 4)).record()
    assert flat["kv_wanted_fraction"] == 1.0
    assert flat["kv_fetched_fraction"] == flat["kv_fetched_fraction_layer_0"]
    assert "kv_fetched_fraction" not in ledger(*state("full", [20], 1)).record()


def test_record_is_flat_and_total_is_the_leaves():
    strategy, kv = state("h2o(heavy=3,recent=4)", [20, 5], 4)
    flat = ledger(strategy, kv, transient=7).record()
    assert flat["kv_device_total_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    assert flat["kv_host_total_bytes"] == 0
    assert flat["kv_transient_bytes"] == 7
    assert all(isinstance(value, int | float) for value in flat.values())


def test_bfloat16_takes_half():
    shape = CacheShape(1, 2, 2, 16, jnp.dtype(jnp.bfloat16))
    strategy = parse_strategy("full")

    def make(dtype_shape: CacheShape) -> KVState:
        return strategy.init(dtype_shape, [10], 10, 6)

    assert nbytes(make(shape).layers) * 2 == nbytes(make(SHAPE).layers)
    assert nbytes(jax.eval_shape(lambda: make(shape))) == nbytes(make(shape))


def test_empty_state():
    strategy = parse_strategy("full")
    books = ledger(strategy, strategy.init(SHAPE, [10], 10, 6))
    assert (books.device.live, books.logical, books.kept_fraction) == (0, 0, 1.0)
