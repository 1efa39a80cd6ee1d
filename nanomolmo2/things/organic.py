"""Families of grown things: a function draws a kind, what it returns draws its instances.

Instances of a kind differ a little, as real ones do: in outline, in where the texture lies.
"""

from __future__ import annotations

import math

import numpy as np

from nanomolmo2.things.surface import Draw, Grid, Palette, Surface, dome, mix, pick

Rng = np.random.Generator


def vary(rng: Rng, value: float, share: float = 0.06) -> float:
    """A value changed by up to a share of it."""
    return value * float(rng.uniform(1 - share, 1 + share))


class Outline:
    """A smooth closed outline as a radius by angle; the largest radius is 1."""

    def __init__(self, rng: Rng, strength: float, waves: int = 5) -> None:
        orders = np.arange(2, 2 + waves)
        self.orders = orders
        self.sizes = strength * rng.normal(0, 1, waves) / (orders - 0.6)
        self.phases = rng.uniform(0, 2 * math.pi, waves)
        self.top = float(self._radius(np.linspace(0, 2 * math.pi, 90), self.sizes, 0.0).max())

    def _radius(self, theta: np.ndarray, sizes: np.ndarray, turn: float) -> np.ndarray:
        radius = np.ones_like(theta)
        for order, size, phase in zip(self.orders, sizes, self.phases, strict=True):
            radius += float(size) * np.cos(int(order) * theta + float(phase + turn))
        return np.maximum(radius, 0.15)

    def radius(self, rng: Rng, grid: Grid, change: float = 0.18) -> np.ndarray:
        sizes = self.sizes * rng.uniform(1 - change, 1 + change, len(self.sizes))
        return self._radius(grid.theta, sizes, float(rng.normal(0, 0.4 * change))) / self.top


def textured(
    rng: Rng, grid: Grid, palette: Palette, texture: int, scale: float, strength: float
) -> np.ndarray:
    """Colours (n, n, 3): clouds, spots, bands, speckles or veins of a kind's own scale."""
    first, second, third = palette.colours
    if texture == 0:
        share = np.clip(0.5 + 0.5 * grid.noise(rng, 3, 30 * scale), 0, 1)
    elif texture == 1:
        share = grid.soft(grid.noise(rng, 3, 70 * scale) - 0.7, 0.3)
    elif texture == 2:
        wave = grid.u * (9 * scale) + grid.noise(rng, 3, 30) * 0.6 + rng.uniform(0, 6)
        share = 0.5 + 0.5 * np.sin(wave)
    elif texture == 3:
        share = grid.soft(grid.noise(rng, 0, 60) - 1.0, 0.8)
    else:
        share = np.exp(-4 * np.abs(grid.noise(rng, 2, 45 * scale)))
    return mix(first, third if texture in (1, 4) else second, share * strength)


def blob(rng: Rng, palette: Palette) -> Draw:
    """A smooth lump of any outline."""
    outline = Outline(rng, float(rng.uniform(0.08, 0.34)))
    texture, scale, strength = int(rng.integers(5)), rng.uniform(0.6, 1.6), rng.uniform(0.3, 1)
    bevel, height = float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.4, 1))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 0.85 * (outline.radius(rng, grid) - grid.r)
        colours = textured(rng, grid, palette, texture, scale, strength)
        return Surface(inside, dome(inside, bevel, height), colours)

    return draw


def stone(rng: Rng, palette: Palette) -> Draw:
    """A pebble or a crumb: rough, mottled."""
    outline = Outline(rng, float(rng.uniform(0.06, 0.2)), waves=7)
    squash, rough = float(rng.uniform(0.6, 1)), float(rng.uniform(0.005, 0.05))
    texture, strength = int(pick(rng, [0, 3, 4])), rng.uniform(0.3, 1)

    def draw(rng: Rng, grid: Grid) -> Surface:
        stretched = np.hypot(grid.u, grid.v * (1 / vary(rng, squash, 0.12)))
        inside = 0.75 * squash * (outline.radius(rng, grid, 0.4) - stretched)
        colours = textured(rng, grid, palette, texture, 1.0, strength)
        height = dome(inside, 0.5) + grid.noise(rng, 2, 50) * rough
        return Surface(inside, height, colours)

    return draw


def bean(rng: Rng, palette: Palette) -> Draw:
    """Bent and shiny, with a mark on the inner side."""
    width, bend = float(rng.uniform(0.4, 0.62)), float(rng.uniform(0, 0.35))
    texture, strength = int(rng.integers(5)), float(pick(rng, [0.15, 0.5, 1]))
    has_mark = rng.random() < 0.7

    def draw(rng: Rng, grid: Grid) -> Surface:
        wide, bent = vary(rng, width, 0.08), vary(rng, bend, 0.2)
        v = grid.v + bent * (grid.u * grid.u - 0.4)
        inside = 0.9 * wide * (1 - np.sqrt(grid.u**2 + (v / wide) ** 2))
        colours = textured(rng, grid, palette, texture, 1.0, strength)
        if has_mark:
            spot = 0.14 - np.hypot(grid.u * 0.7, v - 0.75 * wide)
            colours = mix(colours, palette.third, grid.soft(spot, 0.05))
        return Surface(inside, dome(inside, wide * 0.9), colours)

    return draw


def seed(rng: Rng, palette: Palette) -> Draw:
    """A drop, flat or round: striped, plain or with a pale rim."""
    width, taper = float(rng.uniform(0.28, 0.62)), float(rng.uniform(0.15, 0.75))
    manner, stripes = int(rng.integers(4)), float(rng.uniform(8, 22))
    flat = float(rng.uniform(0.12, 0.5))

    def draw(rng: Rng, grid: Grid) -> Surface:
        wide = vary(rng, width, 0.1)
        along = np.sqrt(np.clip(1 - grid.u**2, 0, 1)) * (1 + taper * grid.u) / (1 + 0.4 * taper)
        inside = 0.8 * np.minimum(wide * along - np.abs(grid.v), 1 - np.abs(grid.u))
        colours: np.ndarray = palette.first
        if manner == 0:
            wave = np.sin(grid.v / (0.3 + along) * stripes + rng.normal(0, 0.5))
            colours = mix(colours, palette.third, grid.soft(wave, 0.6))
        elif manner == 1:
            colours = mix(palette.third, colours, grid.soft(inside - 0.12 * width, 0.08))
        elif manner == 2:
            colours = textured(rng, grid, palette, 0, 1.5, 0.8)
        colours = mix(colours, palette.second, np.clip(-grid.u - 0.4, 0, 1))
        return Surface(inside, dome(inside, flat), colours)

    return draw


def grain(rng: Rng, palette: Palette) -> Draw:
    """Rice, wheat, lentil: a small oval, often with a crease."""
    width, crease = float(rng.uniform(0.22, 0.8)), float(pick(rng, [0, 0.06, 0.12]))
    power = float(rng.uniform(1.7, 2.6))
    speckle = float(pick(rng, [0.1, 0.4]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        wide = vary(rng, width, 0.1)
        ovalness = np.abs(grid.u) ** power + np.abs(grid.v / wide) ** power
        inside = 0.8 * wide * (1 - ovalness ** (1 / power))
        height = dome(inside, 0.7 * wide)
        colours = textured(rng, grid, palette, 0, 1.2, speckle)
        if crease:
            groove = np.exp(-((grid.v / crease) ** 2)) * np.clip(1 - grid.u**2, 0, 1)
            height = height - 0.35 * crease * groove
            colours = mix(colours, palette.second, 0.6 * groove)
        return Surface(inside, height, colours)

    return draw


def berry(rng: Rng, palette: Palette) -> Draw:
    """Round and glossy: with a calyx, freckles or a bloom."""
    squash = float(rng.uniform(0.85, 1))
    rays, calyx = int(rng.integers(3, 8)), float(pick(rng, [0, 0.2, 0.35]))
    freckles = float(pick(rng, [0, 0.5, 1]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 0.95 * (1 - np.hypot(grid.u, grid.v / vary(rng, squash, 0.03)))
        colours = textured(rng, grid, palette, 0, 0.8, 0.5)
        if freckles:
            colours = mix(
                colours, palette.third, freckles * grid.soft(grid.noise(rng, 1, 70) - 1.6)
            )
        if calyx:
            x, y = rng.uniform(-0.35, 0.35, 2).tolist()
            du, dv = grid.u - x, grid.v - y
            star = calyx * (0.6 + 0.4 * np.cos(rays * np.arctan2(dv, du))) - np.hypot(du, dv)
            colours = mix(colours, palette.third * 0.7, grid.soft(star, 0.05))
        return Surface(inside, dome(inside, 0.95), colours)

    return draw


def walnut(rng: Rng, palette: Palette) -> Draw:
    """A wrinkled shell with a seam, or a nut in two shades."""
    outline = Outline(rng, 0.05)
    wrinkled, squash = rng.random() < 0.6, float(rng.uniform(0.75, 1))
    depth, border = float(rng.uniform(0.03, 0.1)), float(rng.uniform(-0.2, 0.6))

    def draw(rng: Rng, grid: Grid) -> Surface:
        stretched = np.hypot(grid.u, grid.v / vary(rng, squash, 0.05))
        inside = 0.9 * squash * (outline.radius(rng, grid, 0.5) - stretched)
        height = dome(inside, 0.8)
        if wrinkled:
            ridges = np.abs(grid.noise(rng, 3, 75))
            height = height + depth * np.minimum(ridges, 1.5)
            seam = np.exp(-((grid.v / 0.05) ** 2))
            dark = np.clip(0.8 * np.exp(-3 * ridges) + 0.7 * seam, 0, 1)
            colours = mix(palette.first, palette.first * 0.45, dark)
        else:
            line = grid.u - border - 0.15 * grid.v**2 + 0.03 * grid.noise(rng, 2, 40)
            colours = mix(palette.first, palette.second * 0.6 + 0.35, grid.soft(line, 0.05))
            colours = mix(colours, palette.first * 0.6, 0.3 * (0.5 + 0.5 * np.sin(20 * grid.v)))
        return Surface(inside, height, colours)

    return draw


def leaf(rng: Rng, palette: Palette) -> Draw:
    """Pointed, with veins; the edge smooth or toothed."""
    width, power = float(rng.uniform(0.25, 0.6)), float(rng.uniform(0.55, 1.1))
    lean, teeth = float(rng.uniform(-0.35, 0.35)), float(pick(rng, [0, 0, 0.05]))
    veins, slant = float(rng.uniform(16, 34)), float(rng.uniform(0.5, 1.2))

    def draw(rng: Rng, grid: Grid) -> Surface:
        v = grid.v + vary(rng, 0.08, 1.0) * pick(rng, [-1, 1]) * (grid.u**2 - 0.3)
        along = np.clip(1 - grid.u**2, 0, 1) ** power * (1 + lean * grid.u)
        wide = vary(rng, width, 0.12)
        edge = wide * along + (teeth * np.sin(grid.u * 40) * along if teeth else 0)
        blade = 0.7 * (edge - np.abs(v))
        stem = np.minimum(0.035 - np.abs(v), 1.0 - np.abs(grid.u))
        inside = np.maximum(blade, stem)
        rib = np.exp(-((v / 0.03) ** 2))
        side = 0.5 + 0.5 * np.cos(veins * (grid.u + slant * np.abs(v)))
        colours = textured(rng, grid, palette, 0, 1.0, 0.5)
        pale = palette.first * 0.6 + 0.35
        colours = mix(colours, pale, np.clip(0.8 * rib + 0.4 * side**6, 0, 1))
        height = 0.06 * side + 0.05 * np.abs(v / wide) + 0.05 * rib
        return Surface(inside, height, colours)

    return draw


def log(rng: Rng, palette: Palette) -> Draw:
    """The end of a log or a slice of wood: rings, bark, cracks."""
    outline = Outline(rng, float(rng.uniform(0.02, 0.08)))
    rings, bark = float(rng.uniform(18, 50)), float(rng.uniform(0.03, 0.16))
    core = float(rng.uniform(0, 0.5))

    def draw(rng: Rng, grid: Grid) -> Surface:
        x, y = rng.uniform(-0.15, 0.15, 2).tolist()
        radius = outline.radius(rng, grid, 0.5)
        inside = radius - grid.r
        away = np.hypot(grid.u - x, grid.v - y)
        wave = away * rings + 0.7 * grid.noise(rng, 3, 25) + rng.uniform(0, 6)
        colours = mix(palette.first, palette.second, 0.3 + 0.3 * np.sin(wave))
        if core:
            colours = mix(colours, palette.second * 0.8, grid.soft(core - away, 0.2))
        for turn in rng.uniform(-math.pi, math.pi, int(rng.integers(0, 4))).tolist():
            gap = np.abs(np.sin((grid.theta - turn) / 2)) * 2 * grid.r + 0.02 * grid.r
            crack = grid.soft(0.018 - gap, 0.03) * (grid.r < rng.uniform(0.4, 0.9))
            colours = mix(colours, palette.first * 0.2, 0.8 * crack)
        is_bark = grid.soft(bark - inside, 0.03)
        rough = 0.7 + 0.15 * grid.noise(rng, 1, 60)
        colours = (
            mix(colours, palette.third * 0.5, is_bark) * (1 - 0.3 * is_bark * rough)[..., None]
        )
        return Surface(inside, 0.03 * is_bark + 0.01 * grid.noise(rng, 2, 60), colours)

    return draw


def cell(rng: Rng, palette: Palette) -> Draw:
    """Seen through a microscope: a membrane, a nucleus, grains; light shines through it."""
    outline = Outline(rng, float(rng.uniform(0.02, 0.16)))
    alpha, membrane = float(rng.uniform(0.3, 0.9)), float(rng.uniform(0.03, 0.12))
    nucleus, donut = float(rng.uniform(0.15, 0.5)), rng.random() < 0.25
    grains = float(pick(rng, [0, 0.4, 0.8]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 0.95 * (outline.radius(rng, grid, 0.5) - grid.r)
        x, y = rng.uniform(-0.25, 0.25, 2).tolist()
        core = vary(rng, nucleus, 0.15) - np.hypot(grid.u - x, (grid.v - y) * vary(rng, 1, 0.2))
        in_core = grid.soft(core, 0.08)
        colours = mix(palette.first, palette.second * 0.6, in_core)
        wall = grid.soft(membrane - np.abs(inside - membrane / 2), 0.05)
        colours = mix(colours, palette.second * 0.7, wall)
        see = alpha + (0.97 - alpha) * np.maximum(wall, in_core)
        if donut:  # a red blood cell is pale in the middle
            colours = mix(palette.first, palette.first * 0.5 + 0.45, in_core)
            see = alpha * (1 - 0.4 * in_core)
        if grains:
            dots = grains * grid.soft(grid.noise(rng, 1, 80) - 1.2)
            colours = mix(colours, palette.third * 0.6, dots)
        return Surface(inside, 0.0, colours, np.maximum(see, 0.42))

    return draw


def insect(rng: Rng, palette: Palette) -> Draw:
    """Two or three segments, legs, sometimes wings."""
    parts = int(rng.integers(2, 4))
    width, legs = float(rng.uniform(0.18, 0.42)), float(rng.uniform(0.35, 0.8))
    winged = rng.random() < 0.4
    stripes = float(pick(rng, [0, 0, 14]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        places = np.linspace(-0.6, 0.45, parts).tolist()
        sizes = np.linspace(0.22, 0.42, parts).tolist()
        body = np.full_like(grid.u, -1)
        for place, size in zip(places, sizes, strict=True):
            wide = width * size / 0.42 * vary(rng, 1, 0.08)
            oval = np.hypot((grid.u - place) / size, grid.v / wide)
            body = np.maximum(body, 0.8 * wide * (1 - oval))
        away = np.abs(grid.v)
        body = np.maximum(body, np.minimum(0.05 - away, 0.5 - np.abs(grid.u + 0.08)))  # a waist
        inside = body
        for place in (-0.45, -0.15, 0.15):
            sweep = vary(rng, 0.5, 0.5) * (-1 if place < -0.3 else 1)
            leg = 0.022 - np.abs(grid.u - place - sweep * away) * 0.85
            inside = np.maximum(inside, np.minimum(leg, legs - away))
        colours: np.ndarray = palette.first
        if stripes:
            colours = mix(colours, palette.third, grid.soft(np.sin(grid.u * stripes), 0.4))
        colours = mix(palette.first * 0.4, colours, grid.soft(body, 0.03))
        alpha: np.ndarray | float = 1.0
        if winged:
            wing = 0.25 * (1 - np.hypot((grid.u - 0.35) / 0.55, (away - 0.38) / 0.25))
            only = grid.soft(wing) * (1 - grid.soft(inside))
            colours = mix(colours, palette.second * 0.4 + 0.5, only)
            alpha = 1 - 0.45 * only
            inside = np.maximum(inside, wing)
        return Surface(inside, dome(np.maximum(body, 0), 0.25), colours, alpha)

    return draw


def flower(rng: Rng, palette: Palette) -> Draw:
    """Petals around a middle: flowers, star-shaped cookies and pasta."""
    petals, depth = int(rng.integers(4, 13)), float(rng.uniform(0.1, 0.55))
    middle, sharp = float(rng.uniform(0.12, 0.4)), float(rng.uniform(0.4, 1.4))

    def draw(rng: Rng, grid: Grid) -> Surface:
        wave = np.abs(np.cos(0.5 * petals * grid.theta)) ** sharp
        radius = 1 - vary(rng, depth, 0.1) * (1 - wave)
        inside = 0.75 * (radius * (1 + 0.03 * grid.noise(rng, 3, 30)) - grid.r)
        ribs = 0.5 + 0.5 * np.cos(3 * petals * grid.theta)
        colours = mix(palette.first, palette.second, np.clip(1 - grid.r, 0, 1) * (0.6 + 0.4 * ribs))
        core = grid.soft(middle - grid.r, 0.05)
        colours = mix(colours, palette.third, core)
        height = dome(inside, 0.25) * (0.7 + 0.3 * wave) + 0.06 * core
        return Surface(inside, height, colours)

    return draw


def shell(rng: Rng, palette: Palette) -> Draw:
    """A fan of ribs with bands across, or a spiral."""
    ribs, ripple = float(rng.integers(9, 24)), float(rng.uniform(0.02, 0.07))
    bands, spiral = float(rng.uniform(6, 20)), rng.random() < 0.35
    spread = float(rng.uniform(0.5, 0.95))

    def draw(rng: Rng, grid: Grid) -> Surface:
        if spiral:
            inside = 0.95 * (1 - 0.12 * (1 + np.sin(grid.theta / 2)) - grid.r)
            turn = grid.theta + 2.6 * np.log(grid.r + 0.03) * 2.2
            wave = 0.5 + 0.5 * np.cos(turn)
            colours = mix(palette.first, palette.second * 0.6, wave**3)
            return Surface(inside, dome(inside, 0.7) - 0.15 * wave, colours)
        du, dv = grid.u + 0.85, grid.v  # from the hinge
        away, angle = np.hypot(du, dv) / (1.85 - 0.5 * spread), np.arctan2(dv, du)
        wave = np.cos(ribs * angle + rng.normal(0, 0.3))
        inside = np.minimum(1 + ripple * wave - away, (vary(rng, spread) - np.abs(angle)) * away)
        band = 0.5 + 0.5 * np.sin(bands * away + 0.4 * grid.noise(rng, 3, 30))
        colours = mix(palette.first, palette.second, 0.7 * band)
        colours = mix(colours, palette.third, np.clip(0.35 - away, 0, 1))
        return Surface(inside, dome(inside, 0.8, 0.6) + 0.05 * wave * away, colours)

    return draw
