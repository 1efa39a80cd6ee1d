"""FiftyOne: exported data sets, as a folder or the JSON file in it.

    samples.json    FiftyOneDataset: {"samples": [{"filepath", FIELD: {"_cls": "Detections",
                    "detections": [{"label", "bounding_box": [x, y, width, height]}]}}]}
    labels.json     FiftyOneImageDetectionDataset and -ClassificationDataset: {"classes": [names],
                    "labels": {NAME: [{"label", "bounding_box"}] or a class}}, pictures in data/

Places go from 0 to 1 of each side. A sample may have several fields of labels, as of the truth and
of a model: one is read, ``ground_truth`` where it is there.

Source: docs.voxel51.com, user_guide/import_datasets and export_datasets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanomolmo2.data.labels.label_studio import CLASS_QUESTION
from nanomolmo2.data.labels.labelled import BAD, UNKNOWN_SHAPE, Labelled, human, numbers
from nanomolmo2.data.labels.pictures import Pictures
from nanomolmo2.data.labels.reading import objects, read_json

KINDS = {
    "Detections": "detections",
    "Keypoints": "keypoints",
    "Polylines": "polylines",
    "Classifications": "classifications",
}
TRUTH = "ground_truth"
EMPTY = "picture without labels: taken as one that shows nothing"


def read_fiftyone(path: Path, pictures: Pictures, field: str = "") -> list[Labelled]:
    """Args: field: of the labels in samples.json; "" = ``ground_truth``, or the only one.

    Raises: OSError; ValueError if it is no such export.
    """
    if path.is_dir():
        names = ("samples.json", "labels.json")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("samples"), list):
        return _read_samples(list(objects(content["samples"])), path, pictures, field)
    if isinstance(content, Mapping) and isinstance(content.get("labels"), Mapping):
        return _read_labels(content, pictures)
    raise ValueError(
        f"{path} has neither 'samples' nor 'labels', expected the samples.json or labels.json of "
        f"an exported FiftyOne data set"
    )


def _read_samples(
    samples: list[Mapping[str, Any]], path: Path, pictures: Pictures, field: str
) -> list[Labelled]:
    known = Counter(
        name
        for sample in samples
        for name, value in sample.items()
        if isinstance(value, Mapping) and _kind(value) in {*KINDS, *(k[:-1] for k in KINDS)}
    )
    if not field:
        field = TRUTH if TRUTH in known or len(known) != 1 else next(iter(known))
    if field not in known:
        raise ValueError(
            f"{path} has no labels in the field {field!r}, it has {', '.join(known) or 'none'}: "
            f"name one by --part"
        )
    found = []
    for number, sample in enumerate(samples):
        name = sample.get("filepath")
        if not isinstance(name, str) or not name:
            pictures.dropped.note(BAD, f"sample {number}: it has no filepath")
            continue
        if str(sample.get("_media_type", "image")) != "image":
            pictures.dropped.note("no image", f"sample {number}: {name}")
            continue
        picture = pictures.open(name)
        if picture is None:
            continue
        labelled = Labelled(picture, pictures.dropped)
        value = sample.get(field)
        if isinstance(value, Mapping):
            _add(labelled, value, field, name)
        else:
            pictures.notes.note(EMPTY, name)
        found.append(labelled)
    return found


def _kind(value: Mapping[str, Any]) -> str:
    return str(value.get("_cls", "")).rpartition(".")[2]


def _add(labelled: Labelled, value: Mapping[str, Any], field: str, name: str) -> None:
    """A value of the field: one label, or a list of them."""
    inner = KINDS.get(_kind(value))
    items = list(objects(value.get(inner))) if inner else [value]
    if _kind(value).startswith("Classification"):
        asked = human(field)
        plain = asked in (human(TRUTH), "label", "labels", "classification", "class")
        question = CLASS_QUESTION if plain else f"What is the {asked}?"
        if items:
            labelled.add_class(question, [item.get("label") for item in items], name)
        return
    for number, item in enumerate(items):
        _add_thing(labelled, item, f"{_kind(item) or 'label'} {number} of {name}")


def _add_thing(labelled: Labelled, item: Mapping[str, Any], where: str) -> None:
    width, height = labelled.picture.frame
    label, points = item.get("label"), item.get("points")
    if "bounding_box" in item:
        box = numbers(item["bounding_box"], 4)
        if box is not None:
            x, y, w, h = box
            box = x * width, y * height, (x + w) * width, (y + h) * height
        return labelled.add_box(label, box, where)
    if isinstance(points, list) and _kind(item) == "Keypoint":
        for place in points:
            found = numbers(place, 2)
            if found is not None:
                labelled.add_point(label, [found[0] * width, found[1] * height], where)
            elif not _is_nowhere(place):
                labelled.dropped.note(BAD, where)
        return None
    if isinstance(points, list) and _kind(item) == "Polyline":
        rings = [
            [numbers(corner, 2) for corner in ring] for ring in points if isinstance(ring, list)
        ]
        if not rings or any(corner is None for ring in rings for corner in ring):
            return labelled.dropped.note(BAD, where)
        pixels = [[[c[0] * width, c[1] * height] for c in ring if c] for ring in rings]
        return labelled.add_polygon(label, pixels, where)
    return labelled.dropped.note(UNKNOWN_SHAPE, where)


def _is_nowhere(place: Any) -> bool:
    """A keypoint that was not found has NaN for its place."""
    return isinstance(place, list) and any(
        value is None or (isinstance(value, float) and math.isnan(value)) for value in place
    )


def _read_labels(content: Mapping[str, Any], pictures: Pictures) -> list[Labelled]:
    classes = content.get("classes")
    names = classes if isinstance(classes, list) else []

    def name_of(label: Any) -> object:
        is_number = type(label) is int and 0 <= label < len(names)
        return names[label] if is_number else label

    found = []
    for name, labels in content["labels"].items():
        picture = pictures.open(name, any_suffix=True)
        if picture is None:
            continue
        labelled = Labelled(picture, pictures.dropped)
        given = labels if isinstance(labels, list) else [] if labels is None else [labels]
        if labels is None:
            pictures.notes.note(EMPTY, name)
        plain = [name_of(label) for label in given if not isinstance(label, Mapping)]
        if plain:
            labelled.add_class(CLASS_QUESTION, plain, name)
        for number, item in enumerate(objects(given)):
            thing = {**item, "label": name_of(item.get("label"))}
            _add_thing(labelled, thing, f"label {number} of {name}")
        found.append(labelled)
    return found
