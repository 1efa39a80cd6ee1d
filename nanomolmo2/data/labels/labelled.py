"""What is known of a picture from its labels, and an account of all that was dropped."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanomolmo2.data.labels.pictures import Picture
from nanomolmo2.data.labels.report import Dropped
from nanomolmo2.data.labels.shapes import (
    Mask,
    Place,
    Ring,
    area_of,
    inside_of,
    inside_of_mask,
    rectangle,
    runs_of,
)

NO_SIZE = "shape without a size"
OUTSIDE = "outside of the picture"
NO_LABEL = "without a label"
BAD = "not readable"
UNKNOWN_SHAPE = "unknown shape"


@dataclass(frozen=True)
class Thing:
    """Something in a picture, in pixels of the picture as it is shown.

    Attributes:
        point: lies on it.
        box: (x0, y0, x1, y1), where it is known.
        mask: as the truth of a record has it: rings, or COCO's run lengths.
    """

    label: str
    point: Place
    box: tuple[float, ...] | None = None
    mask: Any = None


@dataclass
class Labelled:
    """A picture with all that is known of it.

    Attributes:
        things: with labels, in the order of the file.
        classes: what the picture as a whole is: (question, answers).
        counts: label -> number of things whose places nobody marked.
        partly: labels of which more may be there than is marked: they are not counted, and never
            said to be absent.
        none: labels that are said to have no thing here.
        lost: labels of things that were dropped: more of them may be there than is known.
        absent: labels that are known to be absent; None: all that have no thing here.
    """

    picture: Picture
    dropped: Dropped
    things: list[Thing] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    classes: list[tuple[str, list[str]]] = field(default_factory=list)
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    none: set[str] = field(default_factory=set)
    partly: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    absent: set[str] | None = None

    def merge(self, other: Labelled) -> None:
        """Take over what another entry of a label file says of the same picture."""
        self.things += [thing for thing in other.things if thing not in self.things]
        self.captions += [text for text in other.captions if text not in self.captions]
        self.exchanges += [pair for pair in other.exchanges if pair not in self.exchanges]
        for question, names in other.classes:
            self.add_class(question, names, str(self.picture.path))
        self.counts |= other.counts
        self.none |= other.none
        self.partly |= other.partly
        self.lost |= other.lost
        if self.absent is not None or other.absent is not None:
            self.absent = (self.absent or set()) | (other.absent or set())

    # Every method below counts what it cannot take as dropped. Places are in pixels of the frame
    # that the labels refer to, `picture.frame`; ``where`` says which annotation it is.

    def add_box(self, label: Any, box: Any, where: str) -> None:
        """A box (x0, y0, x1, y1)."""
        name, corners = self._name(label, where), numbers(box, 4)
        if name is None or corners is None:
            return self._bad(name, where)
        x0, y0, x1, y1 = corners
        if not (x0 < x1 and y0 < y1):
            return self.drop(NO_SIZE, f"{where}: a box of {x1 - x0:g} x {y1 - y0:g}", name)
        box = self._box(self.picture.places(rectangle(x0, y0, x1, y1)))
        if box is None:
            return self.drop(OUTSIDE, where, name)
        self.things.append(Thing(name, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box))
        return None

    def add_point(self, label: Any, place: Any, where: str, box: Any = None) -> None:
        """A point, and the box (x0, y0, x1, y1) of the thing that it is on, if one is known."""
        name, found = self._name(label, where), numbers(place, 2)
        if name is None or found is None:
            return self._bad(name, where)
        (x, y), size = self.picture.places([(found[0], found[1])])[0], self.picture.size
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            return self.drop(OUTSIDE, where, name)
        corners = numbers(box, 4)
        around = corners and self._box(self.picture.places(rectangle(*corners)))
        self.things.append(Thing(name, (x, y), around or None))
        return None

    def add_polygon(self, label: Any, rings: Any, where: str, box: Any = None) -> None:
        """Rings of corners; ``box`` in place of the one around them."""
        name, shape = self._name(label, where), read_rings(rings)
        if name is None or shape is None:
            return self._bad(name, where)
        if not any(area_of(ring) for ring in shape):
            return self.drop(NO_SIZE, where, name)
        shape = [self.picture.places(ring) for ring in shape]
        point = inside_of(shape, self.picture.size)
        corners = numbers(box, 4)
        around = self._box([corner for ring in shape for corner in ring])
        if corners is not None:
            around = self._box(self.picture.places(rectangle(*corners))) or around
        if point is None or around is None:
            return self.drop(OUTSIDE, where, name)
        places = [[[round(x, 2), round(y, 2)] for x, y in ring] for ring in shape]
        mask = places[0] if len(places) == 1 else places
        self.things.append(Thing(name, point, around, mask))
        return None

    def add_mask(self, label: Any, mask: Mask, where: str, box: Any = None) -> None:
        """A mask of the whole frame."""
        name = self._name(label, where)
        if name is None:
            return self._bad(name, where)
        if mask.shape[::-1] != self.picture.frame:
            return self.drop(BAD, f"{where}: its mask has another size than the picture", name)
        mask = self.picture.mask(mask)
        point = inside_of_mask(mask)
        if point is None:
            return self.drop(NO_SIZE, f"{where}: its mask is empty", name)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        whole = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        corners = numbers(box, 4)
        around = corners and self._box(self.picture.places(rectangle(*corners)))
        around = around or tuple(float(side) for side in whole)
        self.things.append(Thing(name, point, around, runs_of(mask)))
        return None

    def add_class(self, question: str, labels: Sequence[Any], where: str) -> None:
        names = [name for name in (self._name(label, where) for label in labels) if name]
        if len(names) < len(labels):
            self.dropped.note(NO_LABEL, where)
        known = next((answers for asked, answers in self.classes if asked == question), None)
        if known is not None:  # the same question has one answer
            known += [name for name in names if name not in known]
        elif names:
            self.classes.append((question, list(dict.fromkeys(names))))

    def add_caption(self, caption: Any, where: str) -> None:
        if isinstance(caption, str) and caption.strip():
            self.captions.append(" ".join(caption.split()))
        else:
            self.dropped.note(BAD, f"{where}: its caption is empty")

    def _name(self, label: Any, where: str) -> str | None:
        return human(label) if isinstance(label, str) and human(label) else None

    def drop(self, cause: str, where: str, name: str = "") -> None:
        """Count an annotation as dropped; ``name``: its label."""
        self.dropped.note(cause, where)
        self.lost |= {name} - {""}

    def _bad(self, name: str | None, where: str) -> None:
        self.drop(NO_LABEL if name is None else BAD, where, name or "")

    def _box(self, corners: Ring) -> tuple[float, float, float, float] | None:
        """Around corners, cut at the edges of the picture; None if nothing is left."""
        width, height = self.picture.size
        xs = [min(max(x, 0.0), float(width)) for x, _ in corners]
        ys = [min(max(y, 0.0), float(height)) for _, y in corners]
        box = min(xs), min(ys), max(xs), max(ys)
        return box if box[0] < box[2] and box[1] < box[3] else None


def human(label: str) -> str:
    """``stop_sign``, ``stopSign`` and ``STOP SIGN`` -> ``stop sign``; ``QR code`` stays."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", re.sub(r"[_<>\x00-\x1f\x7f]", " ", label))
    words = text.lower().split() if text.isupper() else text.split()
    return " ".join(w if len(w) > 1 and w.isupper() else w.lower() for w in words)


def numbers(values: Any, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers of a list, or None."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    found = tuple(map(float, values))
    return found if all(math.isfinite(v) and abs(v) < 1e9 for v in found) else None


def read_rings(rings: Any) -> list[Ring] | None:
    """Rings of at least three corners each, given as pairs or as one list of x, y, x, y, ..."""
    found: list[Ring] = []
    for ring in rings if isinstance(rings, list) else ():
        flat = ring
        if isinstance(ring, list) and ring and isinstance(ring[0], (list, tuple)):
            if not all(isinstance(corner, (list, tuple)) and len(corner) == 2 for corner in ring):
                return None
            flat = [value for corner in ring for value in corner]
        values = numbers(flat, len(flat)) if isinstance(flat, (list, tuple)) else None
        if values is None or len(values) < 6 or len(values) % 2:
            return None
        found.append(list(zip(values[::2], values[1::2], strict=True)))
    return found or None


def labels_of(pictures: Sequence[Labelled]) -> Counter[str]:
    """Label -> things in all pictures."""
    return Counter(thing.label for labelled in pictures for thing in labelled.things)
