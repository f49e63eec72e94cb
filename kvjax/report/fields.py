"""What a record says: what it was measured under, of which strategy it is, and whether it was finished.

All who read records ask here, so that a figure, a table and an advice understand one record alike.
"""

import math
from collections.abc import Mapping
from typing import Any

from kvjax.cache.identity import Identity, of_record
from kvjax.cache.spec import read_identity

Record = Mapping[str, Any]

NUMBERS = ("request_rate", "input_len", "output_len", "batch_size")
"""Keys whose values are numbers where they are no distributions, even where JSON has them as text."""

UNMEASURED = ("infeasible", "failed")
"""Outcomes of cells that have no figures; their records name the strategy as it was asked for."""


def value(record: Record, key: str) -> Any:
    """What a record says of its setting: what its cell declares or, where it declares nothing, its own figure.

    A record's own figure may be what came of the setting: `max_num_seqs` is what the memory had room for. The model alone is called by the
    name it was found to have.
    """
    cell = record.get("cell", {})
    if key == "model_id":
        return record.get("model_id", cell.get("model"))
    declared = cell.get(key)
    stated = record.get(key) if declared is None else declared
    return _number(stated) if key in NUMBERS else stated


def number(stated: Any) -> float | None:
    """A finite number or infinity (records write it "inf"); None for what is no number."""
    if isinstance(stated, bool) or stated is None:
        return None
    try:
        parsed = float(stated)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(parsed) else parsed


def finished(record: Record) -> bool:
    """Whether a record is of a cell that was measured to its end."""
    return record.get("outcome", "done") == "done" and record.get("complete") is not False


def under_load(record: Record) -> bool:
    """Whether a record is of a serving engine; any other is offline, whole batches from start to end."""
    return "max_num_seqs" in record or "max_num_seqs" in record.get("cell", {})


def identity_of(record: Record) -> Identity:
    """The strategy of a record, as data.

    A record without `strategy_identity` (an old one, or one of a cell that could not be measured) has a spec string and what its cell says.
    """
    if (known := of_record(record.get("strategy_identity"))) is not None:
        return known
    page_size, transfer, budget = (value(record, key) for key in ("page_size", "transfer", "budget"))
    asked = record.get("outcome") in UNMEASURED
    return read_identity(
        str(record.get("strategy")),
        page_size if isinstance(page_size, int) else None,
        transfer if isinstance(transfer, str) else None,
        budget if asked and _is_amount(budget) else None,
        asked,
    )


def family(label: str) -> str:
    """What a strategy belongs to, by its label: `vllm`, `h2o` of `h2o(heavy=0.1,recent=0.1)+paged`."""
    return read_identity(label).family


def scales(label: str) -> bool:
    """Whether what a strategy keeps grows with the prompt, so that it is the same one at another length, by its label."""
    identity = read_identity(label)
    return identity.unlimited or isinstance(identity.budget, float)


def budget_of(record: Record) -> int | float | None:
    """What a strategy may keep or read: what its policy says, else what the cell declares; None for one that keeps all."""
    identity = identity_of(record)
    declared = record.get("cell", {}).get("budget")
    if identity.unlimited or identity.budget is not None or not _is_amount(declared):
        return identity.budget
    return declared


def _is_amount(stated: Any) -> bool:
    return isinstance(stated, int | float) and not isinstance(stated, bool)


def _number(stated: Any) -> Any:
    """`"256"` as 256, `"inf"` as infinity; a distribution stays text."""
    if not isinstance(stated, str):
        return stated
    try:
        parsed = float(stated)
    except ValueError:
        return stated
    return int(parsed) if math.isfinite(parsed) and parsed == int(parsed) else parsed
