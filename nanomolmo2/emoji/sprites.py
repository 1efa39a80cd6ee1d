"""Emoji drawings as arrays: every category in every vendor's style that has it.

The drawings are other people's work, see ``assets/emoji/ATTRIBUTION.md``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
LEVELS_PX = (96, 64, 44)  # sides of the stored sizes; drawing never shrinks by more than about 1.5

INKED = "-inked"  # ends the name of a style that is drawn anew by `inked`
INK = 17  # grey of its lines, of 255
INKED_COLOURS = 7  # flat colours that it leaves
INKED_STEP = 120  # sum of the differences of R, G, B from which a line runs between two colours


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads((ASSETS / "index.json").read_text(encoding="utf-8"))


CATEGORIES: tuple[str, ...] = tuple(c["name"] for c in _index()["categories"])
PLURALS: tuple[str, ...] = tuple(c["plural"] for c in _index()["categories"])

# "seen" is for training and testing; "mild" (twemoji) and "openmoji" only ever test; "extra" and
# "inked" (the seen styles, drawn anew by `inked`) only ever train. A group's place here is a word
# of its test scenes' seeds: new groups come last.
STYLE_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(s for s, info in _index()["styles"].items() if info["group"] == group)
    for group in ("seen", "mild", "openmoji", "extra")
}
STYLE_GROUPS["inked"] = tuple(style + INKED for style in STYLE_GROUPS["seen"])


def article(noun: str) -> str:
    """``"a"`` or ``"an"``; right for every noun in `CATEGORIES`."""
    return "an" if noun[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Sprites:
    """All drawings. An atlas is read when one of its drawings is first asked for.

    Attributes:
        size: side of a drawing's cell in pixels; the drawing's longer side fills it but for one
            pixel on each side.
        images: (category index, style) -> the drawing at each size of `LEVELS_PX`, PIL mode "RGBa"
            (colours multiplied by alpha, so that they can be resampled and added). Those of the
            group "inked" are drawn on first use, about 8 ms each.
    """

    size: int
    images: Mapping[tuple[int, str], tuple[Image.Image, ...]]

    @classmethod
    def load(cls, folder: Path = ASSETS) -> Sprites:
        """The drawings in ``folder``; each atlas is read at most once per process.

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
    size, places = index["sprite_px"], _places(index)
    extents: dict[str, tuple[int, int]] = {}
    for file in {file for file, _, _ in places.values()}:
        with Image.open(folder / file) as atlas:  # reads the header only
            extents[file] = atlas.size
    for (category, style), (file, x, y) in places.items():
        width, height = extents[file]
        if x + size > width or y + size > height:
            raise ValueError(
                f"{folder / file} is {width}x{height} pixels, but index.json places "
                f"{style}/{index['categories'][category]['name']} at ({x}, {y}); rebuild both "
                f"with scripts/build_emoji_atlas.py"
            )
    return Sprites(size, _Images(folder, size, places))


def _places(index: dict[str, Any]) -> dict[tuple[int, str], tuple[str, int, int]]:
    """(category, style) -> atlas file and left, top of the cell in it, pixels."""
    size = index["sprite_px"]
    return {
        (i, style): (info["file"], info["column"] * size, category["row"] * size)
        for style, info in index["styles"].items()
        for i, category in enumerate(index["categories"])
        if style not in category["missing"]
    }


class _Images(Mapping[tuple[int, str], tuple[Image.Image, ...]]):
    """`Sprites.images`, made when asked for: most users need one atlas, and few the inked ones."""

    def __init__(
        self, folder: Path, size: int, places: dict[tuple[int, str], tuple[str, int, int]]
    ) -> None:
        self.folder, self.size, self.places = folder, size, places
        seen = [(c, s) for c, s in places if s in STYLE_GROUPS["seen"]]
        self.keys_in_order = dict.fromkeys([*places, *((c, s + INKED) for c, s in seen)])
        self.done: dict[tuple[int, str], tuple[Image.Image, ...]] = {}

    def __getitem__(self, key: tuple[int, str]) -> tuple[Image.Image, ...]:
        if key not in self.keys_in_order:
            raise KeyError(key)
        if key not in self.done:
            category, style = key
            if style.endswith(INKED):
                source = self[category, style.removesuffix(INKED)][0]
                self.done[key] = self._levels(inked(source))
            else:
                self._read(self.places[key][0])
        return self.done[key]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.keys_in_order)

    def __contains__(self, key: object) -> bool:
        return key in self.keys_in_order  # Mapping's own would make the drawing to find out

    def __len__(self) -> int:
        return len(self.keys_in_order)

    def _read(self, wanted: str) -> None:
        with Image.open(self.folder / wanted) as file:
            atlas = file.convert("RGBA")
        for key, (name, x, y) in self.places.items():
            if name == wanted:
                # "RGBA" -> "RGBa" multiplies colours by alpha, so that resizing cannot bleed edges.
                cell = atlas.crop((x, y, x + self.size, y + self.size)).convert("RGBa")
                self.done[key] = self._levels(cell)

    def _levels(self, cell: Image.Image) -> tuple[Image.Image, ...]:
        return tuple(
            cell if px == self.size else cell.resize((px, px), Image.Resampling.LANCZOS)
            for px in LEVELS_PX
        )


def inked(image: Image.Image) -> Image.Image:
    """The drawing in another manner: a few flat colours, dark lines around it and between them.

    Lines are about 3 px wide, and the outline reaches one pixel further out than the drawing did;
    they suit drawings of about 96 px. Nothing in it is random.

    Args: image: mode "RGBa". Returns: the same mode and size.
    """
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    # Medians take the highlights and the grain out of the colours, the mode specks out of the
    # regions.
    smooth = rgba.convert("RGB").filter(ImageFilter.MedianFilter(5))
    flat = smooth.quantize(INKED_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    regions = Image.fromarray(np.array(flat)).filter(ImageFilter.ModeFilter(7))
    palette = np.array(flat.getpalette(), np.int16).reshape(-1, 3)
    rgb = palette[np.asarray(regions)]  # (H, W, 3)

    inside = np.asarray(alpha) >= 128
    across = np.abs(rgb[:, 1:] - rgb[:, :-1]).sum(-1) > INKED_STEP
    down = np.abs(rgb[1:] - rgb[:-1]).sum(-1) > INKED_STEP
    across &= inside[:, 1:] & inside[:, :-1]
    down &= inside[1:] & inside[:-1]
    edges = np.zeros(inside.shape, bool)
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    lines = Image.fromarray(np.uint8(255) * edges).filter(ImageFilter.GaussianBlur(0.7))
    inner = np.minimum(np.asarray(lines, np.float32) / 255 * 1.6, 1)
    outline = 1 - np.asarray(alpha.filter(ImageFilter.MinFilter(5)), np.float32) / 255
    ink = np.maximum(inner, outline)[..., None]
    pixels = np.empty((*inside.shape, 4), np.uint8)
    pixels[..., :3] = np.rint(rgb * (1 - ink) + INK * ink)
    pixels[..., 3] = np.asarray(alpha.filter(ImageFilter.MaxFilter(3)))
    return Image.fromarray(pixels).convert("RGBa")
