"""Recipes at toy size: a step takes a few hundredths of a second."""

from __future__ import annotations

from dataclasses import replace

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.emoji.questions import BranchMix
from nanomolmo2.emoji.source import EmojiConfig
from nanomolmo2.recipes import smoke
from nanomolmo2.training.point_head import with_point_config
from nanomolmo2.training.recipe import Recipe

FEW_QUESTIONS = BranchMix(2, 1, 0, 1, *(0,) * 6)  # presence, count and point alone
SCENES = SourceConfig("emoji", options=EmojiConfig(length=50, mix=FEW_QUESTIONS).to_dict())


def toy(recipe: Recipe, **changes: object) -> Recipe:
    """The same recipe on a model of one layer, with few and short rows."""
    sizes = smoke().architecture
    assert sizes is not None
    architecture = replace(
        sizes,
        vision_config=replace(sizes.vision_config, num_hidden_layers=1),
        llm_config=replace(sizes.llm_config, num_hidden_layers=1),
    )
    if "points" in recipe.train:
        architecture = with_point_config(architecture, has_crops=False)
    small = {
        "model": "tiny",
        "architecture": architecture,
        "vision": "",
        "llm": "",
        "data": (SCENES,),
        "steps": 12,
        "batch_size": 2,
        "micro_batch_size": 1,
        "sequence_length": 256,
        "max_crops": 4,
        "packing_buffer": 2,
        "save_every": 3,
    }
    return replace(recipe, **{**small, **changes})
