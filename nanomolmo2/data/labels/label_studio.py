"""Label Studio: the exports JSON and JSON-MIN, of projects about images.

    [{"data": {"image": name}, "annotations": [{"result": [
        {"type": "rectanglelabels", "original_width", "original_height",
         "value": {"x", "y", "width", "height", "rotation", "rectanglelabels": [label]}}]}]}]

Places are percent of the sides; rectangles turn around their first corner, ellipses around their
centre, clockwise. Of several annotations of a task the last one counts that was not cancelled.

Source: labelstud.io/guide/task_format and the result formats of its tags.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanomolmo2.data.labels.labelled import BAD, UNKNOWN_SHAPE, Labelled, human, numbers
from nanomolmo2.data.labels.pictures import Picture, Pictures
from nanomolmo2.data.labels.reading import objects, read_json, size
from nanomolmo2.data.labels.shapes import Mask, ellipse, rectangle, turned

NO_ANNOTATION = "task without an annotation"
CANCELLED = "annotation that was cancelled or replaced by a later one"
PLAIN = "text of JSON-MIN, which does not say whether it is a label: export as JSON"
ATTRIBUTE = "attribute of a thing"
_LABELS = ("rectanglelabels", "ellipselabels", "polygonlabels", "keypointlabels", "brushlabels")
_ABOUT = ("id", "annotator", "created_at", "updated_at")  # of tasks: fields of JSON-MIN
# Names of controls that ask nothing in particular.
_BARE = {"choice", "choices", "class", "label", "labels", "tag", "tags", "category", "type"}
CLASS_QUESTION = "What does this picture show?"


def read_label_studio(path: Path, pictures: Pictures) -> list[Labelled]:
    """Raises: OSError; ValueError if it is no such export."""
    tasks = read_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, Mapping) for task in tasks):
        raise ValueError(f"{path} is no list of tasks: export the project as JSON or JSON-MIN")
    found = []
    for number, task in enumerate(tasks):
        where = f"task {task.get('id', number)}"
        name = _image_of(task)
        if name is None:
            pictures.dropped.note(BAD, f"{where}: its data names no image")
            continue
        results = _results(task, where, pictures)
        if results is None:
            pictures.dropped.note(NO_ANNOTATION, where)
            continue
        declared = next(filter(None, map(_size_of, results)), None)
        picture = pictures.open(name, declared, note_turn=False)  # browsers show pictures upright
        if picture is not None:
            labelled = Labelled(picture, pictures.dropped)
            with_labels = [r.get("id") for r in results if str(r.get("type")).endswith("labels")]
            for result in results:
                _add(labelled, result, where, with_labels)
            found.append(labelled)
    return found


def _image_of(task: Mapping[str, Any]) -> str | None:
    """The first field of the data that is called, or looks like, a picture."""
    data = task.get("data", task)
    if not isinstance(data, Mapping):
        return None
    names = sorted(data, key=lambda key: ("image" not in str(key).lower(), list(data).index(key)))
    for key in names:
        value = data[key]
        if isinstance(value, str) and ("." in value.rpartition("/")[2] or "image" in str(key)):
            return value
    return None


def _results(
    task: Mapping[str, Any], where: str, pictures: Pictures
) -> list[Mapping[str, Any]] | None:
    """What was marked and said; None if nobody looked at the task."""
    if "data" not in task:
        return list(_minimal(task, where, pictures))
    given = task.get("annotations", task.get("completions"))
    annotations = [a for a in objects(given) if not a.get("was_cancelled")]
    if not annotations:
        return None
    for _ in range(len(given) - 1):
        pictures.dropped.note(CANCELLED, where)
    return list(objects(annotations[-1].get("result")))


def _minimal(
    task: Mapping[str, Any], where: str, pictures: Pictures
) -> Iterator[Mapping[str, Any]]:
    """JSON-MIN has the values by the name of the control: in lists, or a single one as it is."""
    for key, value in task.items():
        if isinstance(value, str) and key not in _ABOUT and value != _image_of(task):
            if human(key) in _BARE:
                yield {"type": "choices", "from_name": key, "value": {"choices": [value]}}
            else:
                pictures.dropped.note(PLAIN, f"{where}: {key}")
        if isinstance(value, Mapping) and isinstance(value.get("choices"), list):
            yield {"type": "choices", "from_name": key, "value": value}
        for item in objects(value):
            kind = next((k for k in _LABELS if k in item), None)
            if kind is not None:
                yield {**item, "type": kind, "value": item}


def _size_of(result: Mapping[str, Any]) -> tuple[int, int] | None:
    return size(result, "original_width", "original_height")


def _add(
    labelled: Labelled, result: Mapping[str, Any], task: str, with_labels: Collection[Any]
) -> None:
    kind, value = str(result.get("type")).lower(), result.get("value")
    where = f"{task}, {kind} {result.get('id', '')}".rstrip()
    if not isinstance(value, Mapping):
        return labelled.dropped.note(BAD, where)
    if kind in ("choices", "textarea") and "x" in value:  # what is said of a region
        return labelled.dropped.note(ATTRIBUTE, where)
    if kind == "choices":
        choices = value.get("choices")
        return labelled.add_class(
            _question(result), choices if isinstance(choices, list) else [], where
        )
    if kind == "textarea":
        texts = value.get("text")
        for text in texts if isinstance(texts, list) else [texts]:
            labelled.add_caption(text, where)
        return None
    labels = next((found for name, found in value.items() if str(name).endswith("labels")), None)
    if labels is None and result.get("id") in with_labels:  # the same region, said twice
        return None
    label = labels[0] if isinstance(labels, list) and labels else None
    return _add_shape(labelled, label, value, where)


def _question(result: Mapping[str, Any]) -> str:
    name = human(str(result.get("from_name", "")))
    return CLASS_QUESTION if name in _BARE | {""} else f"What is the {name}?"


def _add_shape(labelled: Labelled, label: Any, value: Mapping[str, Any], where: str) -> None:
    """By its fields: old exports have the same types under other names."""
    width, height = labelled.picture.frame

    def pixels(*names: str) -> list[float]:
        """Empty if one of them is no number."""
        found = numbers([value.get(name) for name in names], len(names)) or ()
        sides = [height if name in ("y", "height", "radiusY") else width for name in names]
        return [v * s / 100 for v, s in zip(found, sides, strict=False)]

    rotation = (numbers([value.get("rotation")], 1) or (0.0,))[0]
    if "rle" in value:
        try:
            return labelled.add_mask(label, _brush(value["rle"], labelled.picture), where)
        except (ValueError, IndexError):
            return labelled.dropped.note(BAD, f"{where}: its run lengths")
    if "points" in value:
        points = value["points"] if isinstance(value["points"], list) else []
        places = [numbers(p, 2) if isinstance(p, (list, tuple)) else None for p in points]
        if None in places:
            return labelled.dropped.note(BAD, where)
        ring = [(p[0] * width / 100, p[1] * height / 100) for p in places if p is not None]
        return labelled.add_polygon(label, [ring], where)
    if "radiusX" in value:
        found = pixels("x", "y", "radiusX", "radiusY")
        turn = ellipse(found[0], found[1], found[2], found[3], rotation) if found else None
        return labelled.add_polygon(label, [turn], where)
    if "height" in value:
        found = pixels("x", "y", "width", "height")
        if not found or not rotation:
            box = [*found[:2], found[0] + found[2], found[1] + found[3]] if found else None
            return labelled.add_box(label, box, where)
        x, y, w, h = found
        ring = turned(rectangle(x, y, x + w, y + h), rotation, (x, y))
        return labelled.add_polygon(label, [ring], where)
    if "x" in value:
        return labelled.add_point(label, pixels("x", "y"), where)
    return labelled.dropped.note(UNKNOWN_SHAPE, where)


def _brush(values: Any, picture: Picture) -> Mask:
    """A brush: bytes of bits that hold (H, W, 4) values in runs, of which the last is the mask.

    Source: label-studio-sdk, converter/brush.py, after @thi.ng/rle-pack.
    """
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 256 for v in values):
        raise ValueError("no bytes")
    text = "".join(f"{value:08b}" for value in values)
    place = 0

    def read(bits: int) -> int:
        nonlocal place
        place += bits
        if place > len(text):
            raise ValueError("it breaks off")
        return int(text[place - bits : place], 2)

    length, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    width, height = picture.frame
    if length != 4 * width * height:
        raise ValueError("another size")
    out = np.zeros(length, np.uint8)
    done = 0
    while done < length:
        repeated = read(1)
        end = done + 1 + read(sizes[read(2)])
        if repeated:
            out[done:end] = min(read(word), 255)
        else:
            for i in range(done, min(end, length)):
                out[i] = min(read(word), 255)
        done = end
    return out.reshape(height, width, 4)[:, :, 3] > 127
