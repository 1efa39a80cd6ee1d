"""What makes finding emoji hard: clutter that is no emoji, and photos to lie on.

Pictures are uint8 (H, W, 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from nanomolmo2.processor.image import load_image

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMOOTHING = 2  # shapes are drawn so many times larger, then shrunk: their edges become smooth

Colour = tuple[int, int, int]


# ---- clutter ----


def draw_clutter(rng: np.random.Generator, canvas: np.ndarray, number: int) -> np.ndarray:
    """Draw ``number`` shapes, lines and scribbles that are no emoji onto a copy of ``canvas``."""
    height, width = canvas.shape[:2]
    large = Image.fromarray(canvas).resize(
        (SMOOTHING * width, SMOOTHING * height), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(large)
    for _ in range(number):
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        kind = _KINDS[rng.integers(len(_KINDS))]
        reach = SMOOTHING * rng.uniform(8, 36)  # half of its extent
        middle = rng.uniform(0, 1, 2) * large.size
        kind(rng, draw, middle, reach, (red, green, blue))
    return np.asarray(large.resize((width, height), Image.Resampling.BOX)).copy()


Kind = Callable[[np.random.Generator, ImageDraw.ImageDraw, np.ndarray, float, Colour], None]


def _line(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    middle: np.ndarray,
    reach: float,
    colour: Colour,
) -> None:
    """A zigzag."""
    points = middle + rng.uniform(-reach, reach, (int(rng.integers(2, 5)), 2))
    draw.line(points.ravel().tolist(), colour, SMOOTHING * int(rng.integers(1, 5)))


def _polygon(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    middle: np.ndarray,
    reach: float,
    colour: Colour,
) -> None:
    """Three to six corners, in order around the middle."""
    corners = int(rng.integers(3, 7))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.4, 1, corners) * reach
    points = middle + np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    flat = points.ravel().tolist()
    if rng.random() < 0.5:
        draw.polygon(flat, fill=colour)
    else:
        draw.line([*flat, *flat[:2]], colour, SMOOTHING * 2)


def _ellipse(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    middle: np.ndarray,
    reach: float,
    colour: Colour,
) -> None:
    """Whole, a ring, or an arc."""
    radii = rng.uniform(0.2, 1, 2) * reach
    box = [*(middle - radii).tolist(), *(middle + radii).tolist()]
    kind, thick = rng.random(), SMOOTHING * int(rng.integers(1, 4))
    if kind < 0.3:
        draw.ellipse(box, fill=colour)
    elif kind < 0.6:
        draw.ellipse(box, outline=colour, width=thick)
    else:
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 270), colour, thick)


def _writing(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    middle: np.ndarray,
    reach: float,
    colour: Colour,
) -> None:
    """A row of short strokes, like letters that nobody can read."""
    height = SMOOTHING * rng.uniform(4, 9)
    x, end = middle[0] - reach, middle[0] + reach
    while x < end:
        width = height * rng.uniform(0.3, 0.8)
        strokes = rng.uniform(0, 1, (int(rng.integers(2, 4)), 2, 2)) * (width, height)
        strokes += (x, middle[1])
        for stroke in strokes:
            draw.line(stroke.ravel().tolist(), colour, SMOOTHING)
        x += width + height * (0.8 if rng.random() < 0.2 else 0.25)  # now and then a space


_KINDS: tuple[Kind, ...] = (_line, _polygon, _ellipse, _writing)


# ---- photos ----


def draw_photo(rng: np.random.Generator, size: int, folder: str = "") -> np.ndarray:
    """A square piece of a photo, (size, size, 3); without a folder, a texture like one.

    A piece is 0.4 to 1 of the photo's shorter side wide, at a random place, half of them mirrored.

    Raises: ValueError for a folder without pictures, and a picture that cannot be read.
    """
    if not folder:
        return _texture(rng, size)
    files = _photos_in(folder)
    photo = _load_photo(files[rng.integers(len(files))])
    side = max(1, round(rng.uniform(0.4, 1) * min(photo.size)))
    left = int(rng.integers(0, photo.width - side + 1))
    top = int(rng.integers(0, photo.height - side + 1))
    piece = photo.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )
    pixels = np.asarray(piece)
    return (pixels[:, ::-1] if rng.random() < 0.5 else pixels).copy()


@functools.cache
def _photos_in(folder: str) -> tuple[Path, ...]:
    """Pictures of a folder and its folders, in the order of their names."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {folder}: name one with pictures for backgrounds")
    found = (path for path in root.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    files = tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))
    if not files:
        raise ValueError(
            f"{folder} holds no pictures ({', '.join(PHOTO_SUFFIXES)}): backgrounds need one or "
            f"more"
        )
    return files


@functools.lru_cache(8)
def _load_photo(path: Path) -> Image.Image:
    return load_image(path)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Made up: a sky over a ground, blotches of all sizes as in nature, soft lights, grain."""
    # Photos have about as much contrast at every scale: each octave is half as coarse and weak.
    brightness, tint = np.zeros((size, size)), np.zeros((size, size, 3))
    grid, strength = int(rng.integers(2, 4)), 1.0
    while grid < size / 2:
        brightness += strength * _smooth(rng, grid, size)
        if grid < 16:  # colour changes less in detail than brightness does
            for channel in range(3):
                tint[..., channel] += 0.4 * strength * _smooth(rng, grid, size)
        grid, strength = 2 * grid, strength * rng.uniform(0.45, 0.7)
    upper, lower = rng.uniform(40, 230, (2, 3))
    horizon = rng.uniform(0.2, 0.9) + rng.normal(0, 0.1) * np.linspace(-1, 1, size)  # of a column
    height = (np.arange(size)[:, None] + 0.5) / size
    ground = 1 / (1 + np.exp(-(height - horizon) / rng.uniform(0.01, 0.3)))  # (size, size), 0 to 1
    picture = upper + ground[..., None] * (lower - upper)
    picture += rng.uniform(20, 60) * (brightness[..., None] + tint)

    lights = Image.new("L", (size, size))
    draw = ImageDraw.Draw(lights)
    for _ in range(int(rng.integers(0, 7))):
        x, y = rng.uniform(0, size, 2)
        radius = rng.uniform(0.03, 0.15) * size
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=int(rng.integers(30, 140)))
    blurred = lights.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 0.05 * size))))
    picture += np.asarray(blurred, np.float32)[..., None] * rng.uniform(-0.5, 1, 3)
    picture += rng.normal(0, rng.uniform(0, 8), (size, size, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, grid: int, size: int) -> np.ndarray:
    """Random values on a coarse grid, in between interpolated: (size, size), about -1 to 1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (grid, grid)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
