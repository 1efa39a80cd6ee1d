"""The recipe of the model that finds by example: from the bundled `tiny`, on scenes of things.

Parts, each a run of its own in a folder below the one that is given:

    match    encoder and connector, no decoder: patches and visual tokens learn where things have
             their middles, and what is of one kind; scenes of emoji keep the nouns. Leaves its
             weights in match.safetensors
    answers  the whole model, in three stages:
             point    points at what is like an example, and says whether two things are alike;
                      questions about emoji keep what `tiny` knew
             looks    mostly pictures without words, larger and more crowded ones, for the encoder
                      and the finder
             finish   the decoder learns to answer about what the encoder sees now, which stays as
                      it is

What was measured on the way is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanomolmo2.config import Config
from nanomolmo2.convert.tensor_writer import save_tensors
from nanomolmo2.files import atomic_path
from nanomolmo2.things.drawings import Drawings
from nanomolmo2.things.find_model import FindModel
from nanomolmo2.things.find_stage import FINISH_MIX, POINT_MIX, FindPlan, FindStage
from nanomolmo2.things.match_model import MatchModel
from nanomolmo2.things.match_stage import MatchPlan, MatchStage
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import LoopConfig, run
from nanomolmo2.training.run_folder import Resume

EVALUATE_EVERY = 500  # steps: some hundredths of the time
MATCH_FOLDER, MATCH_FILE, ANSWERS_FOLDER = "match", "match.safetensors", "answers"

POINT = FindPlan(
    name="point",
    stream=30,
    steps=744,
    kinds="twpwtwew",
    source=ThingsConfig(sides=(192, 256, 320, 384), crowded=0.15, mix=POINT_MIX),
    vision=0.002,
    final_ratio=0.3,
)
LOOKS = FindPlan(
    name="looks",
    stream=31,
    steps=4000,
    kinds="wwwwe",
    pictures=8,
    source=ThingsConfig(sides=(192, 256, 320, 384, 512), crowded=0.25, mix=FINISH_MIX),
    max_crops=9,
    llm=2e-4,
    llm_matrix=0.002,
    vision=0.002,
    final_ratio=0.03,
    contrast=0.5,
)
FINISH = FindPlan(
    name="finish",
    stream=32,
    steps=1600,
    kinds="eetewepe",
    pictures=12,
    emoji=32,
    source=LOOKS.source,
    max_crops=9,
    capacity=600,
    points=5e-4,
    vision=0.0,
    final_ratio=0.02,
    contrast=0.5,
)


@dataclass(frozen=True)
class FindScale(Config):
    """What every stage does, and how long."""

    match: MatchPlan = field(default_factory=lambda: MatchPlan(steps=2_600))
    point: FindPlan = POINT
    looks: FindPlan = LOOKS
    finish: FindPlan = FINISH


def _smoke(plan: FindPlan) -> FindPlan:
    return replace(plan, steps=5, pictures=2, emoji=2, capacity=60, scored=1)


SCALES: dict[str, FindScale] = {
    "full": FindScale(),
    "small": FindScale(
        MatchPlan(steps=400),
        replace(POINT, steps=200),
        replace(LOOKS, steps=200),
        replace(FINISH, steps=200),
    ),
    "smoke": FindScale(
        MatchPlan(steps=4, things=2, emoji=2, scored=2),
        _smoke(POINT),
        _smoke(LOOKS),
        _smoke(FINISH),
    ),
}


def scale_of(scale: str) -> FindScale:
    """The scale of a name. Raises: ValueError naming those there are."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    return SCALES[scale]


def with_drawings(source: ThingsConfig, drawings: str) -> ThingsConfig:
    """The same scenes with the drawings of a folder; of emoji where it is empty."""
    return replace(source, scene=replace(source.scene, drawings=drawings))


def train_find(
    out: str | Path,
    *,
    scale: str = "full",
    seed: int = 0,
    drawings: str = "",
    resume: Resume = False,
    config: LoopConfig | None = None,
    world: World | None = None,
) -> bool:
    """Train the model that finds by example in ``out``; when done, write it to ``out/model``.

    Args:
        drawings: folder of the drawings to train on; empty: the emoji for training.
        world: ranks share the pictures of a step; every one holds the whole model.
    Returns: whether the run finished (it may be stopped early by ``config.stop_after``, which
        counts the steps of both parts).
    Raises: ValueError for a folder without drawings, or with drawings that are held out.
    """
    out, config, plans = Path(out), config or LoopConfig(), scale_of(scale)
    world = world or World()
    config = replace(config, evaluate_every=config.evaluate_every or EVALUATE_EVERY)
    Drawings.for_training(drawings)  # refused now rather than in a worker
    match = replace(plans.match, source=with_drawings(plans.match.source, drawings))
    taken = 0
    if not (resume and (out / MATCH_FILE).is_file()):
        finished, taken = train_match(out, seed, match, config, resume, world)
        if not finished:
            return False
    for name, done in (("stop_after", taken), ("stop_at", match.steps)):
        if (limit := getattr(config, name)) is not None:
            if limit <= done:
                return False
            config = replace(config, **{name: limit - done})
    answers = [
        replace(plan, source=with_drawings(plan.source, drawings))
        for plan in (plans.point, plans.looks, plans.finish)
    ]
    return train_answers(out, seed, answers, config, resume, world)


def train_match(
    out: Path, seed: int, plan: MatchPlan, config: LoopConfig, resume: Resume, world: World
) -> tuple[bool, int]:
    """The part ``match``; its weights are left in `MATCH_FILE` once it is done.

    Returns: whether it is, and how many steps this call took.
    """
    model = MatchModel(seed, plan.match)
    model.start_from_tiny()
    model.accelerate()
    stage = MatchStage(model, seed, plan, world)
    finished = run(model, [stage], out / MATCH_FOLDER, config, resume=resume, world=world)
    if finished and world.is_main:
        with atomic_path(out / MATCH_FILE) as temporary:
            save_tensors(model.state_dict(), temporary)
    world.wait()
    return finished, stage.taken


def train_answers(
    out: Path,
    seed: int,
    plans: Sequence[FindPlan],
    config: LoopConfig,
    resume: Resume,
    world: World,
) -> bool:
    """The part ``answers``, on what ``match`` has left; writes the model in bf16."""
    folder = out / ANSWERS_FOLDER
    begun = bool(resume) and folder.exists()
    world.wait()  # before one of them makes the folder
    find = FindModel(seed)
    find.start_from_tiny(load_file(out / MATCH_FILE))
    find.accelerate()
    stages = [FindStage(find, seed, plan, world) for plan in plans]
    finished = run(find, stages, folder, config, resume=begun, world=world)
    if finished and world.is_main:
        model = find.model.to(torch.bfloat16)
        model.save_pretrained(out / "model", processor=find.processor)
    return finished
