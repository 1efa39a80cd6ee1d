"""NanoMolmo2: a vision-language model small enough to read.

::

    import nanomolmo2

    vlm = nanomolmo2.VLM("tiny")
    print(vlm.ask("picture.jpg", "What is in this picture?").text)

The names below are loaded when they are first used, so that ``import nanomolmo2`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanomolmo2.convert.pretrained import load
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.chat import Chat
    from nanomolmo2.generation.options import GenerateOptions
    from nanomolmo2.generation.question import Question
    from nanomolmo2.generation.vlm import VLM

    Pipeline = VLM
    from nanomolmo2.models import NanoMolmo2
    from nanomolmo2.processor import Processor

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Answer",
    "Chat",
    "GenerateOptions",
    "NanoMolmo2",
    "Pipeline",
    "Processor",
    "Question",
    "__version__",
    "load",
]

_HOMES = {
    "Answer": "nanomolmo2.generation.answer",
    "Chat": "nanomolmo2.generation.chat",
    "GenerateOptions": "nanomolmo2.generation.options",
    "NanoMolmo2": "nanomolmo2.models",
    "Pipeline": "nanomolmo2.generation.pipeline",
    "Processor": "nanomolmo2.processor",
    "Question": "nanomolmo2.generation.question",
    "VLM": "nanomolmo2.generation.vlm",
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
