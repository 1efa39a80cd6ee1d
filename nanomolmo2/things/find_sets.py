"""The fixed sets that `nanomolmo2 eval find` asks about: a picture, an example, and the truth.

    few        held-out drawings, 2 to 10 of the kind
    crowded    held-out drawings, 20 to 60 of the kind
    alike      held-out drawings, look-alikes among the others
    pair       as few, the example in another picture than the one that is asked about
    made       a held-out family of procedural things
    photos     photographs of real things, cut out, on photographs of surfaces: see `photos`
    coins      the photograph of 24 coins, three of them as examples: 20 choices of these

Picture i of a set is always the same, and so are its examples: a place on a thing of the first
kind, about in its middle, as somebody might click it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanomolmo2.emoji.scenes import TEST_STREAM
from nanomolmo2.evaluation.finding import FindCase, Place
from nanomolmo2.evaluation.measures import Thing
from nanomolmo2.evaluation.regions import Box
from nanomolmo2.things.photos import coins, photo_scene
from nanomolmo2.things.scenes import Scene, draw_scene, set_rng, test_config
from nanomolmo2.things.source import PAIR_STREAM

PICTURES = 500  # of each set
CLICK_STREAM = 4  # second word of the seeds of examples
COIN_CHOICES, COIN_EXAMPLES = 20, 3


@dataclass(frozen=True)
class FindSet:
    """A fixed set.

    Attributes:
        title: for the table.
        goals: by name of a figure, see `evaluation.breakdown.figures`.
        draw: number of a picture -> its scene, or two, of which the first has the examples.
    """

    title: str
    goals: Mapping[str, float] = field(default_factory=dict)
    draw: Callable[[int], Sequence[Scene]] | None = None


def _drawn(name: str, *, pair: bool = False) -> Callable[[int], Sequence[Scene]]:
    def draw(index: int) -> Sequence[Scene]:
        config = test_config(name)
        rng = set_rng(name, index, 0, TEST_STREAM, *([PAIR_STREAM] if pair else []))
        scene = draw_scene(rng, config)
        return [scene, draw_scene(rng, config, scene.kinds)] if pair else [scene]

    return draw


COINS = "coins"
FIND_SETS: dict[str, FindSet] = {
    "few": FindSet(
        "held-out drawings, 2 to 10", {"f1": 0.95, "exact": 0.80, "mae": 0.3}, _drawn("few")
    ),
    "crowded": FindSet(
        "held-out drawings, 20 to 60", {"f1": 0.88, "relative": 0.08}, _drawn("crowded")
    ),
    "photos": FindSet(
        "photographs of things", {"f1": 0.90, "exact": 0.70, "mae": 0.5}, lambda i: [photo_scene(i)]
    ),
    "pair": FindSet(
        "example in another picture",
        {"f1": 0.90, "exact": 0.70, "mae": 0.5},
        _drawn("few", pair=True),
    ),
    "alike": FindSet(
        "look-alikes present", {"f1": 0.88, "exact": 0.60, "mae": 0.8}, _drawn("alike")
    ),
    "made": FindSet("held-out procedural things", {}, _drawn("made")),
    COINS: FindSet("photograph of 24 coins, three examples", {"mae": 2.0}),
}
SET_NAMES = tuple(FIND_SETS)


def set_of(name: str) -> FindSet:
    """Raises: ValueError for an unknown name."""
    if name not in FIND_SETS:
        raise ValueError(f"unknown set {name!r}; choose from {', '.join(FIND_SETS)}")
    return FIND_SETS[name]


def open_set(name: str, pictures: int = PICTURES, clicks: int = 1) -> SceneCases | CoinCases:
    """The cases of a set.

    Args:
        pictures: the first so many; of coins there are `COIN_CHOICES` choices of examples.
        clicks: examples of each picture, one after the other, each a case of its own; where it has
            fewer things than that, some come again.
    Raises: ValueError for an unknown set.
    """
    draw = set_of(name).draw
    if draw is None:
        return CoinCases(min(pictures, COIN_CHOICES))
    return SceneCases(name, draw, pictures, clicks)


class SceneCases:
    """Cases of drawn scenes; the scene of one case is kept for the next."""

    def __init__(
        self,
        name: str,
        draw: Callable[[int], Sequence[Scene]],
        pictures: int,
        clicks: int = 1,
    ) -> None:
        self.name, self.draw, self.pictures, self.clicks = name, draw, pictures, clicks
        self._drawn: tuple[int, Sequence[Scene]] = (-1, [])

    def __len__(self) -> int:
        return self.pictures * self.clicks

    def __getitem__(self, number: int) -> FindCase:
        index, click = divmod(number, self.clicks)
        if not 0 <= index < self.pictures:
            raise IndexError(f"{self.name} has no case {number}, only {len(self)}")
        if self._drawn[0] != index:
            self._drawn = index, self.draw(index)
        scenes = self._drawn[1]
        shown, asked = scenes[0], scenes[-1]
        kind = next((i for i, k in enumerate(asked.kinds) if k is shown.kinds[0]), None)
        found = [] if kind is None else asked.of_kind(kind)
        return FindCase(
            name=f"{self.name} {index}" + (f", click {click + 1}" if self.clicks > 1 else ""),
            image=asked.image,
            things=tuple(Thing(Box(*asked.things[i].box)) for i in found),
            like=(self._example(shown, index, click),),
            reference=shown.image if len(scenes) > 1 else None,
            picture=index,
        )

    def _example(self, scene: Scene, index: int, click: int) -> Place:
        """A place on a thing of the first kind; another thing for each click."""
        key = list(FIND_SETS).index(self.name)
        rng = np.random.default_rng([TEST_STREAM, CLICK_STREAM, key, index])
        things = rng.permutation(scene.of_kind(0)).tolist()
        places = [scene.point_on(rng, number) for number in things]
        return places[click % len(places)]


class CoinCases:
    """The photograph of coins, with other coins as examples each time."""

    def __init__(self, choices: int = COIN_CHOICES) -> None:
        self.choices = choices
        self.image, self.boxes = coins()

    def __len__(self) -> int:
        return self.choices

    def __getitem__(self, number: int) -> FindCase:
        if not 0 <= number < self.choices:
            raise IndexError(f"coins has no case {number}, only {self.choices}")
        rng = np.random.default_rng(
            [TEST_STREAM, CLICK_STREAM, list(FIND_SETS).index(COINS), number]
        )
        chosen = rng.permutation(len(self.boxes))[:COIN_EXAMPLES].tolist()
        middles = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in self.boxes]
        return FindCase(
            name=f"coins, choice {number}",
            image=self.image,
            things=tuple(Thing(Box(*box)) for box in self.boxes),
            like=tuple(middles[i] for i in chosen),
            picture=number,
        )
