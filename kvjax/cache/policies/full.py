"""Keep everything: the baseline, exact by definition."""

import dataclasses

from kvjax.cache.policies.base import Amount, Policy


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Every token is kept and read."""

    unlimited = True

    def with_budget(self, amount: Amount) -> "Full":
        return self
