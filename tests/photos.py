"""Photos of something that ``tiny`` has never seen: hex nuts on a table, with labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 256, 192


def draw_photos(folder: Path, count: int = 24, seed: int = 0) -> dict[str, list[tuple[int, ...]]]:
    """Write ``00.png``, ``01.png``, ... and ``labels.csv``, a line for each nut: image, label, x0,
    y0, x1, y1. A picture has one to three nuts.

    Returns: name of the picture -> boxes.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines, boxes = ["image,label,x0,y0,x1,y1"], dict[str, list[tuple[int, ...]]]()
    for i in range(count):
        name = f"{i:02d}.png"
        image = _table(rng)
        draw = ImageDraw.Draw(image)
        for column in rng.permutation(3)[: 1 + i % 3]:
            radius = int(rng.integers(20, 28))
            x = int(42 + 85 * column + rng.integers(-10, 11))
            y = int(rng.integers(40, HEIGHT - 40))
            box = _nut(draw, x, y, radius, float(rng.random()))
            boxes.setdefault(name, []).append(box)
            lines.append(",".join(map(str, (name, "hex_nut", *box))))
        image.filter(ImageFilter.GaussianBlur(0.6)).save(folder / name)
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return boxes


def _table(rng: np.random.Generator) -> Image.Image:
    """Wood: a brown with stripes along it."""
    stripes = rng.normal(0, 6, (HEIGHT, 1, 1)) + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
    brown = np.array([150, 110, 75]) + rng.integers(-15, 16, 3)
    return Image.fromarray(np.clip(brown + stripes, 0, 255).astype(np.uint8))


def _nut(
    draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, turn: float
) -> tuple[int, int, int, int]:
    """A hexagon with a hole; returns the box around it."""
    corners = [
        (
            x + radius * math.cos(math.pi * (k + turn) / 3),
            y + radius * math.sin(math.pi * (k + turn) / 3),
        )
        for k in range(6)
    ]
    draw.polygon(corners, fill=(178, 182, 190), outline=(90, 92, 98))
    hole = radius // 2
    draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=(70, 55, 45), outline=(90, 92, 98))
    xs, ys = zip(*corners, strict=True)
    return math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))
