"""Audit: what is wrong with a data source, found before a run is spent on it.

Every record is read and encoded as training does it. A finding is fatal if training would learn
nothing or something wrong from such a record, and a warning if it may be meant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.fields import UNREAD_PICTURE, RowLimits
from nanomolmo2.data.inspect import Encode, Read, learned, read_points, read_record
from nanomolmo2.data.layouts import TAG_COUNT
from nanomolmo2.data.packing import count_crops
from nanomolmo2.data.placeholders import find_tag
from nanomolmo2.data.sources import Source
from nanomolmo2.processor import Encoded, Point, Processor
from nanomolmo2.processor.chat import read_messages

NO_LABEL = "no label left"
IMAGE_TOKENS_CUT = "image tokens cut off"
TOO_LONG = "answer longer than the sequence"
TOO_MANY_CROPS = "more crops than a row holds"
POINTS_OUTSIDE = "points outside the picture"
POINTS_UNREADABLE = "points not readable"
POINTS_IN_CORNER = "points in a corner"
TAG_LEFT = "picture tag in the text"
DUPLICATE_PICTURE = "duplicate picture"
DUPLICATE_QUESTION = "duplicate question on a picture"
EMPTY_QUESTION = "empty question"
VERY_LONG = "very long"
# Of sources; fatal from a share of the records on.
PICTURE_CAUSES = ("missing picture", "broken picture", "changed picture", "missing video")

# All that is not fatal; what a source calls a bad example is, whatever its cause.
WARNINGS = {POINTS_UNREADABLE, DUPLICATE_PICTURE, DUPLICATE_QUESTION, EMPTY_QUESTION, VERY_LONG}
WARNINGS |= {POINTS_IN_CORNER, TAG_LEFT, TAG_COUNT, UNREAD_PICTURE}
_STRIP = 256  # rows of an image
SHOWN = 5  # record numbers that are kept of each finding


@dataclass
class Finding:
    """One cause.

    Attributes:
        count: records with it.
        records: the numbers (from 0) of the first of them.
        detail: what exactly, in the first of them.
    """

    cause: str
    fatal: bool
    detail: str
    count: int = 0
    records: list[int] = field(default_factory=list)


@dataclass
class Report:
    """Result of an audit; ``findings`` has the fatal ones first, then the most frequent.

    Attributes:
        outside: files outside the folder of the data that its records name, ``outside_first`` the
            first of them.
        unread: field that nobody reads -> records that have it.
    """

    source: str
    size: int  # records of the source
    records: int  # of which so many were looked at
    max_tokens: int  # longest sequence
    good: int = 0  # records that training can read
    branches: int = 0
    pictures: int = 0
    tokens: int = 0
    labels: int = 0  # tokens that are learned
    longest: int = 0  # tokens of the longest record
    max_crops: int | None = None  # of a row
    outside: int = 0
    outside_first: str = ""
    unread: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def fatal(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fatal]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"fatal": bool(self.fatal), **dataclasses.asdict(self)}


def audit(
    source: Source,
    encode: Encode,
    processor: Processor,
    *,
    max_tokens: int,
    max_crops: int | None = None,
    visual_tokens: int = 1,
    max_bad_fraction: float = 0.05,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at the records of a source, one after the other.

    Args:
        encode: as training encodes an example.
        processor: the one that ``encode`` uses.
        max_tokens: longest sequence of the training, or the model's context.
        max_crops: crops that a row of the training holds; images, where they are not cut. None: any
            number.
        visual_tokens: what an image token of the prompt becomes in the model; 1 where the processor
            writes them all.
        max_bad_fraction: from more than this fraction of missing and broken pictures on they are
            fatal, as in training.
        limit: look at the first so many records only.
        on_progress: called with the number of records done and of all.
    """
    size = len(source)
    records = size if limit is None else min(limit, size)
    auditor = _Auditor(
        processor,
        Report(source.name, size, records, max_tokens, max_crops=max_crops),
        visual_tokens,
    )
    any_number = 2**62
    limits = RowLimits.of(
        processor, max_tokens, any_number if max_crops is None else max_crops, visual_tokens
    )
    for record in range(records):
        try:
            read = read_record(source, record, encode, limits)
        except BadExample as bad:
            auditor.note(record, bad.cause, bad.detail)
        else:
            auditor.check(record, read)
        if on_progress is not None:
            on_progress(record + 1, records)
    return auditor.report(max_bad_fraction)


class _Auditor:
    """What is remembered from record to record."""

    def __init__(self, processor: Processor, report: Report, visual_tokens: int) -> None:
        self.processor, self.visual_tokens, self._report = processor, visual_tokens, report
        self.findings: dict[str, Finding] = {}
        self.images: dict[bytes, str] = {}  # content -> where it was seen first
        self.questions: dict[bytes, str] = {}  # images and question -> likewise
        self.corners = [_Corner(*corner) for corner in _CORNERS]

    def note(self, record: int, cause: str, detail: str) -> None:
        """Count a record for a cause, once."""
        finding = self.findings.setdefault(cause, Finding(cause, cause not in WARNINGS, detail))
        if finding.records and finding.records[-1] == record:
            return
        finding.count += 1
        # The newest is always kept at the end, to know a record that comes again; see `report`.
        del finding.records[SHOWN:]
        finding.records.append(record)

    def check(self, record: int, read: Read) -> None:
        """All findings of a record that could be read."""
        report = self._report
        report.good += 1
        report.branches += len(read.example.branches)
        report.pictures += len(read.images)
        self._check_length(record, read.encoded)
        self._check_fields(record, read.example)
        known = {id(image): digest(image) for image in {id(i): i for i in read.images}.values()}
        digests = [known[id(image)] for image in read.images]
        for number, content in enumerate(digests, start=1):
            here = f"record {record}, picture {number}"
            there = self.images.setdefault(content, here)
            if there != here:
                self.note(record, DUPLICATE_PICTURE, f"{here} is that of {there}")
        sizes = [image.size for image in read.images]
        for number, branch in enumerate(read.example.branches):
            self._check_question(record, number, branch, b"".join(digests))
            self._check_tags(record, number, branch)
            points, problems = read_points(branch, sizes, read.encoded.video_size)
            for problem in problems:
                self.note(record, cause_of_problem(problem), f"branch {number}: {problem}")
            last = max(read.encoded.frame_times, default=math.inf)  # the last frame is among them
            late = [p.time for p in points if p.time is not None and p.time > last + _LATE]
            if late:
                detail = f"branch {number}: a point at {late[0]:g} s, the video ends at {last:g} s"
                self.note(record, POINTS_OUTSIDE, detail)
            for corner in self.corners:
                corner.add(record, points, sizes, read.encoded.video_size)

    def _check_length(self, record: int, encoded: Encoded) -> None:
        report = self._report
        is_image = np.isin(encoded.input_ids, self.processor.image_token_ids)
        ends = np.cumsum(np.where(is_image, self.visual_tokens, 1))
        fits = ends <= report.max_tokens
        length, labels = int(ends[-1]), learned(encoded)
        report.tokens += length
        report.labels += int(labels.sum())
        report.longest = max(report.longest, length)
        size = f"{length} tokens, {report.max_tokens} fit"
        if not (labels & fits).any():
            self.note(record, NO_LABEL, f"{int(labels.sum())} labels, {size}")
        crops = count_crops(encoded)
        if report.max_crops is not None and crops > report.max_crops:
            self.note(record, TOO_MANY_CROPS, f"{crops} crops, {report.max_crops} fit")
        expected, found = count_image_tokens(encoded, self.processor), int((is_image & fits).sum())
        if found != expected:
            detail = f"{found} image tokens are left of the {expected} that the pictures need"
            self.note(record, IMAGE_TOKENS_CUT, f"{detail}; {size}")
        if (labels & ~fits).any():
            self.note(record, TOO_LONG, size)
        elif 2 * length > report.max_tokens:
            detail = "more than half of a sequence leaves little room to pack others beside it"
            self.note(record, VERY_LONG, f"{size}: {detail}")

    def _check_question(self, record: int, number: int, branch: Branch, images: bytes) -> None:
        asked = [turn.text for turn in read_messages(branch.messages) if turn.role == "user"]
        here = f"record {record}, branch {number}"
        if not all(text.strip() for text in asked):
            self.note(record, EMPTY_QUESTION, here)
        if not images:
            return
        content = hashlib.blake2b(images + asked[0].encode(), digest_size=16).digest()
        there = self.questions.setdefault(content, here)
        if there != here:
            detail = f"{here} asks {asked[0][:80]!r} as {there} does"
            self.note(record, DUPLICATE_QUESTION, detail)

    def _check_fields(self, record: int, example: Example) -> None:
        report = self._report
        for cause, detail in example.notes:
            self.note(record, cause, detail)
        for name in example.unread:
            report.unread[name] = report.unread.get(name, 0) + 1
        if example.outside and not report.outside:
            report.outside_first = f"record {record}: {example.outside[0]}"
        report.outside += len(example.outside)

    def _check_tags(self, record: int, number: int, branch: Branch) -> None:
        for turn in read_messages(branch.messages):
            if (tag := find_tag(turn.text)) is not None:
                what = "a question" if turn.role == "user" else "an answer"
                self.note(record, TAG_LEFT, f"branch {number}: {tag!r} is left in {what}")

    def report(self, max_bad_fraction: float) -> Report:
        report, findings = self._report, self.findings
        bad = sum(findings[cause].count for cause in PICTURE_CAUSES if cause in findings)
        for cause in PICTURE_CAUSES:
            if cause in findings:
                findings[cause].fatal = bad > max_bad_fraction * report.records
        if (corner := next(filter(_Corner.is_unlikely, self.corners), None)) is not None:
            findings[POINTS_IN_CORNER] = corner.finding()
        for finding in findings.values():
            del finding.records[SHOWN:]
        report.findings = sorted(findings.values(), key=lambda f: (not f.fatal, -f.count))
        return report


# Units that people take for pixels: side of the corner in which all points then lie, the unit, and
# the share of the points that makes one think.
_CORNERS = ((1, "unit", 0.1), (100, "percent", 0.8), (1000, "thousandths", 0.8))
_LATE = 1.0  # seconds behind the last frame in which a point may still be of it
_BY_CHANCE = 0.05  # a corner that this many sources would have by chance is none


@dataclass
class _Corner:
    """Points of records that have all of them in the top-left corner of larger pictures."""

    side: int
    scale: str
    least: float
    points: int = 0
    inside: int = 0
    expected: float = 0.0  # points that would lie inside if they lay anywhere
    count: int = 0  # records with points inside
    records: list[int] = field(default_factory=list)

    def add(
        self,
        record: int,
        points: Sequence[Point],
        sizes: Sequence[tuple[int, int]],
        video_size: tuple[int, int] | None,
    ) -> None:
        found = others = 0
        for point in points:
            size = video_size if point.time is not None else sizes[point.image - 1]
            if size is None or max(size) <= self.side:
                continue
            width, height = size
            self.points += 1
            self.expected += min(1, self.side / width) * min(1, self.side / height)
            # Answers give thousandths: a place is known to half of one.
            inside = point.x <= self.side + width / 2000 and point.y <= self.side + height / 2000
            found, others = found + inside, others + (not inside)
        if others:  # a record has one unit: of one with points elsewhere none is mistaken
            return
        self.inside += found
        if found and self.records[-1:] != [record]:
            self.count += 1
            self.records = [*self.records[:SHOWN], record]

    def is_unlikely(self) -> bool:
        """By the Chernoff bound on the number of points that lie inside."""
        if self.inside < max(1, self.least * self.points):
            return False
        share, mean = self.inside / self.points, self.expected / self.points
        if share <= mean:
            return False
        distance = share * math.log(share / mean)
        if share < 1:
            distance += (1 - share) * math.log((1 - share) / (1 - mean))
        return self.points * distance > -math.log(_BY_CHANCE)

    def finding(self) -> Finding:
        detail = (
            f"{self.inside} of {self.points} points lie within {self.side} pixels of the top-left "
            f"corner of larger pictures: if they are no pixels, add 'points_scale': {self.scale!r}"
        )
        return Finding(POINTS_IN_CORNER, False, detail, self.count, self.records)


def digest(image: Image.Image) -> bytes:
    """Of what an image shows: the same for the same pixels in any file format."""
    found = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    for top in range(0, image.height, _STRIP):  # all bytes at once would be a second image
        found.update(image.crop((0, top, image.width, min(top + _STRIP, image.height))).tobytes())
    return found.digest()


def count_image_tokens(encoded: Encoded, processor: Processor) -> int:
    """Image tokens that the images of an example need in its prompt."""
    if encoded.image_token_pooling is not None:
        return len(encoded.image_token_pooling)
    return count_crops(encoded) * (processor.config.image_tokens or 1)


def cause_of_problem(problem: str) -> str:
    """A line of `parse_points`: a place that is not there, or a tag that is not well-formed."""
    is_outside = (
        problem.endswith((": over 1000", ": over 100 %")) or "a point names picture" in problem
    )
    return POINTS_OUTSIDE if is_outside else POINTS_UNREADABLE
