"""What headers say before anything is decoded: frames of animated images, how a video is turned.

GIF, WebP and animated PNG are walked through block by block, MP4 box by box. All of this only
reads; what is cut off or damaged ends the walk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Matrix = tuple[int, int, int, int]  # a, b, c, d: a pixel at (x, y) is shown at (ax + cy, bx + dy)

_MOST_BOXES = 10_000


class Animation(NamedTuple):
    """An animated image by its headers."""

    size: tuple[int, int]  # of its canvas, pixels
    durations: list[int]  # milliseconds of each frame; 0 where none is named


def read_animation(stream: Any, head: bytes, most: int) -> Animation:
    """Size and durations of a GIF, WebP or PNG; no durations if it is a still or not whole.

    Args:
        most: frames after which the walk ends.
    """
    walk: Callable[[Any], Iterator[tuple[int, int, int]]] = (
        _gif if head.startswith(b"GIF8") else _webp if head.startswith(b"RIFF") else _png
    )
    width = height = 0
    durations: list[int] = []
    stream.seek(0)
    try:
        for right, bottom, duration in walk(stream):
            width, height = max(width, right), max(height, bottom)
            if duration >= 0:  # the first item has only the size
                durations.append(duration)
            if len(durations) > most:
                break
    except (struct.error, IndexError):
        pass
    return Animation((width, height), durations)


def _gif(stream: Any) -> Iterator[tuple[int, int, int]]:
    header = stream.read(13)
    yield *struct.unpack_from("<HH", header, 6), -1
    if header[10] & 128:
        stream.read(3 << (header[10] & 7) + 1)
    duration = 0
    while sign := stream.read(1):
        if sign == b";":
            return
        if sign == b"!":
            kind = stream.read(1)
            block = _sub_block(stream)
            if kind == b"\xf9":
                duration = struct.unpack_from("<H", block, 1)[0] * 10
            while block:
                block = _sub_block(stream)
        elif sign == b",":
            left, top, width, height, flags = struct.unpack("<HHHHB", stream.read(9))
            if flags & 128:
                stream.read(3 << (flags & 7) + 1)
            stream.read(1)
            yield left + width, top + height, duration
            duration = 0
            while length := stream.read(1)[0]:
                stream.seek(length, os.SEEK_CUR)


def _sub_block(stream: Any) -> bytes:
    found: bytes = stream.read(stream.read(1)[0])
    return found


def _webp(stream: Any) -> Iterator[tuple[int, int, int]]:
    stream.seek(12)
    while len(header := stream.read(8)) == 8:
        kind, length = struct.unpack("<4sI", header)
        start = stream.tell()
        if kind == b"VP8X":
            body = stream.read(10)
            yield _three(body, 4) + 1, _three(body, 7) + 1, -1
        elif kind == b"ANMF":
            yield 0, 0, _three(stream.read(16), 12)
        stream.seek(start + length + length % 2)


def _three(data: bytes, place: int) -> int:
    return struct.unpack("<I", data[place : place + 3] + b"\0")[0]


def _png(stream: Any) -> Iterator[tuple[int, int, int]]:
    stream.seek(8)
    named = 0
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        start = stream.tell()
        if kind == b"IHDR":
            yield *struct.unpack(">II", stream.read(8)), -1
        elif kind == b"acTL":
            named = struct.unpack(">I", stream.read(4))[0]
        elif kind == b"fcTL" and named > 0:
            named -= 1
            delay, unit = struct.unpack_from(">HH", stream.read(26), 20)
            yield 0, 0, round(1000 * delay / (unit or 100))
        stream.seek(start + length + 4)


# ---- MP4 ----


def mp4_matrix(stream: Any) -> Matrix | None:
    """How the video of an MP4 or MOV is turned and mirrored; None where it is not said."""
    stream.seek(0, os.SEEK_END)
    end = stream.tell()
    try:
        for kind, start, stop in _boxes(stream, 0, end):
            if kind == b"moov":
                return _matrix_of_video(stream, start, stop)
    except (struct.error, IndexError):
        pass
    return None


def _matrix_of_video(stream: Any, start: int, stop: int) -> Matrix | None:
    for kind, track, track_end in _boxes(stream, start, stop):
        matrix = None
        for inner, body, body_end in _boxes(stream, track, track_end) if kind == b"trak" else ():
            if inner == b"tkhd":
                stream.seek(body)
                header = stream.read(96)
                # Version 1 has longer times before.
                a, b, _, c, d = struct.unpack_from(">5i", header, 52 if header[0] else 40)
                matrix = a, b, c, d
            elif inner == b"mdia" and matrix is not None:
                for name, handler, _ in _boxes(stream, body, body_end):
                    stream.seek(handler + 8)
                    if name == b"hdlr" and stream.read(4) == b"vide":
                        return matrix
    return None


def _boxes(stream: Any, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin and end of the body) of the boxes that lie side by side in a range."""
    for _ in range(_MOST_BOXES):
        if start + 8 > stop:
            return
        stream.seek(start)
        length, kind = struct.unpack(">I4s", stream.read(8))
        body = start + 8
        if length == 1:
            length = struct.unpack(">Q", stream.read(8))[0]
            body += 8
        end = stop if length == 0 else start + length
        if not body <= end <= stop:
            return
        yield kind, body, end
        start = end
