"""Images: whatever people have -> RGB -> the float tensor the vision encoder takes.

`load_image` is about people (files, rotation, transparency, bit depths, broken files), `preprocess`
is about the model and equals transformers' ``SiglipImageProcessor`` (PIL backend) bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Resample = Literal["bicubic", "bilinear"]
ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

# Pillow refuses twice its MAX_IMAGE_PIXELS by itself; at this size RGB takes 0.5 GB.
MAX_PIXELS = 178_956_970

# Only formats decoded in memory from one file: never EPS, which starts another program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"

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

    Files (by path or as bytes) may be JPEG, PNG, WebP, GIF and the like; of several frames the
    first is taken. EXIF rotation is applied, transparency is composited on white, palettes, CMYK,
    1-bit and grayscale become RGB. 16-bit values are divided by 257 (65535 is white), never
    clipped. Integer and float images of 32 bits are taken as 0..1 (float), 0..255 or 0..65535 by
    what they hold, and stretched from least to greatest value if they fit none of these.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats 0..1.

    Args:
        source: path, bytes of a file, PIL image or array.
        max_pixels: largest width x height; checked before anything is decoded.
    Returns: the image; the very object that was given if there is nothing to change.
    Raises: FileNotFoundError if there is no such file; ValueError, in one line, for whatever else
        keeps the source from being an image.
    """
    if isinstance(source, Image.Image):
        return _decode(source, f"the {source.mode} image", max_pixels)
    if isinstance(source, np.ndarray):
        image = _from_array(source, max_pixels)
        return _decode(image, "the array", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _open(io.BytesIO(data), data[:512], len(data), "the given bytes", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, max_pixels)
    raise ValueError(
        f"cannot read a picture from {type(source).__name__}: give a path, the bytes of a file, a "
        f"PIL image or a numpy array"
    )


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


def _open_path(source: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    if isinstance(source, str) and re.match(r"(https?|ftp|data|s3|gs):", source):
        raise ValueError(
            f"found the address {source[:60]!r}: nothing is downloaded here; give a local file"
        )
    path = Path(os.path.expanduser(source))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a folder: give the path of one picture in it")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file: give the path of a picture")
        with path.open("rb") as stream:
            head = stream.read(512)
            return _open(stream, head, path.stat().st_size, str(path), max_pixels)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}: check the path of the picture") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def _open(stream: Any, head: bytes, size: int, name: str, max_pixels: int) -> Image.Image:
    """Decode an open file; ``head`` is its beginning, ``size`` its length in bytes."""
    if size == 0:
        raise ValueError(
            f"{name}: found an empty file (0 bytes), expected a picture: copy it again"
        )
    try:
        with _no_warnings():
            image = Image.open(stream, formats=_known_formats())
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(
            name, f"{pixels[0] if pixels else 'too many'} pixels", max_pixels
        ) from None
    except Exception:
        raise ValueError(
            f"{name}: found {_guess(head)}, expected a picture ({_FORMAT_NAMES}): convert it, or "
            f"copy it again"
        ) from None
    return _decode(image, name, max_pixels)


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read; asking for another is a KeyError in it."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Check the size, decode, turn upright, convert to RGB."""
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} pixels", max_pixels)
    if width == 0 or height == 0:
        raise ValueError(f"{name} has no pixels ({width} x {height}): give a picture that has some")
    try:
        with _no_warnings():
            image.load()
            return _to_rgb(_upright(image))
    except MemoryError:
        raise ValueError(
            f"{name}: {width} x {height} pixels do not fit into memory: make the picture smaller"
        ) from None
    except Exception as error:  # decoders of broken files raise nearly everything
        raise ValueError(
            f"{name}: the {image.format or 'picture'} data cannot be decoded ({error}): the file "
            f"is damaged or incomplete; copy it again"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata does not make the pixels worse
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    image = image.transpose(method)
    for key in _ORIENTATION_HOLDERS:  # or the next reader would turn it again
        image.info.pop(key, None)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return _gray((values + 128) // 257)
    if image.mode in ("I", "F"):
        return _gray(_stretch(np.asarray(image).astype(np.float64), image.mode == "F"))
    if image.mode == "La":  # premultiplied gray has only this way out
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _stretch(values: NDArray[np.float64], is_float: bool) -> NDArray[np.float64]:
    """Values of unknown range -> 0..255."""
    finite = np.isfinite(values)
    values = np.where(finite, values, 0.0)
    low, high = (
        (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0, 0)
    )
    if low >= 0 and high <= 1 and is_float:
        return np.rint(values * 255)
    if low >= 0 and high <= 255:
        return np.rint(values)
    if low >= 0 and high <= 65535:
        return np.rint(values / 257)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


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


def _too_large(name: str, found: str, max_pixels: int) -> ValueError:
    return ValueError(
        f"{name}: found {found}, expected at most {max_pixels}: make the picture smaller first"
    )


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


def _guess(head: bytes) -> str:
    """What a file that is no readable image seems to be, by its first bytes."""
    for signature, found in _SIGNATURES:
        if head.startswith(signature):
            return found
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a damaged WebP file"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("ascii", "replace")
        kind = (
            "a HEIC picture" if brand in ("heic", "heix", "mif1", "hevc") else "a video or picture"
        )
        return f"{kind} of type {brand!r}"
    if b"<svg" in head:
        return "an SVG drawing"
    text = head.decode("utf-8", "ignore")
    if text and sum(c.isprintable() or c.isspace() for c in text) > 0.95 * len(head):
        return f"text ({text[:20]!r}...)"
    return f"unknown data ({head[:8].hex(' ')} ...)"


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
