"""Families of made things: a function draws a kind, what it returns draws its instances."""

from __future__ import annotations

import math

import numpy as np

from nanomolmo2.things.organic import Outline, Rng, textured
from nanomolmo2.things.surface import Draw, Grid, Palette, Surface, dome, mix, pick


def stadium(u: np.ndarray, v: np.ndarray, length: float, radius: float) -> np.ndarray:
    """How far inside of a bar with round ends: ``length`` is half of its straight part."""
    return radius - np.hypot(np.maximum(np.abs(u) - length, 0), v)


def slab(u: np.ndarray, v: np.ndarray, a: float, b: float, radius: float) -> np.ndarray:
    """How far inside of a rectangle of half sides a and b with round corners."""
    x, y = np.abs(u) - (a - radius), np.abs(v) - (b - radius)
    outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
    return radius - outside - np.minimum(np.maximum(x, y), 0)


def polygon(grid: Grid, sides: int, turn: float = 0.0) -> np.ndarray:
    """How far inside of a regular polygon whose corners are 1 away from the middle."""
    part = 2 * math.pi / sides
    angle = (grid.theta + turn) % part - part / 2
    return math.cos(part / 2) - grid.r * np.cos(angle)


class Relief:
    """A raised figure: a star, letters that nobody can read, a head, a number of dots."""

    def __init__(self, rng: Rng, reach: float) -> None:
        self.reach, self.manner = reach, int(rng.integers(4))
        self.points, self.depth = int(rng.integers(3, 9)), float(rng.uniform(0.2, 0.6))
        self.outline = Outline(rng, 0.4)
        self.strokes = rng.uniform(-0.8, 0.8, (int(rng.integers(3, 8)), 4)) * reach
        self.dots = rng.uniform(-0.7, 0.7, (int(rng.integers(2, 7)), 2)) * reach

    def on(self, rng: Rng, grid: Grid) -> np.ndarray:
        """0 to 1, (n, n)."""
        width = 0.06
        if self.manner == 0:
            wave = 1 - self.depth * (0.5 + 0.5 * np.cos(self.points * grid.theta))
            return grid.soft(self.reach * 0.9 * wave - grid.r, width)
        if self.manner == 1:
            found = self.outline.radius(rng, grid, 0.0) * self.reach - grid.r
            return grid.soft(found, width) - 0.5 * grid.soft(found - 0.25 * self.reach, width)
        nearest = np.full_like(grid.u, 9)
        if self.manner == 2:
            for x0, y0, x1, y1 in self.strokes.tolist():
                dx, dy = x1 - x0, y1 - y0
                along = ((grid.u - x0) * dx + (grid.v - y0) * dy) * (1 / (dx * dx + dy * dy + 1e-6))
                along = np.clip(along, 0, 1)
                away = np.hypot(grid.u - x0 - along * dx, grid.v - y0 - along * dy)
                nearest = np.minimum(nearest, away)
            return grid.soft(0.06 - nearest, width)
        for x, y in self.dots.tolist():
            nearest = np.minimum(nearest, np.hypot(grid.u - x, grid.v - y))
        return grid.soft(0.12 - nearest, width)


def capsule(rng: Rng, palette: Palette) -> Draw:
    """A capsule or a long pill, in one colour or two."""
    radius, split = float(rng.uniform(0.28, 0.5)), float(rng.uniform(-0.25, 0.25))
    colours_in = int(rng.integers(3))
    clear = float(pick(rng, [1, 1, 0.75]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = stadium(grid.u, grid.v, 1 - radius, radius)
        right = grid.soft(grid.u - split)
        colours: np.ndarray = palette.first
        if colours_in:
            colours = mix(palette.first, palette.third, right)
        height = dome(inside, radius) + 0.04 * right
        alpha = clear + (1 - clear) * right
        return Surface(inside, height, colours, alpha)

    return draw


def tablet(rng: Rng, palette: Palette) -> Draw:
    """A pressed pill: round, oval or cornered, scored or with a mark."""
    shape, width = int(rng.integers(4)), float(rng.uniform(0.5, 0.85))
    bevel, scored = float(rng.uniform(0.08, 0.5)), int(rng.integers(3))
    sides = int(rng.integers(3, 7))
    relief = Relief(rng, 0.4)
    marked, freckles = rng.random() < 0.4, rng.random() < 0.3

    def draw(rng: Rng, grid: Grid) -> Surface:
        if shape == 0:
            inside = 1 - grid.r
        elif shape == 1:
            inside = 0.9 * width * (1 - np.hypot(grid.u, grid.v / width))
        elif shape == 2:
            inside = slab(grid.u, grid.v, 0.9, 0.6 * width, 0.25)
        else:
            inside = polygon(grid, sides)
        height = dome(inside, bevel, 0.7)
        dip = np.exp(-((grid.u / 0.05) ** 2)) * (inside > 0) if scored else np.zeros_like(inside)
        if scored == 2:
            dip = np.maximum(dip, np.exp(-((grid.v / 0.05) ** 2)))
        if marked:
            dip = np.maximum(dip, 0.7 * relief.on(rng, grid))
        colours: np.ndarray = palette.first
        if freckles:
            colours = textured(rng, grid, palette, 3, 1.0, 0.7)
        if scored or marked:
            height = height - 0.06 * dip
            colours = mix(colours, palette.first * 0.8, 0.4 * dip)
        return Surface(inside, height, colours)

    return draw


def coin(rng: Rng, palette: Palette) -> Draw:
    """A raised rim, a raised figure, marks along the edge; some with a ring or a hole."""
    relief = Relief(rng, float(rng.uniform(0.4, 0.62)))
    rim, marks = float(rng.uniform(0.04, 0.12)), int(pick(rng, [0, 24, 40]))
    two = rng.random() < 0.2
    inner, hole = float(rng.uniform(0.5, 0.7)), float(pick(rng, [0, 0, 0, 0, 0.16]))
    sides = int(pick(rng, [0, 0, 0, 0, 7, 12]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 1 - grid.r if not sides else polygon(grid, sides)
        raised = relief.on(rng, grid)
        height = 0.05 * grid.soft(rim - inside, 0.04) + 0.06 * raised
        if marks:
            ticks = grid.soft(np.cos(marks * grid.theta) - 0.3, 0.3)
            height = height + 0.03 * ticks * grid.soft(0.06 - np.abs(inside - rim - 0.1), 0.03)
        height = height + 0.02 * dome(inside, 0.06)
        colours = mix(
            palette.first, palette.second, np.clip(0.5 + 0.3 * grid.noise(rng, 2, 50), 0, 1)
        )
        colours = mix(colours, palette.first * 0.6, 0.35 * raised)
        if two:
            colours = mix(colours, palette.third * 0.5 + 0.3, grid.soft(inner - grid.r))
        if hole:
            inside = np.minimum(inside, grid.r - hole)
        return Surface(inside, height, colours)

    return draw


def nut(rng: Rng, palette: Palette) -> Draw:
    """A nut with corners, or a gear; with a hole."""
    sides, hole = int(pick(rng, [4, 6, 6, 6, 8])), float(rng.uniform(0.3, 0.6))
    gear, teeth = rng.random() < 0.35, int(rng.integers(8, 25))
    depth = float(rng.uniform(0.1, 0.22))

    def draw(rng: Rng, grid: Grid) -> Surface:
        if gear:
            wave = np.clip(3 * np.cos(teeth * grid.theta) + 0.5, 0, 1)
            outer = 1 - depth * wave - grid.r
        else:
            outer = polygon(grid, sides)
        away = grid.r - hole
        inside = np.minimum(outer, away)
        ring = np.exp(-(((away - 0.06) / 0.05) ** 2))
        height = np.minimum(dome(np.maximum(outer, 0), 0.14), dome(np.maximum(away, 0), 0.1) + 0.02)
        colours = textured(rng, grid, palette, 0, 1.0, 0.5)
        colours = mix(colours, palette.first * 0.5, 0.7 * ring)
        return Surface(inside, height, colours)

    return draw


def ring(rng: Rng, palette: Palette) -> Draw:
    """A washer, a ring, an O-ring; flat or round."""
    thick, flat = float(rng.uniform(0.12, 0.5)), rng.random() < 0.5
    squash = float(pick(rng, [1, 1, 0.75]))
    gap = float(pick(rng, [0, 0, 0.25]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        away = np.hypot(grid.u, grid.v / squash)
        inside = (thick / 2 - np.abs(away - 1 + thick / 2)) * squash
        if gap:
            inside = np.minimum(inside, (np.abs(grid.theta) - gap) * grid.r)
        colours = textured(rng, grid, palette, 0, 1.0, 0.4)
        bevel = 0.08 if flat else thick / 2
        return Surface(inside, dome(np.maximum(inside, 0), bevel), colours)

    return draw


def screw(rng: Rng, palette: Palette) -> Draw:
    """Lying on its side: head, shaft, thread and tip of a screw, a bolt or a nail."""
    shaft, head = float(rng.uniform(0.07, 0.2)), float(rng.uniform(0.25, 0.5))
    length, manner = float(rng.uniform(0.14, 0.4)), int(rng.integers(3))
    turns, tip = float(rng.uniform(30, 70)), float(pick(rng, [0.08, 0.25, 0.4]))
    threaded = float(pick(rng, [-0.6, -0.2, 2]))  # from here on; a nail has none
    head = max(head, 1.6 * shaft)

    def draw(rng: Rng, grid: Grid) -> Surface:
        u, v = grid.u, grid.v
        taper = np.clip((1 - u) / tip, 0, 1)
        wave = np.sin(turns * u + 9 * v / (3 * shaft)) * (u > threaded)
        body = np.minimum(shaft * taper * (1 + 0.14 * wave) - np.abs(v), 1 - u)
        body = np.minimum(body, u + 0.95)
        if manner == 0:  # flat head, running out into the shaft
            top = head + (u + 0.98) * (shaft - head) / length - np.abs(v)
        elif manner == 1:  # cylinder or hexagon
            top = head - np.abs(v)
        else:  # round
            top = head * np.sqrt(np.clip(1 - ((u + 0.98 - length) / length) ** 2, 0, 1)) - np.abs(v)
        top = np.minimum(top, np.minimum(u + 0.98, -0.98 + length - u))
        inside = np.maximum(body, top)
        across = np.where(top > 0, np.float32(head), np.float32(shaft))
        height = np.sqrt(np.clip(across**2 - v**2, 0, None)) + 0.02 * wave * (body > 0)
        colours = mix(palette.first, palette.second, 0.35 - 0.35 * wave)
        colours = mix(colours, palette.third, 0.25 * grid.soft(grid.noise(rng, 2, 50) - 1, 0.6))
        return Surface(0.9 * inside, 0.8 * height, colours)

    return draw


def screw_head(rng: Rng, palette: Palette) -> Draw:
    """From above: slotted, crossed, hexagonal, starred; a rivet has nothing."""
    drive, wide = int(rng.integers(5)), float(rng.uniform(0.07, 0.14))
    bevel, corners = float(rng.uniform(0.15, 1)), rng.random() < 0.25
    reach = float(rng.uniform(0.45, 0.8))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = polygon(grid, 6) if corners else 1 - grid.r
        turn = float(rng.uniform(0, 6))
        cos, sin = math.cos(turn), math.sin(turn)
        a, b = np.abs(cos * grid.u + sin * grid.v), np.abs(cos * grid.v - sin * grid.u)
        if drive == 0:
            hole = np.minimum(wide - a, 0.95 - b)
        elif drive == 1:
            hole = np.maximum(np.minimum(wide - a, reach - b), np.minimum(wide - b, reach - a))
        elif drive == 2:
            hole = reach * 0.8 * polygon(grid, 6, turn) + (reach * 0.8 - 1) * grid.r * 0.2 - 0.05
        elif drive == 3:
            hole = reach * (0.75 + 0.2 * np.cos(6 * (grid.theta + turn))) - grid.r
        else:
            hole = np.full_like(grid.u, -1)
        dark = grid.soft(hole, 0.03)
        height = dome(inside, bevel, 0.7) - 0.12 * dark
        colours = mix(textured(rng, grid, palette, 0, 1.0, 0.5), palette.first * 0.2, 0.85 * dark)
        return Surface(inside, height, colours)

    return draw


def pipe(rng: Rng, palette: Palette) -> Draw:
    """The end of a pipe or of a bar of steel, seen along it."""
    wall, hollow = float(rng.uniform(0.06, 0.35)), rng.random() < 0.7
    square, rust = rng.random() < 0.3, float(rng.uniform(0, 1))
    ribs = int(pick(rng, [0, 2, 4]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        reach = 0.86 + 0.14 * np.abs(np.cos(ribs / 2 * grid.theta)) ** 8 if ribs else 1.0
        inside = slab(grid.u, grid.v, 0.76, 0.76, 0.15) if square else reach - grid.r
        colours = textured(rng, grid, palette, 4, 0.8, 0.4)
        patches = grid.soft(grid.noise(rng, 2, 40) + rust * 2 - 1.2, 0.8)
        colours = mix(colours, palette.third, 0.8 * patches)
        height = dome(np.maximum(inside, 0), 0.08) + 0.012 * grid.noise(rng, 1, 60)
        if hollow:
            depth = grid.soft(inside - wall, 0.04)
            towards = np.clip(0.25 + 0.3 * grid.v, 0.05, 0.6)
            colours = (
                mix(colours, palette.first * 0.35, depth)
                * (1 - 0.6 * depth * (1 - towards))[..., None]
            )
            height = height - 0.05 * depth
        return Surface(inside, height, colours)

    return draw


def button(rng: Rng, palette: Palette) -> Draw:
    """Two or four holes, a rim."""
    holes, size = int(pick(rng, [2, 4, 4])), float(rng.uniform(0.07, 0.13))
    away, rim = float(rng.uniform(0.18, 0.32)), float(rng.uniform(0.08, 0.25))
    swirl = float(pick(rng, [0, 0.4, 0.9]))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 1 - grid.r
        turn = float(rng.uniform(0, 6))
        for i in range(holes):
            at = turn + 2 * math.pi * i / holes
            hole = np.hypot(grid.u - away * math.cos(at), grid.v - away * math.sin(at)) - size
            inside = np.minimum(inside, hole)
        edge = 1 - grid.r
        height = 0.12 * grid.soft(rim - edge, 0.12) + dome(np.maximum(edge, 0), 0.1)
        height = height - 0.03 * grid.soft(0.05 - inside, 0.05) * (edge > rim)
        return Surface(inside, height, textured(rng, grid, palette, 4, 0.6, swirl))

    return draw


def ball(rng: Rng, palette: Palette) -> Draw:
    """A bead, a marble, a ball: plain, striped, swirled or pierced."""
    manner, stripes = int(rng.integers(4)), float(rng.uniform(3, 9))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = 1 - grid.r
        lean = float(rng.uniform(-0.5, 0.5))
        colours: np.ndarray = palette.first
        if manner == 0:
            bent = grid.v + lean * np.sqrt(np.clip(1 - grid.r**2, 0, 1))
            colours = mix(colours, palette.third, grid.soft(np.sin(stripes * bent + 1.5), 0.2))
        elif manner == 1:
            colours = textured(rng, grid, palette, 4, 0.5, 1.0)
        elif manner == 2:
            hole = 0.16 - np.hypot(grid.u - lean * 0.5, grid.v - 0.1)
            colours = mix(colours, palette.first * 0.15, grid.soft(hole, 0.06))
        return Surface(inside, dome(inside, 1.0), colours)

    return draw


def stick(rng: Rng, palette: Palette) -> Draw:
    """A match, a pencil, a swab, a tube, a straw: long and thin."""
    radius, manner = float(rng.uniform(0.05, 0.13)), int(rng.integers(5))
    end = float(rng.uniform(0.1, 0.3))
    swell = float(rng.uniform(1.1, 1.9))

    def draw(rng: Rng, grid: Grid) -> Surface:
        u, v = grid.u, grid.v + 0.04 * float(rng.normal()) * (grid.u**2 - 0.3)
        inside = np.minimum(radius - np.abs(v), 1 - np.abs(u))
        tip = grid.soft(u - 1 + end)
        colours = textured(rng, grid, palette, 2 if manner == 2 else 0, 1.2, 0.5)
        if manner in (0, 1):  # match, swab
            knob = stadium(
                np.abs(u) - 1 + end if manner == 1 else u - 1 + end, v, end * 0.5, radius
            )
            wide = stadium(
                (np.abs(u) if manner == 1 else u) - 1 + end * 0.6, v, end * 0.3, radius * swell
            )
            inside = np.maximum(np.minimum(inside, 1 - radius - np.abs(u) + 0.06), wide)
            colours = mix(colours, palette.third, grid.soft(np.maximum(wide, knob * 0.3 - 0.02)))
        elif manner == 3:  # pencil
            inside = np.minimum(inside, (1 - u) * radius / end)
            colours = mix(colours, palette.second * 0.5 + 0.4, tip)
            colours = mix(colours, palette.third * 0.4, grid.soft(u - 1 + 0.35 * end))
        elif manner == 4:
            colours = mix(colours, palette.third, grid.soft(np.abs(u) - 1 + end))
        across = np.where(np.abs(v) < radius, np.float32(radius), np.float32(radius * swell))
        return Surface(inside, np.sqrt(np.clip(across**2 - v**2, 0, None)), colours)

    return draw


def block(rng: Rng, palette: Palette) -> Draw:
    """A brick with studs, a die, a chip with legs, a domino."""
    width, manner = float(rng.uniform(0.35, 0.95)), int(rng.integers(4))
    across = int(rng.integers(2, 5))
    spots = rng.random((3, 3)) < 0.5
    bevel = float(rng.uniform(0.04, 0.15))

    def draw(rng: Rng, grid: Grid) -> Surface:
        wide, long = (0.74, 0.76) if manner == 1 else (0.7 * width, 0.84)
        inside = slab(grid.u, grid.v, long, wide, 0.08)
        height = dome(inside, bevel)
        colours = textured(rng, grid, palette, 0, 1.0, 0.25)
        if manner == 0:  # studs
            rows = max(1, round(across * wide))
            x = (np.abs(grid.u) * across / long + across) % 2 - 1
            y = (np.abs(grid.v) * rows / wide + rows) % 2 - 1
            stud = 0.62 - np.hypot(x, y * (wide * across) / (long * rows))
            height = height + 0.1 * grid.soft(stud, 0.25)
            colours = mix(colours, palette.first * 0.75, grid.soft(0.12 - np.abs(stud), 0.1) * 0.6)
        elif manner == 1:  # spots
            for row, column in np.argwhere(spots).tolist():
                spot = 0.14 - np.hypot(grid.u - (column - 1) * 0.45, grid.v - (row - 1) * 0.45)
                colours = mix(colours, palette.third, grid.soft(spot, 0.04))
        elif manner == 2:  # legs of metal
            legs = np.minimum(np.sin(grid.u * 7 * across) * 0.12, wide + 0.2 - np.abs(grid.v))
            legs = np.minimum(legs, long - np.abs(grid.u))
            on_body = grid.soft(inside)
            colours = mix(np.array([0.7, 0.7, 0.7], np.float32), palette.first * 0.35, on_body)
            inside = np.maximum(inside, legs)
        else:
            colours = mix(colours, palette.third, grid.soft(0.1 - np.abs(grid.u), 0.03))
        return Surface(inside, height, colours)

    return draw


def cap(rng: Rng, palette: Palette) -> Draw:
    """A crimped cap, with a figure on it."""
    teeth, depth = int(rng.integers(12, 24)), float(rng.uniform(0.03, 0.08))
    relief = Relief(rng, 0.5)

    def draw(rng: Rng, grid: Grid) -> Surface:
        wave = np.cos(teeth * grid.theta)
        inside = 1 - depth + depth * wave - grid.r
        figure = relief.on(rng, grid)
        edge = grid.soft(grid.r - 0.78, 0.08)
        height = dome(inside, 0.2) + 0.05 * wave * edge
        colours = mix(palette.first, palette.third, figure)
        return Surface(inside, height, mix(colours, palette.first * 0.8, edge))

    return draw


def resistor(rng: Rng, palette: Palette) -> Draw:
    """A small part with wires and bands, or a battery."""
    radius, body = float(rng.uniform(0.14, 0.3)), float(rng.uniform(0.4, 0.6))
    bands = np.sort(rng.uniform(-0.8, 0.8, int(rng.integers(1, 5)))) * body
    hues = rng.random((len(bands), 3)).astype(np.float32)
    wired = rng.random() < 0.6
    reach = body if wired else 1 - radius * 0.4

    def draw(rng: Rng, grid: Grid) -> Surface:
        v = grid.v
        inside = slab(grid.u, v, reach, radius, radius * 0.6)
        colours: np.ndarray = np.broadcast_to(palette.first, (*grid.u.shape, 3))
        for place, hue in zip(bands.tolist(), hues, strict=True):
            colours = mix(colours, hue, grid.soft(0.05 - np.abs(grid.u - place)))
        body = grid.soft(inside)
        if wired:
            wire = np.minimum(0.03 - np.abs(v), 1 - np.abs(grid.u))
            inside = np.maximum(inside, wire)
            colours = mix(np.array([0.68, 0.68, 0.7], np.float32), colours, body)
        height = np.sqrt(np.clip(radius**2 - v**2, 0, None)) * body
        return Surface(inside, height, colours)

    return draw


def clip(rng: Rng, palette: Palette) -> Draw:
    """Bent wire: a paper clip, a link, a safety pin."""
    wire, width = float(rng.uniform(0.035, 0.07)), float(rng.uniform(0.22, 0.45))
    loops = int(rng.integers(1, 4))

    def draw(rng: Rng, grid: Grid) -> Surface:
        inside = np.full_like(grid.u, -1)
        for loop in range(loops):
            radius = (width - wire) * (1 - 0.3 * loop)
            length = (1 - wire - width) * (1 - 0.22 * loop)
            edge = stadium(grid.u + 0.12 * loop, grid.v, length, radius)
            inside = np.maximum(inside, wire - np.abs(edge))
        return Surface(inside, dome(np.maximum(inside, 0), wire), palette.first)

    return draw


def pasta(rng: Rng, palette: Palette) -> Draw:
    """Tubes with ridges, spirals, bows."""
    manner, width = int(rng.integers(3)), float(rng.uniform(0.25, 0.45))
    ridges, slant = float(rng.uniform(12, 40)), float(rng.uniform(-0.6, 0.6))

    def draw(rng: Rng, grid: Grid) -> Surface:
        u, v = grid.u, grid.v
        colours = textured(rng, grid, palette, 0, 1.0, 0.4)
        if manner == 0:
            inside = np.minimum(width - np.abs(v), 0.8 - np.abs(u + slant * v))
            wave = np.sin(v / width * ridges / 3)
            hole = 0.5 - np.hypot((u + slant * v - 0.8) * 3, v / width)
            colours = mix(colours, palette.first * 0.4, grid.soft(hole, 0.1))
        elif manner == 1:
            wave = np.sin(ridges / 3 * u + 2.2 * v / width + rng.uniform(0, 6))
            inside = np.minimum(width * (0.85 + 0.15 * wave) - np.abs(v), 1 - np.abs(u))
        else:
            wave = np.sin(v * ridges / 2)
            edge = 0.95 + 0.04 * np.sin(v * 30)
            inside = np.minimum(0.12 + 1.2 * width * np.abs(u) - np.abs(v), 0.9 * edge - np.abs(u))
        colours = mix(colours, palette.second, 0.25 + 0.25 * wave)
        height = dome(np.maximum(0.8 * inside, 0), width, 0.9) + 0.03 * wave
        return Surface(0.8 * inside, height, colours)

    return draw
