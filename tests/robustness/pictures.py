"""Pictures: every format and mode that Pillow writes here, spoilt -> `load_image`."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from nanomolmo2.processor.image import MAX_PIXELS, load_image
from tests.robustness.judge import Case, Surroundings
from tests.robustness.mutate import ODD_NAMES, some_bytes, some_chunks, write_chunks

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
MODES += ("I", "F", "I;16", "I;16B", "La", "RGBa")
SIZES = ((1, 1), (9, 7), (40, 24))


def drawn(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with something in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    if mode in ("LAB", "HSV", "YCbCr", "CMYK", "I", "F"):
        return image.convert("RGB").convert("L" if mode in "IF" else "RGB").convert(mode)
    if mode in ("PA", "La", "RGBa"):
        return image.convert("LA" if mode in ("PA", "La") else "RGBA").convert(mode)
    return image.convert(mode)


@lru_cache(maxsize=1)
def valid_files() -> dict[str, list[bytes]]:
    """Format -> files that Pillow wrote."""
    Image.init()
    files: dict[str, list[bytes]] = {}

    def write(image: Image.Image, format: str, **options: Any) -> None:
        stream = io.BytesIO()
        try:
            with warnings.catch_warnings(action="ignore"):  # formats that Pillow will give up
                image.save(stream, format=format, **options)
        except Exception:  # a mode that the format does not have
            return
        files.setdefault(format, []).append(stream.getvalue())

    for format in sorted(Image.SAVE):
        for mode in MODES:
            try:
                image = drawn(mode, SIZES[1])
            except Exception:  # a way between modes that Pillow does not have
                continue
            write(image, format)
    rgb, gray, palette = (drawn(mode, SIZES[2]) for mode in ("RGB", "L", "P"))
    frames = [drawn("RGBA", (16, 12), seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"):
        write(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        write(rgb, format, exif=exif.tobytes())
        write(rgb, format, icc_profile=b"\0" * 600)
    write(rgb, "JPEG", progressive=True, quality=30)
    write(rgb, "JPEG", comment=b"x" * 100, dpi=(72, 72))
    write(rgb, "WEBP", lossless=True)
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "y" * 500, zip=True)
    text.add_itxt("note", "z" * 100)
    write(palette, "PNG", pnginfo=text, transparency=3)
    write(gray, "PNG", transparency=7)
    write(drawn("RGBA", (17, 5)), "PNG", compress_level=0)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4", "zstd", "lzma"):
        write(
            drawn("1", SIZES[2]) if compression == "group4" else rgb,
            "TIFF",
            compression=compression,
        )
        write(gray, "TIFF", compression=compression, tiffinfo={278: 1, 274: 5})
    write(rgb, "JPEG2000", irreversible=True, quality_layers=[20, 5])
    write(palette, "GIF", transparency=0, interlace=1)
    for size in SIZES[::2]:
        for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "TIFF"):
            write(drawn("RGB", size), format)
    return files


@lru_cache(maxsize=1)
def known_files() -> list[bytes]:
    """Those of formats that `load_image` reads, several times: the rest is refused at once."""
    files = valid_files()
    read = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
    return [data for format in read for data in files.get(format, [])]


@lru_cache(maxsize=1)
def all_files() -> list[bytes]:
    return [data for some in valid_files().values() for data in some]


# ---- inputs ----


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    draw = rng.random()
    if draw < 0.003:
        return _given(rng, here, huge(rng), "huge")
    if draw < 0.01:
        return _strange_source(rng, here, around)
    if draw < 0.03:
        return _object(rng)
    if draw < 0.038:
        return _given(rng, here, resized(rng), "another size")
    known, every = known_files(), all_files()
    data = rng.choice(known if rng.random() < 0.9 else every)
    change = some_chunks if rng.random() < 0.3 else some_bytes
    if draw < 0.06:
        return _given(rng, here, patched_tiff(rng), "tiff tags")
    if draw < 0.08:
        data = odd_png(rng)
        if rng.random() < 0.5:
            return _given(rng, here, data, "odd png")
    return _given(rng, here, change(rng, data, known), "mutated")


def _given(rng: random.Random, here: Path, data: bytes, what: str) -> Case:
    if rng.random() < 0.6:
        return Case(f"{what}, bytes", lambda: load_image(data), check)
    name = rng.choice(ODD_NAMES) if rng.random() < 0.1 else f"a.{rng.choice(('png', 'jpg', 'x'))}"
    path = here / name
    path.write_bytes(data)
    return Case(f"{what}, file", lambda: load_image(path), check, names=(str(path), name))


def check(image: Any) -> str | None:
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        return f"gave {image!r}, expected an RGB image"
    if not 0 < image.width * image.height <= MAX_PIXELS:
        return f"gave {image.size}"
    image.load()
    return None


def _strange_source(rng: random.Random, here: Path, around: Surroundings) -> Case:
    """What is no file, or no picture."""
    link, loop, folder = here / "link.png", here / "loop.png", here / "folder.png"
    link.symlink_to(around.outside / "secret.txt")
    loop.symlink_to(loop)
    folder.mkdir()
    fifo = here / "pipe.png"
    os.mkfifo(fifo)
    source = rng.choice(
        [
            *("/dev/zero", "/dev/full", "/dev/null", "/dev/tty", "/dev/stdin", "/dev/fd/0"),
            *("/proc/self/environ", "/proc/self/pagemap", "/proc/self/mem", "/proc/kmsg"),
            *("/proc/self/cmdline", "/sys/kernel/notes", "/proc/cpuinfo", "", " ", "\0", "a\0.png"),
            *(str(around.outside / "secret.txt"), str(link), str(loop), str(folder), str(fifo)),
            *("~nobody-here/a.png", "http://\ud800", "https:a", "data:,a", "file:///dev/zero"),
            *("file:///etc/passwd", "file://host/a.png", "file:a.png", "x" * 300, "a/" * 3000),
            *(f"file://{around.outside}/secret.txt", "\ud800.png", "%2e%2e", "file:///%00"),
        ]
    )
    names = (source, str(Path(source)))  # which leaves a last slash out
    return Case(f"source {source[:60]!r}", lambda: load_image(source), check, names)


def _object(rng: random.Random) -> Case:
    """Arrays and PIL images of all kinds."""
    shapes = [(0, 5), (5, 0), (3,), (), (1, 1, 1, 1), (4, 5), (4, 5, 1), (4, 5, 2), (4, 5, 3)]
    shapes += [(4, 5, 4), (4, 5, 5), (3, 4, 5), (1 << 16, 1), (0, 0, 3), (2, 1, 0)]
    types = ["u1", "u2", "u4", "i1", "i2", "i8", "f2", "f4", "f8", "?", "c8", "O", "S3", "U2"]
    types += [">u2", ">f4", "M8[s]"]
    if rng.random() < 0.5:
        array = np.zeros(rng.choice(shapes), rng.choice(types))
        if array.size and array.dtype.kind in "fui":
            with np.errstate(all="ignore"):
                flat = array.reshape(-1)
                flat[0] = rng.choice((0, 1, 0.5, 100, 2))
                if array.dtype.kind == "f":
                    flat[-1] = rng.choice((np.nan, np.inf, -np.inf, -1, 1e30))
        if rng.random() < 0.2:
            array = np.broadcast_to(array.reshape(-1)[:1], (5, 6)) if array.size else array
        source: Any = array
        return Case(f"array {array.shape} {array.dtype}", lambda: load_image(source), check)
    if rng.random() < 0.3:
        source = rng.choice((None, 1, 1.5, [], {}, object(), [1, 2], b"", bytearray(b"x"), ("a",)))
        return Case(f"object {source!r}", lambda: load_image(source), check)
    image = Image.open(io.BytesIO(rng.choice(known_files())))
    if rng.random() < 0.5:
        image.info["transparency"] = rng.choice(
            (0, 300, -1, b"", b"\0" * 500, (1, 2, 3), "x", (1,))
        )
    if rng.random() < 0.2:
        image.close()
    return Case(f"image {image.mode}", lambda: load_image(image), check)


# ---- files that are small and want much ----

BLOCK = 1 << 20


def zeros(amount: int) -> bytes:
    """A zlib stream of so many zeros, made without packing them all."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    if amount < 2 * BLOCK:
        return zlib.compress(bytes(amount))
    last = zlib.compressobj(9, wbits=-15)
    end = last.compress(bytes(amount % BLOCK)) + last.flush()
    checksum = (amount % 65_521) << 16 | 1  # Adler-32 of zeros
    return first + block * (amount // BLOCK - 1) + end + struct.pack(">I", checksum)


def huge(rng: random.Random) -> bytes:
    """Few bytes, pictures of up to the size that is allowed, and some beyond."""
    side = int(MAX_PIXELS**0.5)
    width, height = rng.choice(
        [
            *((side, side), (1, MAX_PIXELS), (MAX_PIXELS, 1), (side, side // 4), (65_535, 2_730)),
            *((side + 1, side + 1), (1 << 31, 1), ((1 << 32) - 1,) * 2, (65_535, 65_535)),
        ]
    )
    what = rng.randrange(5)
    if what == 0:
        kinds = ((1, 0), (8, 0), (8, 2), (16, 2), (16, 6), (8, 3), (16, 0), (8, 6), (8, 4))
        turned = rng.choice((None, 6))
        return png(width, height, *rng.choice(kinds), rows=rng.choice((None, 1)), turned=turned)
    if what == 1:
        head = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0x80, 0, 0) + bytes(6)
        frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width & 0xFFFF, height & 0xFFFF, 0)
        return b"GIF89a" + head + frame + b"\x02\x02\x4c\x01\0;"
    if what == 2:
        kind, rest = rng.choice(
            ((b"P5", b"255\n"), (b"P4", b""), (b"Pf", b"1.0\n"), (b"P2", b"9 "))
        )
        return b"%s\n%d %d\n%s" % (kind, width, height, rest)
    if what == 3:
        most = (1 << 31) - 1
        info = struct.pack("<Iii", 40, min(width, most), min(height, most))
        info += struct.pack("<HHIIiiII", 1, rng.choice((1, 8, 24, 32)), 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info
    bits, kind = rng.choice(((1, 1), (8, 1), (16, 1), (32, 1), (32, 2), (32, 3)))
    return deflated_tiff(width, height, bits, kind)


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    *,
    rows: int | None = None,
    turned: int | None = None,
) -> bytes:
    """A PNG of zeros, with as many rows of data as given, and an EXIF orientation."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (width * depth * channels + 7) // 8
    data = zeros(min(row * (height if rows is None else rows), 1 << 31))
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    if colour == 3:
        chunks.insert(1, (b"PLTE", bytes(768)))
        chunks.insert(2, (b"tRNS", bytes(200)))
    if turned is not None:
        exif = Image.Exif()
        exif[0x0112] = turned
        chunks.insert(1, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    return write_chunks(b"\x89PNG\r\n\x1a\n", chunks)


def deflated_tiff(width: int, height: int, bits: int, kind: int) -> bytes:
    """A gray TIFF of zeros; kind 1 = whole numbers, 2 = signed, 3 = floats."""
    data = zeros(min((width * bits + 7) // 8 * height, 1 << 31))
    most = (1 << 32) - 1
    tags = {256: min(width, most), 257: min(height, most), 258: bits, 259: 8, 262: 1, 273: 8}
    return tiff({**tags, 277: 1, 278: min(height, most), 279: len(data), 339: kind}, data)


def resized(rng: random.Random) -> bytes:
    """A small JPEG, WebP, JPEG 2000 or AVIF whose header says that it is large."""
    format = rng.choice(("JPEG", "JPEG", "WEBP", "JPEG2000", "AVIF"))
    data = bytearray(rng.choice(valid_files().get(format) or known_files()))
    sides = (1, 255, 4_000, 9_000, 13_377, 16_383, 65_500)
    width, height = rng.choice(sides), rng.choice(sides)
    if format == "JPEG":
        set_jpeg_size(data, width, height)
    elif (place := data.find(b"VP8X")) > 0:
        data[place + 12 : place + 18] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    elif (place := data.find(b"\x9d\x01\x2a")) > 0:  # VP8
        struct.pack_into("<HH", data, place + 3, width & 0x3FFF, height & 0x3FFF)
    elif (place := data.find(b"VP8L")) > 0:
        struct.pack_into(
            "<I", data, place + 9, (width - 1) & 0x3FFF | ((height - 1) & 0x3FFF) << 14
        )
    if (place := data.find(b"ispe")) > 0:
        struct.pack_into(">II", data, place + 8, width, height)
    if (place := data.find(b"\xff\x51")) > 0:  # SIZ of JPEG 2000
        struct.pack_into(">II", data, place + 6, width, height)
        if rng.random() < 0.5:  # and of its tiles
            struct.pack_into(">II", data, place + 22, *rng.choice(((width, height), (1, 1))))
    if (place := data.find(b"ihdr")) > 0:
        struct.pack_into(">II", data, place + 4, height, width)
    return bytes(data)


def set_jpeg_size(data: bytearray, width: int, height: int) -> None:
    """In every frame header of a JPEG, or of the JPEGs in a video."""
    for marker in (b"\xff\xc0\x00", b"\xff\xc2\x00"):
        place = data.find(marker)
        while place >= 0 and place + 9 <= len(data):
            struct.pack_into(">HH", data, place + 5, height & 0xFFFF, width & 0xFFFF)
            place = data.find(marker, place + 9)


def odd_png(rng: random.Random) -> bytes:
    """A PNG with ancillary chunks that lie, are huge, or stand twice."""
    size = rng.choice((0, 10, 5_000, 3_000_000))
    body = zlib.compress(bytes(size))
    extra = rng.choice(
        [
            (b"iCCP", b"name\0\0" + body),
            (b"zTXt", b"note\0\0" + body),
            (b"iTXt", b"note\0\1\0\0\0" + body),
            (b"tEXt", b"note\0" + b"x" * min(size, 200_000)),
            (b"eXIf", rng.choice((b"", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0", rng.randbytes(60)))),
            (b"acTL", struct.pack(">II", rng.choice((0, 1, 5, 1 << 31)), 0)),
            (b"gAMA", struct.pack(">I", rng.choice((0, 1, 45455, (1 << 32) - 1)))),
            (b"cHRM", rng.randbytes(rng.choice((0, 16, 32)))),
            (b"pHYs", rng.randbytes(rng.choice((0, 9, 3)))),
            (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 300)))),
            (b"PLTE", rng.randbytes(rng.choice((0, 1, 3, 768, 900)))),
            (b"sRGB", rng.randbytes(rng.choice((0, 1)))),
            (rng.randbytes(4), rng.randbytes(20)),
        ]
    )
    head = struct.pack(">IIBBBBB", 6, 5, 8, rng.choice((0, 2, 3, 6)), 0, 0, rng.choice((0, 0, 1)))
    colour = head[9]
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    data = zlib.compress(rng.randbytes(1) * (5 * (1 + 6 * channels)))
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    if colour == 3:
        chunks.insert(1, (b"PLTE", bytes(range(256)) * 3))
    chunks.insert(rng.randrange(1, len(chunks)), extra)
    return write_chunks(b"\x89PNG\r\n\x1a\n", chunks)


def tiff(tags: dict[int, int], pixels: bytes = b"\0" * 64) -> bytes:
    """A little-endian TIFF of one strip; every tag is one LONG."""
    offset = 8 + len(pixels) + len(pixels) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", offset) + pixels.ljust(offset - 8, b"\0") + directory


def patched_tiff(rng: random.Random) -> bytes:
    """A TIFF whose tags say something else."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64, 339: 1}
    for _ in range(rng.choice((1, 2, 3))):
        tag = rng.choice([*tags, 274, 284, 317, 320, 322, 323, 324, 325, 338, 347, 530, 34675, 700])
        tags[tag] = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 16, 32, 255, 13_000, 65_536, 1 << 31))
    data = bytearray(tiff(tags, rng.randbytes(64)))
    if rng.random() < 0.3:  # counts and types of entries
        place = 8 + 64 + 2 + 12 * rng.randrange(len(tags))
        struct.pack_into("<HI", data, place + 2, rng.randrange(20), rng.choice((0, 2, 1 << 30)))
    return bytes(data)


# ---- what was once found ----


def _file(data: Callable[[], bytes], suffix: str = ".png") -> Callable[[Path, Surroundings], Case]:
    def build(here: Path, around: Surroundings) -> Case:
        path = here / f"a{suffix}"
        path.write_bytes(data())
        return Case("found before", lambda: load_image(path), check, names=(str(path),))

    return build


def _secret(here: Path, around: Surroundings) -> Case:
    return Case("a text file", lambda: load_image(around.outside / "secret.txt"), check)


def progressive(side: int) -> bytes:
    """A JPEG of few bytes for which a decoder keeps the coefficients of all of it."""
    stream = io.BytesIO()
    drawn("RGB", (16, 16)).save(stream, "JPEG", progressive=True)
    data = bytearray(stream.getvalue())
    set_jpeg_size(data, side, side)
    return bytes(data)


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "a progressive JPEG at the limit": _file(lambda: progressive(13_377), ".jpg"),
    "a text file is not quoted": _secret,
    "one row of 178 million bits": _file(lambda: png(MAX_PIXELS, 1, 1, 0)),
    "one column of 178 million bits": _file(lambda: png(1, MAX_PIXELS, 1, 0)),
    "a palette with transparency at the limit": _file(lambda: png(13_377, 13_377, 8, 3)),
    "floats at the limit": _file(lambda: deflated_tiff(13_377, 13_377, 32, 3), ".tif"),
    "turned and transparent at the limit": _file(lambda: png(13_377, 13_377, 8, 6, turned=6)),
}
