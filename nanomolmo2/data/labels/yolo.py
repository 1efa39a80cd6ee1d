"""YOLO: pictures, a text of labels for each, and the names of the classes.

    data.yaml               path, train, val, test (folder, list file, or several), names
    images/train/a.jpg      labels/train/a.txt, or the text beside the picture

    class x y width height                  a box by its centre             sides from 0 to 1
    class x y x y x y ...                   a polygon (also a turned box)
    class x y width height x y v ...        a box and keypoints; data.yaml has kpt_shape

A picture without a text of labels, or with an empty one, shows nothing of the classes. Without a
data.yaml the names stand in classes.txt or obj.names, one a line.

Source: docs.ultralytics.com/datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanomolmo2.data.labels.labelled import BAD, NO_LABEL, Labelled
from nanomolmo2.data.labels.pictures import MISSING, SUFFIXES, Pictures
from nanomolmo2.data.labels.reading import read_text
from nanomolmo2.data.labels.shapes import Place
from nanomolmo2.data.labels.yaml import Value, parse_yaml

KEYS = ("path", "train", "val", "test", "names", "kpt_shape")
NO_TEXT = "picture without a text of labels: taken as one that shows nothing"
KEYPOINTS = "keypoints of a pose, whose names nobody tells"
SCORE = "score at the end of a line, left out"
NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")


@dataclass(frozen=True)
class _Set:
    """What data.yaml says.

    Attributes:
        keypoints: numbers that a keypoint has (x, y and perhaps whether it can be seen); None:
            there are none.
    """

    folder: Path
    names: dict[int, str]
    keypoints: int | None
    parts: dict[str, list[str]]


def read_yolo(path: Path, pictures: Pictures, split: str = "") -> list[Labelled]:
    """Args: split: one of train, val and test; "" = all that there are.

    Raises: OSError; ValueError if it is no such data set.
    """
    data = _open(path)
    if split and split not in data.parts:
        raise ValueError(
            f"{path} has no part {split!r}, only {', '.join(data.parts) or 'none'}: name another "
            f"--part, or leave it out"
        )
    chosen = {name: places for name, places in data.parts.items() if split in ("", name)}
    found, texts = [], set[Path]()
    for name, places in chosen.items():
        if len(chosen) > 1:
            pictures.notes.note("parts taken together, --part takes one", name)
        for place in places:
            for picture in _pictures_of(data.folder, place, pictures):
                text = text_of(picture, data.folder)
                texts.add(text)
                labelled = _read(picture, text, data, pictures)
                if labelled is not None:
                    found.append(labelled)
    _note_texts_without_pictures(texts, pictures)
    return found


def _open(path: Path) -> _Set:
    if path.is_dir():
        listed = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        path = min(listed, key=lambda file: file.stem not in ("data", "dataset"), default=path)
    if path.is_dir() or path.name in NAME_FILES:
        return _without_yaml(path if path.is_dir() else path.parent)
    values = parse_yaml(read_text(path), path, KEYS)
    folder = path.parent
    root = values.get("path")
    if isinstance(root, str) and root and (folder / root).is_dir():
        folder = folder / root
    parts = {
        name: [value] if isinstance(value, str) else list(value)
        for name in ("train", "val", "test")
        if (value := values.get(name))
    }
    shape = values.get("kpt_shape")
    keypoints = (
        int(shape[1]) if isinstance(shape, list) and shape[1:] and shape[1] in "23" else None
    )
    return _Set(folder, _names(values.get("names"), path), keypoints, parts or {"all": ["images"]})


def _names(value: Value | None, path: Path) -> dict[int, str]:
    if isinstance(value, list):
        return dict(enumerate(value))
    if isinstance(value, dict) and all(key.isdecimal() for key in value):
        return {int(key): name for key, name in value.items()}
    raise ValueError(f"{path} has no names of classes: write 'names: [cat, dog]'")


def _without_yaml(folder: Path) -> _Set:
    for name in NAME_FILES:
        for place in (folder / name, folder / "labels" / name):
            if place.is_file():
                lines = [line.strip() for line in read_text(place).splitlines()]
                parts = ["images"] if (folder / "images").is_dir() else ["."]
                return _Set(folder, dict(enumerate(filter(None, lines))), None, {"all": parts})
    raise ValueError(
        f"{folder} has neither a data.yaml nor a {NAME_FILES[0]}: one of them must name the classes"
    )


def _pictures_of(folder: Path, place: str, pictures: Pictures) -> Iterator[Path]:
    """Pictures of a folder, or of a list of them."""
    named = folder / place
    if not named.exists():  # Roboflow writes ../train/images where ./train/images is meant
        inside = Path(*[part for part in Path(place).parts if part not in ("..", ".", "/")])
        tried = [folder / inside]
        if pictures.images is not None:
            tried += [pictures.images / inside, pictures.images / inside.name]
        named = next((path for path in tried if path.exists()), named)
    if named.suffix == ".txt" and named.is_file():
        for line in read_text(named).splitlines():
            if line.strip():
                listed = named.parent / line.strip()
                listed = listed if listed.is_file() else folder / line.strip()
                found = listed if listed.is_file() else pictures.find(line.strip())
                if found is not None:
                    yield found
    elif named.is_dir():
        yield from (p for p in sorted(named.rglob("*")) if p.suffix.lower() in SUFFIXES)
    else:
        pictures.dropped.note(MISSING, f"there is no folder or list {named}")


def text_of(picture: Path, folder: Path) -> Path:
    """Where the labels of a picture stand: in ``labels`` in place of the last ``images`` of its
    path, beside it, or in the ``labels`` of the data set.
    """
    places = [picture.with_suffix(".txt"), folder / "labels" / f"{picture.stem}.txt"]
    parts = list(picture.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            places.insert(0, Path(*parts).with_suffix(".txt"))
            break
    return next((place for place in places if place.is_file()), places[0])


def _read(path: Path, text: Path, data: _Set, pictures: Pictures) -> Labelled | None:
    picture = pictures.open(str(path.absolute()))
    if picture is None:
        return None
    labelled = Labelled(picture, pictures.dropped)
    if not text.is_file():
        pictures.notes.note(NO_TEXT, str(path))
        return labelled
    for number, line in enumerate(read_text(text).splitlines(), start=1):
        if line.strip():
            _add(labelled, line.split(), data, f"{text}, line {number}")
    return labelled


def _add(labelled: Labelled, words: list[str], data: _Set, where: str) -> None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        return labelled.dropped.note(BAD, f"{where}: {' '.join(words)[:60]!r}")
    name = data.names.get(int(values[0])) if values[0].is_integer() else None
    if name is None:
        return labelled.dropped.note(NO_LABEL, f"{where}: class {words[0]} has no name")
    width, height = labelled.picture.frame
    places: list[Place] = [
        (x * width, y * height) for x, y in zip(values[1::2], values[2::2], strict=False)
    ]
    step = data.keypoints
    is_pose = step is not None and len(values) > 5 and (len(values) - 5) % step == 0
    if len(values) in (5, 6) or is_pose:
        if len(values) == 6 and not is_pose:
            labelled.dropped.note(SCORE, where)
        if is_pose and step is not None:
            labelled.dropped.note(KEYPOINTS, where, (len(values) - 5) // step)
        (x, y), (w, h) = places[:2]
        return labelled.add_box(name, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], where)
    if len(values) >= 7 and len(values) % 2:
        return labelled.add_polygon(name, [places], where)
    return labelled.dropped.note(BAD, f"{where}: {len(values)} numbers")


def _note_texts_without_pictures(texts: set[Path], pictures: Pictures) -> None:
    """Texts of labels beside those that were read, whose pictures are not there."""
    for folder in sorted({text.parent for text in texts}):
        for text in sorted(folder.glob("*.txt")):
            if text not in texts and text.name not in NAME_FILES and folder.name != "":
                pictures.named += 1
                pictures.dropped.note(MISSING, f"of {text}")
