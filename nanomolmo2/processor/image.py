"""Images: whatever people have -> RGB -> the float tensor the vision encoder takes.

`load_image` is about people (files, rotation, transparency, bit depths, broken files), `preprocess`
is about the model and equals transformers' ``SiglipImageProcessor`` (PIL backend) bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.processor.inputs import (
    BinaryFile,
    Input,
    guess,
    is_file,
    open_input,
    video_container,
)
from nanomolmo2.processor.pnm import is_pnm, read_pnm
from nanomolmo2.processor.repair import without_notes

Resample = Literal["bicubic", "bilinear"]
ImageSource = str | os.PathLike[str] | bytes | BinaryFile | Image.Image | NDArray[Any]

# Pillow refuses twice its MAX_IMAGE_PIXELS by itself; at this size RGB takes 0.7 GB.
MAX_PIXELS = 178_956_970
# Resizing takes memory by the longer side: a thread of 1 x 10,000,000 pixels would take 15 GB.
MAX_SIDE = 262_144
# What decoding may hold at once, for each pixel that is allowed: 0.7 GB in all.
_PIXEL_BYTES = 4
MAX_FILE_BYTES = 1 << 30
MAX_SCANNED_PIXELS = 1_500_000_000  # of a progressive JPEG, which usually has 10 scans
_WHOLE_BYTES = 1 << 28  # of files whose decoder reads them whole

# Only formats decoded in memory from one file: never EPS, which starts another program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Bytes a pixel that a decoder holds beside the picture itself.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "JPEG2000": 16}
_READ_WHOLE = ("WEBP", "AVIF", "JPEG2000")

_BAND = 1 << 20  # pixels that are converted at once

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # value of the EXIF orientation tag -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_HOLDERS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open any image as an upright RGB image on white.

    Files (by path, ``file:`` address, as bytes or open) may be JPEG, PNG, WebP, GIF and the like;
    of several frames the first is taken. EXIF rotation is applied, transparency is composited on
    white, palettes, CMYK, 1-bit and grayscale become RGB. 16-bit values are divided by 257 (65535
    is white), never clipped; in PGM and PPM files white is what the file says. Integer and float
    images of 32 bits are taken as 0..1 (float), 0..255 or 0..65535 by what they hold, and
    stretched from least to greatest value if they fit none of these. Notes beside the pixels
    (colour profiles, comments, checksums of either) may be damaged or of any length.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats 0..1.

    Args:
        source: path or ``file:`` address, bytes of a file, binary file, PIL image or array. A file
            is read from its beginning, gets its place back, and stays open.
        max_pixels: largest width x height; checked before anything is decoded. Less is allowed
            where decoding takes more memory than the 4 bytes a pixel of RGB, of the default: for
            gray and palettes 143,165,576 pixels, for alpha, CMYK, 32-bit values or a rotation
            89,478,485, as WebP or AVIF 44,739,242, as JPEG 2000 35,791,394. No side may be longer
            than 262,144 pixels.
    Returns: the image; the very object that was given if there is nothing to change.
    Raises: FileNotFoundError if there is no such file; ValueError, in one line, for whatever else
        keeps the source from being an image.
    """
    try:
        return _load(source, max_pixels)
    except _TooLarge as error:
        raise ValueError(str(error)) from None


def _load(source: ImageSource, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return _decode(source, f"the {source.mode} image", max_pixels)
    if isinstance(source, np.ndarray):
        image = _from_array(source, max_pixels)
        return _decode(image, "the array", max_pixels)
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or is_file(source):
        with open_input(source, "picture") as file:
            return _read(file, max_pixels)
    raise ValueError(
        f"cannot read a picture from {type(source).__name__}: give a path, the bytes of a file, an "
        f"open file, a PIL image or a numpy array"
    )


def stored_size(source: ImageSource) -> tuple[tuple[int, int], Image.Transpose | None]:
    """(width, height) of a file's pixels as they are stored, and what turns them upright (None:
    they are). Only the header is read, where the format allows that.

    Raises: as `load_image`.
    """
    with open_input(source, "picture") as file, _no_warnings():
        try:
            image = Image.open(file.stream, formats=_formats(file.head))
            return image.size, _turn(image)
        except Exception:  # notes that are damaged, say
            pass
    return load_image(source).size, None


def preprocess(
    image: Image.Image | NDArray[np.uint8],
    *,
    image_size: int = 384,
    resample: Resample = "bicubic",
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    rescale_factor: float = 1 / 255,
) -> NDArray[np.float32]:
    """Resize to a square (the aspect ratio is not kept), scale and normalise.

    Args:
        image: RGB image, or an array (S, S, 3) of uint8 that already has the size S = image_size.
        image_size: side S of the result, pixels.
        resample: filter; both antialias when they shrink, as PIL does.
    Returns: (3, S, S) float32, ``(value * rescale_factor - mean) / std``.
    Source: transformers 5.23, models/siglip/image_processing_pil_siglip.py.
    """
    size = (image_size, image_size)
    if isinstance(image, Image.Image):
        image = np.asarray(image.resize(size, _FILTERS[resample]))
    table = _value_table(image_mean, image_std, rescale_factor)
    pixels = np.empty((3, *size), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], image[:, :, channel], out=pixels[channel], mode="clip")
    return pixels


@lru_cache(maxsize=16)
def _value_table(
    mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float
) -> NDArray[np.float32]:
    """(3, 256): the float that each value of each channel becomes, rounded like the reference."""
    scaled = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    means, stds = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    table: NDArray[np.float32] = (scaled - means[:, None]) / stds[:, None]
    return table


# ---- from files ----


class _Undecodable(Exception):
    """What a decoder says about a file."""


def _read(file: Input, max_pixels: int) -> Image.Image:
    """Decode an open file."""
    if file.size == 0:
        raise ValueError(
            f"{file.name}: found an empty file (0 bytes), expected a picture: copy it again"
        )
    if file.size > MAX_FILE_BYTES:
        raise ValueError(
            f"{file.name}: found {file.size:,} bytes, expected a picture of at most "
            f"{MAX_FILE_BYTES:,}: make it smaller"
        )
    if is_pnm(file.head) and (image := _read_pnm(file, max_pixels)) is not None:
        return image
    try:
        return _open(file, file.stream, max_pixels)
    except _Undecodable as error:
        message = str(error)
    data = without_notes(file.stream, file.head, file.size)
    if data is not None:
        with contextlib.suppress(_Undecodable):
            return _open(file, io.BytesIO(data), max_pixels)
    raise ValueError(message)


def _open(file: Input, stream: Any, max_pixels: int) -> Image.Image:
    """Raises: _Undecodable with the message for people."""
    stream.seek(0)
    try:
        with _no_warnings():
            image = Image.open(stream, formats=_formats(file.head))
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(
            file.name, f"{pixels[0] if pixels else 'too many'} pixels", max_pixels
        ) from None
    except Exception:
        raise _Undecodable(_no_picture(file)) from None
    if image.format in _READ_WHOLE and file.size > _WHOLE_BYTES:
        raise ValueError(
            f"{file.name}: found {file.size:,} bytes, expected {image.format} files of at most "
            f"{_WHOLE_BYTES:,}: make it smaller"
        )
    if image.info.get("progressive"):
        _check_scans(image, stream, file.name)
    low = _low_bytes(image, stream)
    return _decode(image, file.name, max_pixels, low=low, ours=True)


def _check_scans(image: Image.Image, stream: Any, name: str) -> None:
    """A progressive JPEG goes over all of its pixels in each scan, and may have any number."""
    width, height = image.size
    place, scans, last = stream.tell(), 0, b""
    stream.seek(0)
    while block := stream.read(1 << 20):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    stream.seek(place)
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise _TooLarge(
            f"{name}: found {scans} scans of {width} x {height} pixels, expected at most "
            f"{MAX_SCANNED_PIXELS} pixels in all: save it as a baseline JPEG"
        )


def _no_picture(file: Input) -> str:
    if video_container(file.head) is not None:
        help_text = (
            "give a video as a video (load_video, `ask --video`, the field 'video'), or convert a "
            "frame of it to a picture"
        )
    else:
        help_text = "convert it, or copy it again"
    return (
        f"{file.name}: found {guess(file.head)}, expected a picture ({_FORMAT_NAMES}): {help_text}"
    )


def _read_pnm(file: Input, max_pixels: int) -> Image.Image | None:
    def check_size(width: int, height: int, most: int) -> None:
        _check_size(file.name, (width, height), min(max_pixels, most))

    try:
        return read_pnm(file.stream, file.head, check_size)
    except _TooLarge:
        raise
    except ValueError as error:
        raise _damaged(file.name, "PPM", error) from None


def _formats(head: bytes) -> tuple[str, ...]:
    """Whom to ask to read a file that begins so. For most files Pillow need not load them all."""
    for start, name in _STARTS.items():
        if head.startswith(start):
            return (name,)
    return _known_formats()


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read; asking for another is a KeyError in it."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _low_bytes(image: Any, stream: Any) -> Callable[[], Image.Image] | None:
    """Bring the transparent colour of a PNG to the depth of its pixels.

    Pillow keeps it as the file has it. Of colours of 16 bits it reads the high bytes alone: what
    is returned decodes the low ones, which two colours may differ by.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(key, (int, tuple)):
        return None
    raw_mode = image.tile[0][3] if image.tile else ""
    if image.mode == "L" and isinstance(key, int):
        white = {"L;2": 3, "L;4": 15}.get(raw_mode, 255)
        image.info["transparency"] = (key & white) * (255 // white)
    elif raw_mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value & 255 for value in key)
    elif raw_mode == "RGB;16B":

        def decode() -> Image.Image:
            stream.seek(0)
            low = Image.open(stream, formats=("PNG",))
            low.tile = [type(low.tile[0])(*low.tile[0][:3], "RGB;16L")]
            low.load()
            return low

        return decode
    return None


def _decode(
    image: Image.Image,
    name: str,
    max_pixels: int,
    *,
    low: Callable[[], Image.Image] | None = None,
    ours: bool = False,
) -> Image.Image:
    """Check the size, decode, convert to RGB, turn upright.

    Args:
        low: decodes the low bytes of 16-bit colours, of which one is transparent.
        ours: nobody else has the image, so its pixels may go before the last copy is made.
    """
    _check_size(name, image.size, min(max_pixels, _limit(image, max_pixels, low is not None)))
    try:
        with _no_warnings():
            image.load()
            turn = _turn(image)
            if turn is not None:
                most = _most(max_pixels, 8)
                _check_size(name, image.size, min(max_pixels, most))
            rgb = _to_rgb(image) if low is None else _keyed(image, low())
            if turn is None:
                return rgb
            if ours and rgb is not image:
                image.close()
            return _turned(rgb, turn)
    except _TooLarge:
        raise
    except MemoryError:
        width, height = image.size
        raise ValueError(
            f"{name}: {width} x {height} pixels do not fit into memory: make the picture smaller"
        ) from None
    except Exception as error:  # decoders of broken files raise nearly everything
        damaged = _damaged(name, image.format or "picture", error)
        raise (_Undecodable(str(damaged)) if ours else damaged) from None


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} pixels", max_pixels)
    if max(size) > MAX_SIDE:
        raise _TooLarge(
            f"{name}: found {width} x {height} pixels, expected no side over {MAX_SIDE}: cut the "
            f"picture into parts"
        )
    if width == 0 or height == 0:
        raise _TooLarge(f"{name} has no pixels ({width} x {height}): give a picture that has some")


def _limit(image: Any, max_pixels: int, has_low_bytes: bool) -> int:
    """The most pixels of such an image, by what its decoding holds at once."""
    is_rgb = image.mode == "RGB" and "transparency" not in image.info
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    decoder = _DECODER_BYTES.get(image.format or "", 0)
    if image.info.get("progressive"):  # all coefficients of all colours
        decoder = 2 * len(image.getbands())
    elif image.format == "TIFF" and image.tile and image.tile[0][0] == "libtiff":
        decoder = _strip_bytes(image)
    held = stored + max(decoder, 0 if is_rgb else 4)
    return _most(max_pixels, held + 4 * has_low_bytes)


def _strip_bytes(image: Any) -> int:
    """Bytes a pixel of the piece of a TIFF that is unpacked at once, over the whole picture."""
    bits = image.tag_v2.get(258, (1,))
    rows = image.tag_v2.get(278, image.height)
    sample = sum(bits) if isinstance(bits, tuple) else int(bits)
    channels = max(1, int(image.tag_v2.get(277, 1)))
    sample = max(sample, sample * channels // max(1, len(bits) if isinstance(bits, tuple) else 1))
    return -(-sample * min(int(rows), image.height) // (8 * max(1, image.height)))


def _most(max_pixels: int, held: int) -> int:
    return max(max_pixels, MAX_PIXELS) * _PIXEL_BYTES // held


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata does not make the pixels worse
        orientation = None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _turned(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    image = image.transpose(turn)
    for key in _ORIENTATION_HOLDERS:  # or the next reader would turn it again
        image.info.pop(key, None)
    return image


# ---- colours ----


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert, large images in bands: what lies between a mode and RGB would fill the memory."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    to_rgb: Callable[[Image.Image], Image.Image] = _band_to_rgb
    if image.mode in ("I", "F"):
        to_rgb = _stretched(image)
    if image.width * image.height <= _BAND:
        return to_rgb(image)
    if image.mode == "P" and image.has_transparency_data:
        to_rgb = _palette_on_white(image)
    rgb = Image.new("RGB", image.size)
    for box in _bands(image):
        rgb.paste(to_rgb(image.crop(box)), box)
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        gray = _FROM_16_BITS[values]
        if isinstance(key := image.info.get("transparency"), int):
            gray = np.where(values == key, 255, gray)
        return _gray(gray)
    if image.mode == "La":  # premultiplied gray has only this way out
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] == 255:
            return rgba.convert("RGB")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _palette_on_white(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Composite the 256 colours in place of the pixels."""
    ramp = image.crop((0, 0, 256, 1))
    ramp.putdata(range(256))
    colours = np.asarray(_band_to_rgb(ramp)).tobytes()

    def to_rgb(band: Image.Image) -> Image.Image:
        band.info.pop("transparency", None)
        band.putpalette(colours)
        return band.convert("RGB")

    return to_rgb


_FROM_16_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def _keyed(high: Image.Image, low: Image.Image) -> Image.Image:
    """Colours of 16 bits in two halves, one of which is transparent -> on white."""
    key = high.info.pop("transparency")
    for box in _bands(high):
        halves = (high.crop(box), 8), (low.crop(box), 0)
        is_key = np.ones((halves[0][0].height, high.width), dtype=bool)
        for half, shift in halves:
            for channel, value in zip(half.split(), key, strict=True):
                is_key &= np.asarray(channel) == value >> shift & 255
        if is_key.any():
            high.paste((255, 255, 255), box, Image.fromarray(is_key))
    return high


def _stretched(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What brings the bands of an image of 32 bits, whose range is unknown, to 0..255."""
    lows, highs = [], []
    for box in _bands(image):
        band = np.asarray(image.crop(box))
        band = band[np.isfinite(band)] if image.mode == "F" else band
        if band.size:
            lows.append(float(band.min()))
            highs.append(float(band.max()))
    low, high = (min(lows), max(highs)) if lows else (0.0, 0.0)
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled it to 16 bits
        low, high = 0.0, 65535.0

    def to_rgb(band: Image.Image) -> Image.Image:
        values = np.asarray(band).astype(np.float64)
        values[~np.isfinite(values)] = 0.0
        if low >= 0 and high <= 1 and image.mode == "F":
            values *= 255
        elif low >= 0 and high <= 255:
            pass
        elif low >= 0 and high <= 65535:
            values /= 257
        else:
            values = np.clip((values - low) / (high - low), 0, 1) * 255
        return _gray(np.rint(values))

    return to_rgb


def _gray(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


# ---- from arrays ----


def _from_array(array: NDArray[Any], max_pixels: int) -> Image.Image:
    shape = array.shape
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise ValueError(
            f"found an array of shape {shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): "
            f"move the channels last, and give several pictures as a list"
        )
    if shape[0] * shape[1] > max_pixels:
        raise _too_large("the array", f"{shape[1]} x {shape[0]} pixels", max_pixels)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"found a float array with values {low:g} .. {high:g}, expected 0 .. 1: divide it "
                f"by its white value, or convert values of 0 .. 255 to uint8"
            )
        array = np.rint(array.astype(np.float64) * 255)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"found an array of {array.dtype}, expected uint8, uint16, bool or float: convert "
            f"values of 0 .. 255 with array.astype('uint8')"
        )
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


# ---- errors and warnings ----


class _TooLarge(ValueError):
    """Not the fault of a decoder: nothing else is tried."""


def _too_large(name: str, found: str, max_pixels: int) -> ValueError:
    return _TooLarge(
        f"{name}: found {found}, expected at most {max_pixels}: make the picture smaller first"
    )


def _damaged(name: str, kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name}: the {kind} data cannot be decoded ({error}): the file is damaged or incomplete; "
        f"copy it again"
    )


_quiet_lock = threading.Lock()
_quiet_threads = 0
_quiet_context = warnings.catch_warnings()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow's remarks on odd metadata do not reach the user.

    ``warnings.catch_warnings`` changes the whole process; two threads that leave it in the order
    they came would keep warnings off for good. So the first in turns them off, the last out on.
    """
    global _quiet_threads, _quiet_context
    with _quiet_lock:
        if _quiet_threads == 0:
            _quiet_context = warnings.catch_warnings()
            _quiet_context.__enter__()
            warnings.simplefilter("ignore")
        _quiet_threads += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads -= 1
            if _quiet_threads == 0:
                _quiet_context.__exit__(None, None, None)
