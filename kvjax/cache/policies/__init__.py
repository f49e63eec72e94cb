"""Policies: which tokens are kept and read. One file each."""

from kvjax.cache.policies.base import PROTECTED, Amount, Policy, Seen, Selection, Slots, TopMass, View, halves, spec_name, tokens
from kvjax.cache.policies.full import Full
from kvjax.cache.policies.h2o import H2O
from kvjax.cache.policies.infinigen import InfiniGen, InfiniGenPaper
from kvjax.cache.policies.oracle_topk import OracleTopK
from kvjax.cache.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {spec_name(p): p for p in (Full, Streaming, H2O, InfiniGen, InfiniGenPaper, OracleTopK)}

__all__ = [
    "H2O", "POLICIES", "PROTECTED", "Amount", "Full", "InfiniGen", "InfiniGenPaper", "OracleTopK", "Policy", "Seen",
    "Selection", "Slots", "Streaming", "TopMass", "View", "halves", "spec_name", "tokens",
]  # fmt: skip
