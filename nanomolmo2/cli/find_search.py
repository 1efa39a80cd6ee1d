"""The work of ``nanomolmo2 find``: one photo after the other, each told, drawn and written down."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomolmo2.cli.answering import answer_report
from nanomolmo2.cli.find_overlays import Overlays
from nanomolmo2.cli.find_table import LABEL, Found, Table, call_digest
from nanomolmo2.cli.output import describe, note, progress_bars
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from PIL.Image import Image

    from nanomolmo2.generation.pipeline import Answer, Pipeline

OF_AN_EXAMPLE = "nothing seems to be there"  # a problem that is the same in every photo


@dataclass(frozen=True)
class Asked:
    """What is looked for. Places are pixels of the reference, or of the one photo without one."""

    model: str
    like: list[tuple[float, float]]
    unlike: list[tuple[float, float]]
    reference: Path | None
    max_crops: int | None
    min_confidence: float


@dataclass
class Search:
    """One call.

    Attributes:
        several: tell a photo a line, though it be a single one of a folder.
        as_json: print a JSON object a photo.
    """

    pipeline: Pipeline
    asked: Asked
    photos: Sequence[Path]
    overlays: Overlays | None
    table: Table | None
    several: bool
    as_json: bool
    _reference: Image | None = None
    _failed: int = 0
    _total: int = 0
    _told: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Look at all photos.

        Raises: ValueError in the end if any of them failed; before the first for a model that
            cannot find, and a table of another call.
        """
        from nanomolmo2.processor import load_image

        if self.pipeline.model.finder is None:
            raise ValueError(
                f"the model {self.asked.model} cannot find by example: choose one that has learned "
                f"it, such as `nanomolmo2 train find` makes"
            )
        if self.asked.reference is not None:
            self._reference = load_image(self.asked.reference)
        if self.table is not None:
            self._begin(self.table)
        if self.overlays is not None:
            self.overlays.begin()
        try:
            self._look_at_all()
        except KeyboardInterrupt:
            if self.table is not None:
                note(f"\n{self.table.path} has what was found: the same command goes on behind it")
            raise
        if self.table is not None:
            self.table.finish(self.photos)
            note(f"wrote {self.table.path}")
        if self.overlays is not None and (sheet := self.overlays.finish()) is not None:
            note(f"wrote {sheet} and an overlay of each photo")
        if self._failed:
            raise ValueError(
                f"{self._failed} of {len(self.photos)} photos could not be looked at, as said "
                f"above; the others were"
            )

    def _begin(self, table: Table) -> None:
        asked = self.asked
        options = [asked.like, asked.unlike, asked.max_crops, asked.min_confidence]
        table.begin(call_digest(self.pipeline, asked.reference, options), self.photos)
        if len(table):
            note(f"{table.path} has {len(table)} of {len(self.photos)} photos: going on")

    def _look_at_all(self) -> None:
        stdout = sys.stdout  # the bar would lead what is printed to stderr
        with progress_bars() as add_bar:
            show = add_bar("photos") if self.several else lambda *_: None
            out = sys.stdout if stdout.isatty() else stdout  # on a terminal it is above the bar
            for number, photo in enumerate(self.photos, start=1):
                for line in self._lines(photo):
                    print(visible(line), file=out, flush=True)
                show(number, len(self.photos))
            if self.several and not self.as_json:
                print(f"{self._total} in {len(self.photos)} photos", file=out, flush=True)

    def _lines(self, photo: Path) -> list[str]:
        """Look at a photo, write what belongs to it, and say what is to be printed."""
        found, answer = self._look_at(photo)
        self._total += found.count or 0
        self._failed += found.count is None
        if self.as_json:
            return [json.dumps({"photo": str(photo), **self._report(photo, found, answer)})]
        if found.count is None:
            return []
        lines = [f"{photo}: {found.count}"]
        if not self.several:
            lines += [
                f"{i:4d}  {mark.x:.1f},{mark.y:.1f}  confidence {mark.confidence:.2f}"
                for i, mark in enumerate(found.marks, start=1)
            ]
        return lines

    def _look_at(self, photo: Path) -> tuple[Found, Answer | None]:
        """What is in a photo, drawn and written down; the answer, where it was asked for now."""
        from nanomolmo2.processor import load_image

        known = None if self.table is None else self.table.known(photo)
        image, answer, found = None, None, known
        try:
            if known is None or self.overlays is not None:
                image = load_image(photo)
        except (ValueError, OSError) as error:
            said = describe(error)
            found = Found(problem=said if str(photo) in said else f"{photo}: {said}")
            note(found.problem)
        if found is None:
            assert image is not None
            answer = self._find(photo, image)
            found = Found.of(answer)
        if self.overlays is not None:
            path = self.overlays.add(photo, image, found)
            if path is not None and not self.several:
                note(f"wrote {path}")
        if self.table is not None and known is None:
            self.table.add(photo, found)
        return found, answer

    def _find(self, photo: Path, image: Image) -> Answer:
        asked = self.asked
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems say the same
            answer = self.pipeline.find(
                image,
                asked.like,
                asked.unlike,
                None if self._is_reference(photo) else self._reference,
                asked.max_crops,
                asked.min_confidence,
            )
        for problem in answer.problems:
            if problem.startswith(OF_AN_EXAMPLE):
                if OF_AN_EXAMPLE not in self._told:
                    note(f"warning: {problem}")
                self._told.add(OF_AN_EXAMPLE)
            else:
                note(f"note: {f'{photo}: ' if self.several else ''}{problem}")
        return answer

    def _is_reference(self, photo: Path) -> bool:
        """Then the examples lie in what is asked about, and it need not be shown twice."""
        return self.asked.reference is not None and os.path.samefile(photo, self.asked.reference)

    def _report(self, photo: Path, found: Found, answer: Answer | None) -> dict[str, Any]:
        asked = self.asked
        report: dict[str, Any] = {"model": asked.model, "at": asked.like, "not": asked.unlike}
        if asked.reference is not None:
            report["in"] = str(asked.reference)
        if found.count is None:
            return {**report, "error": found.problem}
        if answer is not None:
            shown = [str(photo)]
            if len(answer.image_sizes) == 2:
                shown.insert(0, str(asked.reference))
            return {**report, **answer_report(answer, shown)}
        marks = enumerate(found.marks, start=1)
        report["count"] = found.count
        report["points"] = [{"id": i, "label": LABEL, **mark._asdict()} for i, mark in marks]
        report["problems"] = [found.problem] if found.problem else []
        report["images"] = [{"path": str(photo), "width": found.width, "height": found.height}]
        return report
