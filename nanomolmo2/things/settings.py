"""What scenes of things look like, in training and in the fixed test sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanomolmo2.config import Config
from nanomolmo2.things.drawings import HELD_OUT_SETS
from nanomolmo2.things.grounds import GROUNDS, HELD_OUT_GROUNDS, TRAINING_GROUNDS
from nanomolmo2.things.procedural import FAMILIES, HELD_OUT_FAMILIES, TRAINING_FAMILIES

TRAINING_ART = "training"  # the drawings to train on; others are held out
LEAST_THING_PX = 8
MAX_THINGS = 200


@dataclass(frozen=True)
class ThingScene(Config):
    """What scenes look like.

    Attributes:
        width, height: of the picture, pixels.
        min_like, max_like: things of the first kind.
        min_others, max_others: things of all other kinds together.
        max_kinds: most other kinds.
        min_px, max_px: longer side of a thing before it is turned; in full pictures, things are
            nearer to min_px.
        made: share of the kinds that are procedural; the others are drawings.
        art: whose drawings: ``training``, or sets that are held out.
        families, grounds: of procedural things, and of what they lie on.
        alike: share of the scenes in which some other kinds look like the first one, by shape, by
            colours, or but for their size.
        cousins: share of the scenes of procedural things whose other kinds are of the first's
            family: several sorts of screws, of pills, of beans.
        heaped: share of the scenes in which things touch and cover each other; ``cut``: of those
            where they may reach beyond the picture.
        composed: share of the scenes with something flat on the ground, of another ground.
        recoloured: share of the drawings that are in other colours than their own.
        camera: how bad the camera is: 0 none, 1 as in photos.
        drawings: folder of the drawings to train on; empty: emoji of the styles for training.
    """

    width: int = 384
    height: int = 384
    min_like: int = 2
    max_like: int = 20
    min_others: int = 0
    max_others: int = 20
    max_kinds: int = 5
    min_px: float = 10
    max_px: float = 96
    made: float = 0.5
    art: tuple[str, ...] = (TRAINING_ART,)
    families: tuple[str, ...] = TRAINING_FAMILIES
    grounds: tuple[str, ...] = TRAINING_GROUNDS
    alike: float = 0.5
    cousins: float = 0.3
    heaped: float = 0.35
    cut: float = 0.3
    composed: float = 0.12
    recoloured: float = 0.3
    camera: float = 1.0
    drawings: str = ""

    def __post_init__(self) -> None:
        for low, high, least in (
            ("min_like", "max_like", 1),
            ("min_others", "max_others", 0),
        ):
            first, last = getattr(self, low), getattr(self, high)
            if not least <= first <= last <= MAX_THINGS:
                raise ValueError(
                    f"{low} ({first}) to {high} ({last}) must be a range within {least} to "
                    f"{MAX_THINGS}"
                )
        for name in ("width", "height"):
            if not 64 <= getattr(self, name) <= 4096:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 64 to 4096 pixels")
        shorter = min(self.width, self.height)
        if not LEAST_THING_PX <= self.min_px <= self.max_px <= shorter / 2:
            raise ValueError(
                f"min_px ({self.min_px}) to max_px ({self.max_px}) must be a range within "
                f"{LEAST_THING_PX} and half of the picture's shorter side ({shorter})"
            )
        least = self.min_like + self.min_others
        if least * (1.3 * self.min_px) ** 2 > 0.5 * self.width * self.height:
            raise ValueError(
                f"{least} things of {self.min_px} px do not fit into {self.width} x {self.height} "
                f"px: lower min_like, min_others or min_px"
            )
        for name in (
            "made",
            "alike",
            "cousins",
            "heaped",
            "cut",
            "composed",
            "recoloured",
            "camera",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.max_kinds < 1:
            raise ValueError(f"max_kinds is {self.max_kinds}, expected 1 or more")
        for name, known in (
            ("art", (TRAINING_ART, *HELD_OUT_SETS)),
            ("families", tuple(FAMILIES)),
            ("grounds", tuple(GROUNDS)),
        ):
            value = getattr(self, name)
            if not value or not set(value) <= set(known):
                raise ValueError(f"{name} are {value}; choose from {', '.join(known)}")

    @property
    def held_out(self) -> tuple[str, ...]:
        """What of it training must never see."""
        kept = {*HELD_OUT_SETS, *HELD_OUT_FAMILIES, *HELD_OUT_GROUNDS}
        return tuple(n for n in (*self.art, *self.families, *self.grounds) if n in kept)

    def for_training(self) -> ThingScene:
        """Itself. Raises: ValueError if anything in it is held out."""
        if self.held_out:
            raise ValueError(
                f"{', '.join(self.held_out)} are held out, for tests only: leave them out of "
                f"scenes to train on"
            )
        return self


# What is asked about is held out: drawings, or a family of procedural things.
_HELD_OUT = ThingScene(art=HELD_OUT_SETS, grounds=tuple(GROUNDS), made=0.0, recoloured=0.0)
TEST_SETS: dict[str, ThingScene] = {
    "few": replace(_HELD_OUT, max_like=10, min_others=2, max_others=14, alike=0.0),
    "crowded": replace(
        _HELD_OUT, min_like=20, max_like=60, max_others=16, max_px=48, max_kinds=3, alike=0.0
    ),
    "alike": replace(_HELD_OUT, max_like=10, min_others=3, max_others=12, alike=1.0),
    "made": replace(
        _HELD_OUT,
        max_like=10,
        min_others=2,
        max_others=14,
        made=1.0,
        families=HELD_OUT_FAMILIES,
    ),
}
