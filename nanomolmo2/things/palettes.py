"""Colours of procedural things: metals, wood and seeds, paints, and any."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from nanomolmo2.things.surface import Palette, pick

METALS = ((0.72, 0.73, 0.75), (0.55, 0.55, 0.57), (0.83, 0.68, 0.36), (0.72, 0.45, 0.28))
DARK_METALS = ((0.30, 0.30, 0.32), (0.36, 0.30, 0.27))


def _hsv(h: float, s: float, v: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(h % 1, min(max(s, 0), 1), min(max(v, 0), 1)), np.float32)


def metal(rng: np.random.Generator) -> Palette:
    """Steel, brass, copper, blackened; sometimes rusty."""
    table = DARK_METALS if rng.random() < 0.25 else METALS
    first = np.array(table[rng.integers(len(table))], np.float32)
    first = np.clip(first * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3), 0, 1)
    second = first * rng.uniform(0.5, 0.85)
    third = _hsv(rng.uniform(0.03, 0.08), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.5))
    return Palette(
        first.astype(np.float32),
        second.astype(np.float32),
        third,
        metal=0.7,
        gloss=float(rng.uniform(0.3, 0.9)),
        polish=float(rng.uniform(8, 40)),
    )


def natural(rng: np.random.Generator) -> Palette:
    """Browns, creams, greys, greens, reds, dark and light: of seeds, stones, wood and leaves."""
    kind = rng.integers(6)
    if kind == 0:  # brown
        h, s, v = rng.uniform(0.04, 0.11), rng.uniform(0.3, 0.75), rng.uniform(0.25, 0.75)
    elif kind == 1:  # cream
        h, s, v = rng.uniform(0.08, 0.15), rng.uniform(0.08, 0.4), rng.uniform(0.75, 0.97)
    elif kind == 2:  # grey
        h, s, v = rng.uniform(0, 1), rng.uniform(0, 0.15), rng.uniform(0.2, 0.85)
    elif kind == 3:  # green
        h, s, v = rng.uniform(0.18, 0.36), rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.75)
    elif kind == 4:  # red, orange, yellow
        h, s, v = rng.uniform(-0.04, 0.15), rng.uniform(0.55, 0.95), rng.uniform(0.45, 0.95)
    else:  # dark
        h, s, v = rng.uniform(0, 1), rng.uniform(0.1, 0.6), rng.uniform(0.08, 0.25)
    return _around(rng, h, s, v, gloss=float(pick(rng, [0.03, 0.12, 0.35])))


def paint(rng: np.random.Generator) -> Palette:
    """Anything that is made in colour: plastic, pills, enamel."""
    if rng.random() < 0.3:  # white and pastel
        h, s, v = rng.uniform(0, 1), rng.uniform(0, 0.3), rng.uniform(0.85, 1)
    else:
        h, s, v = rng.uniform(0, 1), rng.uniform(0.45, 1), rng.uniform(0.4, 1)
    return _around(rng, h, s, v, gloss=float(rng.uniform(0.15, 0.7)), apart=0.5)


def _around(
    rng: np.random.Generator, h: float, s: float, v: float, gloss: float, apart: float = 0.06
) -> Palette:
    """A colour, another shade of it, and one that goes further."""
    darker = -0.3 if v > 0.4 else 0.3
    second = _hsv(h + rng.normal(0, 0.02), s * rng.uniform(0.7, 1.2), v + darker * rng.random())
    third = _hsv(
        h + rng.uniform(-apart, apart), s * rng.uniform(0.3, 1.2), v + rng.uniform(-0.5, 0.4)
    )
    return Palette(_hsv(h, s, v), second, third, gloss=gloss, polish=float(rng.uniform(8, 60)))


PALETTES: dict[str, Callable[[np.random.Generator], Palette]] = {
    "metal": metal,
    "natural": natural,
    "paint": paint,
}


def draw_palette(rng: np.random.Generator, usual: str) -> Palette:
    """A palette of the usual kind, one time in five of another."""
    if rng.random() < 0.2:
        usual = pick(rng, list(PALETTES))
    return PALETTES[usual](rng)
