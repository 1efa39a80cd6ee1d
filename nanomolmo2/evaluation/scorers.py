"""Scores of single answers, 0 to 1. Positions are pixels of the original image.

Wherever nothing is the right answer, it must be said in the very words: an answer without points is
not taken for one, or silence would be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nanomolmo2.processor.points import (
    NO_TRACKS,
    NOTHING_THERE,
    Point,
    Size,
    parse_count,
    parse_points,
)

Box = Sequence[float]  # x0, y0, x1, y1
Truth = Mapping[str, Any]

NEAR_SECONDS = 0.26  # a point belongs to a frame if it is not further away in time than this


class Shown(NamedTuple):
    """What a question was about: (width, height) of its images, or of its video, in pixels."""

    image_sizes: tuple[Size, ...] = ()
    video_size: Size | None = None

    def points(self, answer: str) -> list[Point]:
        """Points of an answer; those of images that were not shown are left out."""
        return parse_points(answer, self.image_sizes, video_size=self.video_size, problems=[])


# ---- measures ----


def f1(hits: int, predicted: int, expected: int) -> float:
    """Harmonic mean of precision and recall; 1 where nothing was expected and nothing predicted."""
    return 2 * hits / (predicted + expected) if predicted + expected else 1.0


def point_f1(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> float:
    """F1 of points against boxes: a point hits if it lies inside a box of its own."""
    return f1(count_matches(points, boxes), len(points), len(boxes))


def group_f1(groups: Iterable[tuple[Sequence[tuple[float, float]], Sequence[Box]]]) -> float:
    """One F1 over several (points, boxes), where a point can only hit a box of its own group."""
    hits = predicted = expected = 0
    for points, boxes in groups:
        hits += count_matches(points, boxes)
        predicted += len(points)
        expected += len(boxes)
    return f1(hits, predicted, expected)


def count_matches(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> int:
    """Size of the largest one-to-one matching of points to boxes that hold them."""
    owner: dict[int, int] = {}  # box -> point

    def place(point: int, seen: set[int]) -> bool:
        x, y = points[point]
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            if i not in seen and x0 <= x <= x1 and y0 <= y <= y1:
                seen.add(i)
                if i not in owner or place(owner[i], seen):
                    owner[i] = point
                    return True
        return False

    return sum(place(i, set()) for i in range(len(points)))


class Nouns:
    """The nouns of a world, as texts name them: in singular or plural."""

    def __init__(self, nouns: Sequence[str], plurals: Sequence[str]) -> None:
        self._forms = {p: n for n, p in zip(nouns, plurals, strict=True)}
        self._forms |= {noun: noun for noun in nouns}
        # Longest first: "hot dog" must not be read as "dog".
        longest = sorted(map(re.escape, self._forms), key=len, reverse=True)
        self._pattern = re.compile(rf"\b({'|'.join(longest)})\b")

    def singular(self, form: str) -> str:
        """The noun of a form; what is none stays as it is."""
        return self._forms.get(form, form)

    def named_in(self, text: str) -> set[str]:
        """The known nouns that a text names."""
        return {self._forms[form] for form in self._pattern.findall(text.lower())}

    def f1(self, text: str, nouns: Collection[str]) -> float:
        """F1 of the set of nouns that a text names."""
        named = self.named_in(text)
        return f1(len(named & set(nouns)), len(named), len(nouns))


def track_f1(points: Iterable[Point], frames: Sequence[Truth]) -> float:
    """F1 of points against boxes over all frames of a video and all objects in them.

    Every point counts for the frame nearest in time; one that is further than `NEAR_SECONDS` from
    any frame misses. Which number an object has does not matter.

    Args:
        frames: each with ``time``, seconds, and ``boxes``: one an object, None while it is hidden.
    """
    placed: list[list[tuple[float, float]]] = [[] for _ in frames]
    astray: list[tuple[float, float]] = []
    for point in points:
        distances = [abs((point.time or 0.0) - frame["time"]) for frame in frames]
        nearest = min(range(len(frames)), key=distances.__getitem__)
        is_near = distances[nearest] <= NEAR_SECONDS
        (placed[nearest] if is_near else astray).append((point.x, point.y))
    boxes = [[box for box in frame["boxes"] if box is not None] for frame in frames]
    return group_f1([*zip(placed, boxes, strict=True), (astray, [])])


# ---- answers to tasks ----

Scorer = Callable[[Truth, str, Shown], float]


def exact(truth: Truth, answer: str, shown: Shown) -> float:
    """The very words of ``answer``."""
    return float(answer == truth["answer"])


def count(truth: Truth, answer: str, shown: Shown) -> float:
    """The number ``count``, however it is said."""
    return float(parse_count(answer) == truth["count"])


def points(truth: Truth, answer: str, shown: Shown) -> float:
    """Points in ``boxes``, one each."""
    if not truth["boxes"]:
        return float(answer == NOTHING_THERE)
    return point_f1([(p.x, p.y) for p in shown.points(answer)], truth["boxes"])


def track(truth: Truth, answer: str, shown: Shown) -> float:
    """Points in the boxes of all ``frames``."""
    if not any(box is not None for frame in truth["frames"] for box in frame["boxes"]):
        return float(answer == NO_TRACKS)
    return track_f1(shown.points(answer), truth["frames"])


def video_points(truth: Truth, answer: str, shown: Shown) -> float:
    """Points in ``boxes`` at the ``time``."""
    boxes = [box for box in truth["boxes"] if box is not None]
    if not boxes:
        return float(answer == NOTHING_THERE)
    return track_f1(shown.points(answer), [{"time": truth["time"], "boxes": boxes}])
