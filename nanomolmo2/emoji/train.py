"""The recipe of ``tiny``: a Molmo2 model of 7.6 M parameters, trained from scratch on emoji scenes.

Stages, in the order in which each makes the next one easy:

    crops     vision encoder: name the emoji of a small crop
    varied    the same with drawings stretched, sheared and recoloured, as in all that follows:
              what is known by heart gives way to what other artists draw alike
    mosaics   the same for each patch of nine emoji side by side: patches learn to look near by
    scenes    + connector: every visual token points along the embedding of the noun centred in its
              cell, and holds size and position of the object
    presence  decoder on frozen vision: many short yes/no questions a picture teach it to look for
              the noun that was asked
    coarse    decoder, all questions about one picture, points on a grid of 50 thousandths; not at
              twice the rate: the decoder would learn to speak and no longer look
    fine      all weights, also pairs of pictures and videos, until the rates are near zero
    finish    the same once more, the decoder's matrices with Muon: it learns more from a step than
              AdamW, and by now has nothing to wipe out
    settle    vision alone: visual tokens settle which of them an object between two cells counts in
    last      as finish, and the decoder grows by two layers, which added nothing before
    agree     the same once more; image tokens inside of the decoder, where they see each other,
              learn which of them counts an object: what settle leaves open, a tenth of the objects
    several   decoder alone at lower rates: pictures with several things of a kind beside others,
              and videos, where most of what is still wrong is asked
    again     as several, the encoder with it: what its tokens name wrongly is counted wrongly
    counts    the same once more, mostly pictures: fuller ones, counted, with drawings varied less

Artwork: the vendors of the group "seen", line drawings and icons of the group "extra", and the
seen drawings with dark outlines ("inked"), so that shapes are learned and not one way of drawing.

What was measured on the way is in docs/tiny.md and docs/log.md.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from nanomolmo2.accelerate import bf16_matmul, defaults
from nanomolmo2.emoji.model import TinyForTraining
from nanomolmo2.emoji.plans import (
    AGAIN,
    AGREE,
    COARSE,
    COUNTS,
    FINE,
    FINISH,
    LAST,
    PRESENCE,
    SEVERAL,
    QuestionPlan,
    scale_of,
)
from nanomolmo2.emoji.question_stage import Evaluate, QuestionStage
from nanomolmo2.emoji.vision_stages import (
    CropStage,
    MosaicStage,
    SceneStage,
    SettleStage,
    VariedStage,
)
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.metrics import info_to_people
from nanomolmo2.training.run_folder import Resume, claimed


def tiny_stages(
    tiny: TinyForTraining, seed: int, scale: str, evaluate: Evaluate | None = None
) -> list[Stage]:
    """All stages of a run."""
    sizes = scale_of(scale)
    stages: list[Stage] = [
        CropStage(tiny, seed, sizes.crops, 4 * sizes.batch_size),
        VariedStage(tiny, seed, sizes.varied, 4 * sizes.batch_size),
        MosaicStage(tiny, seed, sizes.mosaics, sizes.batch_size),
        SceneStage(tiny, seed, sizes.scenes, sizes.batch_size),
    ]

    own = {plan.name: plan for plan in sizes.plans}

    def asks(plan: QuestionPlan) -> Stage:
        plan = own.get(plan.name, plan)
        steps = getattr(sizes, plan.name)
        return QuestionStage(tiny, seed, steps, plan, sizes.batch_size, evaluate)

    stages += [asks(plan) for plan in (PRESENCE, COARSE, FINE, FINISH)]
    settle = SettleStage(tiny, seed, sizes.settle, sizes.batch_size)
    return [*stages, settle, *map(asks, (LAST, AGREE, SEVERAL, AGAIN, COUNTS))]


def train_tiny(
    out: str | Path,
    *,
    scale: str = "full",
    seed: int = 0,
    resume: Resume = False,
    config: LoopConfig | None = None,
    evaluate: Evaluate | None = None,
) -> bool:
    """Train ``tiny`` from nothing in ``out``; when done, write the model to ``out/model`` in bf16.

    Args:
        evaluate: scores of the model, logged behind each stage that asks questions.
    Returns: whether the run finished (it may be stopped early by ``config.stop_after``).
    """
    out, config = Path(out), config or LoopConfig()
    with claimed(out, resume, info=info_to_people(config.quiet)):
        tiny = TinyForTraining(seed, scenes=scale_of(scale).look)
        stages = tiny_stages(tiny, seed, scale, evaluate)
        if scale_of(scale).compiled and has_compiler():
            tiny.compile_decoder()
        finished = run_stages(tiny, stages, out, config, resume=resume)
        if finished:
            save_tiny(tiny, out / "model")
    return finished


def run_stages(
    tiny: TinyForTraining,
    stages: Sequence[Stage],
    out: Path,
    config: LoopConfig | None = None,
    *,
    resume: Resume = False,
) -> bool:
    """`training.loop.run` with products in bfloat16, where the CPU has instructions for them."""
    bf16_matmul(defaults(tiny.model))
    return run(tiny, stages, out, config, resume=resume)


def has_compiler() -> bool:
    """Whether there are a C++ compiler and Python's headers: ``torch.compile`` needs them."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.exists() and any(name and shutil.which(name) for name in names)


def save_tiny(tiny: TinyForTraining, folder: Path) -> None:
    """Write the model, without the heads of training, in bf16."""
    tiny.model.to(torch.bfloat16).save_pretrained(folder, processor=tiny.processor)
