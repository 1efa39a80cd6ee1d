"""Tables: CSV with a line for each label, several lines a picture.

    image,label,x,y                 points, one a line        (x and y empty: there are none)
    image,label,x0,y0,x1,y1         boxes                     (also xmin,ymin,xmax,ymax)
    image,label,x,y,w,h             boxes by a corner
    image,label,count               numbers of things
    image,label                     what the picture shows
    image,caption                   image,question,answer

Columns are known by their names, in any order and mixed; other columns are not read. The separator
is found in the text. Without a line of names, the first column is the picture and the rest is known
by its kind: one text and no number, one, two or four numbers.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from nanomolmo2.data.labels.label_studio import CLASS_QUESTION
from nanomolmo2.data.labels.labelled import BAD, NO_LABEL, Labelled, human
from nanomolmo2.data.labels.pictures import SUFFIXES, Pictures
from nanomolmo2.data.labels.reading import read_text, side
from nanomolmo2.data.record import PointsScale

NAMES = {
    "image": ("image", "images", "file", "filename", "file_name", "image_path", "path", "picture"),
    "label": ("label", "class", "category", "class_name", "label_name", "name", "object"),
    "x": ("x",),
    "y": ("y",),
    "w": ("w", "box_width", "bbox_width"),
    "h": ("h", "box_height", "bbox_height"),
    "x0": ("x0", "x1", "xmin", "x_min", "left"),
    "y0": ("y0", "y1", "ymin", "y_min", "top"),
    "x1": ("x1", "x2", "xmax", "x_max", "right"),
    "y1": ("y1", "y2", "ymax", "y_max", "bottom"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "count": ("count", "number", "n"),
    "caption": ("caption", "description"),
    "question": ("question",),
    "answer": ("answer",),
}
SIDES = {"unit": 1, "percent": 100, "thousandths": 1000}
BOX, CORNER, POINT = ("x0", "y0", "x1", "y1"), ("x", "y", "w", "h"), ("x", "y")

SHARES = (
    "table whose places are all from 0 to 1, taken as pixels: --points-scale unit if they are not"
)

Row = Mapping[str, str]


def read_table(path: Path, pictures: Pictures, scale: PointsScale = "pixels") -> list[Labelled]:
    """Args: scale: of all places: pixels, or of each side 1, 100 or 1000.

    Raises: OSError; ValueError if no column tells a picture, or nothing is said of them.
    """
    assert scale in get_args(PointsScale)
    rows = _rows(read_text(path), path)
    by_image: dict[str, list[tuple[int, Row]]] = {}
    for number, row in rows:
        if row["image"]:
            by_image.setdefault(row["image"], []).append((number, row))
        elif any(row.values()):
            pictures.dropped.note(BAD, f"line {number}: it names no picture")
    if scale == "pixels" and _are_shares(rows):
        pictures.notes.note(SHARES, f"{path.name}, line {rows[0][0]}")
    found = []
    for name, lines in by_image.items():
        width, height = side(lines[0][1].get("width")), side(lines[0][1].get("height"))
        is_whole = width is not None and height is not None
        picture = pictures.open(name, (width, height) if is_whole else None)  # type: ignore[arg-type]
        if picture is None:
            continue
        labelled = Labelled(picture, pictures.dropped)
        for number, values in lines:
            _add(labelled, values, scale, f"line {number} of {path.name}")
        found.append(labelled)
    return found


def _are_shares(rows: Sequence[tuple[int, Row]]) -> bool:
    """Whether all places are from 0 to 1, and not all of them whole."""
    cells = [row.get(axis, "") for _, row in rows for axis in (*BOX, *CORNER)]
    values = [float(cell) for cell in cells if re.fullmatch(r"\d*\.?\d+", cell)]
    return any(0 < value < 1 for value in values) and max(values) <= 1


def _rows(text: str, path: Path) -> list[tuple[int, dict[str, str]]]:
    """(number of the line, values by our names)."""
    separator = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(line)]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV ({error})") from None
    if not lines:
        raise ValueError(f"{path} is empty: expected lines such as image,label,x,y")
    columns = _columns(lines[0][1])
    names = [name.lower() for name in lines[0][1]] if "image" in columns else []
    if names:
        lines = lines[1:]
    else:
        columns = _columns_by_kind(lines, path)
    _check(columns, names, path)
    decimal_comma = separator != ","
    return [
        (
            number,
            {
                name: _number(line[i]) if decimal_comma and name not in TEXTS else line[i]
                for name, i in columns.items()
                if i < len(line)
            }
            | {"image": line[columns["image"]] if columns["image"] < len(line) else ""},
        )
        for number, line in lines
    ]


TEXTS = ("image", "label", "caption", "question", "answer")


def _number(text: str) -> str:
    """``12,5`` as it is written where the separator is none."""
    return text.replace(",", ".") if re.fullmatch(r"-?\d+,\d+", text) else text


def _separator(text: str) -> str:
    """That which stands most often in the first line, out of quotes."""
    first = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return max(",;\t|", key=lambda sign: (first.count(sign), sign == ","))


def _columns(names: Sequence[str]) -> dict[str, int]:
    """Our name -> place of the column. ``x1, y1`` are first corners where ``x2, y2`` are second."""
    given = {name.strip().lower().replace(" ", "_"): i for i, name in reversed([*enumerate(names)])}
    found: dict[str, int] = {}
    for ours in NAMES:
        known = NAMES[ours]
        if ours in ("x0", "y0") and f"{ours[0]}2" not in given:
            known = tuple(name for name in known if name != f"{ours[0]}1")
        if ours in ("x1", "y1") and f"{ours[0]}2" in given:
            known = known[1:]
        place = next((given[name] for name in known if name in given), None)
        if place is not None:
            found[ours] = place
    return found


def _columns_by_kind(lines: list[tuple[int, list[str]]], path: Path) -> dict[str, int]:
    """Of a table without names, as the first line has it."""
    cells = lines[0][1]
    kinds = [bool(re.fullmatch(r"-?\d+(?:[.,]\d+)?|", cell)) for cell in cells[1:]]
    places = [i for i, is_number in enumerate(kinds, start=1) if is_number]
    texts = [i for i, is_number in enumerate(kinds, start=1) if not is_number]
    form = {0: (), 1: ("count",), 2: POINT, 4: BOX}.get(len(places))
    if not cells[0].lower().endswith(SUFFIXES) or form is None or len(texts) != 1:
        raise ValueError(
            f"{path}: none of its columns ({', '.join(cells)[:100]}) is called image: name them in "
            f"the first line, such as image,label,x,y"
        )
    is_caption = not places and any(
        len(line[texts[0]].split()) > 4 for _, line in lines if len(line) > texts[0]
    )
    names = [*form, "caption" if is_caption else "label"]
    return {"image": 0, **dict(zip(names, [*places, *texts], strict=True))}


def _check(columns: Mapping[str, int], names: Sequence[str], path: Path) -> None:
    """That something is said of the pictures, and in one way."""
    said = {"caption", "answer", "label"} & columns.keys()
    if {"x", "y", "width", "height"} <= {*names} and "w" not in columns:
        raise ValueError(
            f"{path} has the columns x, y, width and height: call them x, y, w and h if they are a "
            f"box, or image_width and image_height if they are the picture's"
        )
    if not said or ("answer" in columns) != ("question" in columns):
        raise ValueError(
            f"{path} says nothing of its pictures (columns {', '.join(columns)}): expected a "
            f"column label (with x,y or x0,y0,x1,y1 or count), a caption, or question and answer"
        )


def _add(labelled: Labelled, row: Row, scale: PointsScale, where: str) -> None:
    """All that one line says."""
    if row.get("question") and row.get("answer"):
        labelled.exchanges.append((row["question"], row["answer"]))
    elif row.get("question") or row.get("answer"):
        labelled.dropped.note(BAD, f"{where}: a question or its answer is missing")
    if row.get("caption"):
        labelled.add_caption(row["caption"], where)
    label = row.get("label", "")
    if not label:
        if any(row.get(name) for name in (*BOX, *CORNER, "count")):
            labelled.dropped.note(NO_LABEL, where)
        return
    name = human(label)
    for form in (BOX, CORNER, POINT):
        if all(row.get(axis) for axis in form):
            return _add_shape(labelled, label, form, row, scale, where)
    if row.get("count"):
        if not row["count"].isdecimal() or len(row["count"]) > 9:
            return labelled.dropped.note(BAD, f"{where}: the count {row['count'][:40]!r}")
        labelled.counts[name] = labelled.counts.get(name, 0) + int(row["count"])
    elif any(row.get(axis) for axis in (*BOX, *CORNER)):
        labelled.dropped.note(BAD, f"{where}: a part of its place is missing")
    elif not any(axis in row for axis in (*BOX, *CORNER, "count")):
        labelled.add_class(CLASS_QUESTION, [label], where)
    else:
        labelled.none.add(name)
    return None


def _add_shape(
    labelled: Labelled,
    label: str,
    form: Sequence[str],
    row: Row,
    scale: PointsScale,
    where: str,
) -> None:
    width, height = labelled.picture.frame
    sides = (width, height, width, height)
    try:
        values = [float(row[axis]) for axis in form]
    except ValueError:
        return labelled.dropped.note(BAD, f"{where}: {', '.join(row[a] for a in form)[:60]}")
    if scale != "pixels":
        values = [v * s / SIDES[scale] for v, s in zip(values, sides, strict=False)]
    if form == POINT:
        return labelled.add_point(label, values, where)
    if form == CORNER:
        values = [values[0], values[1], values[0] + values[2], values[1] + values[3]]
    return labelled.add_box(label, values, where)
