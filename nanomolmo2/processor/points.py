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

    <point x="10.5" y="20" alt="dog">dog</point>
    <points x1="10.5" y1="20" x2="64" y2="48.2" alt="dogs">dogs</points>
                    Molmo 1, which is read but not written: percent of the width and height

Source: Molmo2, olmo/preprocessing/point_formatter.py (html-v2 joins groups with ``;``, html-v1 with
a tab). The grammar of the tags (`_join_groups`, `scan_tags`) does not know what a key means.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from nanomolmo2.processor.counts import stated_count
from nanomolmo2.processor.point import Point, PointsTag, PointsText, Size, join_points

__all__ = [
    "Point",
    "PointMode",
    "PointsText",
    "Size",
    "format_points",
    "format_tracks",
    "join_points",
    "parse_count",
    "parse_points",
    "points_to_json",
]

SCALE = 1000  # coordinates are written in thousandths of the image's side
NOTHING_THERE = "There are none."
NO_TRACKS = "No tracks available."

PointMode = Literal["point", "point_count", "count_point", "count"]


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
    Returns: the answer, a `PointsText`; ``There are none.`` for no points, in every mode.
    Raises: ValueError if a point lies outside its image, names an image that is not there or has
        an impossible time, if the label holds a tag, or if the mode is unknown.
    """
    if mode not in get_args(PointMode):
        raise ValueError(
            f"unknown mode {mode!r} for points: use one of {', '.join(get_args(PointMode))}"
        )
    _check_label(label)
    points = list(points)
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
    if mode == "count":
        return str(count)
    before, after = {
        "point": ("", ""),
        "point_count": ("Counting the ", f" shows a total of {count}."),
        "count_point": (f"There are {count} ", "."),
    }[mode]
    return join_points([before, _tag("points", groups, label, points), after])


def format_tracks(points: Iterable[Point], label: str, video_size: Size) -> str:
    """Write the places of objects over time as an answer.

    Args:
        points: in pixels, in any order, each with a time; ``id`` says which object it is (any
            number). Where an object is hidden, it has no point. The answer numbers the objects
            anew: from 1, in the order in which they appear, at the same time by (x, y) after
            rounding. The points of one time are sorted by that number.
        label: what the objects are, such as ``dancers``.
        video_size: (width, height) of the video, pixels.
    Returns: the tag, a `PointsText`; ``No tracks available.`` for no points.
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
    return _tag("tracks", groups, label, points)


def parse_points(
    text: str,
    image_sizes: Sequence[Size] = (),
    *,
    video_size: Size | None = None,
    problems: list[str] | None = None,
) -> list[Point]:
    """Read the points in an answer, in pixels of the original images or of the video.

    Reads every points, tracks and point tag of the text, with ``;``, a tab, ``:`` or ``,`` between
    the groups and with other attributes. A tag that breaks off is read as far as its numbers are
    surely whole, so the points of a growing (streamed) answer only ever grow. Triples that do not
    fit the grammar are left out, and so are those with a value over 1000 (in percent: over 100).

    Args:
        text: answer such as ``<points coords="1 1 512 300">cat</points>``.
        image_sizes: (width, height) of each image in prompt order, pixels.
        video_size: (width, height) of the video, pixels. With it and without image_sizes every key
            is a time; otherwise ``1`` is an image and ``1.0`` and ``0:01`` a time.
        problems: gets one line for each thing that was left out: what and where.
    Returns: points in order of appearance; empty if the answer has none. Those of a video have a
        time (without video_size they are left out); those of tracks have the id of their object.
        Those of Molmo 1 are numbered over the answer, and lie in the first image if there are
        several, which is reported.
    Raises: ValueError if a point names an image the prompt did not have; with ``problems`` it is
        left out and reported instead.
    """
    points = []
    all_times = video_size is not None and not image_sizes
    noted = [] if problems is None else problems
    for tag in scan_tags(text):
        noted += tag.problems
        for key, triples in tag.groups:
            if not triples:
                continue
            number, time = _read_key(key, all_times)
            try:
                if key == _NO_KEY and all_times:
                    noted.append(f"{tag.where} names no time of the video")
                    continue
                width, height = _size_of(number, time, image_sizes, video_size)
            except ValueError as error:
                if problems is None and time is None:
                    raise
                noted.append(f"{tag.where}: {error}")
                continue
            if key == _NO_KEY and len(image_sizes) > 1:
                noted.append(
                    f"{tag.where} names none of {len(image_sizes)} pictures: taken for the first"
                )
            for id, x, y in triples:
                place = x * width / SCALE, y * height / SCALE
                points.append(Point(*place, number, id, tag.label, time))
    return points


def parse_count(text: str) -> int | None:
    """Read the number that a counting answer gives.

    In this order: the number after ``a total of``; after ``There are`` or ``There is`` (``none``
    and ``no`` are 0, but not in ``no doubt``), and 0 for ``No tracks available``; an answer that is
    only a number, or a number and what was counted (``5 red dogs``); the number of points in the
    answer, where the points of one track count once.

    A number may have separators (``1,024``, ``10 000``, ``1'024``, ``1.000.000``), be a word
    (``five``, ``a dozen``, ``3 million``) and stand behind ``about``, ``exactly``, ``at least`` and
    the like. What is no count of things gives nothing: ``3.7``, ``-3``, ``1.024`` (which may be a
    thousand or one), ``2 or 3``, ``50%``, ``more than 5``.

    Molmo2's own scorer of image counting ignores the number in the text and takes the points:
    that is ``len(parse_points(...))``.

    Returns: the count; None if the answer gives neither a number nor a point, which is not 0.
    """
    stated = stated_count(text)
    if stated is not None:
        return stated
    count = 0
    for tag in scan_tags(text):
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
    ``x`` and ``y`` in pixels, ``x_thousandths`` and ``y_thousandths`` of the width and height, and
    ``confidence`` and ``size`` (pixels) where they are known.

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
                **({} if point.confidence is None else {"confidence": point.confidence}),
                **({} if point.size is None else {"size": point.size}),
            }
        )
    return dicts


# ---- grammar of the tags ----

_TAG = re.compile(r"<(points\b|tracks\b|point(?=\s++[A-Za-z][\w-]*+\s*+=|\s*+/?>))", re.I)
_LABEL_TAG = re.compile(r"</?(?:points?|tracks)\b", re.I)
# One attribute, the end of the opening, or a character of neither. A quote may stand behind a
# backslash; "open" is a value whose end quote is missing.
_PART = re.compile(
    r"""(?:(?<!\s)\s++|(?<=["']))(?P<name>[A-Za-z][\w-]*+)\s*+=\s*+
        (?:"(?P<double>(?:[^"\\]|\\.)*+)"|'(?P<single>(?:[^'\\]|\\.)*+)'|(?P<open>["'])
        |(?P<bare>[^\s"'<>=]++)(?=[\s>]))
    |(?P<end>/?>)|[^<]""",
    re.VERBOSE | re.DOTALL,
)
_DIGITS = re.compile(r"[0-9 .;:,\t]*")
_PLACE = re.compile(r"([xy])(\d{0,6})", re.IGNORECASE)
_PERCENT = re.compile(r"\s*+(\d{1,9}(?:\.\d{0,9})?)\s*+%?\s*+")
_TIMES = ("time", "t", "timestamp")
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*s?")
_CLOSING = {
    name: re.compile(rf"(?P<label>.*?)</{name}>", re.DOTALL | re.I)
    for name in ("points", "point", "tracks")
}
# A colon ends a group, but not where it is that of a clock. What looks like one and is none, such
# as 1:75, stays one piece and is reported as a whole.
_GROUP = re.compile(r"(?: *+\d{1,9}(?::\d{1,9}){1,3}+(?:[.,]\d{1,9})?(?= ))?[^;:,\t]+")
_CLOCK = re.compile(r"(?:(\d{1,5}):)?(\d{1,5}):([0-5]\d(?:[.,]\d{1,9})?)")
_KEY = re.compile(rf" *({_CLOCK.pattern}|\d{{1,9}}(?:\.\d{{1,9}})?) ")
# The lookahead wants to see the end of the last number: "100" may be the beginning of "1000".
_TRIPLE = re.compile(r"(?<![\d.])(\d{1,9}) +(\d{3,4}) +(\d{3,4})(?=[^\w.])")
_NO_KEY = ""  # of Molmo 1, which says neither the image nor, mostly, the time


class _Triple(NamedTuple):
    id: int
    x: float  # thousandths
    y: float


class _Opening(NamedTuple):
    """``<points ...>`` without its name; ``stop`` is None where the ``>`` is missing."""

    attributes: dict[str, tuple[int, int]]  # name -> where its value is
    unclosed: str | None  # the attribute that has no end quote
    stop: int | None
    is_empty: bool  # />


class Tag(NamedTuple):
    """A points, tracks or point tag as it stands in a text."""

    start: int  # of its first character
    stop: int  # behind its last character; where it is not closed, behind what was read
    name: str  # points, tracks or point
    where: str  # for messages
    label: str | None  # None where the tag is not closed and has no alt
    groups: list[tuple[str, list[_Triple]]]  # [(key, triples), ...]
    problems: list[str]  # what was left out
    says_nothing: bool  # it names no place at all, so it may be a word of another language


def _tag(
    name: str,
    groups: Iterable[tuple[str, Iterable[tuple[int, int, int]]]],
    label: str,
    points: Sequence[Point],
) -> PointsText:
    """A whole tag, which remembers its points."""
    text = f'<{name} coords="{_join_groups(groups)}">{label}</{name}>'
    return PointsText(text, [PointsTag(0, len(text), name, label, tuple(points))])


def _join_groups(groups: Iterable[tuple[str, Iterable[tuple[int, int, int]]]]) -> str:
    """[(key, [(id, x, y), ...]), ...] -> value of the coords attribute."""
    return ";".join(
        f"{key} " + " ".join(f"{id} {x:03d} {y:03d}" for id, x, y in triples)
        for key, triples in groups
    )


def scan_tags(text: str) -> Iterator[Tag]:
    """Each points, tracks and point tag of a text."""
    openings = list(_TAG.finditer(text))
    limits = [*(opening.start() for opening in openings[1:]), len(text)]
    pairs = 0  # x and y of Molmo 1, which are numbered over the answer
    for number, (opening, limit) in enumerate(zip(openings, limits, strict=False), start=1):
        name = opening[1].lower()
        where = f"{name} tag {number}"
        head = _read_opening(text, opening.end(), limit)
        start, _ = head.attributes.get("coords", (0, 0))
        if start and text[start - 1] in "\"'":
            stop = _DIGITS.match(text, start).end()  # type: ignore[union-attr]  # may be empty
            groups, problems = _scan_coords(text, start, stop, where)
            says_nothing = start == stop and text[stop : stop + 1] == text[start - 1]
            label, end, problem = _read_label(text, name, head, limit)
            if stop == len(text):
                tail = text[max(start, stop - 20) : stop]
                problems.append(f"{where}: the answer breaks off after {tail!r}")
            elif text[stop] != text[start - 1]:
                label, rest = None, text[stop : stop + 20]
                problems.append(
                    f"{where}: {rest!r} in its coords, expected numbers and an end quote"
                )
            elif problem:
                problems.append(f"{where} {problem}")
        else:
            values = {name: text[begin:end] for name, (begin, end) in head.attributes.items()}
            if head.unclosed is not None:  # "10" may be the beginning of "10.5"
                del values[head.unclosed]
            triples, problems = _read_percents(values, where, pairs, head.stop is not None)
            pairs += len(triples) + len(problems)
            key, problem = _read_time(values)
            groups = [(key, triples)]
            label, end, unclosed = _read_label(text, name, head, limit)
            says_nothing = not triples and not problems and head.unclosed is None
            if says_nothing:
                problem = f"has no {'x and y' if name == 'point' else 'coords'}"
            elif head.unclosed is not None:
                problem = f"breaks off in its {head.unclosed[:40]}"
            problem = problem or unclosed
            problems += [f"{where} {problem}"] if problem else []
        if label is None and (alt := head.attributes.get("alt")):
            value = re.sub(r"\\(.)", r"\1", text[slice(*alt)], flags=re.DOTALL)
            label = None if head.unclosed == "alt" else html.unescape(value)
        yield Tag(opening.start(), end, name, where, label, groups, problems, says_nothing)


def _read_opening(text: str, start: int, limit: int) -> _Opening:
    """The attributes from a place on; of two with one name the first counts, as in HTML."""
    attributes: dict[str, tuple[int, int]] = {}
    for part in _PART.finditer(text, start, limit):
        if part.start() != start:  # stepped over a "<"
            break
        start = part.end()
        if part["end"]:
            return _Opening(attributes, None, start, part["end"] == "/>")
        if part["name"]:
            kind = next(k for k in ("double", "single", "open", "bare") if part[k] is not None)
            name = part["name"].lower()
            if kind == "open":
                attributes.setdefault(name, (start, limit))
                return _Opening(attributes, name, None, False)
            attributes.setdefault(name, part.span(kind))
    return _Opening(attributes, None, None, False)


def _read_label(
    text: str, name: str, head: _Opening, limit: int
) -> tuple[str | None, int, str | None]:
    """(text between the tags or None, end of the whole tag, what is wrong or None)."""
    if head.is_empty:
        return None, head.stop or limit, None
    if head.stop is not None:
        # After the limit it would close a later tag.
        closing = _CLOSING[name].match(text, head.stop, limit)
        if closing is not None:
            return closing["label"], closing.end(), None
    return None, head.stop or limit, f"is not closed with </{name}>"


def _read_percents(
    values: Mapping[str, str], where: str, before: int, is_whole: bool
) -> tuple[list[_Triple], list[str]]:
    """(triples, problems) of ``x``, ``y``, ``x1``, ``y1``, ...; ids count from ``before`` + 1."""
    halves: dict[str, dict[str, str]] = {}
    triples: list[_Triple] = []
    problems: list[str] = []
    for name, value in values.items():
        place = _PLACE.fullmatch(name)
        if place is None:
            continue
        axis, index = place.groups()
        halves.setdefault(index, {})[axis] = value
        if len(halves[index]) < 2:
            continue
        pair = halves.pop(index)
        x, y = (_PERCENT.fullmatch(pair[axis]) for axis in "xy")
        shown = f"x{index}={pair['x'][:20]!r} y{index}={pair['y'][:20]!r}"
        if x is None or y is None:
            problems.append(f"{where}: left out {shown}, expected percent such as 10.5")
        elif max(float(x[1]), float(y[1])) > 100:
            problems.append(f"{where}: left out {shown}: over 100 %")
        else:
            id = before + len(triples) + len(problems) + 1
            thousandths = (SCALE / 100 * float(half[1]) for half in (x, y))
            triples.append(_Triple(id, *thousandths))
    for index, half in halves.items() if is_whole else ():
        axis = next(iter(half))
        other = "y" if axis == "x" else "x"
        problems.append(f"{where}: {axis}{index} has no {other}{index}")
    return triples, problems


def _read_time(values: Mapping[str, str]) -> tuple[str, str | None]:
    """(key, what is wrong or None) of a tag of Molmo 1 with a ``time``."""
    value = next((values[name].strip() for name in _TIMES if name in values), None)
    if value is None:
        return _NO_KEY, None
    if _CLOCK.fullmatch(value):
        return value, None
    if seconds := _SECONDS.fullmatch(value):
        return f"{float(seconds[1])}", None
    return _NO_KEY, f"has the time {value[:40]!r}, expected seconds or 0:12"


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


def _read_key(key: str, all_times: bool) -> tuple[int, float | None]:
    """(number of the image, seconds) that a key names: ``2``, ``2.5``, ``1:05``, ``0:01:05.5``."""
    if key == _NO_KEY:
        return 1, None
    if clock := _CLOCK.fullmatch(key):
        hours, minutes, seconds = (
            float((part or "0").replace(",", ".")) for part in clock.groups()
        )
        return 1, 3600 * hours + 60 * minutes + seconds
    if "." in key or all_times:
        return 1, float(key)
    return int(key), None


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
