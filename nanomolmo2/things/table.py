"""Things are put on a ground one by one, where they find room; what is in view of them is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from nanomolmo2.emoji.scenes import VISIBLE_ALPHA
from nanomolmo2.things.kinds import Kind, draw_angle
from nanomolmo2.things.settings import ThingScene
from nanomolmo2.things.surface import Light, pick

Rng = np.random.Generator

LEAST_VISIBLE = 0.4  # of a thing's pixels, or nobody is asked about it
NUM_PLACES = (6, 24)  # positions tried for a thing, and again, before it is left out


@dataclass(frozen=True)
class Thing:
    """One thing.

    Attributes:
        kind: number of its kind in the scene.
        box: (x0, y0, x1, y1) around its pixels in view.
        center: the middle of these pixels, or, if that is not on the thing, a place on it nearby.
        visible: share of its pixels that is in view.
        px: its longer side before it was turned.
    """

    kind: int
    box: tuple[float, float, float, float]
    center: tuple[float, float]
    visible: float
    px: float


class Table:
    """A ground that things are put on one by one, ``most`` at most."""

    def __init__(
        self, rng: Rng, canvas: np.ndarray, light: Light, config: ThingScene, most: int
    ) -> None:
        self.rng, self.canvas, self.light = rng, canvas, light
        self.height, self.width = canvas.shape[:2]
        self.instance_map = np.full((self.height, self.width), -1, np.int16)
        self.put_so_far: list[tuple[int, float]] = []  # kind, px
        # Of each thing; only the first rows are in use.
        self.boxes = np.zeros((most, 4), np.int64)
        self.pixels = np.zeros(most, np.int64)  # all that it has
        self.left = np.zeros(most, np.int64)  # in view so far
        heaped = rng.random() < config.heaped
        self.may_share = float(rng.uniform(0.2, 0.9)) if heaped else float(pick(rng, [0, 0.04]))
        self.may_cut = 0.45 if rng.random() < config.cut else 0.0
        number = int(rng.integers(1, 4))
        self.heaps = rng.uniform(0.2, 0.8, (number, 2)) * (self.width, self.height)
        self.spread = float(rng.uniform(0.12, 0.35)) if heaped else 0.0
        self.blurred = float(pick(rng, [0, 0, 0.15]))

    def put(self, number: int, kind: Kind, px: float) -> bool:
        """Draw a thing where it finds room; False if it finds none."""
        rng = self.rng
        mirror = kind.mirror and bool(rng.random() < 0.5)
        rgba = kind.look.draw(rng, px, draw_angle(rng, kind.turn), mirror, self.light)
        if rng.random() < self.blurred:
            soft = Image.fromarray(np.clip(rgba, 0, 255).astype(np.uint8), mode="RGBa")
            blur = ImageFilter.BoxBlur(0.06 * px**0.8)
            for channel, band in enumerate(soft.split()):
                rgba[..., channel] = np.asarray(band.filter(blur))
        alpha = rgba[..., 3]
        across, down = alpha.max(0), alpha.max(1)
        if across.max() < VISIBLE_ALPHA:
            return False
        left, right = _ends(across >= VISIBLE_ALPHA)
        top, bottom = _ends(down >= VISIBLE_ALPHA)
        visible = alpha[top:bottom, left:right] >= VISIBLE_ALPHA
        (x0, x1), (y0, y1) = _ends(across > 0), _ends(down > 0)
        drawn = rgba[y0:y1, x0:x1]  # there is nothing beside it
        for places in NUM_PLACES:
            for x, y in self._places(right - left, bottom - top, places):
                if self._mark(visible, x, y):
                    self._draw(drawn, x - left + x0, y - top + y0, px, kind.look.casts)
                    self.put_so_far.append((number, px))
                    return True
        return False

    def _places(self, width: int, height: int, number: int) -> list[list[int]]:
        """Of so many places some (left, top) of a thing where its box shares little with others."""
        rng = self.rng
        cut_x, cut_y = int(self.may_cut * width), int(self.may_cut * height)
        low = (-cut_x, -cut_y)
        high = (self.width - width + cut_x, self.height - height + cut_y)
        if high[0] < low[0] or high[1] < low[1]:
            return []
        places = rng.integers(low, (high[0] + 1, high[1] + 1), (number, 2))
        if self.spread:
            near = self.heaps[rng.integers(len(self.heaps), size=number)]
            near = near + rng.normal(0, self.spread, (number, 2)) * (self.width, self.height)
            near = near.astype(int) - (width // 2, height // 2)
            is_near = (near >= low).all(1) & (near <= high).all(1) & (rng.random(number) < 0.9)
            places = np.where(is_near[:, None], near, places)
        x0, y0 = places[:, :1], places[:, 1:]
        left, top, right, bottom = self.boxes[: len(self.put_so_far)].T
        shared = np.minimum(x0 + width, right) - np.maximum(x0, left)
        shared_y = np.minimum(y0 + height, bottom) - np.maximum(y0, top)
        np.maximum(shared, 0, out=shared)
        shared *= np.maximum(shared_y, 0, out=shared_y)
        areas = (right - left) * (bottom - top)
        free = (shared <= self.may_share * np.minimum(areas, width * height)).all(axis=1)
        found: list[list[int]] = places[free][:8].tolist()
        return found

    def _window(self, shape: tuple[int, int], x: int, y: int) -> tuple[tuple[slice, slice], ...]:
        """Where an array at (x, y) lies on the table, and which part of it does."""
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + shape[1], self.width), min(y + shape[0], self.height)
        on = (slice(y0, y1), slice(x0, x1))
        return on, (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))

    def _mark(self, visible: np.ndarray, x: int, y: int) -> bool:
        """Give a thing its pixels if enough of it is in the picture, and of what it covers remains
        in view; False if not.
        """
        on, part = self._window(visible.shape, x, y)
        inside, under = visible[part], self.instance_map[on]
        pixels, left = np.count_nonzero(visible), np.count_nonzero(inside)
        if left < 1.1 * LEAST_VISIBLE * pixels:
            return False
        number = len(self.put_so_far)
        if number and under.max() >= 0:
            covered = under[inside]
            lost = np.bincount(covered[covered >= 0], minlength=number)
            remains = self.left[:number] - lost
            if ((lost > 0) & (remains < 1.05 * LEAST_VISIBLE * self.pixels[:number])).any():
                return False
            self.left[:number] = remains
        np.copyto(under, number, where=inside)
        self.pixels[number], self.left[number] = pixels, left
        self.boxes[number] = (x, y, x + visible.shape[1], y + visible.shape[0])
        return True

    def _draw(self, rgba: np.ndarray, x: int, y: int, px: float, casts: bool) -> None:
        if casts and self.light.shadow > 0.05:
            self._shadow(rgba[..., 3], x, y, px)
        on, part = self._window(rgba.shape[:2], x, y)
        piece = rgba[part]
        under = self.canvas[on]
        under *= (1 - piece[..., 3] * (1 / 255))[..., None]
        under += piece[..., :3]

    def _shadow(self, alpha: np.ndarray, x: int, y: int, px: float) -> None:
        """Soft, away from the light, darkest where the thing touches the ground."""
        light = self.light
        soft = max(0.6, light.softness * px)
        margin = math.ceil(2 * soft) + 1
        away = 0.09 * px * (1 - light.z) / max(light.z, 0.4) + 0.02 * px
        padded = np.zeros([side + 2 * margin for side in alpha.shape], np.uint8)
        padded[margin:-margin, margin:-margin] = alpha
        blurred = Image.fromarray(padded).filter(ImageFilter.BoxBlur(soft))
        dx, dy = round(-away * 2 * light.x), round(-away * 2 * light.y)
        on, part = self._window(padded.shape, x - margin + dx, y - margin + dy)
        dark = np.asarray(blurred)[part] * np.float32(light.shadow / 255)
        self.canvas[on] *= (1 - dark)[..., None]

    def things(self) -> tuple[Thing, ...]:
        """The truth about all of them."""
        found = []
        for i, (kind, px) in enumerate(self.put_so_far):
            x0, y0 = np.maximum(self.boxes[i, :2], 0).tolist()
            mask = self.instance_map[y0 : self.boxes[i, 3], x0 : self.boxes[i, 2]] == i
            left, right = _ends(mask.any(0))
            top, bottom = _ends(mask.any(1))
            x, y = middle_of(mask)
            found.append(
                Thing(
                    kind=kind,
                    box=(float(x0 + left), float(y0 + top), float(x0 + right), float(y0 + bottom)),
                    center=(x0 + x, y0 + y),
                    visible=float(np.count_nonzero(mask) / self.pixels[i]),
                    px=px,
                )
            )
        return tuple(found)


def _ends(line: np.ndarray) -> tuple[int, int]:
    """First and behind the last that is true, at least one is."""
    return int(line.argmax()), len(line) - int(line[::-1].argmax())


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of a mask's pixels; where that is no pixel of it, of one nearby.

    Nearby is the nearest, sooner one above than one below, so that rings are marked alike.
    """
    number = int(np.count_nonzero(mask))
    x = float(mask.sum(0) @ np.arange(mask.shape[1])) / number + 0.5
    y = float(mask.sum(1) @ np.arange(mask.shape[0])) / number + 0.5
    if mask[int(y), int(x)]:
        return x, y
    rows, columns = np.nonzero(inner(mask))
    dx, dy = columns + 0.5 - x, rows + 0.5 - y
    nearest = int(np.argmin(np.hypot(dx, np.where(dy > 0, 1.3 * dy, 0.9 * dy))))
    return float(columns[nearest]) + 0.5, float(rows[nearest]) + 0.5


def inner(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours belong to a mask too; all of it if there are none."""
    inner = np.zeros_like(mask)
    beside = mask[1:-1, :-2] & mask[1:-1, 2:]
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & beside
    return inner if inner.any() else mask
