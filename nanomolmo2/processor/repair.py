"""A picture without the notes beside its pixels, for files whose notes a decoder chokes on.

A colour profile, a comment or a checksum that is too long or damaged does not make the pixels
worse. What is taken out is only what no pixel depends on; the note of how to turn the picture stays
if it is whole. Files are copied chunk by chunk, nothing is decoded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 1 << 28  # of a file that is tried again
_MAX_TEXT = 1 << 20  # what Pillow unpacks at most


def without_notes(stream: Any, head: bytes, size: int, *, frames: bool = False) -> bytes | None:
    """The same picture without its notes; None where there is nothing to take out.

    Args:
        size: bytes of the file.
        frames: keep the frames of an animated PNG; otherwise only its still.
    """
    if size > MAX_BYTES:
        return None
    kinds = {b"\x89PNG": _png, b"\xff\xd8\xff": _jpeg, b"RIFF": _webp, b"II*\0": _tiff}
    kinds[b"MM\0*"] = _tiff
    for sign, take_out in kinds.items():
        if head.startswith(sign):
            stream.seek(0)
            data = stream.read()
            try:
                kept = take_out(data, frames)
            except (struct.error, IndexError):  # cut off
                return None
            return None if kept == data else kept
    return None


# ---- PNG ----


def _png(data: bytes, frames: bool) -> bytes:
    kept = [data[:8]]
    place = 8
    colour = data[25]
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        place += len(chunk)
        body = memoryview(chunk)[8 : 8 + length]
        is_whole = len(chunk) == 12 + length and chunk[-4:] == struct.pack(
            ">I", zlib.crc32(body, zlib.crc32(kind))
        )
        needed = (
            not kind[0] & 32  # an upper case letter first: pixels depend on it
            or (kind == b"tRNS" and is_whole and length >= {0: 2, 2: 6}.get(colour, 0))
            or (kind == b"eXIf" and is_whole)
            or (frames and kind in (b"acTL", b"fcTL", b"fdAT"))
            or (is_whole and _tells_turn(kind, bytes(body[:_MAX_TEXT])))
        )
        if needed:
            kept.append(chunk)
    return b"".join(kept)


def _tells_turn(kind: bytes, body: bytes) -> bool:
    """Whether a text may say how the picture is turned, and is of a usual size."""
    name, _, text = body.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or len(body) == _MAX_TEXT:
        return False
    if name not in (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp"):
        return False
    if kind == b"zTXt" and text[:1] == b"\0":
        packed = text[1:]
    elif kind == b"iTXt" and text[:2] == b"\1\0":
        packed = text[2:].split(b"\0", 2)[-1]
    else:
        return kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0")
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(packed, _MAX_TEXT)
    except zlib.error:
        return False
    return not unpack.unconsumed_tail


# ---- JPEG ----


def _jpeg(data: bytes, frames: bool) -> bytes:
    kept = [data[:2]]
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF or data[place + 1] == 0xFF:  # junk, or a fill byte
            place += 1
            continue
        marker, length = data[place + 1], struct.unpack_from(">H", data, place + 2)[0]
        if marker in (0x00, 0x01, *range(0xD0, 0xD9)):  # these stand alone
            place += 2
            continue
        if marker == 0xDA:  # pixels begin
            return b"".join([*kept, data[place:]])
        segment = data[place : place + 2 + length]
        is_note = 0xE0 <= marker <= 0xEF or marker == 0xFE
        needed = (
            not is_note
            or (segment[4:8] == b"JFIF" and length >= 14)
            or (marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14)
            or (marker == 0xE1 and segment[4:10] == b"Exif\0\0")
        )
        if needed:
            kept.append(segment)
        place += 2 + length
    return data


# ---- WebP ----

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def _webp(data: bytes, frames: bool) -> bytes:
    chunks = []
    has_turn = False
    for kind, place, length in riff_chunks(data):
        chunk = data[place - 8 : place + length + length % 2]
        is_whole = place + length <= len(data)
        if kind == b"EXIF" and is_whole:
            has_turn = True
        elif kind not in _WEBP_PIXELS:
            continue
        chunks.append(chunk + b"\0" * (is_whole and len(chunk) % 2))
    if chunks and chunks[0][:4] == b"VP8X":
        flags = chunks[0][8] & ~0x2C | (0x08 if has_turn else 0)  # profile, EXIF, XMP
        chunks[0] = chunks[0][:8] + bytes([flags]) + chunks[0][9:]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff_chunks(data: bytes, start: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """(kind, place of the body, its length) of the chunks of a RIFF file."""
    place = start
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        yield kind, place + 8, length
        place += 8 + length + length % 2


# ---- TIFF ----

# Size, bits, compression, colours, strips, tiles, tables of compression, alpha, sample format.
_TIFF_PIXELS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320}
_TIFF_PIXELS |= {322, 323, 324, 325, 332, 338, 339, 340, 341, 347, 529, 530, 531, 532}


def _tiff(data: bytes, frames: bool) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    place = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, place)[0]
    entries = [data[place + 2 + 12 * i : place + 14 + 12 * i] for i in range(count)]
    kept = [e for e in entries if struct.unpack_from(order + "H", e)[0] in _TIFF_PIXELS]
    # A directory of its own at the end; no further pictures follow it.
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + b"\0\0\0\0"
    padding = b"\0" * (len(data) % 2)
    begin = struct.pack(order + "I", len(data) + len(padding))
    return b"".join([data[:4], begin, data[8:], padding, directory])
