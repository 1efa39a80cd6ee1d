"""What training and evaluation feed on: pictures and a tree of conversations about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanomolmo2.processor.chat import Message

__all__ = ["BadExample", "Branch", "Example", "Message"]


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
    """Pictures (anything that the processor reads, in prompt order) and the branches about them.

    ``video``, anything that `processor.video.load_video` takes, stands in place of pictures.
    """

    images: list[Any]
    branches: list[Branch]
    video: Any = None


class BadExample(Exception):
    """An example that cannot be learned from; to be skipped, counted and reported.

    Attributes:
        cause: a few fixed words to count by: ``missing picture``, ``broken picture``,
            ``changed picture``, ``missing video``, ``no answer``, ``bad points``, ``bad record``,
            ``not encodable``, ``too long``.
        detail: which record it is and what is wrong with it.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)  # both, so that it can be pickled
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"
