"""Draw points over their image or the frames of a video: numbered discs, and each label once."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nanomolmo2.checks import save_image
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
    """Mark points on a copy of their image.

    Each point is a disc with its id, ringed in white and black so that it shows on any background;
    points with the same label share a colour, and the first of them carries the label. Sizes follow
    the image's. A label that the font lacks characters of is drawn as `label_marks` says.

    Args:
        image: image the points belong to, anything `load_image` takes.
        points: in its pixels, as `parse_points` gives them; those of other images are left out.
        number: which image of the prompt this is, from 1.
    Returns: RGB image of the same size.
    """
    points = list(points)
    shown = [point for point in points if point.image == number and point.time is None]
    colours = _colour_numbers(shown, by_id=False)
    return _paint(image, shown, colours, label_marks(points), by_id=False)


def label_marks(points: Iterable[Point]) -> dict[str, str]:
    """The labels that cannot be drawn, and what is drawn in their place.

    Pillow's font has little more than the letters of English. Accents are left out (``cafe``);
    a label with other characters (Chinese, Arabic, emoji) becomes ``label A``, ``label B``, in
    order of appearance among all given points, so whoever shows the image can say what they mean.
    """
    labels = dict.fromkeys(label for point in points if (label := point.label))
    lacking = [label for label in labels if any(map(_lacks, _without_accents(label)))]
    return {label: f"label {_letters(number)}" for number, label in enumerate(lacking)}


def _letters(number: int) -> str:
    """A .. Z, A2 .. Z2, ..."""
    turn, letter = divmod(number, 26)
    return chr(ord("A") + letter) + (str(turn + 1) if turn else "")


def _without_accents(label: str) -> str:
    """A label as the font may have it, on one line."""
    label = " ".join(label.split())
    if not any(map(_lacks, label)):
        return label
    parts = unicodedata.normalize("NFKD", label)
    return "".join(part for part in parts if not unicodedata.combining(part))


def writable(text: str) -> str:
    """A text as the font has it, with a ``?`` for each character that it lacks."""
    return "".join("?" if _lacks(c) else c for c in _without_accents(text))


@lru_cache(maxsize=4096)
def _lacks(character: str) -> bool:
    """Whether the font draws its empty box for a character."""
    if character == " ":
        return False
    font = drawing_font(32)
    try:
        drawn, box = font.getmask(character), font.getmask("\uffff")
    except UnicodeError:  # the small font of a Pillow without FreeType, or half a pair
        return True
    return drawn.size == box.size and bytes(drawn) == bytes(box)


def draw_frames(
    frames: Sequence[ImageSource], times: Sequence[float], points: Iterable[Point]
) -> list[Image.Image]:
    """Mark points on copies of a video's frames.

    A point is drawn on the frame nearest in time; one that is more than half a frame step before
    the first or after the last frame is left out. Points look as in `draw_points`, except that an
    object which is followed over time (an id that comes at several times: tracks) has a colour of
    its own.

    Args:
        frames: images of the video, anything `load_image` takes.
        times: seconds, one a frame, rising.
        points: in pixels of the frames, as `parse_points` gives them; those of images, which have
            no time, are left out.
    Returns: RGB images, one a frame, of the same size.
    Raises: ValueError if there is not one time for each frame.
    """
    if len(frames) != len(times):
        raise ValueError(f"found {len(times)} times for {len(frames)} frames: give one each")
    steps = [after - before for before, after in itertools.pairwise(times)]
    # Times in answers are written with one decimal, so even a point on a frame may be 0.05 s off.
    reach = max(steps, default=0.0) / 2 + 0.05
    points = list(points)
    shown: list[list[Point]] = [[] for _ in frames]
    drawn: list[Point] = []
    for point in points:
        if point.time is None or not frames:
            continue
        distances = [abs(time - point.time) for time in times]
        nearest = distances.index(min(distances))
        if distances[nearest] <= reach:
            shown[nearest].append(point)
            drawn.append(point)
    followed = len({(p.label, p.id) for p in drawn}) < len(drawn)
    colours = _colour_numbers(drawn, by_id=followed)
    marks = label_marks(points)
    return [
        _paint(frame, on_frame, colours, marks, by_id=followed)
        for frame, on_frame in zip(frames, shown, strict=True)
    ]


def save_gif(
    frames: Sequence[Image.Image], times: Sequence[float], path: str | Path, *, max_side: int = 640
) -> None:
    """Write frames as an animated GIF that runs as fast as the video; complete or not at all.

    Args:
        frames: at least one, such as `draw_frames` gives.
        times: seconds, one a frame, rising; the last frame stays as long as the one before.
        path: ends with ``.gif``.
        max_side: larger frames are shrunk to this many pixels on their longer side.
    """
    if not frames or len(frames) != len(times):
        raise ValueError(
            f"found {len(frames)} frames and {len(times)} times: give at least one frame, and one "
            f"time for each"
        )
    steps = [after - before for before, after in itertools.pairwise(times)]
    steps.append(steps[-1] if steps else 1.0)
    small = []
    for frame in frames:
        image = frame.copy()
        image.thumbnail((max_side, max_side))
        small.append(image)
    save_image(
        small[0],
        path,
        "GIF",
        save_all=True,
        append_images=small[1:],
        duration=[max(20, round(1000 * step)) for step in steps],  # players slow down below 20
        loop=0,
    )


def _colour_key(point: Point, by_id: bool) -> Hashable:
    return (point.label, point.id) if by_id else point.label


def _colour_numbers(points: Iterable[Point], *, by_id: bool) -> dict[Hashable, int]:
    """Colours are dealt in order of appearance."""
    keys = dict.fromkeys(_colour_key(point, by_id) for point in points)
    return {key: number for number, key in enumerate(keys)}


def _paint(
    image: ImageSource,
    points: Sequence[Point],
    colours: Mapping[Hashable, int],
    marks: Mapping[str, str],
    *,
    by_id: bool,
) -> Image.Image:
    """A copy of an image with points; ``colours`` has a number for each label, or label and id."""
    canvas = load_image(image).copy()
    radius = max(7, round(0.018 * math.sqrt(canvas.width * canvas.height)))

    def colours_of(point: Point) -> tuple[str, str]:
        return _COLOURS[colours[_colour_key(point, by_id)] % len(_COLOURS)]

    for index, point in enumerate(points):
        disc = _disc(radius, str(point.id or index + 1), *colours_of(point))
        corner = (int(point.x) - disc.width // 2, int(point.y) - disc.height // 2)
        canvas.paste(disc, corner, disc)
    for label in filter(None, dict.fromkeys(point.label for point in points)):
        first = next(point for point in points if point.label == label)
        text = marks.get(label) or _without_accents(label)
        _draw_label(canvas, first, text, radius, *colours_of(first))
    return canvas


def _disc(radius: int, text: str, fill: str, ink: str) -> Image.Image:
    """RGBA image of a numbered disc; the radius does not count the rings."""
    ring = max(1, radius // 6)
    side = 2 * (radius + 2 * ring) + 1
    large = Image.new("RGBA", (side * _OVERSAMPLE, side * _OVERSAMPLE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(large)
    for inset, colour in ((0, "black"), (ring, "white"), (2 * ring, fill)):
        inset *= _OVERSAMPLE
        draw.ellipse((inset, inset, large.width - 1 - inset, large.height - 1 - inset), fill=colour)
    size = radius * _OVERSAMPLE * (1.5 if len(text) == 1 else 2.2 / len(text))
    centre = large.width / 2
    draw.text((centre, centre), text, fill=ink, font=drawing_font(size), anchor="mm")
    return large.resize((side, side), Image.Resampling.LANCZOS)


def _draw_label(
    canvas: Image.Image, point: Point, label: str, radius: int, fill: str, ink: str
) -> None:
    """A box beside the disc: to the right, or to the left where the image ends."""
    draw = ImageDraw.Draw(canvas)
    font = drawing_font(max(11, 1.3 * radius))
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


def drawing_font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, whose letters are about so many pixels high."""
    return ImageFont.load_default(size=size)
