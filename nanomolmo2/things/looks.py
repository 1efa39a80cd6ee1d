"""How a kind of thing looks: a drawing or a recipe, and what looks like it without being it.

Looks draw instances: float32 (n, n, 4), 0 to 255, colours multiplied by alpha.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from PIL import Image

from nanomolmo2.things.drawings import THUMB_PX, Drawings, thumbnail
from nanomolmo2.things.grounds import noise
from nanomolmo2.things.procedural import FAMILIES, Recipe, make_recipe
from nanomolmo2.things.surface import Light, pick, planes

Rng = np.random.Generator

LEVELS = 0.72  # each stored size of a drawing is so much smaller than the one before it
LEAST_LEVEL = 12  # pixels
GRAIN_KIND = 1  # of `noise_table`
POOL = 3  # instances of a recipe that are drawn anew in a scene; others are made of these
POOL_TURN = math.radians(25)  # at most: the light on them would look wrong else

OTHER_COLOUR = 0.17  # mean difference of the colours, 0 to 1, from which they are clearly other
OTHER_SHAPE = 0.22  # mean difference of the outlines, of what both cover
OTHER = 0.165  # root mean square difference of clearly other kinds, where one of them is
NUM_TRIES = 12
NUM_TINTS = 256

# Of a colour (r, g, b): its grey, what is beside that, and this turned by a quarter around it.
AXIS = np.full((3, 3), 1 / 3)
AROUND = np.eye(3) - AXIS
ACROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)


class Look(ABC):
    """What all instances of a kind have in common.

    Attributes:
        id: says what it is; equal for equal looks only.
        origin: set of the drawing, or family of the recipe.
        casts: whether it throws a shadow.
    """

    id: str
    origin: str
    casts: bool = True

    @cached_property
    @abstractmethod
    def thumb(self) -> np.ndarray:
        """As of `drawings.thumbnail`, upright and in plain light."""

    @cached_property
    def ways(self) -> np.ndarray:
        """The thumbnail turned by quarters and mirrored: (8, 8, 8, 4)."""
        return self.thumb.reshape(-1, 4)[_way_places()]

    @abstractmethod
    def draw(self, rng: Rng, px: float, angle: float, mirror: bool, light: Light) -> np.ndarray:
        """An instance whose longer side is ``px`` before it is turned by ``angle`` (radians)."""

    @abstractmethod
    def recoloured(self, rng: Rng) -> Look | None:
        """The same shape in a clearly other colour; None if no such colour was found."""


@cache
def _way_places() -> np.ndarray:
    """(8, 8, 8) places of a thumbnail, as `Look.ways` has them."""
    places = np.arange(THUMB_PX**2).reshape(THUMB_PX, THUMB_PX)
    quarters = [np.rot90(places, k) for k in range(4)]
    return np.stack([*quarters, *(way[:, ::-1] for way in quarters)])


def tint(
    hue: float, saturation: float = 1.0, contrast: float = 1.0, brightness: float = 0.0
) -> np.ndarray:
    """A change of colour, float32 (4, 3): a row (r, g, b, a), colours multiplied by alpha, times
    it is the new (r, g, b).

    Args: hue: turn around the grey axis, radians; brightness: added, of 1.
    """
    turn = math.cos(hue) * AROUND + math.sin(hue) * ACROSS
    matrix = np.empty((4, 3), np.float32)
    matrix[:3] = contrast * (AXIS + saturation * turn).T
    matrix[3] = 0.5 * (1 - contrast) + brightness
    return matrix


@cache
def _slight_tints() -> np.ndarray:
    """A table of what light does to things of one kind, the same in every process."""
    rng = np.random.default_rng(0)
    hues = rng.normal(0, math.radians(2.5), NUM_TINTS)
    others = (
        rng.uniform(*span, NUM_TINTS) for span in ((0.9, 1.08), (0.92, 1.05), (-0.035, 0.035))
    )
    return np.stack([tint(*values) for values in zip(hues, *others, strict=True)])


def slight_tint(rng: Rng) -> np.ndarray:
    """As of `tint`, but never to another colour."""
    found: np.ndarray = _slight_tints()[rng.integers(NUM_TINTS)]
    return found


def apply(matrix: np.ndarray, rgba: np.ndarray) -> np.ndarray:
    """Colours changed by a matrix of `tint`, alpha kept."""
    height, width = rgba.shape[:2]
    made = planes(height, width, 4)
    flat = rgba.transpose(2, 0, 1).reshape(4, -1)  # without a copy if its channels lie like this
    colours = (matrix.T @ flat).reshape(3, height, width).transpose(1, 2, 0)
    np.maximum(colours, 0, out=colours)
    np.minimum(colours, rgba[..., 3:], out=made[..., :3])
    made[..., 3] = rgba[..., 3]
    return made


def turned(image: Image.Image, side: int, scale: float, angle: float, mirror: bool) -> np.ndarray:
    """A square picture turned and scaled: float32 (side, side, 4).

    Args: image: mode "RGBa"; scale: pixels of it to a pixel of the result.
    """
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    # PIL wants the way back: the place in the source of each pixel, around both middles.
    a, b, d, e = cos, sin, -sin, cos
    if mirror:
        a, b = -a, -b
    half = image.width / 2
    matrix = (a, b, half - (a + b) * side / 2, d, e, half - (d + e) * side / 2)
    made = image.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    rgba = planes(side, side, 4)
    rgba[...] = np.asarray(made)
    return rgba


# ---- drawings ----


@dataclass(eq=False)
class DrawnLook(Look):
    """A drawing, recoloured or as it is; with ``relief`` it is lit as if it were raised, with
    ``grain`` it has a texture, as of cloth or of a rough surface."""

    id: str
    origin: str
    cell: np.ndarray  # uint8 (n, n, 4), RGBA
    colours: np.ndarray | None = None  # a matrix of `tint`
    relief: float = 0.0
    grain: float = 0.0
    levels: dict[int, Image.Image] = field(default_factory=dict)

    @cached_property
    def plain_thumb(self) -> np.ndarray:
        """Of the drawing as it is."""
        return thumbnail(self.cell)

    @cached_property
    def thumb(self) -> np.ndarray:
        return self.plain_thumb if self.colours is None else apply(self.colours, self.plain_thumb)

    def _level(self, px: float) -> Image.Image:
        """The smallest stored size that is no smaller than wanted."""
        largest = self.cell.shape[0]
        side = largest
        while side * LEVELS >= max(px, LEAST_LEVEL):
            side = int(side * LEVELS)
        if side not in self.levels:
            image = Image.fromarray(self.cell).convert("RGBa")
            if side < largest:
                image = image.resize((side, side), Image.Resampling.BOX)
            self.levels[side] = image
        return self.levels[side]

    def draw(self, rng: Rng, px: float, angle: float, mirror: bool, light: Light) -> np.ndarray:
        image = self._level(px)
        reach = abs(math.cos(angle)) + abs(math.sin(angle))
        side = math.ceil(px * min(reach, 1.42)) + 2
        filled = image.width * (1 - 2 / self.cell.shape[0])
        rgba = turned(image, side, filled / px, angle, mirror)
        matrix = slight_tint(rng)
        if self.colours is not None:
            both = self.colours @ matrix[:3]
            both[3] += matrix[3]
            matrix = both
        rgba = apply(matrix, rgba)
        if self.relief:
            rgba = raised(rgba, self.relief, light)
        if self.grain:
            texture = 1 + self.grain * noise(rng, rgba.shape[:2], GRAIN_KIND)
            colours = rgba[..., :3]
            colours *= texture[..., None]
            np.clip(colours, 0, rgba[..., 3:], out=colours)
        return rgba

    def recoloured(self, rng: Rng) -> Look | None:
        for _ in range(NUM_TRIES):
            hue = pick(rng, [-1, 1]) * rng.uniform(1.2, math.pi)
            matrix = tint(hue, rng.uniform(0.8, 1.4), rng.uniform(0.7, 1), rng.normal(0, 0.15))
            if rng.random() < 0.3:  # also of grey ones: through a coloured glass
                matrix = matrix @ np.diag(rng.uniform(0.15, 1, 3)).astype(np.float32)
            if colour_difference(self.thumb, apply(matrix, self.plain_thumb)) >= OTHER_COLOUR:
                name = f"{self.id}+colour{int(rng.integers(2**31)):08x}"
                return DrawnLook(name, self.origin, self.cell, matrix, self.relief, self.grain)
        return None

    def in_colours_of(self, other: Look, rng: Rng) -> DrawnLook:
        """This drawing, its colours moved to those of another look."""
        mine, wanted = (colour_moments(thumb) for thumb in (self.plain_thumb, other.thumb))
        scale = np.clip(wanted[1] / np.maximum(mine[1], 0.02), 0.4, 2.5)
        matrix = np.empty((4, 3), np.float32)
        matrix[:3] = np.diag(scale)
        matrix[3] = wanted[0] - mine[0] * scale
        name = f"{self.id}+like{int(rng.integers(2**31)):08x}"
        return DrawnLook(name, self.origin, self.cell, matrix, self.relief, self.grain)


def raised(rgba: np.ndarray, strength: float, light: Light) -> np.ndarray:
    """Lit as if the middle of the drawing were higher than its edge."""
    n = rgba.shape[0]
    alpha = Image.fromarray(rgba[..., 3].astype(np.uint8))
    small = alpha.resize((max(3, n // 4), max(3, n // 4)), Image.Resampling.BOX)
    small = small.resize((max(2, n // 8), max(2, n // 8)), Image.Resampling.BILINEAR)
    height = np.asarray(small.resize((n, n), Image.Resampling.BICUBIC), np.float32)
    lit = np.ones_like(height)
    step = strength * n / (8 * 255)
    lit[:, 1:-1] -= (height[:, 2:] - height[:, :-2]) * (light.x * step)
    lit[1:-1] -= (height[2:] - height[:-2]) * (light.y * step)
    made = planes(n, n, 4)
    np.multiply(rgba[..., :3], np.clip(lit, 0.45, 1.6)[..., None], out=made[..., :3])
    np.minimum(made[..., :3], rgba[..., 3:], out=made[..., :3])
    made[..., 3] = rgba[..., 3]
    return made


# ---- recipes ----


@dataclass(frozen=True, eq=False)
class Instance:
    """What `Recipe.draw` made: ``rgba`` for a size, an angle and a light."""

    rgba: np.ndarray
    px: float
    angle: float
    light: Light

    @cached_property
    def image(self) -> Image.Image:
        """Of ``rgba``, to be turned."""
        return Image.fromarray(np.ascontiguousarray(self.rgba.astype(np.uint8)), mode="RGBa")


def _between(first: float, second: float) -> float:
    """The turn from one angle to another, -pi to pi."""
    return math.remainder(second - first, 2 * math.pi)


@dataclass(eq=False)
class MadeLook(Look):
    """A procedural kind. Instances of a scene are drawn anew up to `POOL`; then they repeat, each
    time turned, scaled and tinted a little otherwise."""

    recipe: Recipe
    pool: list[Instance] = field(default_factory=list)

    @property
    def id(self) -> str:  # type: ignore[override]
        first = (self.recipe.palette.first * 255).astype(int)
        return f"{self.recipe.family}/{self.recipe.seed:016x}-{bytes(first.tolist()).hex()}"

    @property
    def origin(self) -> str:  # type: ignore[override]
        return self.recipe.family

    @property
    def casts(self) -> bool:  # type: ignore[override]
        return self.recipe.family != "cell"

    @cached_property
    def thumb(self) -> np.ndarray:
        return thumbnail(self.recipe.picture(26))

    def draw(self, rng: Rng, px: float, angle: float, mirror: bool, light: Light) -> np.ndarray:
        pool = [entry for entry in self.pool if entry.light is light]
        near = [entry for entry in pool if 0.55 < px / entry.px < 1.3]
        if len(pool) < POOL or not near:
            made = self.recipe.draw(rng, px, angle, light, mirror)
            if len(pool) >= POOL:
                self.pool.clear()
            self.pool.append(Instance(made, px, angle, light))
        else:
            apart = [_between(entry.angle, angle) for entry in near]
            best = int(np.argmin(np.abs(apart) + rng.uniform(0, 0.3, len(apart))))
            turn = float(np.clip(apart[best], -POOL_TURN, POOL_TURN))
            entry = near[best]
            reach = math.cos(turn) + abs(math.sin(turn))
            side = math.ceil(entry.rgba.shape[0] * px / entry.px * reach)
            made = turned(entry.image, side, entry.px / px, turn, False)
        return apply(slight_tint(rng), made)

    def recoloured(self, rng: Rng) -> Look | None:
        for _ in range(NUM_TRIES):
            made = MadeLook(make_recipe(rng, self.origin, seed=self.recipe.seed))
            if colour_difference(self.thumb, made.thumb) >= OTHER_COLOUR:
                return made
        return None


# ---- what is like what ----


def colour_moments(thumb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the colours of a thumbnail where it is opaque, (3,) each."""
    alpha = thumb[..., 3]
    weight = (alpha * (alpha > 0.3))[..., None]
    colours = thumb[..., :3] / np.maximum(alpha, 0.3)[..., None]
    total = max(float(weight.sum()), 1e-3)
    mean = (colours * weight).sum((0, 1)) / total
    spread = np.sqrt((((colours - mean) ** 2) * weight).sum((0, 1)) / total)
    return mean, spread


def colour_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of the colours of two thumbnails of one shape, where both are opaque."""
    alpha = np.minimum(a[..., 3], b[..., 3])
    apart = np.abs(a[..., :3] - b[..., :3]).max(-1)
    return float((apart * (alpha > 0.4)).sum() / max(float(alpha[alpha > 0.4].sum()), 1e-3))


def shape_difference(a: Look, b: Look) -> float:
    """How much the outlines of two looks differ, turned so that they fit best: 0 to 1."""
    mine, others = a.thumb[..., 3], b.ways[..., 3]
    apart = np.abs(mine - others).sum((1, 2))
    covered = np.maximum(mine, others).sum((1, 2))
    return float((apart / np.maximum(covered, 1e-3)).min())


def are_clearly_other(a: Look, b: Look) -> bool:
    """Whether nobody would take an instance of the one for one of the other, whatever its turn."""
    apart = (b.ways - a.thumb).reshape(8, -1)
    squares = np.einsum("ij,ij->i", apart, apart) / 4  # of the four channels
    covered = np.maximum(b.ways[..., 3], a.thumb[..., 3]).sum((1, 2))
    return math.sqrt(float((squares / np.maximum(covered, 1e-3)).min())) >= OTHER


def reshaped(rng: Rng, look: Look, drawings: Drawings, families: tuple[str, ...]) -> Look | None:
    """Another shape in the colours of a look; None if none was found."""
    for _ in range(NUM_TRIES):
        made: Look
        if isinstance(look, MadeLook):
            family = pick(rng, families)
            if family not in FAMILIES or (family == look.origin and rng.random() < 0.7):
                continue
            made = MadeLook(make_recipe(rng, family, palette=look.recipe.palette))
        else:
            made = drawn_look(rng, drawings).in_colours_of(look, rng)
        if shape_difference(look, made) >= OTHER_SHAPE:
            return made
    return None


def drawn_look(
    rng: Rng, drawings: Drawings, number: int | None = None, recoloured: float = 0.0
) -> DrawnLook:
    """A drawing, drawn at random, as a look; a share of them in other colours than their own."""
    if number is None:
        number = drawings.draw(rng)
    relief = float(rng.uniform(0.3, 1.2)) if rng.random() < 0.5 else 0.0
    name = f"{drawings.sets[number]}/{drawings.names[number]}"
    grain = float(rng.uniform(0.04, 0.2)) if rng.random() < 0.25 else 0.0
    cell = drawings.cell(number)
    look = DrawnLook(name, drawings.sets[number], cell, relief=relief, grain=grain)
    if rng.random() < recoloured:
        other = look.recoloured(rng)
        if isinstance(other, DrawnLook):
            return other
    return look


def made_look(rng: Rng, families: tuple[str, ...]) -> MadeLook:
    return MadeLook(make_recipe(rng, pick(rng, families)))
