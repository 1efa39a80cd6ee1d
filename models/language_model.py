"""Alias of ``nanomolmo2.models.language_model``."""

from nanomolmo2.models.language_model import LanguageModel, LLMConfig

__all__ = ["LLMConfig", "LanguageModel"]
