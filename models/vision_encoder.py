"""Alias of ``nanomolmo2.models.vision_encoder``."""

from nanomolmo2.models import VisionEncoder
from nanomolmo2.models.vision_encoder import VisionConfig

__all__ = ["VisionConfig", "VisionEncoder"]
