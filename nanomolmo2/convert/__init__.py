"""Checkpoints: reference formats in and out, our own format, and the Hugging Face hub."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanomolmo2.convert.export import export_molmo2
    from nanomolmo2.convert.export_point import export_molmo_point

__all__ = ["export_molmo2", "export_molmo_point"]

_HOMES = {"export_molmo2": "export", "export_molmo_point": "export_point"}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that the package itself stays light (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
