"""Small shaded surfaces: what procedural things are rendered with.

A thing is a height over the plane with a colour at each place. It is drawn in coordinates of its
own, in which it reaches from about -1 to 1; light comes from a direction in the picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

NOISE_PX = 512  # side of a table of noise
NOISE_KINDS = (0.6, 1.2, 1.8, 2.6)  # exponents of the spectra: from grain to clouds


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of some values, the same as ``rng.choice`` would give, in a quarter of the time."""
    return values[int(rng.integers(len(values)))]


def planes(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture float32 (height, width, channels) of any content, to be drawn on.

    Its channels lie one behind the other in memory: NumPy then works along rows, and is up to
    twenty times as fast as along three or four channels. What is computed from such a picture
    alone has the same order; what also comes from elsewhere is best written into one.
    """
    return np.empty((channels, height, width), np.float32).transpose(1, 2, 0)


@functools.cache
def noise_table(kind: int) -> np.ndarray:
    """Float32 (512, 512), mean 0 and deviation 1, without seams: the same in every process.

    Args: kind: number of an exponent of `NOISE_KINDS`; the power falls with so much of frequency.
    """
    rng = np.random.default_rng([NOISE_PX, kind])
    frequency = np.fft.fftfreq(NOISE_PX) * NOISE_PX
    distance = np.hypot(frequency[:, None], frequency)
    distance[0, 0] = np.inf
    waves = np.fft.fft2(rng.standard_normal((NOISE_PX, NOISE_PX))) / distance ** NOISE_KINDS[kind]
    table = np.fft.ifft2(waves).real
    return (table / table.std()).astype(np.float32)


@functools.cache
def noise_tiles(kind: int) -> np.ndarray:
    """The table of noise twice across and twice down, read only."""
    tiles = np.tile(noise_table(kind), (2, 2))
    tiles.flags.writeable = False
    return tiles


@dataclass(frozen=True)
class Light:
    """Where light comes from.

    Attributes:
        x, y, z: unit vector towards it; x to the right, y down, z to the camera.
        ambient: share of the light that comes from everywhere, 0 to 1.
        shadow: how dark shadows are, 0 to 1; ``softness``: their blur, of a thing's size.
    """

    x: float
    y: float
    z: float
    ambient: float = 0.5
    shadow: float = 0.4
    softness: float = 0.08

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Light:
        turn, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 0.95)
        flat = math.sqrt(1 - height**2)
        return cls(
            x=flat * math.cos(turn),
            y=flat * math.sin(turn),
            z=height,
            ambient=float(rng.uniform(0.3, 0.7)),
            shadow=max(0.0, float(rng.uniform(-0.15, 0.75))),
            softness=float(rng.uniform(0.03, 0.16)),
        )


@dataclass(frozen=True)
class Palette:
    """Colours of a kind, float (3,) each, 0 to 1; ``metal``: how much highlights take its colour"""

    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    metal: float = 0.0
    gloss: float = 0.3  # strength of the highlight
    polish: float = 20.0  # its sharpness

    @property
    def colours(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.first, self.second, self.third


class Grid:
    """Coordinates of a square of ``n`` pixels, of a thing turned by ``angle`` (radians).

    Attributes: u, v: float32 (n, n), the thing's own coordinates; step: extent of a pixel.
    """

    def __init__(self, n: int, reach: float, angle: float, mirror: bool = False) -> None:
        """``reach``: half of the square's side, in units of the thing."""
        line = ((np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1) * reach
        cos, sin = math.cos(angle), math.sin(angle)
        self.u = cos * line + sin * line[:, None]
        self.v = cos * line[:, None] - sin * line
        if mirror:
            self.u = -self.u
        self.step = 2 * reach / n

    @functools.cached_property
    def r(self) -> np.ndarray:
        return np.hypot(self.u, self.v)

    @functools.cached_property
    def theta(self) -> np.ndarray:
        return np.arctan2(self.v, self.u)

    def noise(self, rng: np.random.Generator, kind: int, scale: float = 60.0) -> np.ndarray:
        """Another piece of noise each time, (n, n); ``scale``: pixels of the table a unit."""
        table, mask = noise_table(kind), NOISE_PX - 1
        ox, oy = rng.integers(0, NOISE_PX, 2).tolist()
        x = (self.u * scale + (ox + NOISE_PX)).astype(np.int32) & mask
        y = (self.v * scale + (oy + NOISE_PX)).astype(np.int32) & mask
        y *= NOISE_PX
        y += x
        return np.take(table, y)

    def soft(self, x: np.ndarray, width: float = 0.0) -> np.ndarray:
        """0 below 0, 1 above, in between smooth over ``width``, at least over a pixel."""
        return np.clip(x * (1 / max(width, self.step)) + 0.5, 0, 1)


@dataclass
class Surface:
    """What a thing looks like on a grid.

    Attributes:
        inside: (n, n), above 0 on the thing: the distance to its edge, about.
        height: (n, n) or a number.
        albedo: colour, (3,) or (n, n, 3), 0 to 1.
        alpha: how opaque it is, (n, n) or a number.
    """

    inside: np.ndarray
    height: np.ndarray | float
    albedo: np.ndarray
    alpha: np.ndarray | float = 1.0


Draw = Callable[[np.random.Generator, Grid], Surface]  # an instance of a kind


def dome(inside: np.ndarray, bevel: float, height: float = 1.0) -> np.ndarray:
    """A height that rises round from the edge and is flat from ``bevel`` inside on."""
    depth = np.clip(1 - inside * (1 / bevel), 0, 1)
    return height * bevel * np.sqrt(1 - depth * depth)


def mix(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Two colours, (3,) or (n, n, 3), mixed by ``share`` (n, n)."""
    made = planes(*share.shape)
    np.multiply(above - below, share[..., None], out=made)
    made += below
    return made


def shade(surface: Surface, grid: Grid, light: Light, palette: Palette) -> np.ndarray:
    """The surface in light: float32 (n, n, 4), 0 to 255, colours multiplied by alpha."""
    inside = surface.inside
    if isinstance(surface.height, np.ndarray):
        height, per = surface.height, 0.5 / grid.step
        gx, gy = np.zeros_like(height), np.zeros_like(height)
        np.subtract(height[:, 2:], height[:, :-2], out=gx[:, 1:-1])
        np.subtract(height[2:], height[:-2], out=gy[1:-1])
        gx *= per
        gy *= per
        np.clip(gx, -4, 4, out=gx)  # a step would be a wall, black or white
        np.clip(gy, -4, 4, out=gy)
        length = 1 / np.sqrt(1 + gx * gx + gy * gy)
        diffuse = np.maximum((light.z - gx * light.x - gy * light.y) * length, 0)
        hx, hy, hz = light.x, light.y, light.z + 1
        norm = 1 / math.sqrt(hx * hx + hy * hy + hz * hz)
        facing = np.maximum((hz - gx * hx - gy * hy) * length * norm, 0)
        shine = palette.gloss * facing**palette.polish
        lit = light.ambient + (1 - light.ambient) * diffuse * (1 / max(light.z, 0.5))
    else:
        lit = np.ones_like(inside)
    rim = 0.72 + 0.28 * np.clip(inside * 7, 0, 1)  # less light gets to the edge, by the ground
    tint = 1 - palette.metal + palette.metal * palette.first
    opaque = 255 * (np.clip(inside * (1 / grid.step) + 0.5, 0, 1) * surface.alpha)
    rows, cols = inside.shape
    made = planes(rows, cols, 4)
    colour = made[..., :3]
    np.multiply(surface.albedo, (lit * rim)[..., None], out=colour)
    if isinstance(surface.height, np.ndarray):
        colour += np.multiply(shine[..., None], tint, out=planes(*inside.shape))
    np.clip(colour, 0, 1, out=colour)
    colour *= opaque[..., None]
    made[..., 3] = opaque
    return made
