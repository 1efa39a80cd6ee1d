"""COCO: instances, keypoints and captions, as one JSON file.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "segmentation",
                      "keypoints": [x, y, v, ...], "iscrowd", "caption"}],
     "categories": [{"id", "name", "keypoints": [names]}]}

A crowd is a region with an unknown number of things: nothing is said of its category but where the
single ones are. LVIS has the same layout and says of each image which categories were looked for.

Source: cocodataset.org/#format-data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanomolmo2.data.labels.labelled import BAD, NO_LABEL, Labelled, human, numbers, read_rings
from nanomolmo2.data.labels.pictures import Pictures
from nanomolmo2.data.labels.reading import objects, read_json, size
from nanomolmo2.data.labels.shapes import Mask, mask_of

CROWD = "crowd, whose things are not told apart"
NO_MASK = "mask that is not readable: its box is taken"
NO_PICTURE = "annotation of a picture that is not listed"
NO_CATEGORY = "category that is not listed"

Values = Mapping[str, Any]


def read_coco(path: Path, pictures: Pictures) -> list[Labelled]:
    """Raises: OSError; ValueError if it is no COCO file."""
    content = read_json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("images"), list):
        raise ValueError(
            f"{path} has no list of 'images', expected COCO's JSON with 'images', 'annotations' "
            f"and 'categories'"
        )
    categories = {
        c.get("id"): c for c in objects(content.get("categories")) if _is_key(c.get("id"))
    }
    of_image: dict[Any, list[Values]] = {}
    for annotation in objects(content.get("annotations")):
        image = annotation.get("image_id")
        of_image.setdefault(image if _is_key(image) else None, []).append(annotation)
    found = []
    for image in objects(content["images"]):
        name, key = image.get("file_name"), image.get("id")
        annotations = of_image.pop(key, []) if _is_key(key) else []
        if not isinstance(name, str) or not name:
            pictures.dropped.note(BAD, f"image {key}: it has no file_name")
            continue
        picture = pictures.open(name, size(image, "width", "height"))
        if picture is None:
            continue
        labelled = Labelled(picture, pictures.dropped)
        for annotation in annotations:
            where = f"annotation {annotation.get('id')} of {name}"
            _add(labelled, annotation, categories, where)
        _looked_for(labelled, image, categories)
        found.append(labelled)
    for left in of_image.values():
        where = f"annotation {left[0].get('id')} of image {left[0].get('image_id')}"
        pictures.dropped.note(NO_PICTURE, where, len(left))
    return found


def _is_key(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _add(labelled: Labelled, annotation: Values, categories: dict[Any, Values], where: str) -> None:
    """One annotation, of whichever kind."""
    if "caption" in annotation:
        return labelled.add_caption(annotation["caption"], where)
    key = annotation.get("category_id")
    category = categories.get(key) if _is_key(key) else None
    if category is None:
        return labelled.dropped.note(NO_CATEGORY, f"{where}: {key}")
    label = category.get("name")
    if not isinstance(label, str) or not human(label):
        return labelled.dropped.note(NO_LABEL, where)
    if annotation.get("iscrowd"):
        labelled.partly.add(human(label))
        return labelled.dropped.note(CROWD, where)
    box, segmentation = _corners(annotation.get("bbox")), annotation.get("segmentation")
    names, places = category.get("keypoints"), _keypoints(annotation.get("keypoints"))
    if isinstance(names, list) and len(names) > 1 and any(p is not None for p in places):
        _add_parts(labelled, names, places, where)
    single = places[0] if len(places) == 1 else None
    if single is not None:
        return labelled.add_point(label, single, where, box)
    if isinstance(segmentation, Mapping):
        try:
            mask: Mask | None = mask_of(segmentation)
        except ValueError:
            mask = None
            if box is not None:
                labelled.dropped.note(NO_MASK, where)
        if mask is not None and (mask.any() or box is None):
            return labelled.add_mask(label, mask, where, box)
    elif read_rings(segmentation) is not None:
        return labelled.add_polygon(label, segmentation, where, box)
    if box is None and any(p is not None for p in places):  # a thing by its keypoints alone
        visible = [p for p in places if p is not None]
        middle = tuple(sum(axis) / len(visible) for axis in zip(*visible, strict=True))
        nearest = min(visible, key=lambda p: (p[0] - middle[0]) ** 2 + (p[1] - middle[1]) ** 2)
        return labelled.add_point(label, nearest, where)
    return labelled.add_box(label, box, where)


def _corners(bbox: Any) -> list[float] | None:
    found = numbers(bbox, 4)
    return None if found is None else [*found[:2], found[0] + found[2], found[1] + found[3]]


def _keypoints(values: Any) -> list[tuple[float, float] | None]:
    """Places of x, y, v, ...; None where v says that it is not labelled or not visible."""
    flat = numbers(values, len(values)) if isinstance(values, list) else None
    if flat is None or len(flat) % 3:
        return []
    return [
        (x, y) if v >= 2 else None for x, y, v in zip(*(flat[i::3] for i in range(3)), strict=True)
    ]


def _add_parts(labelled: Labelled, names: list[Any], places: list[Any], where: str) -> None:
    """Named keypoints are things of their own; not all that can be seen need be labelled."""
    for name, place in zip(names, places, strict=False):
        if isinstance(name, str) and human(name):
            labelled.partly.add(human(name))
            if place is not None:
                labelled.add_point(name, place, f"{where}, {name}")


def _looked_for(labelled: Labelled, image: Values, categories: dict[Any, Values]) -> None:
    """LVIS: which categories are known to be absent, and which are not all marked."""

    def names_of(field: str) -> set[str]:
        listed = image.get(field)
        found = [categories.get(key) for key in listed or () if _is_key(key)]
        return {human(str(c.get("name"))) for c in found if c is not None}

    if isinstance(image.get("neg_category_ids"), list):
        labelled.absent = names_of("neg_category_ids")
    if isinstance(image.get("not_exhaustive_category_ids"), list):
        labelled.partly |= names_of("not_exhaustive_category_ids")
