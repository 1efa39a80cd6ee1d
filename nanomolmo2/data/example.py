"""What training and evaluation feed on: images and a tree of conversations about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from nanomolmo2.processor.chat import Message

__all__ = ["BadExample", "Branch", "Example", "Message", "Source"]


@dataclass(frozen=True)
class Branch:
    """One conversation about the images; the branches of an example do not see each other.

    Attributes:
        messages: turns of user and assistant, without the images.
        task: what kind of question it is, such as "count"; metrics are kept per task.
        truth: what is known about the right answer, as plain JSON types; depends on the task.
    """

    messages: list[Message]
    task: str = ""
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """Images (anything that the processor reads, in prompt order) and the branches about them.

    ``video``, anything that `processor.video.load_video` takes, stands in place of images.
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


class Source(Protocol):
    """Examples by number; the same number is always the same example."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Raises: `BadExample` where there is nothing to learn from; IndexError past the end."""
        ...
