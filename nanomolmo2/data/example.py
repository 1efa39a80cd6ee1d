"""What training and evaluation feed on: images and a tree of conversations about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from nanomolmo2.processor.chat import Message
from nanomolmo2.terminal import visible

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

    Attributes:
        notes: (cause, detail) of what may be a mistake in the record, for the audit.
        unread: fields of the record that nobody reads, and that look like no picture.
        outside: files it names that lie outside the folder of the data.
    """

    images: list[Any]
    branches: list[Branch]
    video: Any = None
    notes: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


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


MAX_BRIEF = 320  # characters

# Never the fault of the record that is read: a missing extra, and mistakes of this program.
NOT_OF_A_RECORD = (ImportError, AssertionError, NameError)


def named(error: Exception) -> str:
    """An error nobody foresaw, in a line: its name goes first, since some say nothing else."""
    return brief(f"{type(error).__name__}: {error}").removesuffix(":")


def brief(text: object) -> str:
    """One line without codes, the middle left out of a long one: errors of libraries, and those
    that repeat what a record says."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= MAX_BRIEF else f"{line[: MAX_BRIEF // 2]} ... {line[-130:]}"


class Source(Protocol):
    """Examples by number; the same number is always the same example."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Raises: `BadExample` where there is nothing to learn from; IndexError past the end."""
        ...
