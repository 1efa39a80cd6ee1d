"""The recipes that come with the package: functions that return a `Recipe`, to read and to vary.

    smoke       a very small model on emoji scenes, seconds: shows that everything works
    base        SigLIP 2 and Qwen3-0.6B-Base: frozen vision, a fresh connector and the decoder learn
    base_of     the same with another connector, vision encoder or language model
    stage1-3    the three stages of Molmo2-4B
    molmo_point_stage1-3, gui   those of MolmoPoint-8B, and its model for screenshots
    finetune    a trained model on a person's own data

`tiny` has many stages of other kinds: nanomolmo2/emoji/train.py.
"""

from __future__ import annotations

from collections.abc import Callable

from nanomolmo2.recipes.base import base, base_of
from nanomolmo2.recipes.finetune import finetune
from nanomolmo2.recipes.molmo2 import adamw, stage1, stage2, stage3
from nanomolmo2.recipes.molmo_point import (
    gui,
    molmo_point_stage1,
    molmo_point_stage2,
    molmo_point_stage3,
)
from nanomolmo2.recipes.smoke import smoke
from nanomolmo2.registry import Registry
from nanomolmo2.training.recipe import Recipe

__all__ = [
    "RECIPES",
    "STAGED",
    "adamw",
    "base",
    "base_of",
    "finetune",
    "gui",
    "molmo_point_stage1",
    "molmo_point_stage2",
    "molmo_point_stage3",
    "recipe",
    "smoke",
    "stage1",
    "stage2",
    "stage3",
]

RECIPES: Registry[Callable[[], Recipe]] = Registry(
    smoke=smoke,
    base=base,
    stage1=stage1,
    stage2=stage2,
    stage3=stage3,
    molmo_point_stage1=molmo_point_stage1,
    molmo_point_stage2=molmo_point_stage2,
    molmo_point_stage3=molmo_point_stage3,
    gui=gui,
    finetune=finetune,
)
# Runs through several stages: functions that train in a folder, and return whether they are done.
STAGED: Registry[Callable[..., bool]] = Registry(tiny="nanomolmo2.emoji.train:train_tiny")


def recipe(name: str) -> Recipe:
    """The recipe of a name in `RECIPES`, or of a JSON file.

    Raises: ValueError naming those there are.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return Recipe.load(name)
    raise ValueError(
        f"there is no recipe {name!r}: choose one of {', '.join((*STAGED, *RECIPES))}, or give a "
        f".json file, such as the recipe.json of another run"
    )
