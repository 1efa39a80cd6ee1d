"""``nanomolmo2 find``: an example in a photo, and everything like it in that one or in many."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from nanomolmo2.cli.find_overlays import Overlays, is_overlay
from nanomolmo2.cli.find_search import Asked, Search
from nanomolmo2.cli.find_table import Table
from nanomolmo2.cli.loading import files_of, load_pipeline, precision
from nanomolmo2.cli.options import (
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    ModelName,
    Precision,
    UsageError,
)
from nanomolmo2.cli.output import check_writable

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".jp2", ".pgm", ".ppm", ".heic", ".heif"),
)  # of the photos in a folder; of those that cannot be read it is said
# Enough for the reference, which is not to be encoded again for each photo. What is kept changes no
# number: every photo is encoded by itself.
REUSE_BYTES = 1 << 28
_PLACE = re.compile(r"(-?\d{1,9}(?:\.\d{1,9})?),(-?\d{1,9}(?:\.\d{1,9})?)")


@dataclass(frozen=True, kw_only=True)
class Find:
    """Find everything like an example, and count it: in one photo, or in many.

    In one photo the examples lie in it. In several photos, or the photos of a folder, they lie in
    one reference photo, --in. The things need no name. A count is printed for each photo, and of
    one photo the points; --csv writes a table of all points, and a call that was interrupted goes
    on behind what stands there.
    """

    photos: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="PHOTO...",
            help="photo files (JPEG, PNG, WebP, GIF, BMP, TIFF), or folders of such, whose photos "
            "are taken in the order of their names; hidden files, folders in them and overlays of "
            "this command are left out",
            help_behavior_hint="(required)",
        ),
    ]
    at: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="X,Y",
            help="a place on a thing that is meant, in pixels from the top-left corner; several "
            "examples: --at X,Y --at X,Y (up to 3 were learned)",
        ),
    ] = ()
    unlike: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            name="not",
            metavar="X,Y",
            help="a place on a thing that is not meant, in the same photo (up to 2 were learned)",
        ),
    ] = ()
    reference: Annotated[
        Path | None,
        arg(
            name="in",
            metavar="REFERENCE",
            help="the photo in which the examples lie; none = the one PHOTO itself",
        ),
    ] = None
    draw: Annotated[
        bool,
        arg(
            help="write each photo with its points as NAME-found.jpg (.png, .webp), and of several "
            "photos a contact sheet, contact-sheet-found.jpg"
        ),
    ] = False
    out: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="with --draw: folder to write to, which is made; none = beside the photos",
        ),
    ] = None
    json: Annotated[
        bool,
        arg(
            help="print one JSON object instead, of several photos one a line: photo, count, "
            "points (pixels, confidence, size), problems, and what `ask --json` prints"
        ),
    ] = False
    csv: Annotated[
        Path | None,
        arg(
            metavar="FILE.csv",
            help="write a table, a line a point; where it holds photos of the same call already, "
            "go on behind them",
        ),
    ] = None
    min_confidence: Annotated[
        float,
        arg(
            metavar="P",
            help="leave out what is less likely meant, 0 to 1: lower finds more, and more that is "
            "wrong",
        ),
    ] = 0.5
    max_crops: Annotated[
        int | None,
        arg(
            metavar="N",
            help="one look at a photo, with so many detail crops at most: more find smaller "
            "things, and take longer; none = three looks, as large as the photo is, smaller and "
            "larger",
        ),
        AtLeast(1),
    ] = None
    model: ModelName = "tiny"
    device: DeviceName = None
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        like = [read_place(text, "--at") for text in self.at]
        unlike = [read_place(text, "--not") for text in self.unlike]
        self._check_options()
        photos = photos_of(self.photos)
        several = len(photos) > 1 or any(os.path.isdir(name) for name in self.photos)
        if several and self.reference is None:
            raise UsageError(
                f"found {len(photos)} photo{'s' * (len(photos) > 1)} and no reference: say in "
                f"which photo the examples lie, --in PHOTO"
            )
        self._check_places(self.reference or photos[0], [*like, *unlike])
        overlays = self._overlays(photos, several)
        table = self._table(photos)
        pipeline = load_pipeline(
            self.model,
            self.cache_dir,
            reuse_bytes=REUSE_BYTES,
            **precision(self.dtype, self.quantize, self.device),
        )
        asked = Asked(self.model, like, unlike, self.reference, self.max_crops, self.min_confidence)
        Search(pipeline, asked, photos, overlays, table, several, self.json).run()

    def _check_options(self) -> None:
        if not self.photos:
            raise UsageError(
                "expected a photo and a place in it, as in: nanomolmo2 find pills.jpg --at 120,80"
            )
        if not self.at:
            raise UsageError(
                "expected at least one example, --at X,Y: a place on one of the things, in pixels"
            )
        if not 0 <= self.min_confidence <= 1:
            raise UsageError(f"--min-confidence must be 0 to 1, found {self.min_confidence}")
        if self.out is not None and not self.draw:
            raise UsageError("--out is where overlays go: give --draw too, or leave it out")

    def _check_places(self, path: Path, places: Sequence[tuple[float, float]]) -> None:
        """Raises: UsageError for a place outside of the photo of the examples."""
        from nanomolmo2.processor import load_image

        width, height = load_image(path).size
        texts = [*(f"--at {text}" for text in self.at), *(f"--not {t}" for t in self.unlike)]
        for text, (x, y) in zip(texts, places, strict=True):
            if not (0 <= x <= width and 0 <= y <= height):
                raise UsageError(
                    f"{text} lies outside of {path}, which is {width} x {height} pixels: examples "
                    f"are places {'in the reference' if self.reference else 'in the photo'}, in "
                    f"pixels from its top-left corner"
                )

    def _inputs(self, photos: Sequence[Path]) -> list[Path]:
        reference = [] if self.reference is None else [self.reference]
        return [*photos, *reference, *files_of(self.model)]

    def _overlays(self, photos: Sequence[Path], several: bool) -> Overlays | None:
        if not self.draw:
            return None
        return Overlays(photos, self.out, self._inputs(photos), with_sheet=several)

    def _table(self, photos: Sequence[Path]) -> Table | None:
        if self.csv is None:
            return None
        check_writable(self.csv, (".csv",), self._inputs(photos))
        return Table(self.csv)


def read_place(text: str, option: str) -> tuple[float, float]:
    """Raises: UsageError for anything but ``120,80``."""
    found = _PLACE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise UsageError(f"{option} is {text!r}, expected X,Y in pixels such as 120,80")
    return float(found[1]), float(found[2])


def photos_of(names: Sequence[str]) -> list[Path]:
    """The photos that are named, and those of folders in the order of their names; each once.

    Raises: UsageError for an empty name, ValueError for a folder without photos.
    """
    from nanomolmo2.processor.inputs import local_path

    found: dict[Path, None] = {}
    for name in names:
        if not name.strip():
            raise UsageError("the name of a photo is empty: leave it out, or name a file")
        path = local_path(name, "picture")
        if not path.is_dir():
            found.setdefault(path)
            continue
        inside = sorted(filter(_is_photo, path.iterdir()), key=lambda one: one.name)
        if not inside:
            raise ValueError(
                f"{path} holds no photos (files that end with {', '.join(SUFFIXES)}): name another "
                f"folder, or the files"
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def _is_photo(path: Path) -> bool:
    name = path.name.lower()
    is_ours = is_overlay(name)
    return name.endswith(SUFFIXES) and not name.startswith(".") and not is_ours and path.is_file()
