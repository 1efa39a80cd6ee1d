"""Names of pictures in label files -> the files, and where the pixels of the labels lie in them.

Names come from other machines: a path there, an address, a bare name. A picture is looked for by
its whole name, then by less and less of it from the left; nothing is copied or downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from nanomolmo2.data.labels.report import Dropped
from nanomolmo2.data.labels.shapes import MOST_PIXELS, Mask, Place, Ring, Size
from nanomolmo2.data.record import address_key
from nanomolmo2.processor.image import stored_size

MISSING = "missing picture"
BROKEN = "broken picture"
AMBIGUOUS = "several pictures of this name"
OTHER_SIZE = "picture of another size than its labels say"
TURNED = "labels of the stored pixels, turned as the EXIF note turns the picture"
UNCERTAIN = "turned by an EXIF note: the labels are taken as those of the upright picture"
ELSEWHERE = "picture found in another folder than its labels say"
SCALED = "labels scaled from another size of the picture"

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
OF_LABELS = (
    "annotations",
    "annotation",
    "anno",
    "ann",
    "labels",
    "label",
    "json",
)  # names of folders
MOST_FOLDERS = 2_000  # that are looked through without --images
SAME_SHAPE = 0.01  # of a side, that a resized picture may be off

_SWAPS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
)


@dataclass(frozen=True)
class Picture:
    """A picture and the pixels that its labels are in.

    Attributes:
        size: (width, height) as it is shown, and as training sees it, pixels.
        frame: (width, height) of what the labels refer to.
        turn: that turns the frame upright; None if it is.
    """

    path: Path
    size: Size
    frame: Size
    turn: Image.Transpose | None = None

    def places(self, corners: Sequence[Place]) -> Ring:
        """Places in the frame -> in the picture as it is shown; edges become edges."""
        width, height = self.frame
        turned = [_turned(self.turn, x, y, width, height) for x, y in corners]
        if self.turn in _SWAPS:
            width, height = height, width
        return [(x * self.size[0] / width, y * self.size[1] / height) for x, y in turned]

    def mask(self, mask: Mask) -> Mask:
        """A mask of the frame -> of the picture as it is shown."""
        image = Image.fromarray(mask)
        if self.turn is not None:
            image = image.transpose(self.turn)
        return np.asarray(image if image.size == self.size else image.resize(self.size))


def _turned(turn: Image.Transpose | None, x: float, y: float, width: float, height: float) -> Place:
    """Where a place of a picture of width x height lies once that was turned."""
    return {
        None: (x, y),
        Image.Transpose.FLIP_LEFT_RIGHT: (width - x, y),
        Image.Transpose.ROTATE_180: (width - x, height - y),
        Image.Transpose.FLIP_TOP_BOTTOM: (x, height - y),
        Image.Transpose.TRANSPOSE: (y, x),
        Image.Transpose.ROTATE_270: (height - y, x),
        Image.Transpose.TRANSVERSE: (height - y, width - x),
        Image.Transpose.ROTATE_90: (y, width - x),
    }[turn]


class Pictures:
    """Finds the pictures of a label file.

    Args:
        labels: the label file, or its folder.
        images: where the pictures lie, in any folder below; None: in the folder of the labels, or
            one or two below it, and if that is called ``annotations`` or ``labels``, beside it.
    """

    def __init__(self, labels: Path, images: Path | None, dropped: Dropped, notes: Dropped) -> None:
        self.folder = labels if labels.is_dir() else labels.parent
        self.images, self.dropped, self.notes = images, dropped, notes
        self._prefer = labels.stem.lower()
        self.named = 0  # pictures that were asked for
        self._taken: dict[Path, str] = {}  # file -> the name that it was found for
        if images is not None and not images.is_dir():
            raise ValueError(f"there is no folder {images}: --images names that of the pictures")

    def open(
        self,
        name: str,
        declared: Size | None = None,
        *,
        note_turn: bool = True,
        any_suffix: bool = False,
    ) -> Picture | None:
        """A picture by its name in the labels; None, and counted as dropped, if there is none.

        Args:
            declared: (width, height) that the labels say it has.
            note_turn: whether labels may be of the stored pixels without saying so.
            any_suffix: the name lacks its ``.jpg``.
        """
        self.named += 1
        path = self.find(name, any_suffix)
        if path is None:
            return None
        try:
            stored, turn = stored_size(path)
        except (ValueError, OSError) as error:
            self.dropped.note(BROKEN, str(error))
            return None
        shown = stored[::-1] if turn in _SWAPS else stored
        if declared in (None, shown):
            if turn is not None and note_turn:
                self.notes.note(UNCERTAIN, str(path))
            return Picture(path, shown, shown)
        assert declared is not None
        if turn is not None and declared == stored:
            self.notes.note(TURNED, str(path))
            return Picture(path, shown, stored, turn)
        scale = shown[0] / declared[0], shown[1] / declared[1]
        is_scale = abs(scale[0] - scale[1]) <= SAME_SHAPE * max(scale)
        if is_scale and declared[0] * declared[1] <= MOST_PIXELS:
            self.notes.note(
                SCALED, f"{path}: {declared[0]} x {declared[1]}, it has {shown[0]} x {shown[1]}"
            )
            return Picture(path, shown, declared)
        self.dropped.note(
            OTHER_SIZE, f"{path}: {declared[0]} x {declared[1]}, it has {shown[0]} x {shown[1]}"
        )
        return None

    def find(self, name: str, any_suffix: bool = False) -> Path | None:
        """The file of a name; None, and counted as dropped, if there is none or several."""
        forms = forms_of(name)
        if any_suffix:
            forms = [form + suffix for form in forms for suffix in SUFFIXES]
        path = self._find(name, forms)
        if path is not None and self._taken.setdefault(path, name) != name:
            self.dropped.note(AMBIGUOUS, f"{name} and {self._taken[path]}: {path}")
            return None
        return path

    def _find(self, name: str, forms: Sequence[str]) -> Path | None:
        tried = [Path(form) for form in forms]
        for form in tried:  # as it stands
            for folder in (self.images, self.folder) if self.images else (self.folder,):
                if (path := folder / form).is_file():
                    return path
        for form in tried:
            for start in range(len(form.parts)):
                found = self._ending(form.parts[start:])
                if len(found) > 1:
                    found = [p for p in found if p.parent.name.lower() in self._prefer] or found
                if len(found) == 1:
                    if start:
                        self.notes.note(ELSEWHERE, f"{name}: {found[0]}")
                    return found[0]
                if found:
                    self.dropped.note(AMBIGUOUS, f"{name}: {found[0]} and {found[1]}")
                    return None
        self.dropped.note(MISSING, name)
        return None

    def _ending(self, parts: tuple[str, ...]) -> list[Path]:
        """Known files whose paths end so."""
        return [
            path
            for path in self._files.get(parts[-1].lower(), ())
            if [part.lower() for part in path.parts[-len(parts) :]] == [p.lower() for p in parts]
        ]

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Pictures by name, in the order of their paths."""
        files: dict[str, list[Path]] = {}
        for folder in self._folders():
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                continue
            for name in names:
                if name.lower().endswith(SUFFIXES):
                    files.setdefault(name.lower(), []).append(folder / name)
        return files

    def _folders(self) -> Iterator[Path]:
        if self.images is not None:
            for walked, inside, _ in os.walk(self.images):
                inside.sort()
                yield Path(walked)
            return
        todo, seen = [(self.folder, 2)], 0
        if self.folder.name.lower() in OF_LABELS:  # pictures lie beside such a folder
            todo.append((self.folder.parent, 2))
        while todo and seen < MOST_FOLDERS:
            folder, depth = todo.pop(0)
            seen += 1
            yield folder
            if depth:
                try:
                    inner = sorted(e.path for e in os.scandir(folder) if e.is_dir())
                except OSError:
                    continue
                todo += [(Path(path), depth - 1) for path in inner if Path(path) != self.folder]


def forms_of(name: str) -> list[str]:
    """What a picture may be called: the name, and of an address its path or its key.

    Label Studio's ``/data/local-files/?d=a/b.jpg`` and ``/data/upload/3/1a2b3c4d-b.jpg`` are known.
    """
    forms = [name.replace("\\", "/")]
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name) or name.startswith("/data/"):
        address = urlsplit(name)
        query = parse_qs(address.query).get("d")
        path = query[0] if query else unquote(address.path)
        forms = [path.lstrip("/")]
        if address.scheme.startswith("http"):
            key = address_key(name)
            forms += [key, *(key + suffix for suffix in SUFFIXES)]
    stem = forms[0].rpartition("/")[2]
    if found := re.fullmatch(r"[0-9a-f]{8}-(.+)", stem):  # Label Studio's prefix of an upload
        forms.append(found[1])
    return forms


def relative(path: Path, folder: str) -> str:
    """The name of a file as seen from a folder; the whole path where it is on another drive.

    Args:
        folder: where it really lies: a link in its path would lead ``..`` elsewhere.
    """
    try:
        return Path(os.path.relpath(os.path.abspath(path), folder)).as_posix()
    except ValueError:
        return path.absolute().as_posix()
