"""Scenes made of photographs: real things, cut out, on photographs of surfaces. For tests only.

Nothing of it is ever trained on. How far it is from a photograph of such a table is told in
docs/find.md: all things of a kind are one photograph, turned, scaled and lit; only coins are
different ones. `scripts/build_photos.py` makes the files.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from nanomolmo2.emoji.scenes import TEST_STREAM
from nanomolmo2.files import read_regular
from nanomolmo2.things.camera import Camera
from nanomolmo2.things.grounds import colour
from nanomolmo2.things.kinds import TURNS, Kind
from nanomolmo2.things.looks import DrawnLook, Look, are_clearly_other
from nanomolmo2.things.scenes import WORLD, Scene, set_off
from nanomolmo2.things.settings import ThingScene
from nanomolmo2.things.surface import Light
from nanomolmo2.things.table import Table

Rng = np.random.Generator
Box = tuple[int, int, int, int]  # x0, y0, x1, y1

PHOTOS = Path(__file__).parents[1] / "assets" / "photos"
PHOTO_STREAM = 5  # second word of the seeds, see `scenes`
LARGEST_INDEX = 1_000_000  # bytes

# As the test set `few`; no things larger than their photographs.
CONFIG = ThingScene(max_like=10, min_others=2, max_others=14, min_px=22, max_px=64, max_kinds=4)
COUSINS = 0.5  # share of the scenes whose other kinds are of the first's group, as far as they can
NUM_SCENES, NUM_LOOKS = 30, 40  # tries
DULL = 12.0  # of 255: a ground whose channels differ by no more is grey, and is tinted


@functools.cache
def photo_index() -> dict[str, Any]:
    """What index.json says of the photographs."""
    found: dict[str, Any] = json.loads(read_regular(PHOTOS / "index.json", LARGEST_INDEX))
    return found


def coins() -> tuple[Image.Image, list[Box]]:
    """The photograph of 24 coins, RGB, and the boxes around them, as a text is read."""
    with Image.open(PHOTOS / "coins.png") as file:
        image = file.convert("RGB")
    return image, [tuple(box) for box in photo_index()["coins"]["boxes"]]


# ---- things ----


@dataclass(eq=False)
class VariedLook(Look):
    """A kind of which there are several photographs, each of a thing of its own."""

    id: str
    origin: str
    looks: tuple[DrawnLook, ...]

    @cached_property
    def thumb(self) -> np.ndarray:
        return self.looks[0].thumb

    def draw(self, rng: Rng, px: float, angle: float, mirror: bool, light: Light) -> np.ndarray:
        look = self.looks[int(rng.integers(len(self.looks)))]
        return look.draw(rng, px, angle, mirror, light)

    def recoloured(self, rng: Rng) -> None:
        """Photographs stay in their own colours."""


@functools.cache
def photo_looks() -> tuple[Look, ...]:
    """All kinds of things; their ``origin`` is their group."""
    index, looks = photo_index(), list[Look]()
    px = index["cell_px"]
    with Image.open(PHOTOS / "cutouts.webp") as file:
        sheet = np.asarray(file.convert("RGBA"))
    columns = sheet.shape[1] // px
    for number, thing in enumerate(index["things"]):
        row, column = divmod(number, columns)
        cell = sheet[row * px : (row + 1) * px, column * px : (column + 1) * px]
        looks.append(DrawnLook(f"photo/{thing['name']}", thing["group"], cell))
    image, boxes = coins()
    cells = [coin_cell(image, box, px) for box in boxes]
    of_coins = (DrawnLook(f"photo/coin {i}", "coins", cell) for i, cell in enumerate(cells, 1))
    return (*looks, VariedLook("photo/coin", "coins", tuple(of_coins)))


def coin_cell(image: Image.Image, box: Box, px: int) -> np.ndarray:
    """uint8 (px, px, 4), RGBA: the ellipse inside a box, its longer side filling all but a border
    of one pixel."""
    part = image.crop(box).convert("RGBA")
    fine = Image.new("L", (4 * part.width, 4 * part.height))
    ImageDraw.Draw(fine).ellipse((4, 4, fine.width - 5, fine.height - 5), fill=255)
    part.putalpha(fine.resize(part.size, Image.Resampling.BOX))
    by = (px - 2) / max(part.size)
    size = (round(by * part.width), round(by * part.height))
    cell = Image.new("RGBa", (px, px))
    scaled = part.convert("RGBa").resize(size, Image.Resampling.LANCZOS)
    cell.paste(scaled, ((px - size[0]) // 2, (px - size[1]) // 2))
    return np.asarray(cell.convert("RGBA"))


# ---- grounds ----


@functools.cache
def photo_grounds() -> dict[str, np.ndarray]:
    """Name -> float32 (320, 320, 3), 0 to 255."""
    index = photo_index()
    with Image.open(PHOTOS / "grounds.webp") as file:
        parts = np.split(np.asarray(file.convert("RGB"), np.float32), len(index["grounds"]), axis=1)
    return {ground["name"]: part for ground, part in zip(index["grounds"], parts, strict=True)}


def draw_photo_ground(rng: Rng, size: tuple[int, int], name: str) -> np.ndarray:
    """A part of a photographed surface, float32 (height, width, 3): turned, scaled; a grey one in
    a colour."""
    whole = np.rot90(photo_grounds()[name], int(rng.integers(4)))
    side = int(rng.integers(whole.shape[0] // 2, whole.shape[0] + 1))
    y, x = rng.integers(0, whole.shape[0] - side + 1, 2).tolist()
    part = Image.fromarray(whole[y : y + side, x : x + side].astype(np.uint8))
    longer = max(size)
    part = part.resize((longer, longer), Image.Resampling.BICUBIC)
    made = np.array(part.crop((0, 0, size[1], size[0])), np.float32)
    if np.ptp(whole.mean((0, 1))) < DULL:
        wanted = colour(rng, saturation=(0, 0.4), value=(0.2, 0.9))
        made *= wanted / max(float(made.mean()), 1.0)
    return np.clip(made, 0, 255, out=made)


# ---- scenes ----


def photo_scene(index: int, seed: int = 0) -> Scene:
    """Scene number ``index`` of the fixed set: 2 to 10 things of the first kind among others."""
    rng = np.random.default_rng([TEST_STREAM, PHOTO_STREAM, WORLD, seed, index])
    for _ in range(NUM_SCENES):
        kinds, counts = _choose(rng)
        scene = _place(rng, kinds, counts)
        if len(scene.of_kind(0)) >= CONFIG.min_like:
            return scene
    raise AssertionError("two small things find room in any picture")


def _choose(rng: Rng) -> tuple[list[Kind], list[int]]:
    """Kinds that clearly differ, and how many things of each."""
    looks = photo_looks()
    like = int(_log_uniform(rng, CONFIG.min_like, CONFIG.max_like + 1))
    others = int(rng.integers(CONFIG.min_others, CONFIG.max_others + 1))
    room = math.sqrt(0.42 * CONFIG.width * CONFIG.height / (like + others)) * 1.15
    px = _log_uniform(rng, CONFIG.min_px, min(CONFIG.max_px, max(CONFIG.min_px, room)))
    kinds = [_kind(rng, looks[int(rng.integers(len(looks)))], px)]
    wanted = 1 + int(rng.integers(1, CONFIG.max_kinds + 1))
    group = [look for look in looks if look.origin == kinds[0].look.origin]
    pool = group if rng.random() < COUSINS and len(group) > 1 else looks
    for _ in range(NUM_LOOKS):
        if len(kinds) >= wanted:
            break
        look = pool[int(rng.integers(len(pool)))]
        if all(are_clearly_other(look, kind.look) for kind in kinds):
            kinds.append(_kind(rng, look, px * rng.uniform(0.7, 1.4)))
        else:
            pool = looks if rng.random() < 0.1 else pool  # no other of the group may be
    shares = rng.dirichlet(np.full(len(kinds) - 1, 1.5)) if len(kinds) > 1 else np.empty(0)
    return kinds, [like, *(max(1, round(share * others)) for share in shares)]


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def _kind(rng: Rng, look: Look, px: float) -> Kind:
    """Things that lie as they fell, of sizes within a factor of 1.5."""
    factor = math.sqrt(rng.uniform(1, 1.5))
    low, high = max(CONFIG.min_px, px / factor), min(CONFIG.max_px, px * factor)
    return Kind(look, (min(low, high), max(low, high)), turn=int(rng.choice(TURNS[1:])))


def _place(rng: Rng, kinds: list[Kind], counts: list[int]) -> Scene:
    size = (CONFIG.height, CONFIG.width)
    ground = str(rng.choice(list(photo_grounds())))
    canvas = draw_photo_ground(rng, size, ground)
    set_off(canvas, kinds)
    numbers = rng.permutation([kind for kind, count in enumerate(counts) for _ in range(count)])
    table = Table(rng, canvas, Light.draw(rng), CONFIG, len(numbers))
    for number in numbers.tolist():
        kind = kinds[number]
        table.put(number, kind, float(rng.uniform(*kind.px)))
    image = Camera.draw(rng, CONFIG.camera).take(rng, table.canvas)
    return Scene(image, table.things(), tuple(kinds), table.instance_map, f"photo/{ground}")
