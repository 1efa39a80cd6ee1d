"""Where a point may lie to be right: in a box, in a mask, or near a place. All in pixels.

box      [x0, y0, x1, y1]
mask     a polygon [[x, y], ...] or COCO's [[x, y, x, y, ...], ...]; COCO's run lengths
         {"size": [height, width], "counts": [lengths] or their text}
disc     a place and a radius
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from nanomolmo2.data.labels.shapes import read_counts
from nanomolmo2.data.record import short

Outline = list[list[tuple[float, float]]]  # closed lines, as corners


class Region(Protocol):
    """A part of an image."""

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies in it or on its edge."""
        ...

    @property
    def outline(self) -> Outline:
        """Closed lines around it, to be drawn."""
        ...


@dataclass(frozen=True)
class Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def holds(self, x: float, y: float) -> bool:
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1

    @property
    def outline(self) -> Outline:
        return [[(self.x0, self.y0), (self.x1, self.y0), (self.x1, self.y1), (self.x0, self.y1)]]


@dataclass(frozen=True)
class Disc:
    x: float
    y: float
    radius: float

    def holds(self, x: float, y: float) -> bool:
        return math.hypot(x - self.x, y - self.y) <= self.radius

    @property
    def outline(self) -> Outline:
        turns = [2 * math.pi * i / 24 for i in range(24)]
        return [
            [
                (self.x + self.radius * math.cos(t), self.y + self.radius * math.sin(t))
                for t in turns
            ]
        ]


@dataclass(frozen=True)
class Polygons:
    """One or several outlines; what two of them hold is a hole."""

    rings: tuple[tuple[tuple[float, float], ...], ...]

    def holds(self, x: float, y: float) -> bool:
        inside = False
        for ring in self.rings:
            for (x0, y0), (x1, y1) in zip(ring, (*ring[1:], ring[0]), strict=True):
                if _on_line(x, y, x0, y0, x1, y1):
                    return True
                if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    inside = not inside
        return inside

    @property
    def outline(self) -> Outline:
        return [list(ring) for ring in self.rings]


def _on_line(x: float, y: float, x0: float, y0: float, x1: float, y1: float) -> bool:
    across = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
    return (
        abs(across) <= 1e-9 * max(1.0, abs(x1 - x0) + abs(y1 - y0))
        and min(x0, x1) <= x <= max(x0, x1)
        and min(y0, y1) <= y <= max(y0, y1)
    )


@dataclass(frozen=True)
class Runs:
    """COCO's run lengths, down the columns from the left, in turn outside and inside."""

    height: int
    width: int
    ends: tuple[int, ...]  # of the runs

    def holds(self, x: float, y: float) -> bool:
        """Whether the pixel is inside; the far edges belong to the last pixels."""
        if not (0 <= x <= self.width and 0 <= y <= self.height):
            return False
        column, row = min(int(x), self.width - 1), min(int(y), self.height - 1)
        place = column * self.height + row
        run = bisect_right(self.ends, place)  # the first that ends behind the place
        return run % 2 == 1 and run < len(self.ends)

    @property
    def outline(self) -> Outline:
        """The box around it."""
        starts = (0, *self.ends)
        inside = [
            run for run in zip(starts[1::2], self.ends[1::2], strict=False) if run[0] < run[1]
        ]
        if not inside:
            return []
        places = [place for start, end in inside for place in (start, end - 1)]
        columns, rows = zip(*(divmod(place, self.height) for place in places), strict=True)
        if any(start // self.height != (end - 1) // self.height for start, end in inside):
            rows = (0, self.height - 1)  # a run that goes on in the next column
        return Box(min(columns), min(rows), max(columns) + 1, max(rows) + 1).outline


# ---- reading ----


def read_box(value: Any) -> Box:
    """Raises: ValueError for what is no box."""
    if _numbers(value) and len(value) == 4 and value[0] <= value[2] and value[1] <= value[3]:
        return Box(*map(float, value))
    raise ValueError(f"found the box {short(value)}, expected [x0, y0, x1, y1] in pixels")


def read_mask(value: Any) -> Polygons | Runs:
    """Raises: ValueError for what is no mask."""
    if isinstance(value, Mapping):
        return _read_runs(value)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if _numbers(value) or _places(value):
            return Polygons((_read_ring(value),))
        return Polygons(tuple(_read_ring(ring) for ring in value))
    raise ValueError(f"found the mask {short(value)}, expected a polygon or COCO's run lengths")


def _read_ring(value: Any) -> tuple[tuple[float, float], ...]:
    if _places(value) and len(value) >= 3:
        return tuple((float(x), float(y)) for x, y in value)
    if _numbers(value) and len(value) >= 6 and len(value) % 2 == 0:
        return tuple(zip(map(float, value[::2]), map(float, value[1::2]), strict=True))
    raise ValueError(
        f"found the polygon {short(value)}, expected at least three corners [[x, y], ...] in pixels"
    )


def _read_runs(value: Mapping[str, Any]) -> Runs:
    size: Any = value.get("size")
    counts: Any = value.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if isinstance(counts, str):
        counts = read_counts(counts)
    is_size = _numbers(size) and len(size) == 2 and all(side == int(side) > 0 for side in size)
    if not is_size or not _numbers(counts) or any(n != int(n) or n < 0 for n in counts):
        raise ValueError(
            f"found the mask {short(value)}, expected {{'size': [height, width], 'counts': ...}}"
        )
    height, width = map(int, size)
    ends = tuple(accumulate(map(int, counts)))
    if ends[-1:] != (height * width,):
        raise ValueError(
            f"the run lengths of a mask are {sum(map(int, counts))} pixels, expected {height} x "
            f"{width}"
        )
    return Runs(height, width, ends)


def _numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in value
    )


def _places(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        not isinstance(place, str) and _numbers(place) and len(place) == 2 for place in value
    )


# ---- matching ----


def largest_matching(reachable: Sequence[Sequence[int]]) -> int:
    """Size of the largest one-to-one matching.

    Args:
        reachable: for each point the numbers of the things that it may be matched to.
    """
    point_of: dict[int, int] = {}  # a thing's point, and
    thing_of: dict[int, int] = {}  # the other way round
    for start in range(len(reachable)):
        reached_from: dict[int, int] = {}  # thing -> the point that would take it
        todo, free = [start], None
        while todo and free is None:
            point = todo.pop()
            for thing in reachable[point]:
                if thing not in reached_from:
                    reached_from[thing] = point
                    if thing not in point_of:
                        free = thing
                        break
                    todo.append(point_of[thing])
        while free is not None:  # every point on the way gives its thing to the one before
            point = reached_from[free]
            point_of[free] = point
            thing_of[point], free = free, thing_of.get(point)
    return len(point_of)
