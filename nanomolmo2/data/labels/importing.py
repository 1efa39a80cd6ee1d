"""A label file of another program -> records of ours, pictures named and not copied."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from nanomolmo2.checks import refuse_overwriting, written
from nanomolmo2.data.labels.coco import read_coco
from nanomolmo2.data.labels.cvat import read_cvat
from nanomolmo2.data.labels.fiftyone import read_fiftyone
from nanomolmo2.data.labels.label_studio import read_label_studio
from nanomolmo2.data.labels.labelled import Labelled, labels_of
from nanomolmo2.data.labels.pictures import BROKEN, MISSING, Pictures, relative
from nanomolmo2.data.labels.questions import Asking, make_branches
from nanomolmo2.data.labels.report import ImportReport
from nanomolmo2.data.labels.table import read_table
from nanomolmo2.data.labels.yolo import read_yolo
from nanomolmo2.data.record import PointsScale

Format = Literal["coco", "label-studio", "cvat", "yolo", "fiftyone", "csv"]
LISTED_AGAIN = "picture that is listed again: what is said of it is taken together"
NOTHING_ASKED = "picture of which nothing is asked"


def import_labels(
    labels: str | Path,
    out: str | Path,
    format: Format,
    *,
    images: str | Path | None = None,
    asking: Asking | None = None,
    points_scale: PointsScale = "pixels",
    part: str = "",
) -> ImportReport:
    """Write ``out``, a JSONL file with a record for each picture that can be asked about.

    The same labels and options give the same file. What cannot be taken over is left out and
    counted in the report by its cause.

    Args:
        labels: the file, or the folder, that was exported.
        out: paths of pictures are relative to its folder.
        images: folder of the pictures; None: they are looked for around the labels.
        points_scale: of the places of a CSV.
        part: of YOLO its split, of FiftyOne the field with the labels.
    Raises: OSError; ValueError for a file of another kind, for labels none of whose pictures is
        there, and if nothing is left; then nothing is written.
    """
    labels, out = Path(labels).expanduser(), Path(out).expanduser()
    folder = None if images is None else Path(images).expanduser()
    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}: expected {', '.join(get_args(Format))}")
    if not labels.exists():
        raise FileNotFoundError(f"there is no {labels}: expected labels as {format} writes them")
    refuse_overwriting(out, [labels])
    report = ImportReport(format, str(labels), str(out))
    pictures = Pictures(labels, folder, report.dropped, report.notes)
    read: dict[Format, Callable[[], list[Labelled]]] = {
        "coco": lambda: read_coco(labels, pictures),
        "label-studio": lambda: read_label_studio(labels, pictures),
        "cvat": lambda: read_cvat(labels, pictures),
        "yolo": lambda: read_yolo(labels, pictures, part),
        "fiftyone": lambda: read_fiftyone(labels, pictures, part),
        "csv": lambda: read_table(labels, pictures, points_scale),
    }
    found = _each_once(read[format](), report)
    records = _records(found, report, asking or Asking(), out)
    if not records:
        raise ValueError(_nothing_left(report, pictures, folder))
    with written(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return report


def _each_once(found: list[Labelled], report: ImportReport) -> list[Labelled]:
    """Pictures that are listed several times as one: else each entry would be asked about what only
    another says, and answer that there is none.
    """
    pictures: dict[Path, Labelled] = {}
    for labelled in found:
        first = pictures.setdefault(labelled.picture.path, labelled)
        if first is not labelled:
            report.notes.note(LISTED_AGAIN, str(labelled.picture.path))
            first.merge(labelled)
    return list(pictures.values())


def _records(
    found: list[Labelled], report: ImportReport, asking: Asking, out: Path
) -> list[dict[str, object]]:
    report.labels = labels_of(found)
    labels = sorted(report.labels)
    # Names go up from where the file really lies: a link in its path would lead them elsewhere.
    folder = os.path.realpath(out.parent)
    records: list[dict[str, object]] = []
    for number, labelled in enumerate(found):
        picture = labelled.picture
        branches = make_branches(labelled, labels, asking, number)
        if not branches:
            report.dropped.note(NOTHING_ASKED, str(picture.path))
            continue
        for branch in branches:
            report.questions[branch["task"]] += 1
        width, height = picture.size
        name = relative(picture.path, folder)
        records.append({"image": name, "width": width, "height": height, "branches": branches})
    report.records = len(records)
    return records


def _nothing_left(report: ImportReport, pictures: Pictures, images: Path | None) -> str:
    """Why no record could be made, in a sentence."""
    causes = report.dropped.counts
    gone = causes[MISSING] + causes[BROKEN]
    if gone and gone >= pictures.named:
        first = report.dropped.first.get(MISSING) or report.dropped.first[BROKEN]
        where = f"in {images}" if images else "around the labels: name their folder by --images"
        return (
            f"none of the {pictures.named} pictures that {report.source} names can be read (first: "
            f"{first}); they were looked for {where}; nothing was written"
        )
    told = ", ".join(
        f"{count} x {cause}, first {report.dropped.first[cause]}"
        for cause, count in causes.most_common()
    )
    return (
        f"nothing in {report.source} can be asked about ({told or 'it names no pictures'}); "
        f"nothing was written"
    )
