"""Scenes of things as a source: example i is drawn when it is asked for, and always the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.registry import SourceOptions
from nanomolmo2.emoji.scenes import TEST_STREAM
from nanomolmo2.things.questions import TEST_MIX, FindMix, make_branches
from nanomolmo2.things.scenes import (
    Scene,
    ThingScene,
    draw_scene,
    set_rng,
    test_config,
    train_rng,
)
from nanomolmo2.things.surface import pick

PAIR_STREAM, QUESTION_STREAM = 2, 3  # second words of the seeds of tests
CROWDED = (15, 60)  # least and most things of the first kind, as far as they find room
CROWDED_PX = 48  # and their largest size
MOST_ASPECT = 2  # a side is at most so many times the other
REPLAYED = FindMix(like=1, count_like=1, same=2, named=0, count_named=0)


@dataclass(frozen=True)
class ThingsConfig(SourceOptions):
    """Which scenes, and what is asked about them.

    Attributes:
        length: number of examples; scenes never run out, this is where an epoch ends.
        sides: the width and the height of each picture are drawn from these, within a factor of
            2; empty: as ``scene`` says.
        crowded: share of the examples with `CROWDED` things of the first kind, smaller ones.
        pairs: share of the examples with two pictures, the examples in the first.
    """

    length: int = 1_000_000
    scene: ThingScene = field(default_factory=ThingScene)
    sides: tuple[int, ...] = ()
    crowded: float = 0.15
    pairs: float = 0.15
    mix: FindMix = field(default_factory=FindMix)

    def __post_init__(self) -> None:
        self.scene.for_training()
        if self.length < 1:
            raise ValueError(f"length is {self.length}, expected 1 or more examples")
        for name in ("crowded", "pairs"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for side in self.sides:  # refused now rather than in a worker
            sized(self.scene, side, side)

    @classmethod
    def for_replay(cls) -> Self:
        return cls(mix=REPLAYED)

    def open(self, seed: int = 0, name: str = "things") -> Things:
        return Things(self, seed, name)


def sized(scene: ThingScene, width: int, height: int) -> ThingScene:
    """The same scenes in another size of picture, whose things are no larger than they fit.

    Raises: ValueError where they do not fit.
    """
    largest = min(scene.max_px, min(width, height) / 2)
    return replace(scene, width=width, height=height, max_px=largest)


def crowded(scene: ThingScene) -> ThingScene:
    """The same scenes with many things of the first kind, as many as fit."""
    room = int(0.25 * scene.width * scene.height / (1.3 * scene.min_px) ** 2) - scene.min_others
    low, high = (max(scene.min_like, min(number, room)) for number in CROWDED)
    largest = max(scene.min_px, min(scene.max_px, CROWDED_PX))
    return replace(scene, min_like=low, max_like=max(low, high), max_px=largest)


class Things:
    """Example i depends on the seed, i and the config alone."""

    def __init__(self, config: ThingsConfig, seed: int = 0, name: str = "things") -> None:
        self.config, self.seed, self.name = config, seed, name

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no example {i}, only {len(self)}")
        scenes, rng = self.scenes(i)
        branches = make_branches(scenes, rng, self.config.mix)
        if not branches:
            raise BadExample("no answer", f"{self.name}, example {i}: its mix asks nothing")
        return Example([scene.image for scene in scenes], branches)

    def scenes(self, i: int) -> tuple[list[Scene], np.random.Generator]:
        """The pictures of example i with their truth, and the random numbers that go on."""
        config = self.config
        rng = train_rng(self.seed, i)
        scene = config.scene
        if config.sides:
            width = pick(rng, config.sides)
            near = [s for s in config.sides if s <= MOST_ASPECT * width <= MOST_ASPECT**2 * s]
            scene = sized(scene, width, pick(rng, near))
        if rng.random() < config.crowded:
            scene = crowded(scene)
        scenes = [draw_scene(rng, scene)]
        if rng.random() < config.pairs:
            scenes.append(draw_scene(rng, scene, scenes[0].kinds))
        return scenes, rng


def test_scenes(
    index: int, name: str, seed: int = 0, *, pair: bool = False, config: ThingScene | None = None
) -> tuple[list[Scene], list[Branch]]:
    """Example ``index`` of a fixed test set with its truth, in wordings that training never uses.

    Args:
        pair: with the examples in another picture than the one asked about.
        config: see `scenes.test_scene`.
    """
    config = config or test_config(name)
    rng = set_rng(name, index, seed, TEST_STREAM, *([PAIR_STREAM] if pair else []))
    scenes = [draw_scene(rng, config)]
    if pair:
        scenes.append(draw_scene(rng, config, scenes[0].kinds))
    rng = set_rng(name, index, seed, TEST_STREAM, QUESTION_STREAM, int(pair))
    return scenes, make_branches(scenes, rng, TEST_MIX, for_tests=True)


def test_example(index: int, name: str, seed: int = 0, *, pair: bool = False) -> Example:
    """The pictures and questions of `test_scenes`."""
    scenes, branches = test_scenes(index, name, seed, pair=pair)
    return Example([scene.image for scene in scenes], branches)
