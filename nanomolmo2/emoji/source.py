"""Emoji scenes as a source: example i is drawn when it is asked for, and always the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.registry import SourceOptions
from nanomolmo2.emoji.questions import BranchMix, make_branches
from nanomolmo2.emoji.scenes import SceneConfig, render_scene, train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, Sprites

REPLAYED = BranchMix(presence=2, count=1, number=1, point=1, caption=1, points=0, size=0, at=0)


@dataclass(frozen=True)
class EmojiConfig(SourceOptions):
    """Which scenes, and what is asked about them.

    Attributes:
        length: number of examples; scenes never run out, this is where an epoch ends.
        snap: see `make_branches`.
    """

    length: int = 1_000_000
    scene: SceneConfig = field(default_factory=SceneConfig)
    mix: BranchMix = field(default_factory=BranchMix)
    snap: int = 1

    def __post_init__(self) -> None:
        self.check_positive()

    @classmethod
    def for_replay(cls) -> Self:
        """A few questions about each scene, of every kind: the scenes are there to keep what the
        model knows, and a share of the examples is to be about the same share of the loss.
        """
        return cls(mix=REPLAYED)

    @classmethod
    def nouns(cls) -> tuple[str, ...]:
        return (*CATEGORIES, *PLURALS)

    def open(self, seed: int = 0, name: str = "emoji") -> EmojiScenes:
        return EmojiScenes(self, seed, name)


class EmojiScenes:
    """Example i depends on the seed, i and the config alone."""

    def __init__(self, config: EmojiConfig, seed: int = 0, name: str = "emoji") -> None:
        self.config, self.seed, self.name = config, seed, name

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no example {i}, only {len(self)}")
        config = self.config
        rng = train_rng(self.seed, i)
        scene = render_scene(rng, Sprites.load(), config.scene)
        branches = make_branches(scene, rng, config.mix, config.snap)
        if not branches:  # only spatial questions are wanted, and here all are debatable
            raise BadExample("no answer", f"{self.name}, example {i}: the scene allows no question")
        return Example([scene.image], branches)
