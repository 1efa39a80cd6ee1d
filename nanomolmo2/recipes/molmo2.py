"""The three stages of Molmo2-4B, with its rates, lengths and data weights."""

from __future__ import annotations

from dataclasses import replace

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import preset
from nanomolmo2.training.optim import OptimConfig
from nanomolmo2.training.recipe import Recipe

# PixMo's pictures lie behind addresses: download them first, see docs/data.md, "Other formats".
PRETRAINING = (
    SourceConfig(
        "data/pixmo-cap",
        format="pixmo_cap",
        sampling_weight=0.6,
        prompts="styles",
        image_folder="data/pixmo",
    ),
    SourceConfig(
        "data/pixmo-points", format="pixmo_points", prompts="styles", image_folder="data/pixmo"
    ),
    SourceConfig("data/cosyn-point", format="cosyn_point", prompts="styles"),
    SourceConfig("data/tulu.jsonl", sampling_weight=0.1),
)
INSTRUCTION = (
    SourceConfig("data/instruction", name="instruction", sampling_weight=0.8, separate_turns=True),
    SourceConfig(
        "data/pixmo-points", format="pixmo_points", sampling_weight=0.1, image_folder="data/pixmo"
    ),
    SourceConfig("data/tulu.jsonl", sampling_weight=0.1),
)
Z_LOSS = 1e-4


def adamw(lr: float, warmup_steps: int) -> OptimConfig:
    """AdamW alone, as Molmo2 has it: betas 0.9 and 0.95, cosine to a tenth, no weight decay."""
    return OptimConfig(lr=lr, matrix_lr=0.0, warmup_steps=warmup_steps)


def stage1() -> Recipe:
    """Molmo2-4B, pre-training on captions and points.

    The base rows of the embedding stay; the 128 new rows learn with the connector.

    Source: Molmo2, launch_scripts/pretrain.py.
    """
    return Recipe(
        name="stage1",
        model="allenai/Molmo2-4B",
        architecture=preset("molmo2-4b"),
        vision="google/siglip2-so400m-patch14-384",
        llm="Qwen/Qwen3-4B-Instruct-2507",
        data=PRETRAINING,
        steps=32_000,
        batch_size=128,
        micro_batch_size=4,
        sequence_length=2560,
        max_crops=16,
        train=("vision", "connector", "llm"),
        optimisers={
            "vision": adamw(6e-6, 2000),
            "connector": adamw(2e-4, 200),
            "llm": adamw(2e-5, 2000),
        },
        residual_dropout=0.1,
        dropout_at_targets=True,
        z_loss=Z_LOSS,
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=1000,
    )


def stage2() -> Recipe:
    """Molmo2-4B, instruction tuning on what stage 1 left in runs/stage1.

    Source: Molmo2, launch_scripts/sft.py.
    """
    return Recipe(
        name="stage2",
        model="runs/stage1/model",
        data=INSTRUCTION,
        steps=30_000,
        batch_size=128,
        micro_batch_size=2,
        sequence_length=16_384,
        max_crops=128,
        crop_weight=30.0,
        train=("vision", "connector", "llm"),
        optimisers={
            "vision": adamw(5e-6, 200),
            "connector": adamw(5e-6, 200),
            "llm": adamw(1e-5, 200),
        },
        residual_dropout=0.1,
        loss_weighting="molmo2",
        z_loss=Z_LOSS,
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=500,
    )


def stage3() -> Recipe:
    """Molmo2-4B, long context: stage 2 in rows of 36,864 tokens."""
    return replace(
        stage2(),
        name="stage3",
        model="runs/stage2/model",
        steps=2_000,
        micro_batch_size=1,
        sequence_length=36_864,
        max_crops=384,
    )
