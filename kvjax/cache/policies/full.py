"""Keep everything: the baseline, exact by definition."""

import dataclasses

from kvjax.cache.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Every token is kept and read."""
