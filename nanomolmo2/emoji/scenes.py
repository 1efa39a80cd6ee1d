"""Pictures with a few emoji on a background, and exactly what is where.

`SceneConfig` says what they look like; `SETTINGS` are named ones, from easy to hard. Positions are
pixels, x right and y down from the top-left corner; a pixel covers [i, i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from PIL import Image

from nanomolmo2.config import Config
from nanomolmo2.emoji.backgrounds import draw_clutter, draw_photo
from nanomolmo2.emoji.sprites import CATEGORIES, LEVELS_PX, STYLE_GROUPS, Sprites

TRAIN_STREAM, TEST_STREAM = 1, 2  # first word of every seed: no test scene can turn up in training
VISIBLE_ALPHA = 96  # of 255: a pixel belongs to an object from here on
TEST_GROUPS = ("seen", "mild", "openmoji")  # of `STYLE_GROUPS`; any others are for training only
MAX_OBJECTS = 127  # that an int8 map can number
NUM_PLACES = 32  # positions tried for an object before it shrinks,
NUM_TRIES = 20  # and how often it does before the scene is begun anew
COUNT_WEIGHTS = (0.12, 0.18, 0.2, 0.2, 0.16, 0.14)  # 1, 2, ... objects; further ones like the last

Background = Literal["plain", "photo"]


@dataclass(frozen=True)
class SceneConfig(Config):
    """What scenes look like.

    Attributes:
        size: side of the picture, pixels.
        min_objects, max_objects: how many emoji.
        min_px, max_px: longer side of an emoji before it is turned, pixels. In full pictures all
            emoji shrink, but not below min_px.
        styles: styles to draw from.
        mixed_styles: share of the scenes in which every object has a style of its own.
        repeats: share of the scenes of two or more objects in which a category occurs more than
            once.
        max_degrees: largest rotation to either side.
        variation: how far the colours of a drawing are moved, in parts of a usual small change;
            above 1, it is stretched and sheared as well, so that shapes must be learned.
        max_overlap: shared part of two boxes, of the smaller one, stays below this, up to 1.
        min_visible: share of an object's pixels, 0 to 1, that must stay in view. Above 0, boxes are
            those of the pixels in view; at 0 they reach under a covering corner.
        max_filling: sum of the objects' squared sizes, of the picture: beyond this, they shrink.
        clutter: most shapes, lines and scribbles behind the objects; at least half as many.
        background: plain colours and patterns, or pieces of photos.
        photos: folder of the pictures to take pieces of; empty: textures are made up.
    """

    size: int = 192
    min_objects: int = 1
    max_objects: int = 6
    min_px: float = 30
    max_px: float = 72
    styles: tuple[str, ...] = STYLE_GROUPS["seen"]
    mixed_styles: float = 0.5
    repeats: float = 0.47
    max_degrees: float = 15
    variation: float = 1.0
    max_overlap: float = 0.1
    min_visible: float = 0.0
    max_filling: float = 0.5
    clutter: int = 0
    background: Background = "plain"
    photos: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects:
            raise ValueError(
                f"min_objects ({self.min_objects}) to max_objects ({self.max_objects}) must be a "
                f"range that starts at 1 or more"
            )
        if self.max_objects > MAX_OBJECTS:
            raise ValueError(f"max_objects is {self.max_objects}, expected at most {MAX_OBJECTS}")
        if not 8 <= self.min_px <= self.max_px <= self.size / 2:
            raise ValueError(
                f"min_px ({self.min_px}) to max_px ({self.max_px}) must be a range between 8 and "
                f"half of the picture's size ({self.size}), so that objects find room"
            )
        # Overlap is not counted here: this many of the smallest objects surely fit side by side.
        if self.max_objects * (1.3 * self.min_px) ** 2 > 0.4 * self.size**2:
            raise ValueError(
                f"{self.max_objects} objects of {self.min_px} px do not fit into {self.size} px; "
                f"lower max_objects or min_px"
            )
        known = [s for group in STYLE_GROUPS.values() for s in group]
        if not self.styles or not set(self.styles) <= set(known):
            raise ValueError(f"styles are {self.styles}; choose from {', '.join(known)}")
        for name, low, value, high in (
            ("variation", 0, self.variation, 10),
            ("max_overlap", 0.02, self.max_overlap, 1),  # with none, full pictures find no room
            ("min_visible", 0, self.min_visible, 1),
            ("max_filling", 0.1, self.max_filling, 4),
            ("clutter", 0, self.clutter, 1000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        if self.background not in get_args(Background):
            raise ValueError(f"background is {self.background!r}, expected plain or photo")
        if self.photos and self.background != "photo":
            raise ValueError(f"photos ({self.photos}) are for background='photo' only")


# Wide ones are for models that look at crops: small things in a large picture.
SETTINGS: dict[str, SceneConfig] = {
    "easy": SceneConfig(),
    "crowded": SceneConfig(min_objects=7, max_objects=20, min_px=20, max_px=44, repeats=0.8),
    "occluded": SceneConfig(
        min_objects=3, max_objects=8, min_px=32, max_overlap=0.5, min_visible=0.4, max_filling=0.9
    ),
    "clutter": SceneConfig(clutter=24),
    "photos": SceneConfig(background="photo"),
    "wide384": SceneConfig(size=384, max_objects=10, min_px=24),
    "wide768": SceneConfig(size=768, max_objects=20, min_px=24, max_px=96),
}


@dataclass(frozen=True)
class SceneObject:
    """One emoji: ``box`` (x0, y0, x1, y1) around its pixels, ``center`` of the box.

    Whether the box holds pixels that another one covers: see ``min_visible`` of `SceneConfig`.
    """

    category: str
    style: str
    box: tuple[float, float, float, float]
    center: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """A picture and its ground truth.

    Attributes:
        image: uint8 (H, W, 3).
        objects: in drawing order; a later one may cover a corner of an earlier one.
        instance_map: int8 (H, W), index into ``objects`` of the topmost object, -1 for background.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    instance_map: np.ndarray


def setting(name: str, size: int | None = None) -> SceneConfig:
    """A named config of `SETTINGS`.

    Args:
        size: another side of the picture, pixels; the emoji keep theirs.
    Raises: ValueError for an unknown name, and a size in which the emoji find no room.
    """
    if name not in SETTINGS:
        raise ValueError(f"unknown setting {name!r}; choose from {', '.join(SETTINGS)}")
    config = SETTINGS[name]
    return config if size is None else replace(config, size=size)


def train_rng(seed: int, *key: int) -> np.random.Generator:
    """Random numbers for training, never those of `test_scene`; ``key``: worker, step, ..."""
    return np.random.default_rng([TRAIN_STREAM, seed, *key])


def group_rng(seed: int, group: str, index: int, *streams: int) -> np.random.Generator:
    """Random numbers for example ``index`` of the tests of an art group of `TEST_GROUPS`."""
    return np.random.default_rng([*streams, seed, TEST_GROUPS.index(group), index])


def render_scene(
    rng: np.random.Generator, sprites: Sprites, config: SceneConfig | None = None
) -> Scene:
    """Draw a scene. The same ``rng`` state and config give the same scene, bit by bit."""
    config = config or SceneConfig()
    while True:
        scene = draw_scene(rng, sprites, config, choose_objects(rng, sprites, config))
        if scene is not None:
            return scene


def draw_scene(
    rng: np.random.Generator,
    sprites: Sprites,
    config: SceneConfig,
    chosen: list[tuple[int, str]],
) -> Scene | None:
    """Draw a scene of these (category index, style); None where they found no room."""
    sizes = rng.uniform(config.min_px, config.max_px, len(chosen))
    fits = config.max_filling * config.size**2 / float(np.sum(sizes**2))
    sizes = np.clip(sizes * math.sqrt(min(1.0, fits)), config.min_px, config.max_px)

    canvas = draw_canvas(rng, config)
    instance_map = np.full((config.size, config.size), -1, np.int8)
    boxes = np.empty((0, 4))
    pixels = np.empty(0)  # of each object, covered ones too
    for number, ((category, style), size) in enumerate(
        zip(chosen, sorted(map(float, sizes), reverse=True), strict=True)
    ):
        for _ in range(NUM_TRIES):
            drawing = Drawing.of(rng, sprites, category, style, size, config)
            needed = config.min_visible * pixels
            places = find_places(rng, drawing.visible_size, config.size, boxes, config.max_overlap)
            free = (p for p in places if _leaves(instance_map, needed, drawing, p))
            place = next(free, None)
            if place is not None:
                break
            size = max(config.min_px, 0.85 * size)
        else:  # the earlier objects lie badly
            return None
        drawing.paste(canvas, place, instance_map, number)
        boxes = np.vstack([boxes, (*place, *np.add(place, drawing.visible_size))])
        pixels = np.append(pixels, drawing.visible.sum())
    if config.min_visible:
        boxes = np.array([box_of(instance_map == i) for i in range(len(chosen))], float)
    return _scene(canvas, chosen, boxes.tolist(), instance_map)


def _scene(
    canvas: np.ndarray,
    chosen: list[tuple[int, str]],
    boxes: list[list[float]],
    instance_map: np.ndarray,
) -> Scene:
    """A drawn scene and its ground truth: (category index, style) and box of each object."""
    objects = []
    for (category, style), (x0, y0, x1, y1) in zip(chosen, boxes, strict=True):
        center = ((x0 + x1) / 2, (y0 + y1) / 2)
        objects.append(SceneObject(CATEGORIES[category], style, (x0, y0, x1, y1), center))
    return Scene(canvas, tuple(objects), instance_map)


def render_crop(
    rng: np.random.Generator,
    sprites: Sprites,
    config: SceneConfig | None = None,
    size: int = 64,
) -> tuple[np.ndarray, int, tuple[float, float]]:
    """Draw one emoji near the middle of a small picture, for vision pre-training.

    Returns: image uint8 (size, size, 3); category index; (dx, dy) from the picture's centre to the
        emoji's, pixels. Large emoji may reach over the border.
    """
    config = config or SceneConfig()
    (category, style), *_ = choose_objects(rng, sprites, config, count=1)
    canvas = draw_background(rng, size)
    px = float(rng.uniform(config.min_px, config.max_px))
    drawing = Drawing.of(rng, sprites, category, style, px, config)
    width, height = drawing.visible_size
    reach = size / 5
    left = round((size - width) / 2 + rng.uniform(-reach, reach))
    top = round((size - height) / 2 + rng.uniform(-reach, reach))
    drawing.paste(canvas, (left, top))
    return canvas, category, (left + (width - size) / 2, top + (height - size) / 2)


def render_mosaic(
    rng: np.random.Generator, sprites: Sprites, config: SceneConfig | None = None, tiles: int = 3
) -> Scene:
    """Draw one emoji in each square of a grid, for vision pre-training: many in little time.

    Neighbours may cover each other's border; boxes reach under it.
    """
    config = replace(config or SceneConfig(), repeats=0.0)
    canvas = draw_background(rng, config.size)
    instance_map = np.full((config.size, config.size), -1, np.int8)
    boxes: list[list[float]] = []
    reach = config.size / tiles / 5
    chosen = choose_objects(rng, sprites, config, tiles**2)
    for number, (category, style) in enumerate(chosen):
        px = float(rng.uniform(config.min_px, config.max_px))
        drawing = Drawing.of(rng, sprites, category, style, px, config)
        width, height = drawing.visible_size
        row, column = divmod(number, tiles)
        x, y = (np.array([column, row]) + 0.5) * config.size / tiles + rng.uniform(-reach, reach, 2)
        left = min(max(0, round(x - width / 2)), config.size - width)
        top = min(max(0, round(y - height / 2)), config.size - height)
        drawing.paste(canvas, (left, top), instance_map, number)
        boxes.append([float(left), float(top), float(left + width), float(top + height)])
    return _scene(canvas, chosen, boxes, instance_map)


def art_of(group: str, styles: Sequence[str] = ()) -> tuple[str, ...]:
    """Styles that the tests of an art group draw from: all of it, or only some.

    Raises: ValueError for an unknown group, and for styles that are not of it.
    """
    if group not in TEST_GROUPS:
        raise ValueError(f"unknown art group {group!r}; tests have {', '.join(TEST_GROUPS)}")
    if others := [style for style in styles if style not in STYLE_GROUPS[group]]:
        raise ValueError(
            f"no style {others[0]!r} in the art group {group!r}; it has "
            f"{', '.join(STYLE_GROUPS[group])}"
        )
    return tuple(styles) or STYLE_GROUPS[group]


def test_scene(
    index: int,
    group: str,
    seed: int = 0,
    sprites: Sprites | None = None,
    config: SceneConfig | None = None,
    styles: Sequence[str] = (),
) -> Scene:
    """Scene number ``index`` of the fixed test set of an art group ("seen", "mild", "openmoji").

    ``config`` may change sizes and counts; its styles are replaced by `art_of`.
    """
    config = replace(config or SceneConfig(), styles=art_of(group, styles))
    rng = group_rng(seed, group, index, TEST_STREAM)
    return render_scene(rng, sprites or Sprites.load(), config)


def choose_objects(
    rng: np.random.Generator, sprites: Sprites, config: SceneConfig, count: int | None = None
) -> list[tuple[int, str]]:
    """Draw what a scene holds: (category index, style) of each object, in random order."""
    if count is None:
        counts = np.arange(config.min_objects, config.max_objects + 1)
        weights = np.array(COUNT_WEIGHTS)[np.minimum(counts, len(COUNT_WEIGHTS)) - 1]
        count = int(rng.choice(counts, p=weights / weights.sum()))
    multiplicities: list[int] = []
    if count >= 2 and rng.random() < config.repeats:
        many = np.arange(2, count + 1)
        multiplicities.append(int(rng.choice(many, p=(1 / many) / (1 / many).sum())))
        if count - sum(multiplicities) >= 2 and rng.random() < 0.3:
            multiplicities.append(2)
    multiplicities += [1] * (count - sum(multiplicities))

    styles = config.styles
    if rng.random() >= config.mixed_styles:
        styles = (styles[rng.integers(len(styles))],)
    drawn = [c for c in range(len(CATEGORIES)) if any(sprites.has(c, s) for s in styles)]
    chosen: list[tuple[int, str]] = []
    for category, copies in zip(rng.permutation(drawn), multiplicities, strict=False):
        available = [s for s in styles if sprites.has(int(category), s)]
        chosen += [(int(category), available[rng.integers(len(available))]) for _ in range(copies)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def find_places(
    rng: np.random.Generator,
    visible_size: tuple[int, int],
    size: int,
    boxes: np.ndarray,
    max_overlap: float,
) -> list[tuple[int, int]]:
    """Random (left, top) where a box of this size overlaps none of the others (n, 4) too much."""
    width, height = visible_size
    x0 = rng.integers(0, size - width + 1, (NUM_PLACES, 1))
    y0 = rng.integers(0, size - height + 1, (NUM_PLACES, 1))
    shared_x = np.minimum(x0 + width, boxes[:, 2]) - np.maximum(x0, boxes[:, 0])
    shared_y = np.minimum(y0 + height, boxes[:, 3]) - np.maximum(y0, boxes[:, 1])
    shared = np.maximum(shared_x, 0) * np.maximum(shared_y, 0)  # (NUM_PLACES, n)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    free = (shared < max_overlap * np.minimum(areas, width * height)).all(axis=1)
    return list(zip(x0[free, 0].tolist(), y0[free, 0].tolist(), strict=True))


def _leaves(
    instance_map: np.ndarray, needed: np.ndarray, drawing: Drawing, place: tuple[int, int]
) -> bool:
    """Whether a drawing at ``place`` leaves as many pixels of each object in view as it needs."""
    if not needed.any():
        return True
    after = instance_map.copy()
    drawing.mark(after, place, len(needed))
    return bool((np.bincount(after[after >= 0], minlength=len(needed) + 1)[:-1] >= needed).all())


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) around the pixels of a mask (H, W)."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Drawing:
    """A sprite turned, scaled and recoloured."""

    rgb: np.ndarray  # float32 (n, n, 3), 0 to 255, multiplied by alpha
    alpha: np.ndarray  # float32 (n, n, 1), 0 to 1
    visible: np.ndarray  # bool (n, n)
    offset: tuple[int, int]  # left, top of the visible part
    visible_size: tuple[int, int]  # its width, height

    @classmethod
    def of(
        cls,
        rng: np.random.Generator,
        sprites: Sprites,
        category: int,
        style: str,
        px: float,
        config: SceneConfig,
    ) -> Drawing:
        """Vary a sprite; its longer side is ``px`` before it is turned (and stretched)."""
        angle = math.radians(rng.uniform(-config.max_degrees, config.max_degrees))
        mirror = 1 if rng.random() < 0.5 else -1
        level = max(i for i, side in enumerate(LEVELS_PX) if side >= px or i == 0)
        source = sprites.images[category, style][level]
        scale = source.width * (1 - 2 / sprites.size) / px  # source pixels per drawn pixel
        side = math.ceil(px * (abs(math.cos(angle)) + abs(math.sin(angle)))) + 2
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        # PIL wants the way back: the source position of each drawn pixel, around both centres.
        a, b, d, e = mirror * cos, mirror * sin, -sin, cos
        if config.variation > 1:
            (a, b), (d, e) = _stretch(rng, config.variation) @ ((a, b), (d, e))
        half = source.width / 2
        matrix = (a, b, half - (a + b) * side / 2, d, e, half - (d + e) * side / 2)
        turned = source.transform(
            (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        rgba = np.asarray(turned)
        visible = rgba[..., 3] >= VISIBLE_ALPHA
        columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
        left, top = int(columns[0]), int(rows[0])
        return cls(
            rgb=rgba.astype(np.float32) @ _recolouring(rng, config.variation),
            alpha=rgba[..., 3:].astype(np.float32) / 255,
            visible=visible,
            offset=(left, top),
            visible_size=(int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top),
        )

    def paste(
        self,
        canvas: np.ndarray,
        place: tuple[int, int],
        instance_map: np.ndarray | None = None,
        instance: int = -1,
    ) -> None:
        """Draw onto ``canvas`` with the visible part's top-left corner at ``place`` (left, top)."""
        target, part = self._parts(canvas, place)
        mixed = canvas[target] * (1 - self.alpha[part]) + self.rgb[part]
        canvas[target] = np.clip(mixed, 0, 255)
        if instance_map is not None:
            self.mark(instance_map, place, instance)

    def mark(self, instance_map: np.ndarray, place: tuple[int, int], instance: int) -> None:
        """Write ``instance`` where the drawing at ``place`` would be seen."""
        target, part = self._parts(instance_map, place)
        instance_map[target][self.visible[part]] = instance

    def _parts(
        self, canvas: np.ndarray, place: tuple[int, int]
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the drawing lies on the canvas, and which part of it does."""
        left, top = place[0] - self.offset[0], place[1] - self.offset[1]
        height, width = canvas.shape[:2]
        side = len(self.visible)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + side, width), min(top + side, height)
        return np.s_[y0:y1, x0:x1], np.s_[y0 - top : y1 - top, x0 - left : x1 - left]


def _stretch(rng: np.random.Generator, variation: float) -> np.ndarray:
    """A random change of shape, (2, 2): nothing gets larger, so a drawing stays in its square."""
    shear = variation * rng.uniform(-0.05, 0.05)
    width, height = 1 + abs(shear) + variation * rng.uniform(0, 0.1, 2)
    return np.array([[width, shear], [shear, height]])


def _recolouring(rng: np.random.Generator, variation: float) -> np.ndarray:
    """A random change of hue, saturation, contrast and brightness, small at 1: float32 (4, 3).

    A row vector (r, g, b, a), colours multiplied by alpha, times this matrix is the new (r, g, b).
    """
    hue, saturation = rng.normal(0, math.radians(6)), rng.uniform(0.8, 1.15)
    contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.07, 0.07)
    if variation != 1:
        hue, brightness = variation * hue, brightness * min(variation, 2)
        saturation = max(0.0, 1 + variation * (saturation - 1))
        contrast = max(0.4, 1 + min(variation, 2) * (contrast - 1))
    # Rotation around the grey axis (Rodrigues); saturation scales the distance from that axis.
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(hue) * (np.eye(3) - axis) + math.sin(hue) * cross
    matrix = np.empty((4, 3), np.float32)
    matrix[:3] = contrast * (axis + saturation * turn).T
    matrix[3] = 0.5 * (1 - contrast) + brightness
    return matrix


def draw_canvas(rng: np.random.Generator, config: SceneConfig) -> np.ndarray:
    """What lies behind the emoji, uint8 (size, size, 3)."""
    if config.background == "photo":
        canvas = draw_photo(rng, config.size, config.photos)
    else:
        canvas = draw_background(rng, config.size)
    if config.clutter:
        number = int(rng.integers((config.clutter + 1) // 2, config.clutter + 1))
        canvas = draw_clutter(rng, canvas, number)
    return canvas


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A plain picture of moderate contrast, uint8 (size, size, 3)."""
    first, second = _two_colours(rng)
    kind = rng.choice(
        ("flat", "gradient", "stripes", "checks", "noise", "blobs"),
        p=(0.3, 0.2, 0.1, 0.1, 0.15, 0.15),
    )
    if kind == "flat":
        return np.broadcast_to(first.astype(np.uint8), (size, size, 3)).copy()
    if kind in ("noise", "blobs"):
        grid = int(rng.integers(3, 8)) if kind == "blobs" else size // int(rng.integers(1, 6))
        coarse = Image.fromarray(rng.integers(0, 256, (grid, grid), np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    else:
        angle = rng.uniform(0, 2 * math.pi)
        line = np.arange(size, dtype=np.float32) - size / 2
        along = math.cos(angle) * line + math.sin(angle) * line[:, None]  # (size, size)
        if kind == "gradient":
            mix = (128 + along * (127 / (0.71 * size))).astype(np.uint8)
        else:
            period = float(rng.uniform(8, 40))
            odd = (along / period + 1000).astype(np.int32) & 1
            if kind == "checks":
                across = math.cos(angle) * line[:, None] - math.sin(angle) * line
                odd ^= (across / period + 1000).astype(np.int32) & 1
            mix = (255 * odd).astype(np.uint8)
    steps = np.linspace(0, 1, 256)[:, None]
    palette = (first * (1 - steps) + second * steps).astype(np.uint8)  # (256, 3)
    return np.take(palette, mix, axis=0)  # much faster than palette[mix]


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A background colour and one not far from it, float (3,), 0 to 255."""
    tone = rng.random()
    if tone < 0.35:
        first = rng.uniform(225, 255) + rng.uniform(-12, 12, 3)
    elif tone < 0.45:
        first = rng.uniform(15, 70) + rng.uniform(-12, 12, 3)
    else:
        first = rng.uniform(50, 240, 3)
    second = first + rng.uniform(-45, 45, 3)
    return np.clip(first, 0, 255), np.clip(second, 0, 255)
