"""Policies: which tokens are kept and read. One file each."""

from kvjax.cache.policies.base import (
    PROTECTED,
    Amount,
    Policy,
    Seen,
    Selection,
    Slots,
    TopMass,
    View,
    arguments,
    halves,
    policy_name,
    spec_name,
    tokens,
)
from kvjax.cache.policies.full import Full
from kvjax.cache.policies.h2o import H2O
from kvjax.cache.policies.infinigen import InfiniGen, InfiniGenPaper
from kvjax.cache.policies.oracle_topk import OracleTopK
from kvjax.cache.policies.random import Random
from kvjax.cache.policies.streaming import Streaming
from kvjax.cache.policies.tova import TOVA

POLICIES: dict[str, type[Policy]] = {spec_name(p): p for p in (Full, Streaming, H2O, TOVA, Random, InfiniGen, InfiniGenPaper, OracleTopK)}

__all__ = [
    "H2O", "POLICIES", "PROTECTED", "TOVA", "Amount", "Full", "InfiniGen", "InfiniGenPaper", "OracleTopK", "Policy", "Random", "Seen",
    "Selection", "Slots", "Streaming", "TopMass", "View", "arguments", "halves", "policy_name", "spec_name", "tokens",
]  # fmt: skip
