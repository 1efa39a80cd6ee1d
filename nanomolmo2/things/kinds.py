"""Which kinds a scene has: some at random, and some that only look like the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np

from nanomolmo2.things.drawings import Drawings
from nanomolmo2.things.looks import (
    Look,
    MadeLook,
    are_clearly_other,
    drawn_look,
    made_look,
    reshaped,
)
from nanomolmo2.things.settings import TRAINING_ART, ThingScene
from nanomolmo2.things.surface import pick

Rng = np.random.Generator
Alike = Literal["", "colour", "shape", "size"]

SAME_SIZE, OTHER_SIZE = 2.0, 3.0  # factors: up to the one alike, from the other on not
TURNS = (0, 15, 180, 360)  # how far things of a kind are turned: see `draw_angle`


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of things.

    Attributes:
        look: what its things have in common; ``id`` says what it is.
        px: smallest and largest longer side of its things, pixels: within a factor of 2.
        alike, of: in what it is unlike kind number ``of``, which it resembles otherwise.
        turn: of `TURNS`; mirror: whether some are mirrored.
    """

    look: Look
    px: tuple[float, float]
    alike: Alike = ""
    of: int | None = None
    turn: int = 15
    mirror: bool = False

    @property
    def id(self) -> str:
        """Of no other kind of its pictures: one of another size has the same look."""
        return f"{self.look.id}+size" if self.alike == "size" else self.look.id


def choose_kinds(
    rng: Rng, config: ThingScene, known: Sequence[Kind] = ()
) -> tuple[list[Kind], list[int]]:
    """The kinds of a scene and how many things of each; all clearly differ.

    Of ``known`` kinds all are among them, in their order; a few have no things.
    """
    like = _draw_count(rng, config.min_like, config.max_like)
    others = int(rng.integers(config.min_others, config.max_others + 1))
    room = config.width * config.height * 0.42 / max(like + others, 1)
    largest = min(config.max_px, max(config.min_px, math.sqrt(room) * 1.15))
    if known:
        kinds = list(known)
    else:
        least = largest / 3.5 if rng.random() < 0.6 else config.min_px
        px = _log_uniform(rng, max(config.min_px, least), largest)
        kinds = [Kind(new_look(rng, config), _span(rng, config, px), **_turning(rng))]
        if others and rng.random() < config.alike:
            _add_look_alikes(rng, config, kinds, largest)
    wanted = max(len(kinds), 1 + int(rng.integers(1, config.max_kinds + 1))) if others else 1
    first = kinds[0].look
    if isinstance(first, MadeLook) and rng.random() < config.cousins:
        config = replace(config, families=(first.origin,), made=1.0)
    for _ in range(4 * wanted):
        if len(kinds) >= wanted:
            break
        look = new_look(rng, config)
        if all(are_clearly_other(look, kind.look) for kind in kinds):
            middle = math.sqrt(kinds[0].px[0] * kinds[0].px[1])
            px = float(np.clip(middle * rng.uniform(0.6, 1.6), config.min_px, config.max_px))
            kinds.append(Kind(look, _span(rng, config, px), **_turning(rng)))
    counts = [like if not known or rng.random() < 0.8 else 0]
    shares = rng.dirichlet(np.full(len(kinds) - 1, 1.5)) if len(kinds) > 1 else np.empty(0)
    for kind, share in zip(kinds[1:], shares, strict=True):
        count = max(1, round(share * others)) if others else 0
        fitting = 0.25 * config.width * config.height / kind.px[1] ** 2  # large ones are few
        counts.append(min(count, max(1, round(fitting))))
    return kinds, counts


def new_look(rng: Rng, config: ThingScene) -> Look:
    """A look at random."""
    if rng.random() < config.made:
        return made_look(rng, config.families)
    drawings = drawings_of(config, pick(rng, config.art))
    return drawn_look(rng, drawings, recoloured=config.recoloured)


def drawings_of(config: ThingScene, art: str) -> Drawings:
    if art == TRAINING_ART:
        return Drawings.for_training(config.drawings)
    return Drawings.held_out(art)


def _add_look_alikes(rng: Rng, config: ThingScene, kinds: list[Kind], largest: float) -> None:
    """One to three kinds that resemble the first, each unlike it in one way."""
    first = kinds[0]
    ways: list[Alike] = ["colour", "shape", "size"]
    for way in rng.permutation(ways)[: int(rng.integers(1, 4))].tolist():
        look: Look | None = first.look
        px, turn, mirror = first.px, first.turn, first.mirror
        if way == "colour":
            look = first.look.recoloured(rng)
        elif way == "shape":
            art = drawings_of(config, pick(rng, config.art))
            look = reshaped(rng, first.look, art, config.families)
        else:
            spans = _other_sizes(rng, config, first.px)
            if spans is None:
                continue
            px = spans
        # What is unlike the first may still resemble another look-alike.
        rivals = [k for k in kinds if way != "size" and k.alike != "size"]
        if look is not None and all(are_clearly_other(look, k.look) for k in rivals):
            kinds.append(Kind(look, px, way, 0, turn, mirror))


def _other_sizes(
    rng: Rng, config: ThingScene, px: tuple[float, float]
) -> tuple[float, float] | None:
    """Sizes at least 3 times as large as any of ``px``, or as small; None without room."""
    low, high = px[0] / OTHER_SIZE, px[1] * OTHER_SIZE
    spans = []
    if high <= min(config.width, config.height) / 2:
        spans.append((high, high * rng.uniform(1, 1.15)))
    if low >= config.min_px:
        spans.append((max(config.min_px, low * rng.uniform(0.7, 1)), low))
    return spans[int(rng.integers(len(spans)))] if spans else None


def _draw_count(rng: Rng, low: int, high: int) -> int:
    """Small numbers are more frequent, as in life."""
    return min(high, int(_log_uniform(rng, low, high + 1)))


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def _span(rng: Rng, config: ThingScene, px: float) -> tuple[float, float]:
    """Sizes of a kind around ``px``, within a factor of 2 and the settings."""
    factor = math.sqrt(pick(rng, [1.0, rng.uniform(1, 1.3), rng.uniform(1, 0.98 * SAME_SIZE)]))
    return max(config.min_px, px / factor), min(config.max_px, max(config.min_px, px * factor))


class _Turning(TypedDict):
    turn: int
    mirror: bool


def _turning(rng: Rng) -> _Turning:
    turn = int(rng.choice(TURNS, p=(0.15, 0.25, 0.15, 0.45)))
    return _Turning(turn=turn, mirror=bool(rng.random() < 0.4))


def draw_angle(rng: Rng, turn: int) -> float:
    """An angle, radians: about upright; up to 15 degrees; that or upside down; any."""
    if turn == 360:
        return float(rng.uniform(0, 2 * math.pi))
    angle = math.radians(rng.uniform(-1, 1) * min(turn, 15))
    return angle + (math.pi if turn == 180 and rng.random() < 0.5 else 0.0)
