"""The pictures of ``nanomolmo2 find --draw``: photos with their points, and a sheet of them all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanomolmo2.checks import save_image
from nanomolmo2.cli.find_table import Found
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import IMAGE_SUFFIXES, check_writable

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET = "contact-sheet-found.jpg"
_OURS = re.compile(rf".+-found(-\d+)?({'|'.join(map(re.escape, IMAGE_SUFFIXES))})", re.IGNORECASE)
_QUALITY, _JPEG = 92, (".jpg", ".jpeg")


def is_overlay(name: str) -> bool:
    """Whether a file is called as those that are written here."""
    return _OURS.fullmatch(name) is not None


def overlay_paths(photos: Sequence[Path], out: Path | None) -> list[Path]:
    """Where each photo with its points goes: ``NAME-found.jpg``, each to a place of its own.

    Args:
        out: the folder; None: beside the photos.
    """
    taken: set[Path] = set()
    paths = []
    for photo in photos:
        suffix = photo.suffix if photo.suffix.lower() in IMAGE_SUFFIXES else ".png"
        folder = photo.parent if out is None else out
        path, number = folder / f"{photo.stem}-found{suffix}", 1
        while path in taken or path.name == SHEET:
            number += 1
            path = folder / f"{photo.stem}-found-{number}{suffix}"
        taken.add(path)
        paths.append(path)
    return paths


class Overlays:
    """Draws what was found in one photo after the other, in their order."""

    def __init__(
        self,
        photos: Sequence[Path],
        out: Path | None,
        inputs: Iterable[str | os.PathLike[str]],
        *,
        with_sheet: bool,
    ) -> None:
        """
        Args:
            out: folder to write to, which is made; None: beside the photos.
            inputs: what is read; none of it may be replaced.
        Raises: UsageError where something cannot be written, or would be over an input.
        """
        self._paths = dict(zip(photos, overlay_paths(photos, out), strict=True))
        self._number = len(photos)
        folder = photos[0].parent if out is None else out
        self._sheet = folder / SHEET if with_sheet else None
        if out is not None:
            _make(out)
        targets = [*self._paths.values(), *([] if self._sheet is None else [self._sheet])]
        for one in {path.parent: path for path in targets}.values():
            check_writable(one)
        read = {_identity(path): path for path in inputs if os.path.exists(path)}
        for path in targets:
            if path.is_dir():
                raise UsageError(f"{path} is a folder, and an overlay would be called so")
            if path.exists() and (given := read.get(_identity(path))) is not None:
                raise UsageError(
                    f"{path} would be written over {given}, which is read: name a folder with --out"
                )

    def begin(self) -> None:
        """Get the sheet ready; a large one takes memory, so this comes late."""
        if self._sheet is not None:
            from nanomolmo2.processor.contact_sheet import ContactSheet

            self._contacts = ContactSheet(self._number)

    def add(self, photo: Path, image: Image | None, found: Found) -> Path | None:
        """Write a photo with its points.

        Args:
            image: the photo, opened; None: it cannot be, so the sheet alone says it.
        Returns: where, if anywhere.
        """
        from nanomolmo2.processor import Point
        from nanomolmo2.processor.draw import draw_points

        drawn = None
        if image is not None and found.count is not None:
            points = [Point(mark.x, mark.y, id=i) for i, mark in enumerate(found.marks, start=1)]
            drawn = draw_points(image, points)
            path = self._paths[photo]
            options = {"quality": _QUALITY} if path.suffix.lower() in _JPEG else {}
            save_image(drawn, path, None, **options)
        if self._sheet is not None:
            said = "did not open" if found.count is None else str(found.count)
            self._contacts.add(drawn, photo.name, said)
        return None if drawn is None else self._paths[photo]

    def finish(self) -> Path | None:
        """Write the contact sheet. Returns: where; None of one photo."""
        if self._sheet is not None:
            save_image(self._contacts.image, self._sheet, quality=_QUALITY)
        return self._sheet


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}") from None


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
