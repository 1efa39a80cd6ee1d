"""What a point is, and a text that remembers the points it was written from.

The text of an answer has thousandths of a side; a model that points by selecting what it sees has
to learn the very place. So `PointsText` carries it, through messages and worker processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int]  # (width, height), pixels


@dataclass(frozen=True)
class Point:
    """A point in pixels of an original image or of a video's frames.

    Attributes:
        x: 0 .. width of the image, pixels; right from the top-left corner.
        y: 0 .. height of the image, pixels; down from the top-left corner.
        image: number of the image in the prompt, from 1; says nothing where there is a time.
        id: number of the point in its answer, from 1, or of the object that a track follows; None
            before it was written.
        label: what the point marks, as the answer says it; None if the answer broke off before it.
        time: seconds from the start of the video; None for a point in an image.
        confidence: probability of the place that the model selected, 0 to 1; None for a point that
            was written as text, or given.
        size: longer side of the thing there, pixels, a guess; None where it is not known.
    """

    x: float
    y: float
    image: int = 1
    id: int | None = None
    label: str | None = None
    time: float | None = None
    confidence: float | None = None
    size: float | None = None


class PointsTag(NamedTuple):
    """One tag of a text, and its points as they were given."""

    start: int  # of its first character in the text
    stop: int  # behind its last character; equal to ``start`` for a point of a question
    name: str  # points or tracks
    label: str
    points: tuple[Point, ...]


class PointsText(str):
    """A text with ``points`` and ``tracks`` tags that knows the exact points of its ``tags``.

    It is a string like others; what is cut out of it or added to it is a plain string again, but
    for `join_points`.
    """

    tags: tuple[PointsTag, ...]

    def __new__(cls, text: str, tags: Iterable[PointsTag] = ()) -> PointsText:
        made = super().__new__(cls, text)
        made.tags = tuple(tags)
        return made


def join_points(texts: Iterable[str], separator: str = "") -> str:
    """As ``separator.join(texts)``, and the tags of every `PointsText` go along."""
    texts = list(texts)
    joined = separator.join(texts)
    tags: list[PointsTag] = []
    start = 0
    for text in texts:
        tags += tags_of(text, start)
        start += len(text) + len(separator)
    return PointsText(joined, tags) if tags else joined


def tags_of(text: str, shift: int = 0) -> list[PointsTag]:
    """The tags that a text remembers, so many characters further on; none of a plain string."""
    tags = text.tags if isinstance(text, PointsText) else ()
    return [tag._replace(start=tag.start + shift, stop=tag.stop + shift) for tag in tags]
