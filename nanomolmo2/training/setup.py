"""A run to be planned: its recipe, the sizes of its model, and where it will run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomolmo2.convert.pretrained import load_config
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.presets import PRESETS, preset
from nanomolmo2.training.frozen import prepare
from nanomolmo2.training.point_head import with_point_config
from nanomolmo2.training.recipe import Recipe

KNOWN = {"base": "nanomolmo2", "tiny": "tiny", "allenai/Molmo2-4B": "molmo2-4b"}
KNOWN["allenai/Molmo2-8B"] = "molmo2-8b"
KNOWN |= dict.fromkeys(
    (
        *("allenai/MolmoPoint-8B", "allenai/MolmoPoint-GUI-8B"),
        # What the recipes' stages leave for the next one, also before it is there.
        *(f"runs/molmo_point_stage{k}/model" for k in (1, 2, 3)),
    ),
    "molmo-point-8b",
)
KNOWN["allenai/MolmoPoint-Vid-4B"] = "molmo-point-vid-4b"


@dataclass(frozen=True)
class Setup:
    """A run, as far as its memory is concerned."""

    recipe: Recipe
    model: NanoMolmo2Config
    ranks: int = 1
    device: str = "cpu"

    def change(self, **fields: Any) -> Setup:
        """Other fields of the recipe."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **fields))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.dtype == "bfloat16" else torch.float32

    @property
    def rows(self) -> int:
        """m: of a micro-batch; a rank may have fewer in a step."""
        return min(self.recipe.micro_batch_size, self.recipe.batch_size // self.ranks)

    @property
    def is_sharded(self) -> bool:
        """As :func:`nanomolmo2.training.distributed.shard` decides."""
        return self.ranks > 1 or self.dtype != torch.float32


def setup_for(recipe: Recipe, ranks: int, device: str, architecture: str | None = None) -> Setup:
    """What is known of a recipe's model, without loading it.

    Args:
        architecture: a preset that has its sizes, where they follow from neither the recipe nor a
            known name nor a folder.
    Raises: ValueError if the sizes are unknown, or the rows cannot be shared by the ranks.
    """
    if recipe.batch_size % ranks:
        raise ValueError(
            f"batch_size {recipe.batch_size} cannot be shared by {ranks} ranks: choose a multiple "
            f"of the ranks"
        )
    model = preset(architecture) if architecture is not None else recipe.architecture
    if model is None:
        model = known_config(recipe.model)
    if model is None and Path(recipe.model).expanduser().is_dir():
        model = load_config(recipe.model)
    if model is None:
        raise ValueError(
            f"the sizes of {recipe.model!r} are not known here: give a preset of the same sizes "
            f"(--architecture)"
        )
    return Setup(recipe, sizes_in(recipe, model), ranks, device)


def sizes_in(recipe: Recipe, model: NanoMolmo2Config) -> NanoMolmo2Config:
    """Sizes in a recipe's run of the model that it starts from."""
    return with_point_config(model) if recipe.point_head else model


def known_config(name: str) -> NanoMolmo2Config | None:
    """Sizes of a model that is known by its name, or of a preset; None for folders and others."""
    if name in KNOWN:
        return None if "/" in name and Path(name).is_dir() else preset(KNOWN[name])
    return preset(name) if name in PRESETS and not Path(name).is_dir() else None


def count_weights(config: NanoMolmo2Config) -> int:
    """Parameters of a model, which is not allocated."""
    with torch.device("meta"):
        return count(NanoMolmo2(config).parameters())


def on_meta(setup: Setup) -> NanoMolmo2:
    """The model in the form in which the run trains it, without memory."""
    with torch.device("meta"):
        model = NanoMolmo2(setup.model)
    model = prepare(model, setup.recipe)
    if setup.is_sharded and "vision" not in setup.recipe.train:
        model.vision_encoder.to(setup.dtype)  # its norms too
    return model


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in tensors."""
    return sum(p.numel() for p in parameters)
