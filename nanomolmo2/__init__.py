"""NanoMolmo2: a vision-language model small enough to read.

::

    import nanomolmo2

    pipeline = nanomolmo2.Pipeline.from_pretrained("tiny")
    print(pipeline.ask("picture.jpg", "What is in this picture?").text)

The names below are loaded when they are first used, so that ``import nanomolmo2`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanomolmo2.convert.pretrained import load
    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.models import NanoMolmo2
    from nanomolmo2.processor import Processor

__version__ = "0.1.0"

__all__ = ["NanoMolmo2", "Pipeline", "Processor", "__version__", "load"]

_HOMES = {
    "NanoMolmo2": "nanomolmo2.models",
    "Pipeline": "nanomolmo2.generation.pipeline",
    "Processor": "nanomolmo2.processor",
    "load": "nanomolmo2.convert.pretrained",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
