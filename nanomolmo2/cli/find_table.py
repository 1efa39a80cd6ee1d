"""The table of ``nanomolmo2 find``: a CSV file with a line for every point, which grows as photos
are done.

    image,count,label,id,x,y,confidence,size,image_width,image_height,problem,fingerprint

A photo in which nothing was found has one line, without a point, and one that could not be looked
at one without a count. Lines of a photo are written together: those of one that broke off, when the
call was killed, are known by their number. Every line carries what it is the result of (model,
examples and options, then the photo), so that other results are never gone on with.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanomolmo2.checks import named_errors, sha256_of, written
from nanomolmo2.files import read_regular
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from nanomolmo2.generation.pipeline import Answer, Pipeline

COLUMNS = (
    *("image", "count", "label", "id", "x", "y", "confidence", "size"),
    *("image_width", "image_height", "problem", "fingerprint"),
)
LABEL = "thing"
MOST_BYTES = 1 << 30
ELSEWHERE = "name another --csv, or remove it"
# What spreadsheets take for a formula, and would run.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Mark(NamedTuple):
    """A point: pixels, its confidence, and how large its thing is, pixels."""

    x: float
    y: float
    confidence: float
    size: float


@dataclass(frozen=True)
class Found:
    """What was found in a photo; ``count`` None: it could not be looked at, for its ``problem``."""

    count: int | None = None
    marks: tuple[Mark, ...] = ()
    width: int = 0
    height: int = 0
    problem: str = ""

    @classmethod
    def of(cls, answer: Answer) -> Found:
        """Rounded as the table has it."""
        width, height = answer.image_sizes[-1]
        marks = tuple(
            Mark(round(p.x, 1), round(p.y, 1), round(p.confidence or 0, 3), round(p.size or 0, 1))
            for p in answer.points
        )
        return cls(len(marks), marks, width, height, "; ".join(answer.problems))


def call_digest(pipeline: Pipeline, reference: Path | None, options: Sequence[Any]) -> str:
    """The same for the same model, examples and options."""
    from nanomolmo2.evaluation.store import digest_of

    shown = None if reference is None else sha256_of(reference)
    about = json.dumps([digest_of(pipeline), shown, *options])
    return hashlib.sha256(about.encode()).hexdigest()[:16]


@dataclass
class Table:
    """A file of results, of which some may be there.

    Attributes:
        path: where it is.
        by: of `call_digest`.
    """

    path: Path
    by: str = ""
    _lines: dict[str, list[list[str]]] = field(default_factory=dict)  # by the photo's cell

    def begin(self, by: str, photos: Sequence[Path]) -> None:
        """Read what an earlier call has written, and keep of it what is whole.

        Raises: ValueError for a file of something else, and results of another call.
        """
        self.by, self._lines = by, {}
        if self.path.exists():
            self._read({cell_of(photo) for photo in photos})
        self._write_all()

    def known(self, photo: Path) -> Found | None:
        """What stands there of a photo that is the same as it was."""
        lines = self._lines.get(cell_of(photo))
        if lines is None:
            return None
        try:
            is_same = lines[0][-1] == self._fingerprint(photo)
        except (OSError, ValueError):
            is_same = False
        return _found_of(lines) if is_same else None

    def add(self, photo: Path, found: Found) -> None:
        """Write what was found, behind the rest."""
        name = cell_of(photo)
        is_again = name in self._lines
        fingerprint = self.by if found.count is None else self._fingerprint(photo)
        self._lines[name] = lines = _lines_of(name, found, fingerprint)
        if is_again:  # the photo has changed
            return self._write_all()
        with named_errors(self.path), self.path.open("ab") as stream:
            stream.write(_encoded(lines))
        return None

    def finish(self, photos: Sequence[Path]) -> None:
        """Bring all into the order of the photos."""
        order = [cell_of(photo) for photo in photos]
        if list(self._lines) != order:
            self._lines = {name: self._lines[name] for name in order if name in self._lines}
            self._write_all()

    def __len__(self) -> int:
        """How many photos it has."""
        return len(self._lines)

    def _fingerprint(self, photo: Path) -> str:
        return f"{self.by}-{sha256_of(photo)[:16]}"

    def _read(self, asked: set[str]) -> None:
        data = read_regular(self.path, MOST_BYTES)
        text = data[: data.rfind(b"\n") + 1].decode(errors="replace")  # the last line broke off
        rows = csv.reader(io.StringIO(text, newline=""))
        header = next(rows, None)
        if header is None and not data:
            return
        if header is None or tuple(header) != COLUMNS:
            raise ValueError(
                f"{self.path} holds something else than a table of this command: {ELSEWHERE}"
            )
        for number, row in enumerate(rows, start=2):
            where = f"{self.path}, line {number}"
            if len(row) != len(COLUMNS) or not row[-1]:
                raise ValueError(f"{where} was not written by this command: {ELSEWHERE}")
            if row[-1].partition("-")[0] != self.by:
                raise ValueError(
                    f"{where} is of a call with another model, other examples or other options: "
                    f"{ELSEWHERE}"
                )
            if row[0] not in asked:
                raise ValueError(f"{where} is of {row[0]}, which is not asked about: {ELSEWHERE}")
            self._lines.setdefault(row[0], []).append(row)
        # Photos that failed are looked at once more, and those whose lines are not all there.
        self._lines = {name: lines for name, lines in self._lines.items() if _is_whole(lines)}

    def _write_all(self) -> None:
        with written(self.path) as temporary, temporary.open("wb") as stream:
            stream.write(_encoded([COLUMNS]))
            for lines in self._lines.values():
                stream.write(_encoded(lines))


def cell_of(photo: Path) -> str:
    """The name of a photo as it stands in the table: on one line, and never a formula."""
    text = visible(str(photo)).replace("\n", "\\n").replace("\t", "\\t")
    return _harmless(text)


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _lines_of(name: str, found: Found, fingerprint: str) -> list[list[str]]:
    size = [str(found.width), str(found.height)] if found.width else ["", ""]
    problem = _harmless(" ".join(visible(found.problem).split()))
    after = [*size, problem, fingerprint]
    before = [name, "" if found.count is None else str(found.count), LABEL]
    lines = [
        [
            *before,
            str(i),
            f"{m.x:.1f}",
            f"{m.y:.1f}",
            f"{m.confidence:.3f}",
            f"{m.size:.1f}",
            *after,
        ]
        for i, m in enumerate(found.marks, start=1)
    ]
    return lines or [[*before, *[""] * 5, *after]]


def _is_whole(lines: Sequence[Sequence[str]]) -> bool:
    count = lines[0][1]
    if not count.isdecimal() or len(lines) != max(1, int(count)):
        return False
    try:
        _found_of(lines)
    except ValueError:
        return False
    return True


def _found_of(lines: Sequence[Sequence[str]]) -> Found:
    """Raises: ValueError for cells that are no numbers."""
    _, count, _, id, *_ = lines[0]
    marks = [Mark(*map(float, line[4:8])) for line in lines] if id else []
    width, height, problem, _ = lines[0][8:]
    return Found(int(count), tuple(marks), int(width), int(height), problem)


def _encoded(lines: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode("utf-8", errors="backslashreplace")
