"""Two pictures side by side: which has more of something, and what is only in one of them.

more        Which picture has more dogs?      The first picture.
difference  What is only in the second one?   A cat and two apples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.questions import PLURAL, caption_counts, exchange, listed
from nanomolmo2.emoji.scenes import (
    TEST_STREAM,
    Scene,
    SceneConfig,
    art_of,
    choose_objects,
    draw_scene,
    group_rng,
)
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.emoji.wordings import AMOUNTS, PICTURES, Wordings

SAME_ANSWER = "Both have the same."
PAIR_STREAM = 4  # second word of test seeds


@dataclass(frozen=True)
class PairConfig(Config):
    """Two pictures and the questions about them.

    Attributes:
        scene: of each picture.
        kept: chance of a thing of the first picture to be in the second one too.
        more, difference: questions a pair.
    """

    scene: SceneConfig = field(default_factory=SceneConfig)
    kept: float = 0.5
    more: int = 4
    difference: int = 2


def render_pair(
    rng: np.random.Generator, sprites: Sprites, config: PairConfig | None = None
) -> tuple[Scene, Scene]:
    """Draw two scenes that share some things; one kind often occurs in different numbers."""
    config = config or PairConfig()
    limit = config.scene.max_objects
    first = choose_objects(rng, sprites, config.scene)
    kept = [thing for thing in first if rng.random() < config.kept]
    taken = {category for category, _ in first}
    new = [t for t in choose_objects(rng, sprites, config.scene) if t[0] not in taken]
    second = (kept + new)[:limit] or first
    for things in (first, second):  # one more of something that both may have
        common = [thing for thing in kept if len(things) < limit]
        if common and rng.random() < 0.4:
            things.append(common[rng.integers(len(common))])

    def draw(things: list[tuple[int, str]]) -> Scene:
        while True:
            scene = draw_scene(rng, sprites, config.scene, things)
            if scene is not None:
                return scene

    return draw(first), draw(second)


def ask_about_pair(
    pair: tuple[Scene, Scene],
    rng: np.random.Generator,
    config: PairConfig | None = None,
    *,
    casual: float = 0.1,
    for_tests: bool = False,
) -> list[Branch]:
    """Questions whose ``truth`` holds ``answer`` and, by task:

    more: ``noun``, ``counts`` (of both pictures); difference: ``counts`` (noun -> number).
    """
    config = config or PairConfig()
    wording = Wordings(rng, casual, for_tests)
    first, second = (caption_counts(scene) for scene in pair)
    branches = []
    nouns = [str(noun) for noun in rng.permutation(sorted({*first, *second}))]
    # Kinds that both pictures have come first: the others are questions about presence.
    nouns.sort(key=lambda noun: not (noun in first and noun in second and rng.random() < 0.7))
    for i in range(config.more):
        noun = nouns[i % len(nouns)]
        counts = [first.get(noun, 0), second.get(noun, 0)]
        order = str(rng.choice(list(AMOUNTS)))
        word = str(rng.choice(AMOUNTS[order]))
        question = wording("more").format(more=word, many=PLURAL[noun])
        if counts[0] == counts[1]:
            answer = SAME_ANSWER
        else:
            index = int((counts[0] > counts[1]) != (order == "more"))
            answer = f"{PICTURES[index].capitalize()} picture."
        branches.append(exchange("more", question, answer, noun=noun, counts=counts))
    sides = rng.permutation(2)
    for i in range(config.difference):
        index = int(sides[i % 2])
        mine, other = (first, second) if index == 0 else (second, first)
        only = {noun: count for noun, count in mine.items() if noun not in other}
        question = wording("difference").format(which=PICTURES[index])
        branches.append(exchange("difference", question, listed(only), counts=only))
    return branches


def test_pair(
    index: int,
    group: str,
    seed: int = 0,
    sprites: Sprites | None = None,
    styles: Sequence[str] = (),
) -> Example:
    """Pair number ``index`` of the fixed test set of an art group, with two questions of a kind.

    ``styles``: see `art_of`.
    """
    config = PairConfig(SceneConfig(styles=art_of(group, styles)), more=2, difference=2)
    rng = group_rng(seed, group, index, TEST_STREAM, PAIR_STREAM)
    pair = render_pair(rng, sprites or Sprites.load(), config)
    branches = ask_about_pair(pair, rng, config, casual=0, for_tests=True)
    return Example([scene.image for scene in pair], branches)
