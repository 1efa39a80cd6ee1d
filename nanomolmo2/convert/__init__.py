"""Checkpoints: reference formats in and out, our own format, and the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanomolmo2.convert.export import export_molmo2

__all__ = ["export_molmo2"]


def __getattr__(name: str) -> object:
    """Import the public name on first use, so that the package itself stays light (PEP 562)."""
    if name != "export_molmo2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanomolmo2.convert.export import export_molmo2

    return export_molmo2
