"""Short import path for a checkout: ``from models import VisionEncoder``.

The same objects as in ``nanomolmo2.models``; this folder holds no code and is not installed.
"""

from nanomolmo2.models import (
    ConnectorConfig,
    LanguageModel,
    LLMConfig,
    MultimodalConnector,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
    VisionEncoder,
)

__all__ = [
    "ConnectorConfig",
    "LLMConfig",
    "LanguageModel",
    "MultimodalConnector",
    "NanoMolmo2",
    "NanoMolmo2Config",
    "VisionConfig",
    "VisionEncoder",
]
