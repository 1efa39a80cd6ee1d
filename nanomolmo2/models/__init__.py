"""The nets: tensors in, tensors out; no files, no network, no tokenizer."""

from nanomolmo2.models.connector import ConnectorConfig, MultimodalConnector
from nanomolmo2.models.kv_cache import KVCache
from nanomolmo2.models.language_model import LanguageModel, LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2, NanoMolmo2Config
from nanomolmo2.models.presets import PRESETS, preset
from nanomolmo2.models.vision_encoder import VisionConfig, VisionEncoder

__all__ = [
    "PRESETS",
    "ConnectorConfig",
    "KVCache",
    "LLMConfig",
    "LanguageModel",
    "MultimodalConnector",
    "NanoMolmo2",
    "NanoMolmo2Config",
    "VisionConfig",
    "VisionEncoder",
    "preset",
]
