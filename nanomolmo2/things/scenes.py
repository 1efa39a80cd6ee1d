"""Pictures of things of a few kinds on a ground, and exactly what is where.

Two things are alike if they are of one kind: the same drawing, or the same recipe, however turned,
mirrored, lit, slightly tinted, blurred or covered, as long as at least 40 % is in view and their
sizes are within a factor of 2. They are not alike in another colour, in another shape, or 3 times
as large: such look-alikes are kinds of their own (`Kind.alike`). Sizes in between do not occur.

Positions are pixels, x right and y down from the top-left corner; a pixel covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanomolmo2.emoji.scenes import TEST_STREAM, TRAIN_STREAM
from nanomolmo2.things.camera import Camera
from nanomolmo2.things.grounds import compose, draw_ground
from nanomolmo2.things.kinds import Kind, choose_kinds
from nanomolmo2.things.looks import colour_moments
from nanomolmo2.things.settings import TEST_SETS, ThingScene
from nanomolmo2.things.surface import Light, pick
from nanomolmo2.things.table import Table, Thing, inner

__all__ = ["TEST_SETS", "Kind", "Scene", "Thing", "ThingScene", "draw_scene", "test_scene"]

Rng = np.random.Generator

WORLD = 7  # second word of every seed, so that no other world shares them
LEAST_CONTRAST = 34  # of 255: by so much some channel of a kind's mean colour is unlike the ground
MOST_SPREAD = 42.0  # of 255: deviation of a ground's colours under things of `WIDE_PX` or more;
WIDE_PX = 36  # under smaller ones it is less, or nobody would find them
NUM_SCENES = 30  # tries before it is said that the settings are impossible


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and its ground truth.

    Attributes:
        image: uint8 (H, W, 3).
        things: in drawing order; a later one may cover an earlier one.
        kinds: the first is the one that the settings speak of.
        instance_map: int16 (H, W), index into ``things`` of the topmost thing, -1 for the ground.
        ground: its family; two joined by + where the one lies on the other.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    kinds: tuple[Kind, ...]
    instance_map: np.ndarray
    ground: str

    def of_kind(self, kind: int) -> list[int]:
        """Numbers of the things of a kind."""
        return [i for i, thing in enumerate(self.things) if thing.kind == kind]

    def point_on(self, rng: Rng, number: int) -> tuple[float, float]:
        """A place on a thing, about in its middle, as somebody might click it."""
        x0, y0, x1, y1 = (int(side) for side in self.things[number].box)
        rows, columns = np.nonzero(inner(self.instance_map[y0:y1, x0:x1] == number))
        x, y = self.things[number].center
        spread = 0.15 * max(x1 - x0, y1 - y0)
        wanted = rng.normal((x - x0 - 0.5, y - y0 - 0.5), spread)
        nearest = int(np.argmin((columns - wanted[0]) ** 2 + (rows - wanted[1]) ** 2))
        return x0 + float(columns[nearest]) + 0.5, y0 + float(rows[nearest]) + 0.5


# ---- which scene ----


def train_rng(seed: int, *key: int) -> Rng:
    """Random numbers for training, never those of `test_scene`."""
    return np.random.default_rng([TRAIN_STREAM, WORLD, seed, *key])


def set_rng(name: str, index: int, seed: int, *streams: int) -> Rng:
    """Random numbers for scene ``index`` of a test set."""
    return np.random.default_rng([*streams, WORLD, seed, list(TEST_SETS).index(name), index])


def test_config(name: str) -> ThingScene:
    """Raises: ValueError for an unknown test set."""
    if name not in TEST_SETS:
        raise ValueError(f"unknown test set {name!r}; choose from {', '.join(TEST_SETS)}")
    return TEST_SETS[name]


def test_scene(index: int, name: str, seed: int = 0, config: ThingScene | None = None) -> Scene:
    """Scene number ``index`` of a fixed test set; ``config`` in place of its own, for a size."""
    config = config or test_config(name)
    return draw_scene(set_rng(name, index, seed, TEST_STREAM), config)


def draw_scene(rng: Rng, config: ThingScene, known: Sequence[Kind] = ()) -> Scene:
    """Draw a scene. The same ``rng`` state and arguments give the same scene, bit by bit.

    Args: known: kinds of another picture, of which some are in this one too.
    Raises: ValueError if the settings are impossible in practice.
    """
    for _ in range(NUM_SCENES):
        kinds, counts = choose_kinds(rng, config, known)
        scene = place_things(rng, config, kinds, counts)
        if len(scene.of_kind(0)) >= (0 if known else config.min_like):
            return scene
        config = replace(config, max_px=max(config.min_px, 0.85 * config.max_px))
    raise ValueError(
        f"{config.min_like} things of at least {config.min_px} px find no room in "
        f"{config.width} x {config.height} px: lower min_like or min_px"
    )


# ---- drawing ----


def place_things(
    rng: Rng, config: ThingScene, kinds: Sequence[Kind], counts: Sequence[int]
) -> Scene:
    """Draw so many things of each kind where they find room; some may find none."""
    size = (config.height, config.width)
    ground = pick(rng, config.grounds)
    light = Light.draw(rng)
    canvas = draw_ground(rng, size, ground)
    if rng.random() < config.composed:
        other = pick(rng, config.grounds)
        canvas, ground = compose(rng, canvas, draw_ground(rng, size, other)), f"{ground}+{other}"
    set_off(canvas, kinds)
    numbers = [kind for kind, count in enumerate(counts) for _ in range(count)]
    table = Table(rng, canvas, light, config, len(numbers))
    sizes = np.array([rng.uniform(*kinds[kind].px) for kind in numbers])
    order = np.argsort(-sizes * rng.uniform(0.7, 1.4, len(sizes)))  # mostly the large ones first
    for i in order.tolist():
        table.put(numbers[i], kinds[numbers[i]], float(sizes[i]))
    image = Camera.draw(rng, config.camera).take(rng, table.canvas)
    return Scene(image, table.things(), tuple(kinds), table.instance_map, ground)


def set_off(canvas: np.ndarray, kinds: Sequence[Kind]) -> None:
    """Darken, lighten or calm a ground on which some of the things could hardly be seen."""
    means = np.array([colour_moments(kind.look.thumb)[0] for kind in kinds], np.float32) * 255
    some = np.ascontiguousarray(canvas[::5, ::5])
    ground, spread = some.mean((0, 1)), float(some.std((0, 1)).max())
    most = MOST_SPREAD * min(1.0, min(kind.px[0] for kind in kinds) / WIDE_PX)
    if spread > most:
        canvas -= ground
        canvas *= most / spread
        canvas += ground
    tones = ((1.0, 0.0), (0.55, 0.0), (0.55, 115.0), (0.25, 0.0), (0.3, 178.0))  # factor, added
    contrasts = []
    for factor, added in tones:
        apart = np.abs(means - (factor * ground + added)).max(1)
        contrasts.append(float(apart.min()))
        if contrasts[-1] >= LEAST_CONTRAST:
            break
    factor, added = tones[int(np.argmax(contrasts))]
    if (factor, added) != tones[0]:
        canvas *= factor
        canvas += added
