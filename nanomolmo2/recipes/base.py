"""The base design: SigLIP 2, a fresh connector and Qwen3-0.6B-Base, or others of their kinds."""

from __future__ import annotations

from dataclasses import replace

from nanomolmo2.convert.fresh import fresh_config
from nanomolmo2.convert.parts import LLM, VISION
from nanomolmo2.recipes.molmo2 import PRETRAINING, adamw
from nanomolmo2.training.recipe import Recipe

TEXT_TOKENS = 256  # of a row, beside its pictures
MOST_PICTURES = 16  # of a row: the vision encoder works for every one


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


def base_of(connector: str = "linear", vision: str = "", llm: str = "") -> Recipe:
    """`base` with another connector, vision encoder or language model.

    Args:
        connector: ``linear``, ``mlp``, ``resampler`` or ``pooling``, which is Molmo2's design.
        vision, llm: names on the hub or folders; empty = SigLIP 2 and Qwen3-0.6B-Base.
    Raises: as `fresh_config`.
    """
    vision, llm = vision or VISION.repository, llm or LLM.repository
    architecture = fresh_config(connector, vision, llm)
    made = base()
    length = min(made.sequence_length, architecture.llm_config.max_position_embeddings)
    pictures = max(1, (length - TEXT_TOKENS) // architecture.num_visual_tokens)
    if connector == "pooling":  # crops: a picture has up to nine
        pictures = max(9, pictures)
    return replace(
        made,
        architecture=architecture,
        vision=vision,
        llm=llm,
        sequence_length=length,
        max_crops=min(MOST_PICTURES, pictures),
    )
