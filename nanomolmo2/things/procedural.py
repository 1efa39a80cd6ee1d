"""Endless kinds of things from a seed: beans, coins, screws, cells, leaves, ...

recipe = make_recipe(rng, "coin")          a kind: shape, texture and colours of its own
rgba = recipe.draw(rng, 40, angle, light)  an instance: never quite like another one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nanomolmo2.things import manufactured, organic
from nanomolmo2.things.palettes import draw_palette
from nanomolmo2.things.surface import Draw, Grid, Light, Palette, planes, shade

LEAST_PX = 44  # smaller things are drawn this large and reduced: thin parts would be lost
REACH = 1.06  # half of the side of an instance's square, in units of the thing
STANDARD = Light(-0.4, -0.5, 0.77)  # in which kinds are compared

Family = Callable[[np.random.Generator, Palette], Draw]

# Family -> what draws a kind of it, and its usual colours.
FAMILIES: dict[str, tuple[Family, str]] = {
    "blob": (organic.blob, "paint"),
    "stone": (organic.stone, "natural"),
    "bean": (organic.bean, "natural"),
    "seed": (organic.seed, "natural"),
    "grain": (organic.grain, "natural"),
    "berry": (organic.berry, "natural"),
    "walnut": (organic.walnut, "natural"),
    "leaf": (organic.leaf, "natural"),
    "log": (organic.log, "natural"),
    "cell": (organic.cell, "paint"),
    "insect": (organic.insect, "natural"),
    "flower": (organic.flower, "paint"),
    "shell": (organic.shell, "natural"),
    "capsule": (manufactured.capsule, "paint"),
    "tablet": (manufactured.tablet, "paint"),
    "coin": (manufactured.coin, "metal"),
    "nut": (manufactured.nut, "metal"),
    "ring": (manufactured.ring, "metal"),
    "screw": (manufactured.screw, "metal"),
    "screw_head": (manufactured.screw_head, "metal"),
    "pipe": (manufactured.pipe, "metal"),
    "button": (manufactured.button, "paint"),
    "ball": (manufactured.ball, "paint"),
    "stick": (manufactured.stick, "natural"),
    "block": (manufactured.block, "paint"),
    "cap": (manufactured.cap, "paint"),
    "resistor": (manufactured.resistor, "paint"),
    "clip": (manufactured.clip, "metal"),
    "pasta": (manufactured.pasta, "natural"),
}
HELD_OUT_FAMILIES = ("shell",)  # never in training
TRAINING_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT_FAMILIES)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A procedural kind."""

    family: str
    seed: int  # of its shape
    palette: Palette
    instance: Draw

    def draw(
        self,
        rng: np.random.Generator,
        px: float,
        angle: float = 0.0,
        light: Light = STANDARD,
        mirror: bool = False,
        least_px: int = LEAST_PX,
    ) -> np.ndarray:
        """An instance: float32 (n, n, 4), 0 to 255, colours multiplied by alpha.

        Args:
            px: longer side before it is turned, pixels; angle: radians.
            least_px: see `LEAST_PX`.
        """
        side = max(4, round(px * REACH) + 2)
        factor = -(-least_px // side)  # rounded up
        grid = Grid(side * factor, side / px, angle, mirror)
        made = shade(self.instance(rng, grid), grid, light, self.palette)
        return made if factor == 1 else reduced(made, factor)

    def picture(self, px: int = 72) -> np.ndarray:
        """A picture of the kind, uint8 (px, px, 4), RGBA: always the same."""
        made = self.draw(np.random.default_rng(self.seed), (px - 2) / REACH, least_px=24)
        made[..., :3] /= np.maximum(made[..., 3:], 1) / 255
        pixels = np.ascontiguousarray(np.clip(made, 0, 255).astype(np.uint8))
        if len(made) == px:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((px, px), Image.Resampling.BILINEAR))


def reduced(made: np.ndarray, factor: int) -> np.ndarray:
    """A picture made so many times smaller: each pixel is the mean of factor x factor."""
    height, width, channels = made.shape
    small = planes(height // factor, width // factor, channels)
    small[...] = made[::factor, ::factor]
    for i in range(1, factor**2):
        small += made[i // factor :: factor, i % factor :: factor]
    small /= factor**2
    return small


def make_recipe(
    rng: np.random.Generator,
    family: str,
    palette: Palette | None = None,
    seed: int | None = None,
) -> Recipe:
    """A kind of a family, in its usual colours or in given ones.

    Args: seed: of the shape of another recipe, to have the same in other colours.
    """
    draw, usual = FAMILIES[family]
    if palette is None:
        palette = draw_palette(rng, usual)
    if seed is None:
        seed = int(rng.integers(2**62))
    return Recipe(family, seed, palette, draw(np.random.default_rng(seed), palette))
