"""One record of a data set: its fields, and the pictures and videos that it names.

Images are decoded here, so a broken one shows here and nowhere later. Each is decoded once, however
often a record names it.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image

from nanomolmo2.data.example import BadExample, brief
from nanomolmo2.files import open_regular, read_regular
from nanomolmo2.processor.image import MAX_PIXELS, load_image
from nanomolmo2.processor.inputs import local_path
from nanomolmo2.processor.points import Size
from nanomolmo2.processor.video import Video, load_video

Prompts = Literal["natural", "styles"]
PointsScale = Literal["pixels", "unit", "percent", "thousandths"]
Confined = Literal["no", "folder", "itself"]
ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")  # of the image of an address
MAX_RECORD_PIXELS = 2**28  # of all pictures of a record; as RGB 0.8 GB
MAX_FILE = 2**30  # bytes of a picture whose checksum is looked at


@dataclass(frozen=True)
class Record:
    """One record and how it is to be read.

    Attributes:
        values: its fields.
        where: file and place, for messages.
        folder: what its paths are relative to; images of addresses lie here too.
        rng: for whatever is drawn, such as the wording of a question; always the same for a record.
        prompts: how captions and points are asked for, where the data set has no questions.
        separate_turns: every turn is a branch of its own.
        points_scale: of points in pixels, unless the record says another.
        needs_answer: what has no answer cannot be learned from; it may be asked, where its truth is
            known.
        needs_truth: False: it may be asked whatever is known of its answer.
        confined: "no" lets it name any file; "folder" only what lies in ``folder``; "itself" none:
            records of an archive, or of the hub, are no business of the files around.
        notes: (cause, detail) of what may be a mistake.
        outside: files it named that lie outside of ``folder``.
    """

    values: Mapping[str, Any]
    where: str
    folder: Path
    rng: np.random.Generator
    prompts: Prompts = "natural"
    separate_turns: bool = False
    points_scale: PointsScale = "pixels"
    confined: Confined = "no"
    needs_answer: bool = True
    needs_truth: bool = True
    notes: list[tuple[str, str]] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    _opened: dict[Any, Image.Image] = field(default_factory=dict)

    def bad(self, detail: str, cause: str = "bad record") -> NoReturn:
        raise BadExample(cause, f"{self.where}: {brief(detail)}") from None

    def lacks_answer(self, truth: Mapping[str, Any] | None) -> bool:
        """Whether a question without an answer in words is of no use, given its truth."""
        return self.needs_truth and (self.needs_answer or not truth)

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field of the right type; ``default`` where there is none."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            self.bad(f"the field {name!r} is {short(value)}, of the type {type(value).__name__}")
        return value

    # ---- images ----

    def image(self, source: Any, sha256: str | None = None) -> Image.Image:
        """Open an image given as path, address, bytes, PIL image or ``{"bytes", "path"}``.

        Args:
            sha256: checksum of the file, where the data set has one: images behind addresses
                change, and points of another image teach nothing.
        """
        source = self.find(source, sha256)
        key = _identity(source)
        if key not in self._opened or sha256 is not None:
            self._opened[key] = self._load(source, sha256)
        return self._opened[key]

    def find(self, source: Any, sha256: str | None = None) -> object:
        """Where an image lies that a record names: a path, its bytes, or what `image` takes."""
        if isinstance(source, Mapping):
            given, source = source, source.get("bytes") or source.get("path")
            if source is None:
                self.bad(f"found {short(given)} in place of a picture, expected its path")
        if isinstance(source, str):
            if not source.strip():
                self.bad(
                    "the name of its picture is empty: give a path, or leave the field out where "
                    "there is none",
                    "broken picture",
                )
            return self._find(source, sha256)
        if not isinstance(source, (bytes, Image.Image)):
            self.bad(f"found {short(source)} in place of a picture")
        return source

    def _load(self, source: Any, sha256: str | None) -> Image.Image:
        used = sum(image.width * image.height for image in self._opened.values())
        left = MAX_RECORD_PIXELS - used
        try:
            if sha256 is not None and not isinstance(source, Image.Image):
                source = read_regular(source, MAX_FILE) if isinstance(source, Path) else source
                if hashlib.sha256(source).hexdigest() != sha256.lower():
                    self.bad(f"the picture is not the one of checksum {sha256}", "changed picture")
            return load_image(source, max_pixels=min(MAX_PIXELS, left))
        except FileNotFoundError:
            self.bad(f"there is no {source}", "missing picture")
        except (ValueError, OSError) as error:
            more = f"; its pictures may have {MAX_RECORD_PIXELS:,} pixels together"
            self.bad(f"{error}{more if left < MAX_PIXELS else ''}", "broken picture")

    def _find(self, name: str, sha256: str | None) -> Path | str:
        """Where a picture lies; data URLs as they are."""
        if name.startswith("data:"):
            return name
        if not re.match(r"https?://", name):
            return self._path(name)
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            self.bad(f"image_sha256 is {short(sha256)}, expected 64 hexadecimal digits")
        for stem in filter(None, (sha256, address_key(name))):
            for ending in ENDINGS:
                if (path := self.folder / (stem + ending)).is_file():
                    return path
        self.bad(
            f"{short(name)} is an address, from which nothing is downloaded here: save its "
            f"picture as {self.folder / address_key(name)}.jpg (SHA-256 of the address)",
            "missing picture",
        )

    def _path(self, name: str) -> Path:
        """Where a file lies that the record names."""
        if self.confined == "itself":
            self.bad(
                f"it names the file {short(name)}, but records of an archive or the hub use only "
                f"what they hold: unpack the archive, or give image_folder"
            )
        try:
            path = self.folder / (local_path(name, "file") if name.startswith("file:") else name)
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))
        except (ValueError, OSError) as error:  # a zero byte in it, for instance
            self.bad(f"{short(name)} is no name of a file ({error})", "broken picture")
        if not inside and self.confined == "folder":
            self.bad(f"it names the file {short(name)}, which lies outside of {self.folder}")
        if not inside:
            self.outside.append(name)
        return path

    def images(self) -> list[Image.Image]:
        """Those of the field ``image`` (one or a list) or ``images``."""
        if self.values.get("image") is not None and self.values.get("images") is not None:
            self.bad("it has both 'image' and 'images'")
        one = self.values.get("image")
        sources = one if isinstance(one, list) else [one] if one is not None else None
        return [self.image(s) for s in (sources or self.get("images", list, []))]

    def video(self) -> Path | Video | None:
        """Path of the field ``video``, or ``{"frames": [images], "times": [seconds]}`` loaded."""
        source = self.values.get("video")
        if source is None:
            return None
        if isinstance(source, str):
            if not source.strip():
                self.bad("the name of its video is empty: give a path", "missing video")
            path = self._path(source)
            try:
                open_regular(path).close()
            except FileNotFoundError:
                self.bad(f"there is no {path}", "missing video")
            except (OSError, ValueError) as error:
                self.bad(f"its video cannot be read: {error}", "missing video")
            return path
        if not isinstance(source, Mapping) or not isinstance(source.get("frames"), list):
            self.bad(f"found {short(source)} in place of a video")
        images = [self.image(frame) for frame in source["frames"]]
        times: Any = source.get("times")
        try:
            if isinstance(times, (int, float)):  # frames a second
                return load_video((images, times), max_frames=max(1, len(images)))
            arrays = {id(image): np.asarray(image) for image in self._opened.values()}
            frames = tuple(arrays[id(image)] for image in images)
            return Video(frames, tuple(float(time) for time in times))
        except (ValueError, TypeError, OverflowError) as error:
            self.bad(f"the frames and times of the video do not go together: {error}")

    def video_size(self, video: Path | Video | None) -> Size | None:
        """(width, height) of a video, pixels; of a file, by its first frame."""
        if isinstance(video, Path):
            try:
                return load_video(video, max_frames=1).size
            except ValueError as error:
                self.bad(str(error), "not encodable")
        return video.size if video is not None else None


def _identity(source: Any) -> object:
    """The same for what gives the same picture."""
    if isinstance(source, Path):
        try:
            found = os.stat(source)
        except (OSError, ValueError):
            return source
        return found.st_dev, found.st_ino
    return id(source) if isinstance(source, Image.Image) else source


def address_key(address: str) -> str:
    """Name under which the image of an address is looked for: SHA-256 of the address, hex."""
    return hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()


def short(value: Any) -> str:
    """A value of a record for messages, not longer than a line."""
    return reprlib.repr(value)
