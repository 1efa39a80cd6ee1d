"""The recipe of the model that finds by example: from the bundled `tiny`, on scenes of things.

Stages:

    small    pictures without words, up to 320 pixels, for encoder, connector and finder: where
             things have their middles, which are alike, which are meant. Visual tokens of scenes of
             emoji stay near those of `tiny`, so that its decoder can still read them
    looks    the same on larger and more crowded pictures, down to a small rate
    answers  the decoder learns to answer about what the encoder sees now, which stays as it is:
             questions by example, names, and what `tiny` knew about emoji

The scale `finder` has another end: `tiny` stays the model that it is, with this encoder and this
finder, and a stage of a run of its own, in the folder `words`, lets its decoder learn the questions
about emoji again for a while. Such a model finds, and answers what it answered before; questions by
example are not among that. The scale `more` is that for a model that finds already: one stage like
`looks`, and the decoder again.

What was measured on the way is in docs/log.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nanomolmo2.convert.export import state_without_finder
from nanomolmo2.emoji.model import TinyForTraining
from nanomolmo2.emoji.plans import COUNTS
from nanomolmo2.emoji.question_stage import QuestionStage
from nanomolmo2.emoji.train import run_stages
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.things.drawings import Drawings
from nanomolmo2.things.find_model import FindModel
from nanomolmo2.things.find_stage import ANSWERS_MIX, FindPlan, FindStage
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import LoopConfig, run
from nanomolmo2.training.run_folder import Resume

EVALUATE_EVERY = 1000  # steps: some hundredths of the time

SMALL = FindPlan(
    name="small",
    stream=40,
    steps=1600,
    kinds="w",
    pictures=8,
    source=ThingsConfig(sides=(192, 256, 320), crowded=0.2, mix=ANSWERS_MIX),
    llm=0.0,
    llm_matrix=0.0,
    vision=0.004,
    final_ratio=0.6,
    contrast=0.5,
    keep=8,
    keep_weight=4.0,
    scored=16,
)
LOOKS = replace(
    SMALL,
    name="looks",
    stream=41,
    steps=2000,
    source=ThingsConfig(sides=(192, 256, 320, 384, 512), crowded=0.25, mix=ANSWERS_MIX),
    max_crops=9,
    points=8e-4,
    vision=0.003,
    final_ratio=0.03,
    keep_weight=10.0,
)
MORE = replace(
    LOOKS,
    name="more",
    stream=52,
    steps=1000,
    source=replace(LOOKS.source, crowded=0.35),
    pairs=0.6,
    points=6e-4,
    vision=0.002,
    final_ratio=0.02,
)
ANSWERS = replace(
    LOOKS,
    name="answers",
    stream=42,
    steps=1800,
    kinds="eteweetpew",
    emoji=24,
    llm=4e-4,
    llm_matrix=0.004,
    points=5e-4,
    vision=0.0,
    by_looks=True,
    final_ratio=0.02,
    keep=0,
)


def _smoke(plan: FindPlan) -> FindPlan:
    return replace(
        plan, steps=5, pictures=2, emoji=2, keep=min(plan.keep, 2), capacity=60, scored=1
    )


FULL = (SMALL, LOOKS, ANSWERS)
WORDS_FOLDER = "words"
WORDS = replace(
    COUNTS,
    name="words",
    stream=43,
    kinds="spscsssp",
    vision_rate=0.0,
    claims=False,
)
# Steps of `WORDS`, of so many pictures; of scales that are not here it is no part.
WORDS_STEPS: dict[str, tuple[int, int]] = {"finder": (100, 32), "more": (350, 32)}
# The stages of a run, by its name: how much is learned.
SCALES: dict[str, tuple[FindPlan, ...]] = {
    "full": FULL,
    "finder": (SMALL, LOOKS),
    "more": (MORE,),
    "small": tuple(replace(plan, steps=300) for plan in FULL),
    "smoke": tuple(map(_smoke, FULL)),
}


def scale_of(scale: str) -> tuple[FindPlan, ...]:
    """The stages of a scale. Raises: ValueError naming those there are."""
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
    start: str | Path = "tiny",
    resume: Resume = False,
    config: LoopConfig | None = None,
    world: World | None = None,
) -> bool:
    """Train the model that finds by example in ``out``; when done, write it to ``out/model``.

    Args:
        drawings: folder of the drawings to train on; empty: the emoji for training.
        start: the `tiny` to start with.
        world: ranks share the pictures of a step; every one holds the whole model.
    Returns: whether the run finished (it may be stopped early by ``config.stop_after``).
    Raises: ValueError for a folder without drawings, or with drawings that are held out; and for
        another model than a `tiny`.
    """
    out, config, plans = Path(out), config or LoopConfig(), scale_of(scale)
    world = world or World()
    config = replace(config, evaluate_every=config.evaluate_every or EVALUATE_EVERY)
    Drawings.for_training(drawings)  # refused now rather than in a worker
    find = FindModel(seed, start=start)
    find.start_from_tiny()
    find.accelerate()
    plans = tuple(replace(p, source=with_drawings(p.source, drawings)) for p in plans)
    stages = [FindStage(find, seed, plan, world) for plan in plans]
    finished = run(find, stages, out, config, resume=resume, world=world)
    if not finished or not world.is_main:
        return finished
    model, processor = find.model, find.processor
    if scale in WORDS_STEPS:
        model, processor = find.put_into_tiny()
        if not train_words(model, out / WORDS_FOLDER, seed, *WORDS_STEPS[scale], config):
            return False
    model.to(torch.bfloat16).save_pretrained(out / "model", processor=processor)
    return True


def train_words(
    model: NanoMolmo2, folder: Path, seed: int, steps: int, pictures: int, config: LoopConfig
) -> bool:
    """Let the decoder of a `tiny` learn its questions again, in ``folder``; resumed if it is there.

    Returns: whether it has; the model then has its weights.
    """
    tiny = TinyForTraining(seed)
    tiny.model.load_state_dict(state_without_finder(model))
    stage = QuestionStage(tiny, seed, steps, WORDS, pictures)
    config = replace(config, evaluate_every=0)
    if not run_stages(tiny, [stage], folder, config, resume=folder.exists()):
        return False
    model.llm.load_state_dict(tiny.model.llm.state_dict())
    return True
