"""The base design: SigLIP 2, a fresh connector and Qwen3-0.6B-Base."""

from __future__ import annotations

from nanomolmo2.recipes.molmo2 import PRETRAINING, adamw
from nanomolmo2.training.recipe import Recipe


def base() -> Recipe:
    """The base design: SigLIP 2 stays frozen, a fresh connector and Qwen3-0.6B-Base learn."""
    return Recipe(
        name="base",
        model="base",
        data=PRETRAINING,
        steps=20_000,
        batch_size=64,
        micro_batch_size=4,
        sequence_length=2560,
        max_crops=3,  # images, of 729 tokens each
        train=("connector", "llm"),
        optimisers={"connector": adamw(2e-4, 200), "llm": adamw(2e-5, 2000)},
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=500,
    )
