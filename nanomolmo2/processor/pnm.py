"""PNM: pictures of plain numbers after a header of a few words (PBM, PGM, PPM).

Pillow reads each number by itself, which takes minutes for a large picture, and gives 16-bit gray
without its white value. Here a picture is read in bands, and white is what the file says it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"  # comments run to the end of their line
_HEADER = re.compile(
    rb"P([1-6])" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})", re.DOTALL
)  # then, but for 1 bit, the value of white; then one white space
_WHITE = re.compile(_SPACE + rb"(\d{1,5})")
_COMMENT = re.compile(rb"#[^\r\n]*")
_DIGITS = 10  # of one number
_BLOCK = 1 << 20  # bytes of text at once
_BAND = 1 << 20  # values at once
MAX_WRITTEN = 8_000_000  # numbers written as text: those take time


def is_pnm(head: bytes) -> bool:
    return re.match(rb"P[1-6][\s#]", head) is not None


def read_pnm(
    stream: Any, head: bytes, check_size: Callable[[int, int, int], None]
) -> Image.Image | None:
    """Decode a file; None for the two common kinds (1 bit, and white 255), which Pillow reads.

    Args:
        head: the beginning of the file; holds all of its header.
        check_size: called with width, height and the most pixels that are read.
    Returns: RGB, ``value * 255 / white`` rounded half to even.
    Raises: ValueError for a header or data that are not as they should be.
    """
    header = _HEADER.match(head)
    kind = int(header[1]) if header else 0
    has_white = kind not in (1, 4)
    white = _WHITE.match(head, header.end()) if header and has_white else header
    if header is None or white is None:
        raise ValueError("its header is not complete")
    width, height = int(header[2]), int(header[3])
    most = int(white[1]) if has_white else 1
    if not 0 < most < 65536:
        raise ValueError(f"its white is {most}, expected 1 to 65535")
    channels = 3 if kind in (3, 6) else 1
    is_text = kind <= 3
    check_size(width, height, MAX_WRITTEN // channels if is_text and kind != 1 else 1 << 62)
    if kind == 4 or (not is_text and most == 255):
        return None
    stream.seek(white.end() + 1)
    if is_text:
        values = _written(stream, is_bits=kind == 1)
    else:
        values = _stored(stream, np.dtype(np.uint8 if most < 256 else ">u2"))
    table = np.rint(np.arange(most + 1) / most * 255).astype(np.uint8)
    if kind == 1:
        table = table[::-1]  # in a bitmap 1 is black
    image = Image.new("RGB", (width, height))
    rows = max(1, _BAND // max(1, width * channels))
    for top in range(0, height, rows):
        count = min(rows, height - top)
        band = table[np.minimum(_take(values, count * width * channels), most)]
        shape = (count, width, 3) if channels == 3 else (count, width)
        image.paste(Image.fromarray(band.reshape(shape)).convert("RGB"), (0, top))
    return image


Reader = Callable[[int], NDArray[Any]]  # gives at most so many of the next values


def _take(values: Reader, count: int) -> NDArray[Any]:
    found = values(count)
    if len(found) < count:
        raise ValueError("it ends before its last pixel")
    return found


def _stored(stream: Any, dtype: np.dtype[Any]) -> Reader:
    return lambda count: np.frombuffer(
        _whole(stream.read(count * dtype.itemsize), dtype.itemsize), dtype
    )


def _whole(data: bytes, size: int) -> bytes:
    return data[: len(data) // size * size]


def _written(stream: Any, *, is_bits: bool) -> Reader:
    blocks = _text_blocks(stream, is_bits)
    rest: NDArray[Any] = np.empty(0, dtype=np.int64)

    def values(count: int) -> NDArray[Any]:
        nonlocal rest
        parts = [rest]
        have = len(rest)
        while have < count and (block := next(blocks, None)) is not None:
            parts.append(_bits(block) if is_bits else _numbers(block))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        rest = joined[count:]
        return joined[:count]

    return values


def _text_blocks(stream: Any, is_bits: bool) -> Iterator[bytes]:
    """The text without its comments, cut between words; each bit is a word."""
    rest = b""
    while block := stream.read(_BLOCK):
        lines = rest + block
        # A comment, like a number, may go on in the next block.
        cut = max(lines.rfind(b"\n"), lines.rfind(b"\r")) + 1
        if b"#" not in lines[cut:]:
            last = len(lines) if is_bits else max(lines.rfind(space) + 1 for space in (b" ", b"\t"))
            cut = max(cut, last)
        if cut == 0 and len(lines) > 8 * _BLOCK:
            raise ValueError("it has a line without an end")
        rest = lines[cut:]
        yield _COMMENT.sub(b" ", lines[:cut])
    yield _COMMENT.sub(b" ", rest)


def _bits(text: bytes) -> NDArray[Any]:
    bits = np.frombuffer(b"".join(text.split()), np.uint8) - 48
    if len(bits) and bits.max() > 1:
        raise ValueError("it holds something that is not 0 or 1")
    return bits


def _numbers(text: bytes) -> NDArray[Any]:
    words = text.split()
    # One long word would make all of an array that long.
    if not all(word.isdigit() for word in words) or max(map(len, words), default=0) > _DIGITS:
        raise ValueError("it holds something that is not a number from 0 to white")
    return np.array(words, dtype=f"S{_DIGITS}").astype(np.int64)
