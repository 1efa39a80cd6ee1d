"""Ways to spoil bytes and JSON values, all of them drawn from the `random.Random` given."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

EXTREMES = (0, 1, 2, 127, 128, 255, 256, 13_000, 32_767, 32_768, 65_535, 65_536, 1 << 24)
EXTREMES += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
NUMBERS = (b"0", b"-1", b"1", b"7", b"13000", b"65536", b"178956970", b"2147483648", b"9" * 40)

# Names that a terminal, a shell, a decoder or a regular expression may take for something else.
ODD_NAMES = (
    *("v%d.png", "v%03d.mp4", "%s%s%n", "-i", "--help", "a b.png", "ä\u0301ö.jpg", "名前.png"),
    *("a\nb.png", "\x1b]0;title\x07.png", "\x1b[2J.gif", "\x9b31m.png", "\u202egpj.exe", "tab\t"),
    *("concat:a|b", "file:a.mp4", "pipe:0", "http:x.mp4", "data:image", "~root", "$HOME", "a*?["),
    *("subfile,,start,0,end,9,,:a", "'; rm -rf x", "a" * 200, "caf\udce9.png", "nul", "."),
)
ODD_NAMES = tuple(name for name in ODD_NAMES if name != ".")


def some_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes of a file; ``others`` are what it may be mixed with."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_BYTES)(rng, data, others)
    return data


def flip(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Turn single bits, more often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        if changed:
            changed[_place(rng, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _place(rng: random.Random, length: int) -> int:
    limit = rng.choice((64, 512, length, length))
    return rng.randrange(max(1, min(limit, length)))


def _cut(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = _place(rng, len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 4, 16, 300)) :]


def _repeat(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start, length = _place(rng, len(data) + 1), rng.choice((1, 4, 16, 300))
    piece = data[start : start + length] * rng.choice((1, 2, 50))
    return data[:start] + piece + data[start:]


def _number(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """An integer of 1 to 8 bytes becomes an extreme one."""
    size = rng.choice((1, 2, 2, 4, 4, 4, 8))
    value = rng.choice(EXTREMES) & ((1 << (8 * size)) - 1)
    start = _place(rng, len(data) + 1)
    if rng.random() < 0.5:
        start -= start % size
    packed = value.to_bytes(size, rng.choice(("little", "big")))
    return data[:start] + packed + data[start + size :]


def _digits(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found = list(re.finditer(rb"\d+", data[:4000]))
    if not found:
        return flip(rng, data)
    chosen = rng.choice(found)
    return data[: chosen.start()] + rng.choice(NUMBERS) + data[chosen.end() :]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data
    return data[: _place(rng, len(data) + 1)] + other[_place(rng, len(other) + 1) :]


def _join(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data + (rng.choice(others) if others else data)


def _head(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """It begins like a file of another kind."""
    other = rng.choice(others) if others else b"\x89PNG\r\n\x1a\n"
    length = rng.choice((4, 8, 12, 16, 64))
    return other[:length] + data[rng.choice((0, length)) :]


def _blank(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start, length = _place(rng, len(data) + 1), rng.choice((1, 4, 64, 1000))
    filling = rng.choice((b"\0", b"\xff", b"\x80", b"\n", b" "))
    return data[:start] + filling * length + data[start + length :]


def _noise(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start, length = _place(rng, len(data) + 1), rng.choice((4, 32, 200))
    return data[:start] + rng.randbytes(length) + data[start + length :]


_BYTES: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    *(flip, flip, flip, _number, _number, _number, _number),
    *(_cut, _drop, _repeat, _digits, _splice, _join, _head, _blank, _noise),
)


# ---- files of chunks ----

Chunk = tuple[bytes, bytes]  # kind, content


def read_chunks(data: bytes) -> tuple[bytes, list[Chunk]] | None:
    """(what comes first, chunks) of a PNG, RIFF or MP4 file; None for others."""
    if data.startswith(b"\x89PNG"):
        return data[:8], _walk(data, 8, kind_first=False, little=False, tail=4)
    if data.startswith(b"RIFF"):
        return data[:12], _walk(data, 12, kind_first=True, little=True, even=True)
    if data[4:8] in (b"ftyp", b"moov", b"styp", b"wide"):
        return b"", _walk(data, 0, kind_first=False, little=False, inside=8)
    return None


def write_chunks(first: bytes, chunks: Sequence[Chunk]) -> bytes:
    """With right lengths and checksums."""
    if first.startswith(b"\x89PNG"):
        return first + b"".join(
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
            for kind, content in chunks
        )
    if first.startswith(b"RIFF"):
        body = b"".join(
            kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
            for kind, content in chunks
        )
        return b"RIFF" + struct.pack("<I", len(body) + 4) + first[8:12] + body
    return b"".join(struct.pack(">I", len(c) + 8) + kind + c for kind, c in chunks)


def _walk(
    data: bytes,
    place: int,
    *,
    kind_first: bool,
    little: bool,
    tail: int = 0,
    inside: int = 0,
    even: bool = False,
) -> list[Chunk]:
    chunks = []
    while place + 8 <= len(data):
        words = data[place : place + 4], data[place + 4 : place + 8]
        kind, number = words if kind_first else (words[1], words[0])
        length = int.from_bytes(number, "little" if little else "big") - inside
        if length < 0:
            break
        chunks.append((kind, data[place + 8 : place + 8 + length]))
        place += 8 + length + tail + (length % 2 if even else 0)
    return chunks


def some_chunks(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change chunks so that lengths and checksums stay right; other files: `some_bytes`."""
    found = read_chunks(data)
    if found is None or not found[1]:
        return some_bytes(rng, data, others)
    first, chunks = found
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_chunks(rng, first, chunks, others)
    return write_chunks(first, chunks)


def _change_chunks(
    rng: random.Random, first: bytes, chunks: list[Chunk], others: Sequence[bytes]
) -> None:
    if not chunks:
        return
    place = rng.randrange(len(chunks))
    kind, content = chunks[place]
    what = rng.randrange(7)
    if what == 0:
        del chunks[place]
    elif what == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, content))
    elif what == 2:
        rng.shuffle(chunks)
    elif what == 3:
        chunks[place] = rng.choice(chunks)[0], content
    elif what == 4 and (other := read_chunks(rng.choice(others))):
        if other[1]:
            chunks.insert(place, rng.choice(other[1]))
    elif kind in CONTAINERS and rng.random() < 0.9:
        inner = _walk(content, 0, kind_first=False, little=False, inside=8)
        _change_chunks(rng, b"", inner, others)
        chunks[place] = kind, write_chunks(b"", inner)
    else:
        chunks[place] = kind, some_bytes(rng, content, [c for _, c in chunks])


CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"dinf")


# ---- JSON ----


def hostile_values(rng: random.Random) -> Any:
    """A value that a field does not expect."""
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice((None, True, False, [], {}, "", " ", [[]], {"": None}, [None], "\0"))
    if kind == 1:
        return rng.choice((0, -1, 1, 2, 3, 1 << 31, 1 << 63, 10**9, 10**30, -(10**400), 10**4000))
    if kind == 2:
        return rng.choice((0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")))
    if kind == 3:
        return rng.choice(("a", "0", "1e5", "null", "\ud800", "\x1b[2J", "\x1b]52;c;YQ==\x07"))
    if kind == 4:
        return rng.choice(ODD_NAMES)
    if kind == 5:
        return rng.choice(("x", "ab ", "<image>", "\n", "é", "[", "0")) * rng.choice((300, 20_000))
    if kind == 6:
        return [hostile_values(rng) for _ in range(rng.choice((1, 2, 5)))]
    if kind == 7:
        return {rng.choice(("type", "text", "x", "a")): hostile_values(rng)}
    if kind == 8:
        value: Any = "deep"
        for _ in range(rng.choice((5, 60, 150))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if kind == 9:
        return [rng.choice((0, 1.5, "a", None, [1]))] * rng.choice((3, 1000))
    if kind == 10:
        return "".join(chr(rng.choice((rng.randrange(128), 0x3000, 0x1F600))) for _ in range(30))
    return rng.randrange(-(10**6), 10**6)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value within."""
    found = []
    todo = [value]
    while todo:
        container = todo.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


def some_json(
    rng: random.Random, value: Any, hostile: Callable[[random.Random], Any] = hostile_values
) -> Any:
    """A copy of an object with one to three values changed, taken out, renamed or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        nodes = _nodes(value)
        if not nodes:
            return hostile(rng)
        container, key = rng.choice(nodes)
        what = rng.randrange(10)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[rng.choice((f"{key}s", key[:-1], key.upper(), "extra"))] = container.pop(key)
        elif what == 2:
            other, place = rng.choice(nodes)
            container[key] = copy.deepcopy(other[place])
        elif what == 3 and isinstance(container, list):
            container += [copy.deepcopy(container[key])] * rng.choice((1, 2, 40))
        elif what == 4 and isinstance(container[key], str):
            container[key] = _spoilt_text(rng, container[key])
        elif what == 5 and isinstance(container[key], (int, float)):
            container[key] = rng.choice((*EXTREMES, -container[key], str(container[key]), 0.5))
        else:
            container[key] = hostile(rng)
    return value


def _spoilt_text(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    piece = rng.choice(("\0", "\n", "\x1b[31m", "\ud800", "../", "<image>", "<|im_end|>", " ", "9"))
    return rng.choice((text[:place], text[:place] + piece + text[place:], text * 3, text.upper()))


def dump(value: Any) -> str:
    """JSON with the numbers that Python writes and others do not, half pairs as escapes."""
    return json.dumps(value)
