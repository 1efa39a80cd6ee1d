"""Points in answers: text of Molmo2's ``html-v2`` format <-> pixels of the original pictures.

    <points coords="1 1 210 455 2 640 480;2 3 100 042">dogs</points>
                    | |  |   |             |
                    | |  |   |             group of the second picture; ids run on over the groups
                    | |  x and y in thousandths of the width and height, at least three digits
                    | id, from 1
                    key of the group: number of the picture, from 1

Source: Molmo2, olmo/preprocessing/point_formatter.py (html-v2 joins groups with ``;``, html-v1 with
a tab). The grammar of the ``coords`` attribute (`_join_groups`, `_scan_tags`) does not know what a
key means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SCALE = 1000  # coordinates are written in thousandths of the picture's side
NOTHING_THERE = "There are none."

PointMode = Literal["point", "point_count", "count_point"]


@dataclass(frozen=True)
class Point:
    """A point in pixels of an original picture, x right and y down from the top-left corner.

    Attributes:
        x: 0 .. width of the picture, pixels.
        y: 0 .. height of the picture, pixels.
        image: number of the picture in the prompt, from 1.
        id: number of the point in its answer, from 1; None before it was written.
        label: what the point marks, as the answer says it; None if the answer broke off before it.
    """

    x: float
    y: float
    image: int = 1
    id: int | None = None
    label: str | None = None


def format_points(
    points: Iterable[Point],
    label: str,
    image_sizes: Sequence[tuple[int, int]],
    *,
    mode: PointMode = "point",
) -> str:
    """Write points as an answer.

    Args:
        points: in pixels, in any order; their ids and labels are not read. Groups are sorted by
            picture, the points of one picture by (x, y) after rounding, and ids are given in that
            order from 1 over all pictures.
        label: what the points mark, such as ``dogs``.
        image_sizes: (width, height) of each picture in prompt order, pixels.
        mode: ``point``: the tag alone; ``point_count``: ``Counting the <tag> shows a total of N.``;
            ``count_point``: ``There are N <tag>.``
    Returns: the answer; ``There are none.`` for no points, in every mode.
    Raises: ValueError if a point lies outside its picture or names a picture that is not there, if
        the label holds a points tag, or if the mode is unknown.
    """
    if mode not in ("point", "point_count", "count_point"):
        raise ValueError(
            f"unknown mode {mode!r} for points: use 'point', 'point_count' or 'count_point'"
        )
    if "<points" in label or "</points" in label:
        raise ValueError(
            f"the label {label!r} holds a points tag and could not be read back: use plain words"
        )
    rounded: dict[int, list[tuple[int, int]]] = {}
    for point in points:
        rounded.setdefault(point.image, []).append(_to_thousandths(point, image_sizes))
    if not rounded:
        return NOTHING_THERE
    groups = []
    count = 0
    for image in sorted(rounded):
        triples = []
        for x, y in sorted(rounded[image]):
            count += 1
            triples.append((count, x, y))
        groups.append((str(image), triples))
    tag = f'<points coords="{_join_groups(groups)}">{label}</points>'
    if mode == "point_count":
        return f"Counting the {tag} shows a total of {count}."
    if mode == "count_point":
        return f"There are {count} {tag}."
    return tag


def parse_points(text: str, image_sizes: Sequence[tuple[int, int]]) -> list[Point]:
    """Read the points in an answer, in pixels of the original pictures.

    Reads every points tag of the text, with ``;`` or a tab between the groups and with other
    attributes before ``coords``. A tag that breaks off is read as far as its numbers are surely
    whole, so the points of a growing (streamed) answer only ever grow. Triples that do not fit the
    grammar are left out, and so are those with a value over 1000.

    Args:
        text: answer such as ``<points coords="1 1 512 300">cat</points>``.
        image_sizes: (width, height) of each picture in prompt order, pixels.
    Returns: points in order of appearance; empty if the answer has none.
    Raises: ValueError if a point names a picture the prompt did not have.
    """
    points = []
    for label, triples in _scan_tags(text):
        for key, id, x, y in triples:
            if not key.isdecimal():  # a time: belongs to a video
                continue
            width, height = _image_size(int(key), image_sizes)
            points.append(Point(x * width / SCALE, y * height / SCALE, int(key), id, label))
    return points


def parse_count(text: str) -> int | None:
    """Read the number that a counting answer gives.

    In this order: the number after ``a total of``; after ``There are`` or ``There is`` (``none``
    and ``no`` are 0); an answer that is only a number; the number of points in the answer.

    Returns: the count; None if the answer gives neither a number nor a point, which is not 0.
    """
    for pattern in (_TOTAL, _THERE_ARE, _BARE_NUMBER):
        if match := pattern.search(text):
            found = match[1]
            return int(found) if found.isdecimal() else 0
    num_points = sum(len(triples) for _, triples in _scan_tags(text))
    return num_points or None


# ---- grammar of the coords attribute ----

_TAG = re.compile(r'<points\b[^<>]*?\bcoords="(?P<coords>[0-9 .;\t]*)')
_LABEL = re.compile(r'"[^<>]*>(?P<label>.*?)</points>', re.DOTALL)
_GROUP = re.compile(r"[^;\t]+")
_KEY = re.compile(r" *(\d{1,9}(?:\.\d+)?) ")
# The lookahead wants to see the end of the last number: "100" may be the beginning of "1000".
_TRIPLE = re.compile(r"(?<![\d.])(\d{1,9}) +(\d{3,4}) +(\d{3,4})(?=[^\w.])")

_TOTAL = re.compile(r"\ba total of (\d{1,9})\b", re.IGNORECASE)
_THERE_ARE = re.compile(r"\bthere (?:are|is) (\d{1,9}|none|no)\b", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"^\s*(\d{1,9})\s*\.?\s*$")


class _Triple(NamedTuple):
    key: str
    id: int
    x: int
    y: int


def _join_groups(groups: Iterable[tuple[str, Iterable[tuple[int, int, int]]]]) -> str:
    """[(key, [(id, x, y), ...]), ...] -> value of the coords attribute."""
    return ";".join(
        f"{key} " + " ".join(f"{id} {x:03d} {y:03d}" for id, x, y in triples)
        for key, triples in groups
    )


def _scan_tags(text: str) -> list[tuple[str | None, list[_Triple]]]:
    """(label, triples) of each tag in a text; the label is None where the tag is not closed."""
    tags = []
    for tag in _TAG.finditer(text):
        start, stop = tag.span("coords")
        label = _LABEL.match(text, stop)
        if (
            label is not None and "<points" in label["label"]
        ):  # the closing tag belongs to a later one
            label = None
        triples = []
        for group in _GROUP.finditer(text, start, stop):
            key = _KEY.match(text, group.start(), group.end())
            if key is None:
                continue
            # Up to one character past the group: the separator or quote that ends the last number.
            for triple in _TRIPLE.finditer(text, key.end(), group.end() + 1):
                id, x, y = (int(number) for number in triple.groups())
                if x <= SCALE and y <= SCALE:
                    triples.append(_Triple(key[1], id, x, y))
        tags.append((None if label is None else label["label"], triples))
    return tags


def _to_thousandths(point: Point, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    width, height = _image_size(point.image, image_sizes)
    if not (math.isfinite(point.x) and math.isfinite(point.y)) or not (
        0 <= point.x <= width and 0 <= point.y <= height
    ):
        raise ValueError(
            f"the point ({point.x}, {point.y}) lies outside of picture {point.image}, which is "
            f"{width} x {height} pixels: give pixels of the original picture, from its top-left "
            f"corner"
        )
    return round(SCALE * point.x / width), round(SCALE * point.y / height)


def _image_size(image: int, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    if not 1 <= image <= len(image_sizes):
        raise ValueError(
            f"a point names picture {image}, but the prompt has {len(image_sizes)}: pictures count "
            f"from 1 in prompt order; was a picture left out of image_sizes?"
        )
    return image_sizes[image - 1]
