"""Plans a run on a card that is not here: what a strategy would take of its memory, and what a decode step cannot be faster than.

devices   the cards: memory, bandwidth, peak rate, and how to compile for them
programs  the real prefill and decode programs, compiled from shapes alone
bounds    bytes and operations a decode step cannot do without
planner   these put together, and the largest batch and context that fit
"""

from kvjax.plan.devices import DEVICES, Device, PlanError, open_device
from kvjax.plan.planner import Plan, plan
from kvjax.plan.programs import Setting

__all__ = ["DEVICES", "Device", "Plan", "PlanError", "Setting", "open_device", "plan"]
