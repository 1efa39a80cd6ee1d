"""What training and evaluation feed on: pictures and a tree of conversations about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanomolmo2.processor.chat import Message

__all__ = ["Branch", "Example", "Message"]


@dataclass(frozen=True)
class Branch:
    """One conversation about the pictures; the branches of an example do not see each other.

    Attributes:
        messages: turns of user and assistant, without the pictures.
        task: what kind of question it is, such as "count"; metrics are kept per task.
        truth: what is known about the right answer, as plain JSON types; depends on the task.
    """

    messages: list[Message]
    task: str = ""
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """Pictures (anything that the processor reads, in prompt order) and the branches about them."""

    images: list[Any]
    branches: list[Branch]
