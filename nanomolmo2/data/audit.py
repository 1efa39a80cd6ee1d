"""Audit: what is wrong with a data source, found before a run is spent on it.

Every record is read and encoded as training does it. A finding is fatal if training would learn
nothing or something wrong from such a record, and a warning if it may be meant.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.example import BadExample, Branch
from nanomolmo2.data.inspect import Encode, Read, learned, read_points, read_record
from nanomolmo2.data.sources import Source
from nanomolmo2.processor import Encoded, Processor
from nanomolmo2.processor.chat import read_messages

NO_LABEL = "no label left"
IMAGE_TOKENS_CUT = "image tokens cut off"
TOO_LONG = "answer longer than the sequence"
POINTS_OUTSIDE = "points outside the picture"
POINTS_UNREADABLE = "points not readable"
DUPLICATE_PICTURE = "duplicate picture"
DUPLICATE_QUESTION = "duplicate question on a picture"
EMPTY_QUESTION = "empty question"
VERY_LONG = "very long"
# Of sources; fatal from a share of the records on.
PICTURE_CAUSES = ("missing picture", "broken picture", "changed picture", "missing video")

# All that is not fatal; what a source calls a bad example is, whatever its cause.
WARNINGS = {POINTS_UNREADABLE, DUPLICATE_PICTURE, DUPLICATE_QUESTION, EMPTY_QUESTION, VERY_LONG}
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
    """Result of an audit; ``findings`` has the fatal ones first, then the most frequent."""

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
        visual_tokens: what an image token of the prompt becomes in the model; 1 where the processor
            writes them all.
        max_bad_fraction: from more than this fraction of missing and broken pictures on they are
            fatal, as in training.
        limit: look at the first so many records only.
        on_progress: called with the number of records done and of all.
    """
    size = len(source)
    records = size if limit is None else min(limit, size)
    auditor = _Auditor(processor, Report(source.name, size, records, max_tokens), visual_tokens)
    for record in range(records):
        try:
            read = read_record(source, record, encode)
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
        digests = [digest(image) for image in read.images]
        for number, content in enumerate(digests, start=1):
            here = f"record {record}, picture {number}"
            there = self.images.setdefault(content, here)
            if there != here:
                self.note(record, DUPLICATE_PICTURE, f"{here} is that of {there}")
        sizes = [image.size for image in read.images]
        for number, branch in enumerate(read.example.branches):
            self._check_question(record, number, branch, b"".join(digests))
            for problem in read_points(branch, sizes, read.encoded.video_size)[1]:
                self.note(record, cause_of_problem(problem), f"branch {number}: {problem}")

    def _check_length(self, record: int, encoded: Encoded) -> None:
        report = self._report
        is_image = encoded.input_ids == self.processor.image_token_id
        ends = np.cumsum(np.where(is_image, self.visual_tokens, 1))
        fits = ends <= report.max_tokens
        length, labels = int(ends[-1]), learned(encoded)
        report.tokens += length
        report.labels += int(labels.sum())
        report.longest = max(report.longest, length)
        size = f"{length} tokens, {report.max_tokens} fit"
        if not (labels & fits).any():
            self.note(record, NO_LABEL, f"{int(labels.sum())} labels, {size}")
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

    def report(self, max_bad_fraction: float) -> Report:
        report, findings = self._report, self.findings
        bad = sum(findings[cause].count for cause in PICTURE_CAUSES if cause in findings)
        for cause in PICTURE_CAUSES:
            if cause in findings:
                findings[cause].fatal = bad > max_bad_fraction * report.records
        for finding in findings.values():
            del finding.records[SHOWN:]
        report.findings = sorted(findings.values(), key=lambda f: (not f.fatal, -f.count))
        return report


def digest(image: Image.Image) -> bytes:
    """Of what an image shows: the same for the same pixels in any file format."""
    header = f"{image.width}x{image.height}:".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).digest()


def count_image_tokens(encoded: Encoded, processor: Processor) -> int:
    """Image tokens that the images of an example need in its prompt."""
    if encoded.image_token_pooling is not None:
        return len(encoded.image_token_pooling)
    images = 0 if encoded.pixel_values is None else len(encoded.pixel_values)
    return images * (processor.config.image_tokens or 1)


def cause_of_problem(problem: str) -> str:
    """A line of `parse_points`: a place that is not there, or a tag that is not well-formed."""
    is_outside = problem.endswith(": over 1000") or "a point names picture" in problem
    return POINTS_OUTSIDE if is_outside else POINTS_UNREADABLE
