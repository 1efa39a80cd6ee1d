"""MolmoPoint-8B and its GUI model: the Molmo2 design that points by selecting visual tokens.

The rates, lengths and shares are those of the scripts of the training repository. What is not
certain: the configurations of the released runs were not published, so steps and loss weights are
the scripts' own, and where a script sets a value twice its last one; the scripts do not run for
this model as they are. Two things of theirs no recipe here has: pictures are cut into as many crops
as the processor says (in 30 % of its image pointing the instruction tuning takes up to 24 in place
of 8), and labels of a source have no weight of their own (there 0.2 in answers with points and
tracks, 0.1 in captions; ``sampling_weight`` decides how often a source is seen).

Source: Molmo2, launch_scripts/pretrain.py, sft.py and gui of MolmoPoint.
"""

from __future__ import annotations

from dataclasses import fields, replace

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import preset
from nanomolmo2.models.point_config import CONSISTENT, PointConfig
from nanomolmo2.recipes.changes import POINTS_RATE
from nanomolmo2.recipes.molmo2 import PRETRAINING, Z_LOSS, adamw, stage1, stage2
from nanomolmo2.training.optim import OptimConfig
from nanomolmo2.training.recipe import Recipe

# Shares of the second stage; its sources have to be made ready by whoever trains, see docs/data.md.
INSTRUCTION = tuple(
    SourceConfig(f"data/{name}", name=name, sampling_weight=share, separate_turns=separate)
    for name, share, separate in (
        ("demo", 0.15, False),
        ("video-academic", 0.20, True),
        ("image-academic", 0.25, True),
        ("tracking", 0.12, False),
        ("video-pointing", 0.11, False),
        ("image-pointing", 0.07, False),
        ("text", 0.0995, False),
        ("hard-coded", 0.0005, False),
    )
)


def _rates(
    vision: float, connector: float, llm: float, warmup_steps: int
) -> dict[str, OptimConfig]:
    """Connector and point modules warm up for 200 steps always."""
    return {
        "vision": adamw(vision, warmup_steps),
        "connector": adamw(connector, 200),
        "llm": adamw(llm, warmup_steps),
        "points": adamw(POINTS_RATE, 200),
    }


def consistent(points: PointConfig | None) -> PointConfig:
    """The same tokens and sizes under the rule of our own training."""
    assert points is not None
    kept = {f.name: getattr(points, f.name) for f in fields(points) if f.name not in CONSISTENT}
    return PointConfig.consistent(**kept)


def molmo_point_stage1() -> Recipe:
    """MolmoPoint-8B, pre-training on captions, points and text, from Qwen3-8B and SigLIP 2.

    It learns under the rule ``consistent``, one in training and use, and not under that of the
    released models: an example then has the same loss alone and packed. The stages behind it go on
    with what is in the model's folder.

    The point modules start at N(0, 0.02), their biases and the vector of no-more-points at zero.
    The rows of the 128 tokens of its own, in the table and in the head, learn with the connector.

    Not certain: the script ends at 31,000 steps, a line of it says 23,000.
    """
    sizes = preset("molmo-point-8b")
    return replace(
        stage1(),
        name="molmo_point_stage1",
        model="allenai/MolmoPoint-8B",
        architecture=replace(sizes, point_config=consistent(sizes.point_config)),
        llm="Qwen/Qwen3-8B",
        data=PRETRAINING,
        steps=31_000,
        batch_size=128,
        sequence_length=2536,
        max_crops=16,
        train=("vision", "connector", "llm", "points"),
        optimisers=_rates(6e-6, 2e-4, 2e-5, 2000),
    )


def molmo_point_stage2() -> Recipe:
    """MolmoPoint-8B, instruction tuning on what stage 1 left in runs/molmo_point_stage1."""
    return replace(
        stage2(),
        name="molmo_point_stage2",
        model="runs/molmo_point_stage1/model",
        data=INSTRUCTION,
        steps=22_000,
        batch_size=160,
        sequence_length=16_384,
        max_crops=128,
        train=("vision", "connector", "llm", "points"),
        optimisers=_rates(5e-6, 5e-6, 1e-5, 200),
    )


def molmo_point_stage3() -> Recipe:
    """MolmoPoint-8B, long context: stage 2 in rows of 37,376 tokens and 384 frames."""
    return replace(
        molmo_point_stage2(),
        name="molmo_point_stage3",
        model="runs/molmo_point_stage2/model",
        steps=2_000,
        micro_batch_size=1,
        sequence_length=37_376,
        max_crops=384,
    )


def gui() -> Recipe:
    """MolmoPoint-GUI-8B: the 8B, after long context, on screenshots with a point a question.

    A record is a screenshot, a question on one of its elements and the centre of the element's box;
    all questions on a screenshot make one tree (`separate_turns`). The processor cuts a screenshot
    into up to 48 crops in training and 64 when it is measured: the folder of the model says it
    (`multicrop.max_crops`).

    Not certain: the loss weights of the released run; here they are those of stage 2.
    """
    return replace(
        molmo_point_stage2(),
        name="gui",
        model="runs/molmo_point_stage3/model",
        data=(SourceConfig("data/gui.jsonl", name="gui", separate_turns=True),),
        steps=2_000,
        batch_size=128,
        micro_batch_size=1,
        sequence_length=12_288,
        max_crops=49,
        packing_buffer=32,
        crop_weight=10.0,
        z_loss=Z_LOSS,
    )
