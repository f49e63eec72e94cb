"""The KV cache: state, policies (which tokens), stores (where bytes live), strategies (both), the ledger."""

from kvjax.cache.identity import Identity
from kvjax.cache.ledger import Ledger, Tier, ledger
from kvjax.cache.policies import (
    H2O,
    POLICIES,
    PROTECTED,
    TOVA,
    Amount,
    Full,
    InfiniGen,
    InfiniGenPaper,
    OracleTopK,
    Policy,
    Random,
    Seen,
    Selection,
    Slots,
    Streaming,
    TopMass,
    View,
    halves,
    tokens,
)
from kvjax.cache.spec import parse_policy, parse_strategy, read_identity, split_specs
from kvjax.cache.state import CacheShape, KVState, LayerState
from kvjax.cache.steps import Decode, Forward, Prefill, Stage
from kvjax.cache.store import STORES, Store, dense, host, paged
from kvjax.cache.strategy import Strategy, stage
from kvjax.cache.tiers import TRANSFERS, Ahead

__all__ = [
    "H2O", "POLICIES", "PROTECTED", "STORES", "TOVA", "TRANSFERS", "Ahead", "Amount", "CacheShape", "Decode", "Forward", "Full",
    "Identity", "InfiniGen", "InfiniGenPaper", "KVState", "LayerState", "Ledger", "OracleTopK", "Policy", "Prefill", "Random", "Seen",
    "Selection", "Slots", "Stage", "Store", "Strategy", "Streaming", "Tier", "TopMass", "View", "dense", "halves", "host", "ledger",
    "paged", "parse_policy", "parse_strategy", "read_identity", "split_specs", "stage", "tokens",
]  # fmt: skip
