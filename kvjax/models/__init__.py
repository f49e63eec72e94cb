"""Models: configurations, the decoder, and loading of weights."""

from kvjax.models.config import BUNDLED, PRESETS, ModelConfig, preset
from kvjax.models.decoder import Decoder
from kvjax.models.load import Model, load_model

__all__ = ["BUNDLED", "PRESETS", "Decoder", "Model", "ModelConfig", "load_model", "preset"]
