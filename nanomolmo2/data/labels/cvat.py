"""CVAT: "CVAT for images 1.1", as its annotations.xml or the zip that holds it.

    <annotations><image name width height>
        <box label xtl ytl xbr ybr rotation/>  <polygon|polyline|points label points="x,y;x,y"/>
        <ellipse label cx cy rx ry rotation/>  <mask label rle left top width height/>
        <skeleton label><points label outside points/></skeleton>  <tag label/>

Each point of a ``points`` shape is a thing. XML with a document type is refused, so that nothing in
it can grow or be fetched.

Source: docs.cvat.ai, XML annotation format.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError
from xml.parsers import expat

import numpy as np

from nanomolmo2.data.labels.label_studio import ATTRIBUTE, CLASS_QUESTION
from nanomolmo2.data.labels.labelled import BAD, UNKNOWN_SHAPE, Labelled
from nanomolmo2.data.labels.pictures import Pictures
from nanomolmo2.data.labels.reading import MOST_TEXT, size
from nanomolmo2.data.labels.shapes import Mask, Place, ellipse, rectangle, turned
from nanomolmo2.files import open_regular, read_regular

HIDDEN = "part of a skeleton that is outside"
XML = "annotations.xml"


def read_cvat(path: Path, pictures: Pictures) -> list[Labelled]:
    """Raises: OSError; ValueError if it is no such export."""
    root = parse_xml(_content(path), path)
    if root.tag != "annotations":
        raise ValueError(f"{path} begins with <{root.tag}>, expected CVAT's <annotations>")
    if root.find("track") is not None and root.find("image") is None:
        raise ValueError(
            f"{path} holds the tracks of a video, whose frames have no files: export the task as "
            f"'CVAT for images 1.1', with its images"
        )
    found = []
    for image in root.iter("image"):
        name = image.get("name")
        if not name:
            pictures.dropped.note(BAD, f"image {image.get('id')}: it has no name")
            continue
        picture = pictures.open(name, size(image.attrib, "width", "height"), note_turn=False)
        if picture is None:
            continue
        labelled = Labelled(picture, pictures.dropped)
        for number, shape in enumerate(image):
            _add(labelled, shape, f"{shape.tag} {number + 1} of {name}")
        found.append(labelled)
    return found


def _content(path: Path) -> bytes:
    if path.suffix.lower() != ".zip":
        return read_regular(path / XML if path.is_dir() else path, MOST_TEXT)
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            found = archive.getinfo(XML)
            if found.file_size > MOST_TEXT:
                raise ValueError(f"its {XML} has {found.file_size:,} bytes")
            return archive.read(found)
    except (KeyError, ValueError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{path} is no zip with an {XML} in it ({error}): unpack it, and give the folder"
        ) from None


def parse_xml(content: bytes, path: Path) -> Element:
    """XML -> its root. Raises: ValueError for what is none, and for one with a document type: its
    entities may be files of this machine, or grow without end.
    """
    parser = expat.ParserCreate()
    root: list[Element] = []
    open_elements: list[Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        element = Element(name, attributes)
        (open_elements[-1] if open_elements else root).append(element)
        open_elements.append(element)

    def refuse(*_: Any) -> None:
        raise ValueError(f"{path} has a document type (<!DOCTYPE>), which is not read: remove it")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: open_elements.pop()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ParseError) as error:
        raise ValueError(f"{path} is not valid XML ({error}): export it again") from None
    return root[0]


def _add(labelled: Labelled, shape: Element, where: str) -> None:
    """One shape, of whichever kind; attributes (of things) are counted as dropped."""
    label = shape.get("label")
    if shape.find("attribute") is not None:
        labelled.dropped.note(ATTRIBUTE, where, len(shape.findall("attribute")))
    if shape.tag == "tag":
        return labelled.add_class(CLASS_QUESTION, [label], where)
    if shape.tag == "box":
        return _add_box(labelled, shape, where)
    if shape.tag == "points":
        places = _places(shape)
        for place in places or ():
            labelled.add_point(label, place, where)
        return None if places else labelled.dropped.note(BAD, where)
    if shape.tag in ("polygon", "polyline"):
        places = _places(shape)
        if shape.tag == "polygon":
            return labelled.add_polygon(label, [places], where)
        return labelled.add_point(label, _on_line(places) if places else None, where)
    if shape.tag == "ellipse":
        found = _values(shape, "cx", "cy", "rx", "ry")
        rotation = _values(shape, "rotation") or [0.0]
        ring = ellipse(found[0], found[1], found[2], found[3], rotation[0]) if found else None
        return labelled.add_polygon(label, [ring], where)
    if shape.tag == "mask":
        mask = _mask(shape, labelled.picture.frame)
        if mask is None:
            return labelled.dropped.note(BAD, f"{where}: its run lengths")
        return labelled.add_mask(label, mask, where)
    if shape.tag == "skeleton":
        return _add_skeleton(labelled, shape, where)
    return labelled.dropped.note(UNKNOWN_SHAPE, where)


def _add_box(labelled: Labelled, shape: Element, where: str) -> None:
    label, box = shape.get("label"), _values(shape, "xtl", "ytl", "xbr", "ybr")
    rotation = _values(shape, "rotation") or [0.0]
    if box is None or not rotation[0]:
        return labelled.add_box(label, box, where)
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    ring = turned(rectangle(box[0], box[1], box[2], box[3]), rotation[0], middle)
    return labelled.add_polygon(label, [ring], where)


def _add_skeleton(labelled: Labelled, shape: Element, where: str) -> None:
    """The thing, by that of its points which is nearest to their middle."""
    visible: list[Place] = []
    for part in shape.iter("points"):
        if part.get("outside") == "1":
            labelled.dropped.note(HIDDEN, f"{where}, {part.get('label')}")
        else:
            visible += _places(part) or []
    place = None
    if visible:
        x, y = (sum(axis) / len(visible) for axis in zip(*visible, strict=True))
        place = min(visible, key=lambda p: (p[0] - x) ** 2 + (p[1] - y) ** 2)
    labelled.add_point(shape.get("label"), place, where)


def _values(shape: Element, *names: str) -> list[float] | None:
    try:
        return [float(shape.get(name, "")) for name in names]
    except ValueError:
        return None


def _places(shape: Element) -> list[Place] | None:
    try:
        pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
        return [(float(x), float(y)) for x, y in pairs]
    except ValueError:
        return None


def _on_line(places: list[Place]) -> Place:
    """Halfway along a line."""
    steps = np.hypot(*np.diff(np.asarray(places), axis=0).T)
    left = float(steps.sum()) / 2
    for (x0, y0), (x1, y1), step in zip(places, places[1:], steps.tolist(), strict=False):
        if left <= step and step:
            return x0 + (x1 - x0) * left / step, y0 + (y1 - y0) * left / step
        left -= step
    return places[0]


def _mask(shape: Element, frame: tuple[int, int]) -> Mask | None:
    """Run lengths along the rows of a part of the frame, in turn outside and inside."""
    found = _values(shape, "left", "top", "width", "height")
    try:
        runs = [int(run) for run in shape.get("rle", "").split(",")]
    except ValueError:
        return None
    if found is None or min(runs) < 0 or not all(value == int(value) for value in found):
        return None
    left, top, width, height = map(int, found)
    fits = 0 <= left <= left + width <= frame[0] and 0 <= top <= top + height <= frame[1]
    if not fits or sum(runs) != width * height:
        return None
    mask = np.zeros(frame[::-1], bool)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    mask[top : top + height, left : left + width] = inside
    return mask
