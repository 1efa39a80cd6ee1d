"""Alias of ``nanomolmo2.models.nanomolmo2``."""

from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

__all__ = ["NanoMolmo2", "NanoMolmo2Config"]
