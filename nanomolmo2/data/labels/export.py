"""Predictions -> COCO and Label Studio, so that people correct points instead of placing them.

A line of predictions is what ``nanomolmo2 eval --out`` or ``nanomolmo2 ask --json`` writes: its
``images`` (path, width, height), and ``points`` in pixels, or an answer that has them. Points of a
label in a picture are taken once: from the question that asked for points, before those that
counted.

    COCO            a keypoint annotation for each point, of categories with one keypoint, without
                    a box: none is known, and programs would draw one of no size
    Label Studio    a task for each picture with one prediction, whose keypoints are in percent;
                    beside it the labelling configuration that shows them
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from nanomolmo2.checks import refuse_overwriting, written
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.labels.labelled import numbers
from nanomolmo2.data.labels.pictures import relative
from nanomolmo2.data.labels.reading import objects, side
from nanomolmo2.data.labels.report import Dropped
from nanomolmo2.data.labels.shapes import Place, Size
from nanomolmo2.data.records import JsonLines
from nanomolmo2.processor.points import parse_points

Target = Literal["coco", "label-studio"]
UNNAMED = "point"  # label of points that have none
NO_PICTURE = "prediction that names no picture, with its width and height"
NO_POINTS = "answer without points"
AGAIN = "points of a label that another question has given"
UNSEEN = "picture outside of the document root, where Label Studio does not look: give --root"
VIDEO = "prediction about a video"
VERSION = "nanomolmo2"
LOCAL = "/data/local-files/?d="


@dataclass
class Predicted:
    """A picture and the points that were predicted in it.

    Attributes:
        points: label -> places, pixels; without any where right answers name a label that the
            answers do not.
        scores: of the answers about it, 0 to 1, where they were scored.
    """

    path: Path
    size: Size
    points: dict[str, list[Place]] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)


@dataclass
class ExportReport:
    """What was written: pictures, points by label, and what was left out."""

    out: str
    pictures: int
    labels: Counter[str]
    dropped: Dropped
    notes: Dropped = field(default_factory=Dropped)

    def lines(self) -> list[str]:
        """For people."""
        points = sum(self.labels.values())
        lines = [f"wrote {points} points in {self.pictures} pictures to {self.out}"]
        for cause, found in self.dropped.to_dict().items():
            lines.append(f"dropped: {found['count']} x {cause}, first {found['first']}")
        for cause, found in self.notes.to_dict().items():
            lines.append(f"noted: {found['count']} x {cause}, first {found['first']}")
        return lines


def export_predictions(
    predictions: str | Path, out: str | Path, target: Target, *, root: str | Path | None = None
) -> ExportReport:
    """Write predictions as labels of another program.

    Args:
        predictions: JSON lines of ``eval --out DIR`` (DIR/predictions.jsonl) or ``ask --json``.
        out: a JSON file. For Label Studio its configuration is written to ``out`` with the ending
            ``.label_config.xml``.
        root: folder that the names of pictures are relative to, such as the document root of Label
            Studio; None: that of ``out``.
    Raises: OSError; ValueError if no line has a picture and an answer.
    """
    predictions, out = Path(predictions).expanduser(), Path(out).expanduser()
    if target not in get_args(Target):
        raise ValueError(f"unknown target {target!r}: expected {', '.join(get_args(Target))}")
    refuse_overwriting(out, [predictions])
    dropped = Dropped()
    pictures = read_predictions(predictions, dropped)
    if not pictures:
        told = ", ".join(f"{count} x {cause}" for cause, count in dropped.counts.items())
        raise ValueError(
            f"{predictions} has no predictions of points in pictures ({told or 'it is empty'}): "
            f"give what eval --out or ask --json writes; nothing was written"
        )
    folder = os.path.realpath(out.parent if root is None else Path(root).expanduser())
    labels = Counter({label: 0 for picture in pictures for label in picture.points})
    for picture in pictures:
        labels.update({label: len(places) for label, places in picture.points.items()})
    notes = Dropped()
    if target == "coco":
        content: Any = to_coco(pictures, folder)
    else:
        content = to_label_studio(pictures, folder)
        for picture in pictures:
            if relative(picture.path, folder).startswith("../"):
                notes.note(UNSEEN, f"{picture.path}, the root is {folder}")
        config = out.with_suffix(".label_config.xml")
        with written(config) as temporary:
            temporary.write_text(label_config(sorted(labels)), encoding="utf-8")
    with written(out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return ExportReport(str(out), len(pictures), labels, dropped, notes)


# ---- reading ----


def read_predictions(path: Path, dropped: Dropped) -> list[Predicted]:
    """Pictures in the order of their first lines, with the points of all lines about them."""
    rows = JsonLines(path)
    pictures: dict[Path, Predicted] = {}
    lines = []
    for i in range(len(rows)):
        try:
            row = rows[i]
        except BadExample as bad:
            raise ValueError(f"{bad.detail}: nothing was written") from None
        shown = _pictures(row.values, path.parent)
        if row.values.get("video") is not None or shown is None:
            dropped.note(NO_PICTURE if shown is None else VIDEO, row.where)
            continue
        points = _points(row.values, [picture.size for picture in shown])
        if not points and not _asks_for_points(row.values):
            dropped.note(NO_POINTS, row.where)
            continue
        for picture in shown:
            pictures.setdefault(picture.path, picture)
        lines.append((row, [picture.path for picture in shown], points))
    # Questions for points come first: counts repeat what those name.
    lines.sort(key=lambda line: not _asks_for_points(line[0].values))
    for row, paths, points in lines:
        for number, path in enumerate(paths, start=1):
            picture = pictures[path]
            score = row.values.get("score")
            if isinstance(score, (int, float)) and not isinstance(score, bool):
                picture.scores.append(float(score))
            here = [(label, place) for image, label, place in points if image == number]
            for label in dict.fromkeys(label for label, _ in here):
                if picture.points.get(label):
                    dropped.note(AGAIN, f"{row.where}: {label}")
                else:
                    picture.points[label] = [place for known, place in here if known == label]
        text = row.values.get("reference")
        if isinstance(text, str) and len(paths) == 1:  # a label that was missed is needed too
            picture = pictures[paths[0]]
            for point in parse_points(text, [picture.size], problems=[]):
                picture.points.setdefault(_name(point.label), [])
    return list(pictures.values())


def _asks_for_points(values: Mapping[str, Any]) -> bool:
    return values.get("scorer", values.get("task", "")) in ("points", "point")


def _pictures(values: Mapping[str, Any], folder: Path) -> list[Predicted] | None:
    """Those of a line; None if it names none, or not their sizes."""
    found = []
    for image in objects(values.get("images")):
        name = image.get("path")
        width, height = side(image.get("width")), side(image.get("height"))
        if not isinstance(name, str) or not name or width is None or height is None:
            return None
        beside = folder / name  # `ask` names pictures from where it was called
        path = beside if beside.is_file() or not Path(name).is_file() else Path(name)
        found.append(Predicted(Path(os.path.abspath(path)), (width, height)))
    return found or None


def _points(values: Mapping[str, Any], sizes: Sequence[Size]) -> list[tuple[int, str, Place]]:
    """(number of the picture, label, place), of the field ``points`` or else of the answer."""
    given = values.get("points")
    if isinstance(given, list):
        found = []
        for point in objects(given):
            place = numbers([point.get("x"), point.get("y")], 2)
            if place is not None and point.get("time") is None:
                label = point.get("label")
                found.append((point.get("image", 1), _name(label), (place[0], place[1])))
        return found
    text = values.get("answer", values.get("text"))
    if not isinstance(text, str):
        return []
    points = parse_points(text, sizes, problems=[])
    return [(point.image, _name(point.label), (point.x, point.y)) for point in points]


def _name(label: Any) -> str:
    """Of a category: in XML and on a screen, so without control characters."""
    text = label if isinstance(label, str) else ""
    return "".join(c if c.isprintable() else " " for c in text).strip() or UNNAMED


# ---- writing ----


def to_coco(pictures: Sequence[Predicted], folder: str) -> dict[str, Any]:
    """COCO's keypoints; names of pictures are relative to ``folder``."""
    labels = sorted({label for picture in pictures for label in picture.points})
    numbers_of = {label: i for i, label in enumerate(labels, start=1)}
    images, annotations = [], list[dict[str, Any]]()
    for image, picture in enumerate(pictures, start=1):
        width, height = picture.size
        name = relative(picture.path, folder)
        images.append({"id": image, "file_name": name, "width": width, "height": height})
        for label, places in picture.points.items():
            for x, y in places:
                x, y = round(x, 2), round(y, 2)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": numbers_of[label],
                        "keypoints": [x, y, 2],
                        "num_keypoints": 1,
                        "iscrowd": 0,
                    }
                )
    categories = [
        {"id": i, "name": label, "supercategory": "", "keypoints": ["point"], "skeleton": []}
        for label, i in numbers_of.items()
    ]
    info = {"description": "Points predicted by NanoMolmo2"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def to_label_studio(pictures: Sequence[Predicted], folder: str) -> list[dict[str, Any]]:
    """Tasks with predictions; pictures are local files below the document root ``folder``."""
    tasks = []
    for picture in pictures:
        width, height = picture.size
        result: list[dict[str, Any]] = []
        for label, places in picture.points.items():
            for x, y in places:
                value = {"x": 100 * x / width, "y": 100 * y / height, "width": 0.5}
                key = f"{picture.path.name} {label} {x} {y} {len(result)}".encode()
                result.append(
                    {
                        "id": hashlib.sha256(key).hexdigest()[:10],
                        "type": "keypointlabels",
                        "from_name": "label",
                        "to_name": "image",
                        "original_width": width,
                        "original_height": height,
                        "image_rotation": 0,
                        "value": {**value, "keypointlabels": [label]},
                    }
                )
        prediction: dict[str, Any] = {"model_version": VERSION, "result": result}
        if picture.scores:
            prediction["score"] = sum(picture.scores) / len(picture.scores)
        image = LOCAL + quote(relative(picture.path, folder))
        tasks.append({"data": {"image": image}, "predictions": [prediction]})
    return tasks


def label_config(labels: Sequence[str]) -> str:
    """What a project of Label Studio needs, to show these predictions."""
    lines = "".join(f"    <Label value={quoteattr(label)}/>\n" for label in labels)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <KeyPointLabels name="label" toName="image">\n{lines}  </KeyPointLabels>\n</View>\n'
    )
