"""What things lie on: plain, wood, cloth, paper, stone, soil, grass, velvet, a belt, ...

A family is a function that draws a ground of its own, float32 (height, width, 3), 0 to 255.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from nanomolmo2.things.surface import NOISE_PX, noise_table, noise_tiles, pick, planes

Rng = np.random.Generator
Size = tuple[int, int]  # height, width


def noise(rng: Rng, size: Size, kind: int, stretch: Size = (1, 1)) -> np.ndarray:
    """A piece of noise, float32, mean 0, deviation about 1; another one each time. Read only.

    Args:
        kind: see `noise_table`.
        stretch: how many pixels high and wide one of the table becomes.
    """
    height, width = (-(-side // by) for side, by in zip(size, stretch, strict=True))
    y, x = rng.integers(0, NOISE_PX, 2).tolist()
    down, right = pick(rng, (-1, 1)), pick(rng, (-1, 1))  # which way the table is read
    if max(height, width) <= NOISE_PX:
        piece = noise_tiles(kind)[_run(y, down, height), _run(x, right, width)]
    else:
        rows = (np.arange(height) * down + y) % NOISE_PX
        columns = (np.arange(width) * right + x) % NOISE_PX
        piece = noise_table(kind).take(rows, 0).take(columns, 1)
    if stretch != (1, 1):
        wide = Image.fromarray(piece).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        piece = np.asarray(wide)
    return piece


def _run(start: int, step: int, length: int) -> slice:
    """So many places of `noise_tiles`, up from ``start`` or down from where it comes again."""
    if step > 0:
        return slice(start, start + length)
    start += NOISE_PX
    return slice(start, start - length, -1)


def coordinates(rng: Rng, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Pixels along and across a random direction, float32 (height, width) each."""
    angle = rng.uniform(0, math.pi) if rng.random() < 0.6 else pick(rng, [0, math.pi / 2])
    cos, sin = math.cos(angle), math.sin(angle)
    y = np.arange(size[0], dtype=np.float32)[:, None]
    x = np.arange(size[1], dtype=np.float32)
    return cos * x + sin * y, cos * y - sin * x


def colour(
    rng: Rng,
    hue: tuple[float, float] | None = None,
    saturation: tuple[float, float] = (0, 0.5),
    value: tuple[float, float] = (0.1, 1),
) -> np.ndarray:
    """Float32 (3,), 0 to 255; of any hue, warm ones and dull ones more often."""
    if hue is None:
        hue = (0.02, 0.14) if rng.random() < 0.5 else (0, 1)
    low, high = saturation
    s = low + (high - low) * rng.random() ** 1.8
    return np.array(
        colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, s, rng.uniform(*value)), np.float32
    ) * np.float32(255)


def ramp(share: np.ndarray, *colours: np.ndarray) -> np.ndarray:
    """Colours along a ramp at ``share`` (height, width), 0 to 1."""
    places = np.linspace(0, 255, len(colours))
    steps = np.arange(256)
    table = np.stack(
        [np.interp(steps, places, [c[i] for c in colours]) for i in range(3)], axis=1
    ).astype(np.float32)
    places = np.clip(share * 255, 0, 255).astype(np.uint8)
    return np.take(np.ascontiguousarray(table.T), places, axis=1).transpose(1, 2, 0)


def tinted(base: np.ndarray, change: np.ndarray) -> np.ndarray:
    """A colour (3,), changed by ``change`` (height, width) in all channels alike."""
    return np.add(base, change[..., None], out=planes(*change.shape))


def toned(base: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """A colour (3,) times ``factor`` (height, width)."""
    return np.multiply(base, factor[..., None], out=planes(*factor.shape))


# ---- families ----


def plain(rng: Rng, size: Size) -> np.ndarray:
    """One colour, often white or grey, with hardly any grain."""
    if rng.random() < 0.5:
        base = colour(rng, saturation=(0, 0.12), value=(0.75, 1))
    else:
        base = colour(rng, saturation=(0, 0.8), value=(0.05, 1))
    grain = noise(rng, size, int(rng.integers(3))) * rng.uniform(0, 4)
    return tinted(base, grain)


def gradient(rng: Rng, size: Size) -> np.ndarray:
    """From one colour to another, as of paper that is lit from one side."""
    along, _ = coordinates(rng, size)
    first = colour(rng, saturation=(0, 0.7))
    second = np.clip(first + rng.normal(0, 45, 3), 0, 255)
    share = (along - along.min()) / max(float(np.ptp(along)), 1)
    return ramp(share, first, second)


def wood(rng: Rng, size: Size) -> np.ndarray:
    """Boards with grain; light, dark or painted."""
    hue = (0.05, 0.11) if rng.random() < 0.85 else None
    light = colour(rng, hue, (0.15, 0.65), (0.35, 0.95))
    dark = light * rng.uniform(0.45, 0.85)
    upright = rng.random() < 0.5
    shape = size if upright else size[::-1]
    bent = noise(rng, shape, 3, (12, 3)) * rng.uniform(1, 5)
    x = np.arange(shape[1], dtype=np.float32)
    rings = np.sin((x + bent * 4) * rng.uniform(0.05, 0.5))
    fibres = noise(rng, shape, 1, (10, 1))
    share = 0.5 + 0.22 * rings + 0.22 * fibres
    made = ramp(share, dark, light)
    board = int(rng.integers(30, 160))
    if rng.random() < 0.6:
        boards = rng.uniform(0.8, 1.12, shape[1] // board + 1).astype(np.float32)
        tone = boards[(np.arange(shape[1]) // board)]
        tone = tone * np.where(np.arange(shape[1]) % board < 2, 0.45, 1)
        made = made * tone[:, None].astype(np.float32)
    return made if upright else made.swapaxes(0, 1)


def cloth(rng: Rng, size: Size) -> np.ndarray:
    """Woven, with folds; plain, striped or checked."""
    along, across = coordinates(rng, size)
    period = rng.uniform(2, 6)
    weave = np.sin(along * (2 * math.pi / period)) * np.sin(across * (2 * math.pi / period))
    base = colour(rng, saturation=(0, 0.8))
    made = tinted(base, weave * rng.uniform(3, 18) + noise(rng, size, 0) * 4)
    pattern = rng.integers(4)
    if pattern < 2:
        other = np.clip(base + rng.normal(0, 60, 3), 0, 255)
        wide = rng.uniform(10, 50)
        stripes = 1.0 * (np.sin(along / wide * math.pi) > rng.uniform(-0.3, 0.7))
        if pattern == 1:
            stripes = stripes / 2 + (np.sin(across / wide * math.pi) > 0) / 2
        for channel, change in enumerate(other - base):
            made[..., channel] += stripes * change * 0.8
    folds = noise(rng, size, 3, (4, 4)) * rng.uniform(0, 0.12)
    made *= (1 + folds)[..., None]
    return made


def paper(rng: Rng, size: Size) -> np.ndarray:
    """Paper or cardboard: fibres, sometimes lines, squares or writing."""
    base = colour(rng, (0.05, 0.18), (0, 0.35), (0.6, 1))
    made = tinted(base, noise(rng, size, 1) * rng.uniform(1, 6) + noise(rng, size, 3) * 4)
    manner = rng.integers(5)
    ink = colour(rng, saturation=(0.1, 0.8), value=(0.2, 0.7))
    step = int(rng.integers(8, 30))
    lines = np.zeros(size, np.float32)
    if manner <= 1:
        lines[:: max(step, 4)] = 1
        if manner == 1:
            lines[:, :: max(step, 4)] = 1
    elif manner == 2:  # writing nobody can read
        rows = (np.arange(size[0]) % step < step * 0.4)[:, None]
        lines = (rows & (noise(rng, size, 1, (2, 1)) > 0.5)).astype(np.float32)
    return made + toned(ink - base, lines * rng.uniform(0.2, 0.8))


def stone(rng: Rng, size: Size) -> np.ndarray:
    """Granite, marble, concrete, slate."""
    base, vein = (colour(rng, saturation=(0, 0.2)) for _ in range(2))
    manner = rng.integers(3)
    if manner == 0:  # speckled
        share = np.clip(0.5 + noise(rng, size, 1) * 0.35, 0, 1)
        made = ramp(share, base * 0.6, base, np.clip(base * 1.2, 0, 255))
        made[noise(rng, size, 1) > 1.7] = vein
        return made
    if manner == 1:  # veins
        share = np.exp(-np.abs(noise(rng, size, 2, (2, 2))) * rng.uniform(3, 9))
        made = ramp(share, base, vein)
        made += (noise(rng, size, 1) * 3)[..., None]
        return made
    share = 0.5 + 0.25 * noise(rng, size, 2) + 0.06 * noise(rng, size, 0)
    return ramp(share, base * 0.75, np.clip(base * 1.1, 0, 255))


def soil(rng: Rng, size: Size) -> np.ndarray:
    """Earth, sand, crumbs: rough, lit from the side."""
    base = colour(rng, (0.04, 0.13), (0.15, 0.7), (0.15, 0.9))
    height = noise(rng, size, int(rng.integers(1, 3)), (1, 1) if rng.random() < 0.6 else (2, 2))
    step = int(rng.integers(1, 3))
    relief = height - np.roll(height, (step, step), (0, 1))
    share = 0.5 + relief * rng.uniform(0.1, 0.35) + 0.12 * noise(rng, size, 2)
    return ramp(share, base * 0.25, base, np.clip(base * 1.4, 0, 255))


def speckles(rng: Rng, size: Size) -> np.ndarray:
    """Noise of two colours, coarse or fine: terrazzo, static, carpet."""
    by = int(rng.integers(1, 5))
    first, second = colour(rng, saturation=(0, 0.7)), colour(rng, saturation=(0, 0.7))
    second = first + (second - first) * rng.uniform(0.15, 0.7)
    share = 0.5 + noise(rng, size, int(rng.integers(3)), (by, by)) * rng.uniform(0.1, 0.5)
    return ramp(share, first, second)


def grass(rng: Rng, size: Size) -> np.ndarray:
    """Blades or fur, leaning one way: short strokes, green, brown, grey."""
    hue = (0.17, 0.36) if rng.random() < 0.7 else None
    base = colour(rng, hue, (0.15, 0.8), (0.2, 0.8))
    long = int(rng.integers(4, 10))
    upright = rng.random() < 0.5
    shape = size if upright else size[::-1]
    strokes = np.maximum(noise(rng, shape, 0, (long, 1)), noise(rng, shape, 0, (long, 2)))
    strokes = strokes + 0.5 * noise(rng, shape, 2)
    made = ramp(0.1 + 0.3 * strokes, base * 0.3, base, np.clip(base * 1.5 + 15, 0, 255))
    return made if upright else made.swapaxes(0, 1)


def velvet(rng: Rng, size: Size) -> np.ndarray:
    """Dark, with a dull sheen and dust."""
    base = colour(rng, saturation=(0, 0.8), value=(0.02, 0.28))
    sheen = noise(rng, size, 3, (3, 3)) * rng.uniform(2, 12)
    made = tinted(base, sheen + noise(rng, size, 0) * rng.uniform(1, 5))
    if rng.random() < 0.5:
        made[noise(rng, size, 0) > 2.6] += rng.uniform(10, 60)
    return made


def belt(rng: Rng, size: Size) -> np.ndarray:
    """A conveyor or a tray: ribs, holes or diamonds in rubber or metal."""
    base = colour(rng, saturation=(0, 0.35), value=(0.1, 0.7))
    along, across = coordinates(rng, size)
    wide = rng.uniform(8, 36)
    manner = rng.integers(3)
    x, y = np.sin(along * (math.pi / wide)), np.sin(across * (math.pi / wide))
    if manner == 0:
        lit = np.cos(along * (math.pi / wide)) * np.abs(x) ** 3
    elif manner == 1:  # holes
        lit = -2.2 * np.clip((x * y - 0.6) * 5, 0, 1)
    else:
        lit = np.clip((np.abs(x * y) - 0.75) * 6, 0, 1) * np.cos(along * (2 * math.pi / wide))
    streaks = noise(rng, size, 1, (1, 8)) * 0.1
    made = toned(base, 1 + lit * rng.uniform(0.1, 0.4) + streaks)
    made += (noise(rng, size, 1) * 3)[..., None]
    return made


def metal(rng: Rng, size: Size) -> np.ndarray:
    """A brushed sheet, with scratches."""
    base = colour(rng, saturation=(0, 0.12), value=(0.35, 0.9))
    streaks = noise(rng, size, 0, (1, 12)) if rng.random() < 0.5 else noise(rng, size, 0, (12, 1))
    sheen = noise(rng, size, 3, (2, 2))
    return toned(base, 1 + 0.05 * streaks + 0.08 * sheen)


def clouds(rng: Rng, size: Size) -> np.ndarray:
    """As of a photo out of focus: several colours that run into each other, and some detail."""
    by = int(rng.integers(1, 4))
    share = 0.5 + noise(rng, size, 3, (by, by)) * 0.25
    made = ramp(share, *(colour(rng, saturation=(0, 0.7)) for _ in range(int(rng.integers(2, 5)))))
    made += (noise(rng, size, int(rng.integers(1, 3))) * rng.uniform(0, 18))[..., None]
    return made


def tiles(rng: Rng, size: Size) -> np.ndarray:
    """Tiles or bricks with joints, each in a shade of its own."""
    high, wide = rng.uniform(14, 60), rng.uniform(14, 90)
    y = np.arange(size[0], dtype=np.float32)[:, None] + rng.uniform(0, high)
    row = np.floor(y / high)
    x = np.arange(size[1], dtype=np.float32) + rng.uniform(0, wide)
    if rng.random() < 0.6:  # bricks
        x = x + (row % 2) * wide / 2
    column = np.floor(x / wide)
    shade = np.sin(row * 12.9898 + column * 78.233) * 43758.5453
    shade = shade - np.floor(shade)  # of each tile, 0 to 1
    base = colour(rng, saturation=(0, 0.7), value=(0.3, 0.95))
    joint = colour(rng, saturation=(0, 0.2))
    gap = rng.uniform(1, 4)
    is_joint = (y - row * high < gap) | (x - column * wide < gap)
    made = toned(base, 0.8 + 0.35 * shade + 0.05 * noise(rng, size, 1))
    np.copyto(made, joint, where=is_joint[..., None])
    return made


GROUNDS: dict[str, Callable[[Rng, Size], np.ndarray]] = {
    "plain": plain,
    "gradient": gradient,
    "wood": wood,
    "cloth": cloth,
    "paper": paper,
    "stone": stone,
    "soil": soil,
    "speckles": speckles,
    "grass": grass,
    "velvet": velvet,
    "belt": belt,
    "metal": metal,
    "clouds": clouds,
    "tiles": tiles,
}
HELD_OUT_GROUNDS = ("tiles",)  # never in training
TRAINING_GROUNDS = tuple(name for name in GROUNDS if name not in HELD_OUT_GROUNDS)


def draw_ground(rng: Rng, size: Size, family: str) -> np.ndarray:
    """A ground of a family, float32 (height, width, 3), 0 to 255, not yet lit.

    Raises: ValueError for an unknown family.
    """
    if family not in GROUNDS:
        raise ValueError(f"unknown ground {family!r}; choose from {', '.join(GROUNDS)}")
    return np.clip(GROUNDS[family](rng, size), 0, 255, out=planes(*size))


def compose(rng: Rng, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A sheet, a tray or a board of the second ground on the first, or a table's edge.

    Both float32 (height, width, 3); the result too.
    """
    height, width = first.shape[:2]
    angle = rng.normal(0, 0.25) + rng.integers(4) * math.pi / 2
    cos, sin = math.cos(angle), math.sin(angle)
    y = np.arange(height, dtype=np.float32)[:, None] - rng.uniform(0.3, 0.7) * height
    x = np.arange(width, dtype=np.float32) - rng.uniform(0.3, 0.7) * width
    u, v = cos * x + sin * y, cos * y - sin * x
    manner = rng.integers(3)
    half = rng.uniform(0.25, 0.6, 2) * min(height, width)
    if manner == 0:
        inside = u
    elif manner == 1:
        inside = np.minimum(half[0] - np.abs(u), half[1] - np.abs(v))
    else:
        inside = (1 - np.hypot(u / half[0], v / half[1])) * half.min()
    share = np.clip(inside + 0.5, 0, 1)
    reach = rng.uniform(2, 12)
    dark = 1 - rng.uniform(0, 0.6) * np.clip(1 + inside / reach, 0, 1)  # beside its edge
    made = planes(height, width)
    np.multiply(first, np.where(inside < 0, dark, 1)[..., None], out=made)
    made *= (1 - share)[..., None]
    made += np.multiply(second, share[..., None], out=planes(height, width))
    return made
