"""Alias of ``nanomolmo2.models.vision_encoder``."""

from nanomolmo2.models.vision_encoder import VisionConfig, VisionEncoder

__all__ = ["VisionConfig", "VisionEncoder"]
