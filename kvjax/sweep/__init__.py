"""Grids of measurements: cells that are declared, measured one by one, recorded, and resumed."""

from kvjax.sweep.cells import Cell, canonical, cell_id, in_turns
from kvjax.sweep.log import Record
from kvjax.sweep.runner import Measure, run

__all__ = ["Cell", "Measure", "Record", "canonical", "cell_id", "in_turns", "run"]
