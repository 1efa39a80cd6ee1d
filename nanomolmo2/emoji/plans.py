"""What each question stage of `tiny` asks, and how long every stage is at each scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanomolmo2.emoji.clips import ClipConfig
from nanomolmo2.emoji.model import SCENES
from nanomolmo2.emoji.pairs import PairConfig
from nanomolmo2.emoji.questions import BranchMix
from nanomolmo2.emoji.scenes import SceneConfig

MARGIN = 0.25  # of a cell: so near to a line, centres belong to either side


@dataclass(frozen=True)
class QuestionPlan:
    """What a question stage asks, and who learns at which rate.

    The decoder learns with AdamW alone at first: Muon's full-size steps would wipe out its
    initialisation while there is not yet anything to learn from.
    """

    name: str
    stream: int
    mix: BranchMix
    snap: int
    llm_rate: float
    llm_matrix_rate: float = 0.0  # Muon's; 0 = AdamW for matrices too
    vision_rate: float = 0.0  # Muon's; AdamW's is a tenth. 0 = vision and connector are frozen
    final_ratio: float = 0.3
    kinds: str = "s"  # what the steps show in turn: scenes, pairs, clips
    first: bool = False  # the first that the decoder learns: queries and keys are set, and frozen
    margin: float = 0.0  # of `label_scenes`
    depth: Literal["shallow", "growing", "full"] = (
        "shallow"  # with the layers `GROWN_LAYERS` or not
    )
    claims: bool = False  # image tokens learn to agree inside of the decoder
    pairs: PairConfig = field(default_factory=PairConfig)  # but for its scenes
    clips: ClipConfig = field(default_factory=ClipConfig)  # but for its scenes and most frames
    clip_capacity: int = 0  # tokens of the questions about a video, the rest is left out; 0 = all
    frames: int = 1  # of the videos of a step, for each picture of other steps
    look: Mapping[str, Any] = field(default_factory=dict)  # how its pictures differ from others


PRESENCE = QuestionPlan(
    name="presence",
    stream=2,
    mix=BranchMix(16, *(0,) * 9, bare=1.0),
    snap=50,
    llm_rate=1e-3,
    first=True,
)
COARSE = QuestionPlan(
    name="coarse",
    stream=3,
    mix=BranchMix(presence=3, count=2, number=1, point=4, spatial=1, at=2, unknown=1),
    snap=50,
    llm_rate=1e-3,
)
FINE = QuestionPlan(
    name="fine",
    stream=4,
    mix=BranchMix(presence=4, count=3, number=1, point=3, spatial=3, unknown=1),
    snap=50,
    llm_rate=6e-4,
    vision_rate=0.0015,
    final_ratio=0.02,
    kinds="sspssc",
)

FINISH = QuestionPlan(
    name="finish",
    stream=8,
    mix=BranchMix(
        presence=3, count=3, number=1, point=3, spatial=3, size=2, unknown=1, repeated_first=0.8
    ),
    snap=50,
    llm_rate=5e-4,
    llm_matrix_rate=0.006,
    vision_rate=0.001,
    final_ratio=0.02,
    kinds="sspsc",
)
LAST = replace(
    FINISH,
    name="last",
    stream=10,
    mix=replace(FINISH.mix, presence=2, point=4, points=2),
    vision_rate=0.002,
    kinds="spsc",
    margin=MARGIN,
    depth="growing",
    pairs=PairConfig(more=6, difference=3),
)
AGREE = replace(LAST, name="agree", stream=11, depth="full", claims=True)
SEVERAL = QuestionPlan(
    name="several",
    stream=12,
    mix=BranchMix(presence=2, count=5, number=1, point=3, spatial=3, unknown=1, repeated_first=1.0),
    snap=50,
    llm_rate=2e-4,
    llm_matrix_rate=0.0025,
    final_ratio=0.02,
    kinds="scspscsc",
    depth="full",
    pairs=LAST.pairs,
    clips=ClipConfig(track=4, appears=3, video_point=3),
    clip_capacity=896,
    frames=2,
    look={"repeats": 0.9, "min_objects": 2, "variation": 2.0},
)
AGAIN = replace(
    SEVERAL,
    name="again",
    stream=13,
    mix=replace(SEVERAL.mix, number=2, spatial=4, size=2),
    llm_rate=3e-4,
    llm_matrix_rate=0.004,
    vision_rate=0.001,
    margin=MARGIN,
    claims=True,
    look={"repeats": 0.85, "min_objects": 2, "variation": 2.5},
)
COUNTS = replace(
    AGAIN,
    name="counts",
    stream=14,
    mix=replace(SEVERAL.mix, count=6, number=2, point=4),
    llm_rate=1.5e-4,
    llm_matrix_rate=0.002,
    vision_rate=0.0005,
    kinds="ssscsssp",
    look={"repeats": 0.9, "min_objects": 3, "variation": 1.5},
)

# To tell a place in one digit a side, of ten, is learned in minutes, and good enough to hit most
# things. Vision stays as the scenes stage left it: steps are shorter, so there are more of them.
SMALL_MIX = BranchMix(
    presence=2, count=2, number=0, point=5, points=2, spatial=0, size=0, at=2, unknown=1
)
SMALL_COARSE = replace(COARSE, mix=SMALL_MIX, snap=100)
SMALL_FINISH = replace(FINISH, mix=SMALL_MIX, snap=100, vision_rate=0.0, kinds="s")


@dataclass(frozen=True)
class Scale:
    """Steps of each stage, in order, pictures a step (four times as many crops), their look.

    ``plans``: question stages that are otherwise than at full scale.
    ``compiled``: whether it is long enough to compile for, where there is a compiler.
    """

    crops: int
    varied: int
    mosaics: int
    scenes: int
    presence: int
    coarse: int
    fine: int
    finish: int
    settle: int
    last: int
    agree: int
    several: int
    again: int
    counts: int
    batch_size: int = 32
    look: SceneConfig = SCENES
    plans: tuple[QuestionPlan, ...] = ()
    compiled: bool = True


SCALES: dict[str, Scale] = {
    "full": Scale(
        *(2500, 1500, 1000, 800),
        presence=450,
        coarse=1000,
        fine=1200,
        finish=1300,
        settle=1400,
        last=1950,
        agree=1450,
        several=540,
        again=2100,
        counts=350,
    ),
    # Smaller steps, so that there are more of them; one artist, single pictures: all six and the
    # rest are not learned so soon.
    "small": Scale(
        *(0, 0, 350, 220),
        presence=100,
        coarse=120,
        fine=0,
        finish=560,
        settle=0,
        last=0,
        agree=0,
        several=0,
        again=0,
        counts=0,
        batch_size=16,
        look=SceneConfig(styles=("fluent-3d",)),
        plans=(SMALL_COARSE, SMALL_FINISH),
    ),
    "smoke": Scale(
        *(2, 2, 2, 2),
        presence=2,
        coarse=2,
        fine=2,
        finish=2,
        settle=2,
        last=4,
        agree=4,
        several=4,
        again=4,
        counts=4,
        batch_size=4,
        compiled=False,
    ),
}


def scale_of(scale: str) -> Scale:
    """The scale of a name. Raises: ValueError naming those there are."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    return SCALES[scale]
