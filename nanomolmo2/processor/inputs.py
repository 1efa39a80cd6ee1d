"""What people name as a picture or a video -> an open file and its beginning, which says its kind.

Paths, ``file:`` addresses, bytes and open files come out as one thing. Only regular files are
opened, nothing is downloaded, and no decoder gets a name: FFmpeg would take ``v%d.png`` for many
files and ``concat:a|b`` for two.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.request import url2pathname

from nanomolmo2.files import open_regular

HEAD_BYTES = 4096
MAX_STREAM_BYTES = 1 << 30  # of what cannot be wound back and so is kept in memory

_ADDRESS = re.compile(r"(https?|ftp|data|s3|gs|hf|rtsp|rtmp):", re.IGNORECASE)
_FILE_ADDRESS = re.compile(r"file:(?://([^/]*))?(/.*)?", re.IGNORECASE | re.DOTALL)


class BinaryFile(Protocol):
    """What `open(path, "rb")` and `io.BytesIO` give."""

    def read(self, size: int = ..., /) -> bytes: ...
    def seek(self, place: int, whence: int = ..., /) -> int: ...
    def tell(self) -> int: ...


class Unnamed:
    """A file as decoders get it: it has no name, and they cannot close it.

    With its number (``fileno``) a decoder may read past Python's buffer: only of our own files.
    """

    def __init__(self, stream: Any, *, has_number: bool) -> None:
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell
        if has_number:
            self.fileno = stream.fileno

    @staticmethod
    def seekable() -> bool:
        return True


class Input(NamedTuple):
    """An open file at its beginning."""

    name: str  # for messages
    stream: Any  # read, seek and tell
    size: int  # bytes
    head: bytes  # the first HEAD_BYTES


@contextlib.contextmanager
def open_input(source: Any, kind: str) -> Iterator[Input]:
    """Open a path, a ``file:`` address, the bytes of a file, or take an open binary file.

    An open file is read from its beginning and gets its place back; it is not closed. One that
    cannot be wound back (a pipe, a response) is read from where it stands, to its end.

    Args:
        kind: ``picture`` or ``video``, for messages.
    Raises: FileNotFoundError if there is no such file; ValueError, in one line, for addresses,
        folders, devices, and what cannot be read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield _input("the given bytes", io.BytesIO(source))
    elif isinstance(source, (str, os.PathLike)):
        path = local_path(source, kind)
        with _open_path(path, kind) as stream:
            yield _input(str(path), stream, has_number=True)
    elif is_file(source):
        with _rewound(source) as stream:
            yield _input("the given file", stream)
    else:
        raise ValueError(f"cannot read a {kind} from {type(source).__name__}")


def is_file(source: Any) -> bool:
    """Whether this is an open file, or something that is read like one."""
    return callable(getattr(source, "read", None))


def local_path(source: str | os.PathLike[str], kind: str) -> Path:
    """The path that a person wrote: ``~`` and ``file:`` addresses are understood.

    Raises: ValueError for an empty name, and for addresses of other computers.
    """
    text = os.fspath(source)
    if not text or (isinstance(source, str) and not text.strip()):
        raise ValueError(f"found an empty name, expected the path of a {kind}: name a file")
    if isinstance(source, str) and _ADDRESS.match(text):
        raise ValueError(
            f"found the address {text[:60]!r}: nothing is downloaded here; give a local file"
        )
    if address := _FILE_ADDRESS.fullmatch(text):
        host, path = address.groups()
        if not path or (host or "").lower() not in ("", "localhost"):
            raise ValueError(
                f"found the address {text[:60]!r}, expected a file of this computer with its whole "
                f"path: file:///folder/name"
            )
        text = url2pathname(path)
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def _open_path(path: Path, kind: str) -> Iterator[Any]:
    try:
        if path.is_dir():
            inside = " in it" if kind == "picture" else ", or its frames as (frames, times)"
            raise ValueError(f"{path} is a folder: give the path of one {kind}{inside}")
        stream = open_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}: check the path of the {kind}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        if " is a folder: " in str(error):
            raise
        raise ValueError(f"{path} is not a regular file: give the path of a {kind}") from None
    with stream:
        yield stream


@contextlib.contextmanager
def _rewound(stream: Any) -> Iterator[Any]:
    """A person's open file, at its beginning; its place comes back at the end."""
    try:
        place = stream.tell() if getattr(stream, "seekable", lambda: True)() else None
    except (OSError, AttributeError):
        place = None
    except ValueError as error:
        raise ValueError(f"the given file cannot be read ({error}): open it again") from None
    if isinstance(stream.read(0), str):
        raise ValueError("the given file was opened as text: open it with mode 'rb'")
    if place is None:
        data = stream.read(MAX_STREAM_BYTES + 1)
        if len(data) > MAX_STREAM_BYTES:
            raise ValueError(
                f"the given file has more than {MAX_STREAM_BYTES:,} bytes and cannot be wound "
                f"back: save it, and give its path"
            )
        yield io.BytesIO(data)
        return
    try:
        yield stream
    finally:
        stream.seek(place)


def _input(name: str, stream: Any, *, has_number: bool = False) -> Input:
    try:
        size = stream.seek(0, os.SEEK_END)
        size = stream.tell() if size is None else size
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror or error})") from None
    return Input(name, Unnamed(stream, has_number=has_number), size, head)


# ---- kinds, by the first bytes ----


def is_video_file(path: str | os.PathLike[str] | bytes) -> bool:
    """Whether a file (or its bytes) begins like a video, whatever its name; False if it cannot be
    opened.
    """
    try:
        with open_input(path, "video") as file:
            return video_container(file.head) is not None
    except (OSError, ValueError):
        return False


class Container(NamedTuple):
    """A kind of file that holds videos (or only sound)."""

    name: str
    demuxer: str  # FFmpeg's name


_CONTAINERS = {
    b"\x1aE\xdf\xa3": Container("Matroska or WebM", "matroska"),
    b"\x00\x00\x01\xba": Container("MPEG", "mpeg"),
    b"\x00\x00\x01\xb3": Container("MPEG", "mpegvideo"),
    b"0&\xb2u\x8ef\xcf\x11": Container("WMV", "asf"),
    b"FLV\x01": Container("FLV", "flv"),
    b"OggS": Container("Ogg", "ogg"),
    b"\x06\x0e+4\x02\x05\x01\x01": Container("MXF", "mxf"),
    b".RMF": Container("RealMedia", "rm"),
    b"nut/multimedia container\x00": Container("NUT", "nut"),
    b"DKIF": Container("IVF", "ivf"),
    b"YUV4MPEG2 ": Container("YUV4MPEG", "yuv4mpegpipe"),
    b"\xb7\xd8\x00 7I\xda\x11\xa6N\x00\x07\xe9^\xad\x8d": Container("WTV", "wtv"),
    b"\x1f\x07\x00": Container("DV", "dv"),
}
_MP4 = Container("MP4 or MOV", "mov")
_AVI = Container("AVI", "avi")
_MPEG_TS = Container("MPEG transport stream", "mpegts")
_MP4_BOXES = {b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof", b"sidx", b"styp"}
# What cameras and phones call pictures that lie in the boxes of MP4.
_PICTURE_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")


def video_container(head: bytes) -> Container | None:
    """The container that a file begins like, if it is one that holds videos."""
    box = head[4:8]
    if box in _MP4_BOXES or (box == b"ftyp" and head[8:12] not in _PICTURE_BRANDS):
        return _MP4
    if head[:4] == b"RIFF":
        return _AVI if head[8:12] in (b"AVI ", b"AVIX") else None
    if _has_packets(head):
        return _MPEG_TS
    return next((found for sign, found in _CONTAINERS.items() if head.startswith(sign)), None)


def _has_packets(head: bytes) -> bool:
    """Packets that each begin with the letter G; cameras put four bytes of time before it. What
    was cut out of a stream may begin within a packet."""
    for packet in (188, 192, 204):
        for start in range(packet):
            marks = head[start::packet][:8]
            if marks == b"G" * (8 if start not in (0, 4) else max(2, len(marks))):
                return True
    return False


_SIGNATURES = (
    (b"\xff\xd8\xff", "a damaged JPEG file"),
    (b"\x89PNG\r\n\x1a\n", "a damaged PNG file"),
    (b"GIF8", "a damaged GIF file"),
    (b"BM", "a damaged BMP file"),
    (b"II*\x00", "a damaged TIFF file"),
    (b"MM\x00*", "a damaged TIFF file"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
)


def guess(head: bytes) -> str:
    """What a file that cannot be read seems to be. Nothing of its content is told: in data of
    others a path may lead to any file of the user."""
    for signature, found in _SIGNATURES:
        if head.startswith(signature):
            return found
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a damaged WebP file"
    if head[4:8] == b"ftyp" and re.fullmatch(rb"[\w ]{4}", head[8:12]):
        brand = head[8:12].decode("ascii")
        kind = "a HEIC picture" if head[8:12] in _PICTURE_BRANDS[:5] else "a video or picture"
        return f"{kind} of type {brand!r}"
    if container := video_container(head):
        return f"a video or sound ({container.name})"
    if b"<svg" in head:
        return "an SVG drawing"
    text = head.decode("utf-8", "ignore")
    written = "".join(c for c in text if c.isprintable() or c.isspace())
    if written and len(written.encode()) > 0.95 * len(head):
        return "text"
    return "unknown data"
