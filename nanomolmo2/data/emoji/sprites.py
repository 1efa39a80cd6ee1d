"""Emoji drawings as arrays: every category in every vendor's style that has it.

The drawings are other people's work, see ``assets/emoji/ATTRIBUTION.md``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[2] / "assets" / "emoji"
LEVELS_PX = (96, 64, 44)  # sides of the stored sizes; drawing never shrinks by more than about 1.5


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads((ASSETS / "index.json").read_text(encoding="utf-8"))


CATEGORIES: tuple[str, ...] = tuple(c["name"] for c in _index()["categories"])
PLURALS: tuple[str, ...] = tuple(c["plural"] for c in _index()["categories"])

# "seen" is for training; "mild" (twemoji) and "openmoji" only ever test.
STYLE_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(s for s, info in _index()["styles"].items() if info["group"] == group)
    for group in ("seen", "mild", "openmoji")
}


def article(noun: str) -> str:
    """``"a"`` or ``"an"``; right for every noun in `CATEGORIES`."""
    return "an" if noun[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Sprites:
    """All drawings, read once.

    Attributes:
        size: side of a drawing's cell in pixels; the drawing's longer side fills it but for one
            pixel on each side.
        images: (category index, style) -> the drawing at each size of `LEVELS_PX`, PIL mode "RGBa"
            (colours multiplied by alpha, so that they can be resampled and added).
    """

    size: int
    images: dict[tuple[int, str], tuple[Image.Image, ...]]

    @classmethod
    def load(cls, folder: Path = ASSETS) -> Sprites:
        """Read the atlases in ``folder``; the bundled ones are read only once per process.

        Raises: ValueError if an atlas does not have the size that the index asks for.
        """
        return _load(Path(folder))

    def styles_of(self, category: int) -> tuple[str, ...]:
        """Styles that have a drawing of this category."""
        return tuple(style for c, style in self.images if c == category)

    def has(self, category: int, style: str) -> bool:
        return (category, style) in self.images

    def rgba(self, category: int, style: str) -> np.ndarray:
        """One drawing as a uint8 array (size, size, 4), colours not multiplied by alpha."""
        return np.asarray(self.images[category, style][0].convert("RGBA"))


@functools.cache
def _load(folder: Path) -> Sprites:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    size, categories = index["sprite_px"], index["categories"]
    files = {info["file"] for info in index["styles"].values()}
    atlases = {file: Image.open(folder / file).convert("RGBA") for file in files}
    images: dict[tuple[int, str], tuple[Image.Image, ...]] = {}
    for style, info in index["styles"].items():
        atlas = atlases[info["file"]]
        x = info["column"] * size
        for i, category in enumerate(categories):
            y = category["row"] * size
            if x + size > atlas.width or y + size > atlas.height:
                raise ValueError(
                    f"{folder / info['file']} is {atlas.width}x{atlas.height} pixels, but "
                    f"index.json places {style}/{category['name']} at ({x}, {y}); rebuild both "
                    f"with scripts/build_emoji_atlas.py"
                )
            if style in category["missing"]:
                continue
            # "RGBA" -> "RGBa" multiplies colours by alpha, so that resizing cannot bleed edges.
            cell = atlas.crop((x, y, x + size, y + size)).convert("RGBa")
            images[i, style] = tuple(
                cell if px == size else cell.resize((px, px), Image.Resampling.LANCZOS)
                for px in LEVELS_PX
            )
    return Sprites(size, images)
