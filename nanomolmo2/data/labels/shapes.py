"""Shapes of things: which point lies inside, and masks as COCO's run lengths.

A ring is a list of corners (x, y) in pixels; of several rings what lies in an odd number is inside.
A mask is bool (H, W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[float, float]
Ring = list[Place]
Mask = NDArray[np.bool_]
Size = tuple[int, int]  # (width, height), pixels

LINES = 31  # across a polygon, of which the one with the widest piece inside is taken
MOST_PIXELS = 2**28  # of a mask: 16,384 x 16,384
CORNERS = 32  # of a polygon in place of an ellipse


def inside_of(rings: Sequence[Ring], size: Size) -> Place | None:
    """A point inside of a polygon and of the picture; None if there is none.

    The centre of its area, or where that lies outside (of a crescent, say) the middle of the widest
    piece of some horizontal lines.
    """
    width, height = size
    corners = [corner for ring in rings for corner in ring]
    top = max(0.0, min(y for _, y in corners))
    bottom = min(float(height), max(y for _, y in corners))
    best, widest = None, 0.0
    x, y = _centre(rings)
    if any(a < x < b for a, b in _pieces(rings, y, width)) and 0 <= y <= height:
        return x, y
    for line in range(1, LINES + 1):
        y = top + (bottom - top) * line / (LINES + 1)
        for a, b in _pieces(rings, y, width):
            if b - a > widest:
                best, widest = ((a + b) / 2, y), b - a
    return best


def _pieces(rings: Sequence[Ring], y: float, width: int) -> list[Place]:
    """Where a horizontal line is inside: (from, to), cut at the edges of the picture."""
    crossings = []
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
            if (y0 > y) != (y1 > y):
                crossings.append(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    crossings = [min(max(x, 0.0), float(width)) for x in sorted(crossings)]
    return list(zip(crossings[::2], crossings[1::2], strict=True))


def _centre(rings: Sequence[Ring]) -> Place:
    """Of the largest ring's area; of its corners if it has no area."""
    ring = max(rings, key=lambda ring: abs(area_of(ring)))
    area = area_of(ring)
    if not area:
        return tuple(np.mean(ring, axis=0).tolist())
    x0, y0 = ring[0]  # places from here: far from the origin products lose digits
    x = y = 0.0
    for (ax, ay), (bx, by) in zip(ring, [*ring[1:], ring[0]], strict=True):
        cross = (ax - x0) * (by - y0) - (bx - x0) * (ay - y0)
        x += (ax + bx - 2 * x0) * cross
        y += (ay + by - 2 * y0) * cross
    return x0 + x / (6 * area), y0 + y / (6 * area)


def area_of(ring: Ring) -> float:
    """Square pixels, negative where the corners go round the other way."""
    x0, y0 = ring[0]
    pairs = zip(ring, [*ring[1:], ring[0]], strict=True)
    return sum((ax - x0) * (by - y0) - (bx - x0) * (ay - y0) for (ax, ay), (bx, by) in pairs) / 2


def turned(corners: Ring, degrees: float, around: Place) -> Ring:
    """Corners turned clockwise as seen on a picture, where y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x0, y0 = around
    return [
        (x0 + (x - x0) * cos - (y - y0) * sin, y0 + (x - x0) * sin + (y - y0) * cos)
        for x, y in corners
    ]


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Ring:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Ring:
    """As a polygon; ``degrees`` clockwise."""
    turns = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    ring = [(x + rx * math.cos(turn), y + ry * math.sin(turn)) for turn in turns]
    return turned(ring, degrees, (x, y))


# ---- masks ----


def inside_of_mask(mask: Mask) -> Place | None:
    """The middle of a pixel inside: of the centre, or of the widest run of a row."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    y, x = int(rows.mean()), int(columns.mean())
    if mask[y, x]:
        return x + 0.5, y + 0.5
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    # Of equally wide runs the one nearest to the centre.
    best = min(range(len(row)), key=lambda i: (start[i] - end[i], abs(row[i] - y), row[i]))
    return float(start[best] + end[best]) / 2, float(row[best]) + 0.5


def runs_of(mask: Mask) -> dict[str, list[int]]:
    """COCO's run lengths, not compressed: down the columns, in turn outside and inside."""
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *borders, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def mask_of(runs: Mapping[str, Any]) -> Mask:
    """The mask of COCO's run lengths, as numbers or as their compressed text.

    Raises: ValueError for anything else.
    """
    size, counts = runs.get("size"), runs.get("counts")
    if isinstance(counts, str):
        counts = read_counts(counts)
    whole = (
        isinstance(values, list) and all(type(n) is int for n in values)
        for values in (size, counts)
    )
    if not all(whole) or len(size) != 2 or min(size) < 1 or min(counts, default=-1) < 0:  # type: ignore[arg-type]
        raise ValueError("it has no size and counts")
    height, width = size  # type: ignore[misc]
    if sum(counts) != height * width or height * width > MOST_PIXELS:  # type: ignore[arg-type]
        raise ValueError(f"its counts are not those of {width} x {height} pixels")
    inside = np.arange(len(counts)) % 2 == 1  # type: ignore[arg-type]
    return np.repeat(inside, counts).reshape(height, width, order="F")  # type: ignore[arg-type]


def read_counts(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: five bits a letter, the lowest first; from the third
    length on each is the difference to the one two before.

    Source: cocoapi, common/maskApi.c (rleFrString).
    Raises: ValueError for a letter that is none of them.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the counts of a mask hold {letter!r}, expected COCO's text")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
