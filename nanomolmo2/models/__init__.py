"""The nets: tensors in, tensors out; no files, no network, no tokenizer.

Read attention, vision_encoder, connector, language_model and nanomolmo2; face.py is how they are
called from outside.
"""

from nanomolmo2.models.connector import ConnectorConfig, MultimodalConnector
from nanomolmo2.models.face import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config, Output
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.presets import PRESETS, preset
from nanomolmo2.models.vision_encoder import VisionConfig

__all__ = [
    "PRESETS",
    "ConnectorConfig",
    "LLMConfig",
    "LanguageModel",
    "MultimodalConnector",
    "NanoMolmo2",
    "NanoMolmo2Config",
    "Output",
    "PointConfig",
    "VisionConfig",
    "VisionEncoder",
    "preset",
]
