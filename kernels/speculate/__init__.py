"""InfiniGen's guess of the tokens that the next layer will attend to."""

from .api import speculate
from .base import Speculation

__all__ = ["Speculation", "speculate"]
