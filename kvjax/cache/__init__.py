"""The KV cache: state, policies (which tokens), stores (where bytes live), strategies (both), the ledger."""

from kvjax.cache.identity import Identity
from kvjax.cache.ledger import Ledger, Tier, ledger
from kvjax.cache.policies import (
    H2O,
    POLICIES,
    PROTECTED,
    Amount,
    Full,
    InfiniGen,
    InfiniGenPaper,
    OracleTopK,
    Policy,
    Slots,
    Streaming,
    halves,
    tokens,
)
from kvjax.cache.spec import parse_policy, parse_strategy, read_identity, split_specs
from kvjax.cache.state import CacheShape, KVState, LayerState
from kvjax.cache.steps import Decode, Forward, Prefill, Stage
from kvjax.cache.stores import STORES, DenseStore, HostStore, PagedStore, PageTable, Store
from kvjax.cache.strategy import Strategy, stage_for

__all__ = [
    "H2O", "POLICIES", "PROTECTED", "STORES", "Amount", "CacheShape", "Decode", "DenseStore", "Forward", "Full",
    "HostStore", "Identity", "InfiniGen", "InfiniGenPaper", "KVState", "LayerState", "Ledger", "OracleTopK", "PageTable",
    "PagedStore", "Policy", "Prefill", "Slots", "Stage", "Store", "Strategy", "Streaming", "Tier", "halves", "ledger",
    "parse_policy", "parse_strategy", "read_identity", "split_specs", "stage_for", "tokens",
]  # fmt: skip
