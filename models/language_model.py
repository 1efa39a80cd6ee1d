"""Alias of ``nanomolmo2.models.language_model``."""

from nanomolmo2.models import LanguageModel
from nanomolmo2.models.language_model import LLMConfig

__all__ = ["LLMConfig", "LanguageModel"]
