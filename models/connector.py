"""Alias of ``nanomolmo2.models.connector``."""

from nanomolmo2.models.connector import ConnectorConfig, MultimodalConnector

__all__ = ["ConnectorConfig", "MultimodalConnector"]
