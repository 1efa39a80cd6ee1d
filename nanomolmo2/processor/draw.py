"""Draw points over their picture: numbered discs, and each label once."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from nanomolmo2.processor.image import ImageSource, load_image
from nanomolmo2.processor.points import Point

# Told apart by people with colour-blindness too (after Okabe and Ito), each with its text colour.
_COLOURS = (
    ("#d6006c", "white"),
    ("#0072b2", "white"),
    ("#f0c800", "black"),
    ("#007a5a", "white"),
    ("#e66a00", "black"),
    ("#56b4e9", "black"),
    ("#6a3d9a", "white"),
    ("#b8e000", "black"),
)
_OVERSAMPLE = 4  # PIL draws hard edges: discs are drawn larger and shrunk


def draw_points(image: ImageSource, points: Iterable[Point], *, number: int = 1) -> Image.Image:
    """Mark points on a copy of their picture.

    Each point is a disc with its id, ringed in white and black so that it shows on any background;
    points with the same label share a colour, and the first of them carries the label. Sizes follow
    the picture's.

    Args:
        image: picture the points belong to, anything `load_image` takes.
        points: in its pixels, as `parse_points` gives them; those of other pictures are left out.
        number: which picture of the prompt this is, from 1.
    Returns: RGB image of the same size.
    """
    canvas = load_image(image).copy()
    radius = max(7, round(0.018 * math.sqrt(canvas.width * canvas.height)))
    shown = [point for point in points if point.image == number]
    labels = list(dict.fromkeys(point.label for point in shown))
    for index, point in enumerate(shown):
        colours = _COLOURS[labels.index(point.label) % len(_COLOURS)]
        disc = _disc(radius, str(point.id or index + 1), *colours)
        corner = (int(point.x) - disc.width // 2, int(point.y) - disc.height // 2)
        canvas.paste(disc, corner, disc)
    for label in filter(None, labels):
        first = next(point for point in shown if point.label == label)
        colours = _COLOURS[labels.index(label) % len(_COLOURS)]
        _draw_label(canvas, first, label, radius, *colours)
    return canvas


def _disc(radius: int, text: str, fill: str, ink: str) -> Image.Image:
    """RGBA picture of a numbered disc; the radius does not count the rings."""
    ring = max(1, radius // 6)
    side = 2 * (radius + 2 * ring) + 1
    large = Image.new("RGBA", (side * _OVERSAMPLE, side * _OVERSAMPLE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(large)
    for inset, colour in ((0, "black"), (ring, "white"), (2 * ring, fill)):
        inset *= _OVERSAMPLE
        draw.ellipse((inset, inset, large.width - 1 - inset, large.height - 1 - inset), fill=colour)
    size = radius * _OVERSAMPLE * (1.5 if len(text) == 1 else 2.2 / len(text))
    centre = large.width / 2
    draw.text((centre, centre), text, fill=ink, font=_font(size), anchor="mm")
    return large.resize((side, side), Image.Resampling.LANCZOS)


def _draw_label(
    canvas: Image.Image, point: Point, label: str, radius: int, fill: str, ink: str
) -> None:
    """A box beside the disc: to the right, or to the left where the picture ends."""
    draw = ImageDraw.Draw(canvas)
    font = _font(max(11, 1.3 * radius))
    label = label if len(label) <= 40 else label[:39] + "…"
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    pad = max(2, radius // 3)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = point.x + 1.6 * radius
    if x + width > canvas.width:
        x = point.x - 1.6 * radius - width
    x = round(min(max(x, 0), max(canvas.width - width, 0)))
    y = round(min(max(point.y - height / 2, 0), max(canvas.height - height, 0)))
    box = (x, y, x + width - 1, y + height - 1)
    draw.rounded_rectangle(box, radius=pad, fill=fill, outline="white", width=max(1, radius // 8))
    draw.text((x + pad - left, y + pad - top), label, fill=ink, font=font)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
