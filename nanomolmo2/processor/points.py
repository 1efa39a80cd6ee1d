"""Points in answers: text of Molmo2's ``html-v2`` format <-> pixels of the images or the video.

    <points coords="1 1 210 455 2 640 480;2 3 100 042">dogs</points>
                    | |  |   |             |
                    | |  |   |             group of the second image; ids run on over the groups
                    | |  x and y in thousandths of the width and height, at least three digits
                    | id, from 1
                    key of the group: number of the image, from 1, also where there is only one

    <points coords="0.0 1 259 340;12.5 2 138 427">goals</points>
                    key in a video: seconds, one decimal

    <tracks coords="0.0 1 259 340 2 800 120;0.5 1 262 338">dancers</tracks>
                    the id is that of an object and stays with it; a hidden object is left out

Source: Molmo2, olmo/preprocessing/point_formatter.py (html-v2 joins groups with ``;``, html-v1 with
a tab). The grammar of the tags (`_join_groups`, `_scan_tags`) does not know what a key means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

SCALE = 1000  # coordinates are written in thousandths of the image's side
NOTHING_THERE = "There are none."
NO_TRACKS = "No tracks available."

PointMode = Literal["point", "point_count", "count_point", "count"]
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
    """

    x: float
    y: float
    image: int = 1
    id: int | None = None
    label: str | None = None
    time: float | None = None


def format_points(
    points: Iterable[Point],
    label: str,
    image_sizes: Sequence[Size] = (),
    *,
    mode: PointMode = "point",
    video_size: Size | None = None,
) -> str:
    """Write points as an answer.

    Args:
        points: in pixels, in any order, all with a time or none; their ids and labels are not read.
            Groups are sorted by image or time, the points of one group by (x, y) after rounding,
            and ids are given in that order from 1 over all groups.
        label: what the points mark, such as ``dogs``.
        image_sizes: (width, height) of each image in prompt order, pixels.
        mode: ``point``: the tag alone; ``point_count``: ``Counting the <tag> shows a total of N.``;
            ``count_point``: ``There are N <tag>.``; ``count``: ``N``
        video_size: (width, height) of the video, pixels; for points with a time, which is written
            with one decimal.
    Returns: the answer; ``There are none.`` for no points, in every mode.
    Raises: ValueError if a point lies outside its image, names an image that is not there or has
        an impossible time, if the label holds a tag, or if the mode is unknown.
    """
    if mode not in get_args(PointMode):
        raise ValueError(
            f"unknown mode {mode!r} for points: use one of {', '.join(get_args(PointMode))}"
        )
    _check_label(label)
    groups = []
    count = 0
    for key, group in _by_key(points, image_sizes, video_size):
        triples = []
        for x, y, _ in sorted(group):
            count += 1
            triples.append((count, x, y))
        groups.append((key, triples))
    if not groups:
        return NOTHING_THERE
    tag = f'<points coords="{_join_groups(groups)}">{label}</points>'
    return {
        "point": tag,
        "point_count": f"Counting the {tag} shows a total of {count}.",
        "count_point": f"There are {count} {tag}.",
        "count": str(count),
    }[mode]


def format_tracks(points: Iterable[Point], label: str, video_size: Size) -> str:
    """Write the places of objects over time as an answer.

    Args:
        points: in pixels, in any order, each with a time; ``id`` says which object it is (any
            number). Where an object is hidden, it has no point. The answer numbers the objects
            anew: from 1, in the order in which they appear, at the same time by (x, y) after
            rounding. The points of one time are sorted by that number.
        label: what the objects are, such as ``dancers``.
        video_size: (width, height) of the video, pixels.
    Returns: the tag; ``No tracks available.`` for no points.
    Raises: ValueError as `format_points`, and for a point without time or id, and an object with
        two points at the same tenth of a second.
    """
    _check_label(label)
    points = list(points)
    if any(point.time is None or point.id is None for point in points):
        raise ValueError(
            "a point of a track lacks its time or its id: give the seconds, and an id that says "
            "which object it is"
        )
    groups = []
    numbers: dict[int, int] = {}  # object -> its id in the answer
    for key, group in _by_key(points, (), video_size):
        objects = [id for _, _, id in group]
        if len(set(objects)) < len(objects):
            twice = next(id for id in objects if objects.count(id) > 1)
            raise ValueError(
                f"object {twice} has several points at {key} s: times are written with one "
                f"decimal, so give each object at most one point every tenth of a second"
            )
        for _, _, id in sorted(group):
            numbers.setdefault(id, len(numbers) + 1)
        groups.append((key, sorted((numbers[id], x, y) for x, y, id in group)))
    if not groups:
        return NO_TRACKS
    return f'<tracks coords="{_join_groups(groups)}">{label}</tracks>'


def parse_points(
    text: str,
    image_sizes: Sequence[Size] = (),
    *,
    video_size: Size | None = None,
    problems: list[str] | None = None,
) -> list[Point]:
    """Read the points in an answer, in pixels of the original images or of the video.

    Reads every points and tracks tag of the text, with ``;``, a tab, ``:`` or ``,`` between the
    groups and with other attributes. A tag that breaks off is read as far as its numbers are surely
    whole, so the points of a growing (streamed) answer only ever grow. Triples that do not fit the
    grammar are left out, and so are those with a value over 1000.

    Args:
        text: answer such as ``<points coords="1 1 512 300">cat</points>``.
        image_sizes: (width, height) of each image in prompt order, pixels.
        video_size: (width, height) of the video, pixels. With it and without image_sizes every key
            is a time; otherwise ``1`` is an image and ``1.0`` a time.
        problems: gets one line for each thing that was left out: what and where.
    Returns: points in order of appearance; empty if the answer has none. Those of a video have a
        time (without video_size they are left out); those of tracks have the id of their object.
    Raises: ValueError if a point names an image the prompt did not have; with ``problems`` it is
        left out and reported instead.
    """
    points = []
    for tag in _scan_tags(text):
        if problems is not None:
            problems += tag.problems
        for key, triples in tag.groups:
            if not triples:
                continue
            time, number = None, 1
            if "." in key or (video_size is not None and not image_sizes):
                time = float(key)
            else:
                number = int(key)
            try:
                width, height = _size_of(number, time, image_sizes, video_size)
            except ValueError as error:
                if problems is not None:
                    problems.append(f"{tag.where}: {error}")
                elif time is None:
                    raise
                continue
            for id, x, y in triples:
                place = x * width / SCALE, y * height / SCALE
                points.append(Point(*place, number, id, tag.label, time))
    return points


def parse_count(text: str) -> int | None:
    """Read the number that a counting answer gives.

    In this order: the number after ``a total of``; after ``There are`` or ``There is`` (``none``
    and ``no`` are 0), and 0 for ``No tracks available``; an answer that is only a number; the
    number of points in the answer, where the points of one track count once.

    Molmo2's own scorer of image counting ignores the number in the text and takes the points:
    that is ``len(parse_points(...))``.

    Returns: the count; None if the answer gives neither a number nor a point, which is not 0.
    """
    for pattern in (_TOTAL, _THERE_ARE, _NO_TRACKS, _BARE_NUMBER):
        if match := pattern.search(text):
            found = match[1]
            return int(found) if found.isdecimal() else 0
    count = 0
    for tag in _scan_tags(text):
        ids = [triple.id for _, triples in tag.groups for triple in triples]
        count += len(set(ids) if tag.name == "tracks" else ids)
    return count or None


def points_to_json(
    points: Iterable[Point],
    image_sizes: Sequence[Size] = (),
    *,
    video_size: Size | None = None,
) -> list[dict[str, Any]]:
    """Points as dicts that `json.dumps` takes.

    Each has ``image`` (number of its image, from 1) or ``time`` (seconds), ``id``, ``label``,
    ``x`` and ``y`` in pixels, ``x_thousandths`` and ``y_thousandths`` of the width and height.

    Raises: ValueError for a point without its image, or with a time and without ``video_size``.
    """
    dicts = []
    for point in points:
        width, height = _size_of(point.image, point.time, image_sizes, video_size)
        dicts.append(
            {
                **({"image": point.image} if point.time is None else {"time": point.time}),
                "id": point.id,
                "label": point.label,
                "x": point.x,
                "y": point.y,
                "x_thousandths": round(SCALE * point.x / width),
                "y_thousandths": round(SCALE * point.y / height),
            }
        )
    return dicts


# ---- grammar of the tags ----

_TAG = re.compile(r"<(points|tracks)\b")
_LABEL_TAG = re.compile(r"</?(?:points|tracks)\b")
_COORDS = re.compile(r'(?P<before>[^<>]*?)\scoords="(?P<coords>[0-9 .;:,\t]*)')
_ALT = re.compile(r'\salt="([^"]*)"')
_END = {
    name: re.compile(rf'"[^<>]*?(?:/>|>(?P<label>.*?)</{name}>)', re.DOTALL)
    for name in ("points", "tracks")
}
_GROUP = re.compile(r"[^;:,\t]+")
_KEY = re.compile(r" *(\d{1,9}(?:\.\d+)?) ")
# The lookahead wants to see the end of the last number: "100" may be the beginning of "1000".
_TRIPLE = re.compile(r"(?<![\d.])(\d{1,9}) +(\d{3,4}) +(\d{3,4})(?=[^\w.])")

_TOTAL = re.compile(r"\ba total of (\d{1,9})\b", re.IGNORECASE)
_THERE_ARE = re.compile(r"\bthere (?:are|is) (\d{1,9}|none|no)\b", re.IGNORECASE)
_NO_TRACKS = re.compile(r"\b(no) tracks available\b", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"^\s*(\d{1,9})\s*\.?\s*$")


class _Triple(NamedTuple):
    id: int
    x: int
    y: int


class _Tag(NamedTuple):
    name: str  # points or tracks
    where: str  # for messages
    label: str | None  # None where the tag is not closed and has no alt
    groups: list[tuple[str, list[_Triple]]]  # [(key, triples), ...]
    problems: list[str]  # what was left out


def _join_groups(groups: Iterable[tuple[str, Iterable[tuple[int, int, int]]]]) -> str:
    """[(key, [(id, x, y), ...]), ...] -> value of the coords attribute."""
    return ";".join(
        f"{key} " + " ".join(f"{id} {x:03d} {y:03d}" for id, x, y in triples)
        for key, triples in groups
    )


def _scan_tags(text: str) -> Iterator[_Tag]:
    """Each points and tracks tag of a text."""
    openings = list(_TAG.finditer(text))
    limits = [*(opening.start() for opening in openings[1:]), len(text)]
    for number, (opening, limit) in enumerate(zip(openings, limits, strict=False), start=1):
        name = opening[1]
        where = f"{name} tag {number}"
        found = _COORDS.match(text, opening.end())
        if found is None:
            yield _Tag(name, where, None, [], [f"{where} has no coords"])
            continue
        start, stop = found.span("coords")
        end = _END[name].match(text, stop, limit)  # after the limit it would close a later tag
        label = end["label"] if end else None
        if label is None and (alt := _ALT.search(found["before"])):
            label = alt[1]
        groups, problems = _scan_coords(text, start, stop, where)
        if stop == len(text):
            tail = text[max(start, stop - 20) : stop]
            problems.append(f"{where}: the answer breaks off after {tail!r}")
        elif text[stop] != '"':
            rest = text[stop : stop + 20]
            problems.append(f"{where}: {rest!r} in its coords, expected numbers and an end quote")
        elif end is None:
            problems.append(f"{where} is not closed with </{name}>")
        yield _Tag(name, where, label, groups, problems)


def _scan_coords(
    text: str, start: int, stop: int, where: str
) -> tuple[list[tuple[str, list[_Triple]]], list[str]]:
    """(groups, problems) of the coords between two places of a text."""
    groups, problems = [], []

    def leave_out(begin: int, end: int, key: str | None) -> None:
        part = text[begin:end].strip()
        if part and end < len(text):  # at the end of the text it breaks off, which is said once
            place = "expected a key and triples" if key is None else f"group {key}: not 'id x y'"
            shown = part if len(part) <= 40 else f"{part[:40]}..."
            problems.append(f"{where}: left out {shown!r}, {place}")

    for group in _GROUP.finditer(text, start, stop):
        key = _KEY.match(text, group.start(), group.end())
        if key is None:
            leave_out(*group.span(), None)
            continue
        triples = []
        read = key.end()
        # Up to one character past the group: the separator or quote that ends the last number.
        for triple in _TRIPLE.finditer(text, read, group.end() + 1):
            leave_out(read, triple.start(), key[1])
            read = triple.end()
            id, x, y = (int(number) for number in triple.groups())
            if x <= SCALE and y <= SCALE:
                triples.append(_Triple(id, x, y))
            else:
                problems.append(f"{where}: left out {triple[0]!r}, group {key[1]}: over {SCALE}")
        leave_out(read, group.end(), key[1])
        groups.append((key[1], triples))
    return groups, problems


# ---- keys and pixels ----

_LATEST = 10**8  # seconds; a key has at most nine digits before the point


def _by_key(
    points: Iterable[Point], image_sizes: Sequence[Size], video_size: Size | None
) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """[(key, [(x, y, id), ...]), ...] in order of the keys; x, y in thousandths; id 0 if None."""
    groups: dict[str, list[tuple[int, int, int]]] = {}
    timed = set()
    for point in points:
        timed.add(point.time is not None)
        size = _size_of(point.image, point.time, image_sizes, video_size)
        key = str(point.image) if point.time is None else _format_time(point.time)
        groups.setdefault(key, []).append((*_to_thousandths(point, size), point.id or 0))
    if len(timed) > 1:
        raise ValueError(
            "some points have a time and some do not: write those of the video and those of the "
            "pictures as answers of their own"
        )
    return sorted(groups.items(), key=lambda item: float(item[0]))


def _format_time(time: float) -> str:
    if not 0 <= time <= _LATEST:
        raise ValueError(
            f"a point has the time {time}, expected seconds from the start of the video, 0 to "
            f"{_LATEST}"
        )
    return f"{time + 0.0:.1f}"  # -0.0 + 0.0 is 0.0


def _to_thousandths(point: Point, size: Size) -> tuple[int, int]:
    width, height = size
    if not (math.isfinite(point.x) and math.isfinite(point.y)) or not (
        0 <= point.x <= width and 0 <= point.y <= height
    ):
        frame = f"picture {point.image}" if point.time is None else "the video"
        raise ValueError(
            f"the point ({point.x}, {point.y}) lies outside of {frame}, which is {width} x "
            f"{height} pixels: give pixels of the original, from its top-left corner"
        )
    return round(SCALE * point.x / width), round(SCALE * point.y / height)


def _size_of(
    image: int, time: float | None, image_sizes: Sequence[Size], video_size: Size | None
) -> Size:
    """Size of what a point is in: an image by its number, or the video."""
    if time is not None:
        if video_size is None:
            raise ValueError(
                f"a point names the time {time} s, but there is no video: was video_size left out?"
            )
        return video_size
    if not 1 <= image <= len(image_sizes):
        raise ValueError(
            f"a point names picture {image}, but the prompt has {len(image_sizes)}: pictures count "
            f"from 1 in prompt order; was a picture left out of image_sizes?"
        )
    return image_sizes[image - 1]


def _check_label(label: str) -> None:
    if _LABEL_TAG.search(label):
        raise ValueError(
            f"the label {label!r} holds a points or tracks tag and could not be read back: use "
            f"plain words"
        )
