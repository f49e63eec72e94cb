"""The conformance kit: what every strategy must do, a user's own included.

from kvjax.testing import check_strategy
check_strategy(MyPolicy(budget_tokens=12))
"""

from kvjax.testing.conformance import CHECKS, Outcome, Report, check_strategy

__all__ = ["CHECKS", "Outcome", "Report", "check_strategy"]
