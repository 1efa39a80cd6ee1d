"""Answers of models that point by selecting what they see: their text <-> markers and targets.

What a person or a data set writes as text coordinates, MolmoPoint learns as three markers a point,
P S L, each with the row, slot or cell that it selects, and one P more that ends the list:

    <points coords="1 1 210 455 2 640 480">cups</points>           what `points.format_points` makes
    <points coords="P S L 1 P S L 2 P">cups</point>                what is learned (without spaces)
    <points coords="<POINT_276><POINT_727><POINT_731>1...">cups</point>       what `decode` writes

Points are sorted by (row, slot, cell) and numbered in that order; objects of tracks are numbered by
their first appearance in it. Every tag closes with ``</point>``, and the number comes last.

Source: MolmoPoint, olmo/models/molmo_point (``no_space_id_last``) and its Hugging Face code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from nanomolmo2.processor.chat import Segment
from nanomolmo2.processor.point import Point, PointsTag, Size, tags_of
from nanomolmo2.processor.point_space import CLASS_NAME, END_OF_LIST, PointSpace, Target
from nanomolmo2.processor.points import format_points, parse_points, scan_tags

_CLASS = re.compile(CLASS_NAME)
_TRIPLE = re.compile(rf"{CLASS_NAME} ?{CLASS_NAME} ?{CLASS_NAME} ?([0-9]+)")
# A tag whose coords hold classes; its label ends where another tag begins.
_TAG = re.compile(
    r'<(?:points|tracks)\s[^"<>]*?coords="(?P<coords>(?:[^"<]|<POINT_[0-9]{1,9}>)*+)"[^<>]*+>'
    r"(?P<label>(?:[^<]|<(?!/?(?:points?|tracks)\b))*+)</(?:points?|tracks)>",
    re.IGNORECASE,
)
_TAKEN = "taken for the first"  # a note of `parse_points`, which is no mistake
_END = "</point>"


class Markers(NamedTuple):
    """The special tokens that mark a row, a slot and a cell."""

    row: str
    slot: str
    cell: str

    def segment(self, target: Target, *, is_answer: bool, ends_list: bool = False) -> Segment:
        """A selection; what a target that broke off lacks (-1) has no marker."""
        length = 1 if target[1] < 0 else 2 if target[2] < 0 else 3
        return Segment("".join(self[:length]), True, is_answer, (target,), ends_list)


# ---- text -> markers ----


def ground(
    segments: Sequence[Segment], space: PointSpace | None, markers: Markers
) -> list[Segment]:
    """The segments of a prompt with markers in place of the points of answers and questions.

    Args:
        space: what the prompt shows; None: nothing.
    Raises: ValueError for points that the prompt does not show, and classes of another prompt.
    """
    grounded: list[Segment] = []
    for segment in segments:
        if segment.is_answer and not segment.is_control:
            grounded += _Answer(segment.text, space, markers).segments
        elif tags := tags_of(segment.text):
            grounded += _question(segment, tags, space, markers)
        else:
            grounded.append(segment)
    return grounded


def write_question(text: str, image_sizes: Sequence[Size], video_size: Size | None) -> str:
    """A question with its points as text coordinates, as Molmo2 has them in questions.

    Raises: ValueError for a point outside of its picture, or in one that is not shown.
    """
    written, end = "", 0
    for tag in tags_of(text):
        if tag.name != "point":
            continue
        shown = format_points(tag.points, tag.label, image_sizes, video_size=video_size)
        written += text[end : tag.start] + shown
        end = tag.stop
    return written + text[end:] if written else text


def _question(
    segment: Segment, tags: Iterable[PointsTag], space: PointSpace | None, markers: Markers
) -> Iterator[Segment]:
    """A question with its points as markers; each is a list of its own."""
    end = 0
    for tag in tags:
        if tag.name != "point":
            continue
        if tag.start > end:
            yield segment._replace(text=segment.text[end : tag.start])
        end = tag.stop
        for point in tag.points:
            target = _shown(space, point).target(point)
            yield markers.segment(target, is_answer=False, ends_list=True)
    if end < len(segment.text) or end == 0:
        yield segment._replace(text=str(segment.text[end:]))


def _shown(space: PointSpace | None, point: Point) -> PointSpace:
    if space is None:
        what = f"picture {point.image}" if point.time is None else f"the time {point.time} s"
        raise ValueError(
            f"a point names {what}, but the prompt shows no picture and no video: give what it "
            f"lies in, or leave it out"
        )
    return space


class _Answer:
    """One answer's text as segments."""

    def __init__(self, text: str, space: PointSpace | None, markers: Markers) -> None:
        self.space, self.markers = space, markers
        self.segments: list[Segment] = []
        self._plain = ""  # text that is not yet a segment
        end = 0
        for tag in self._tags(text):
            self._text(text[end : tag.start], is_last=False)
            self._list(tag)
            end = tag.stop
        self._text(text[end:], is_last=True)
        if self._plain or not self.segments:
            self._flush()
        self._end_list()  # of an answer that broke off

    def _tags(self, text: str) -> list[PointsTag]:
        """The tags of an answer, with the exact points where it knows them."""
        exact = {tag.start: tag for tag in tags_of(text)}
        sizes = () if self.space is None else self.space.image_sizes
        video_size = None if self.space is None else self.space.video_size
        found = []
        for tag in scan_tags(text):
            whole = text[tag.start : tag.stop]
            is_other = tag.says_nothing or (self.space is None and tag.name == "point")
            if tag.start in exact:
                found.append(exact[tag.start])
                continue
            if is_other or _CLASS.search(whole):  # classes are read from the text between the tags
                continue
            problems: list[str] = []
            points = parse_points(whole, sizes, video_size=video_size, problems=problems)
            problems = [problem for problem in problems if not problem.endswith(_TAKEN)]
            if problems:
                raise ValueError(
                    f"an answer points at what cannot be learned ({problems[0]}): give its points "
                    f"in whole tags, as format_points writes them"
                )
            name = "tracks" if tag.name == "tracks" else "points"
            found.append(PointsTag(tag.start, tag.stop, name, tag.label or "", tuple(points)))
        return found

    def _list(self, tag: PointsTag) -> None:
        """A tag, its points sorted and numbered."""
        found = _shown(self.space, tag.points[0]).order(tag.points) if tag.points else []
        numbers: dict[int | None, int] = {}
        self._plain += f'<{tag.name} coords="'
        for number, (target, point) in enumerate(found, start=1):
            self._mark(target)
            if tag.name == "tracks":
                number = numbers.setdefault(point.id, len(numbers) + 1)
            self._plain += str(number)
        self._mark(END_OF_LIST)
        self._plain += f'">{tag.label}{_END}'

    def _text(self, text: str, *, is_last: bool) -> None:
        """Text without tags of coordinates, perhaps with classes of an earlier answer."""
        reader = _Classes(self.space)
        end = 0
        for match in _CLASS.finditer(text):
            between = text[end : match.start()]
            end = match.end()
            if not reader.inside:
                if 'coords="' in between:
                    self._end_list()
                    reader.last = None
                self._plain += between
            elif between not in ("", " "):
                reader.fail(match[0], "a point is three classes one after the other")
            if (target := reader.read(int(match[1]))) is not None:
                self._mark(target)
        if reader.inside:
            if end < len(text) or not is_last:
                reader.fail(text[end : end + 20], "a point is three classes one after the other")
            self._mark(reader.broken_off())
        self._plain += text[end:]

    def _mark(self, target: Target) -> None:
        self._flush()
        ends_list = target == END_OF_LIST
        self.segments.append(self.markers.segment(target, is_answer=True, ends_list=ends_list))

    def _flush(self) -> None:
        if self._plain or not self.segments:
            self.segments.append(Segment(self._plain, is_control=False, is_answer=True))
            self._plain = ""

    def _end_list(self) -> None:
        """The last list ends here, though it was not said."""
        for number in reversed(range(len(self.segments))):
            if self.segments[number].targets:
                self.segments[number] = self.segments[number]._replace(ends_list=True)
                return


class _Classes:
    """The classes of an earlier answer one by one -> targets."""

    def __init__(self, space: PointSpace | None) -> None:
        self.space = space
        self.last: Target | None = None  # of the list
        self._read: list[int] = []

    @property
    def inside(self) -> bool:
        """Whether a point has begun that is not whole."""
        return bool(self._read)

    def read(self, number: int) -> Target | None:
        """The target that is whole with this class; None if more has to follow."""
        name = f"<POINT_{number}>"
        if self.space is None:
            self.fail(name, "this prompt shows nothing to point at")
        N, S = self.space.num_rows, self.space.num_slots
        if number >= self.space.num_classes:
            self.fail(name, f"this prompt has {self.space.num_classes} classes")
        kind = 0 if number <= N else 1 if number <= N + S else 2
        if kind != len(self._read):
            self.fail(name, "a point is a row, a slot and a cell, in this order")
        if number == N:
            self.last = None
            return END_OF_LIST
        if kind == 0 and not self.space.is_selectable(number):
            self.fail(name, f"row {number} of this prompt cannot be selected")
        self._read.append(number - (0, N + 1, N + 1 + S)[kind])
        if kind < 2:
            return None
        target = self.broken_off()
        if self.last is not None and target < self.last:
            self.fail(name, "the points of a list are sorted by row, slot and cell")
        self.last = target
        return target

    def broken_off(self) -> Target:
        """What was read of a point, -1 for the rest."""
        row, slot, cell = [*self._read, -1, -1][:3]
        self._read = []
        return row, slot, cell

    def fail(self, found: str, reason: str) -> NoReturn:
        raise ValueError(
            f"an answer holds {found!r}, a class of another prompt's width or order ({reason}): "
            f"<POINT_k> means something else in every prompt, so give an answer to this one, or "
            f"its points as text coordinates"
        )


# ---- classes -> points ----


def points_from_ids(ids: Any, encoded: Any, *, problems: list[str] | None = None) -> list[Point]:
    """The points that a model of points has generated.

    Args:
        ids: new ids of one row, those of points behind the vocabulary (V + class): a list, array or
            tensor.
        encoded: the prompt, an `Encoded`, or its ``point_space``.
        problems: gets one line for each point that was left out.
    Returns: as `points_from_text`; empty for a prompt that shows nothing. In a worker process,
        which has no tokenizer, they have no labels.
    Raises: ValueError for several rows, and for ids that are neither tokens nor classes of the
        prompt, such as those of an answer to another one.
    """
    space = encoded if isinstance(encoded, PointSpace) else encoded.point_space
    if space is None:
        return []
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if values and isinstance(values[0], list):
        if len(values) > 1:
            raise ValueError(f"found {len(values)} rows of ids: give those of one answer")
        values = values[0]
    end = space.first_class + space.num_classes
    wrong = next((value for value in values if not 0 <= value < end), None)
    if wrong is not None:
        raise ValueError(
            f"id {wrong} is neither a token nor a class of this prompt, whose ids end at {end - 1} "
            f"({space.num_rows} visual tokens, {space.num_slots} patches in each): give the ids of "
            f"an answer to this prompt, without padding"
        )
    return points_from_text(space.text_of(values), space, problems=problems)


def points_from_text(
    text: str, space: PointSpace, *, problems: list[str] | None = None
) -> list[Point]:
    """The points of an answer as it was decoded, in pixels of the pictures or the video's frames.

    A point is three ``<POINT_k>``, a space between them or not, and the digits of its number; three
    without digits behind them are none. A selection of nothing (of an overview, or an empty slot)
    is left out.

    Args:
        problems: gets one line for each point that was left out.
    Returns: points in order of appearance, each with its number (of a track: its object's) as id.
    """
    return [point for _, point in find_points(text, space, problems=problems)]


def find_points(
    text: str, space: PointSpace, *, problems: list[str] | None = None
) -> Iterator[tuple[int, Point]]:
    """(where it begins in the text, point) of every point, as `points_from_text`."""
    tags = list(_TAG.finditer(text))
    for match in _TRIPLE.finditer(text):
        while tags and tags[0].end("coords") < match.end():
            tags.pop(0)
        inside = bool(tags) and tags[0].start("coords") <= match.start()
        row, slot, cell = (int(match[k]) for k in (1, 2, 3))
        slot -= space.num_rows + 1
        cell -= space.num_rows + 1 + space.num_slots
        label = tags[0]["label"] if inside else None
        point = space.point((row, slot, cell), int(match[4][:18]), label)
        if point is not None:
            yield match.start(), point
        elif problems is not None:
            problems.append(
                f"{match[0]!r:.60} selects row {row}, slot {slot}, cell {cell}, which is no place "
                f"of a picture: left out"
            )
