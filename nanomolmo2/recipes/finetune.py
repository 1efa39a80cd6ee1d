"""A trained model on a person's own data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanomolmo2.convert.pretrained import load_config, load_processor
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor import ProcessorConfig
from nanomolmo2.recipes.changes import (
    points_rates,
    vision_rates,
    with_lora,
    with_rate,
    with_steps,
)
from nanomolmo2.recipes.fresh import has_fresh_connector
from nanomolmo2.recipes.length import FEWEST, config_of, is_small, with_default_length
from nanomolmo2.recipes.length import SMALL as SMALL
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.training.optim import PARTS, OptimConfig
from nanomolmo2.training.recipe import DType, Recipe
from nanomolmo2.training.setup import known_config

TEXT_TOKENS = 256  # of a row, beside its largest picture
ROW_STEP = 512  # rows are a multiple of it, as far as the model's positions allow
REPLAY = 0.3  # of the examples, from what the model was trained on
WARMUP = 10  # steps
FIND_WEIGHT = 1.0  # of what is found all at once, where a model does that
PHOTOS_A_ROW = 4  # as many of the largest have room among the crops of a row
# Peak rate of a connector that was never trained, and at least so much more than the decoder's.
FRESH_RATE, FRESH_RATIO = 2e-4, 2.0


def finetune(
    data: Sequence[str] = ("my.jsonl",),
    model: str = "tiny",
    *,
    steps: int | None = None,
    lora: bool = False,
    lr: float | None = None,
    points: bool = False,
) -> Recipe:
    """A trained model on own data.

    The connector and the decoder learn, or LoRA matrices of it, and the point modules of a model
    that has them; of a small model the vision encoder and the embeddings too, in which new words of
    the data get rows, unless LoRA is to keep it near to what it was. A share of what the model was
    trained on is mixed in, where it says so. Rows, rates and arithmetic follow from the
    configuration of the model, see `sizes_of`, and the steps from the data.

    Args:
        data: files of records, see docs/data.md.
        model: a folder, ``tiny``, ``base`` or a name on the hub.
        steps: None = by the size of the data, see `length.with_default_length`; ``FEWEST`` where
            they cannot be opened.
        lr: peak rate of the decoder or its LoRA; None = what suits the model.
        points: let a model that writes coordinates as text point by selecting what it sees.
    Raises: ValueError where there is no such model; OSError without network for a name on the hub.
    """
    sizes = sizes_of(model)
    rates = adamw(lr or sizes.lr, WARMUP)
    recipe = Recipe(
        name="finetune",
        model=model,
        data=tuple(SourceConfig(path) for path in data),
        steps=FEWEST,
        batch_size=2,
        micro_batch_size=1,
        sequence_length=sizes.sequence_length,
        max_crops=sizes.max_crops,
        packing_buffer=8,
        replay=REPLAY,
        new_words=None,
        point_head=points,
        train=("connector", "llm"),
        optimisers={"connector": rates, "llm": rates},
        dtype=sizes.dtype,
        gradient_checkpointing=sizes.gradient_checkpointing,
        save_every=100,
    )
    if lora:
        recipe = with_lora(recipe)
        recipe = recipe if lr is None else with_rate(recipe, lr)
    elif is_small(config_of(recipe)):
        recipe = dataclasses.replace(
            recipe,
            train=("vision", *recipe.train, "embeddings"),
            optimisers={"vision": vision_rates(rates), **recipe.optimisers, "embeddings": rates},
        )
    if config_of(recipe).point_config is not None:
        recipe = with_points(recipe, rates)
        if config_of(recipe).finder_dim is not None:
            crops = largest_picture(config_of(recipe), load_processor(model).config)[1]
            recipe = dataclasses.replace(
                recipe,
                photos=True,
                find_weight=FIND_WEIGHT,
                max_crops=max(recipe.max_crops, PHOTOS_A_ROW * crops),
            )
    elif config_of(recipe).finder_dim is not None:
        recipe = dataclasses.replace(recipe, find_weight=FIND_WEIGHT)  # behind the last step
    recipe = with_fresh_rate(recipe)
    return with_default_length(recipe) if steps is None else with_steps(recipe, steps)


def with_points(recipe: Recipe, rates: OptimConfig) -> Recipe:
    """What selects visual tokens learns too; ``rates``: of the decoder."""
    train = [part for part in PARTS if part in (*recipe.train, "points")]
    optimisers = {**recipe.optimisers, "points": points_rates(rates)}
    return dataclasses.replace(recipe, train=tuple(train), optimisers=optimisers)


def with_fresh_rate(recipe: Recipe) -> Recipe:
    """A connector that was never trained learns at a rate that makes something of it.

    Raises: as `has_fresh_connector`.
    """
    if "connector" not in recipe.train or recipe.architecture is not None:
        return recipe
    if not has_fresh_connector(recipe.model):
        return recipe
    config = recipe.optimisers["connector"]
    others = [o.lr for part, o in recipe.optimisers.items() if part in ("llm", "embeddings")]
    lr = max(config.lr, FRESH_RATE, *(FRESH_RATIO * lr for lr in others))
    optimisers = {**recipe.optimisers, "connector": dataclasses.replace(config, lr=lr)}
    return dataclasses.replace(recipe, optimisers=optimisers)


@dataclass(frozen=True)
class Sizes:
    """What a recipe takes from its model."""

    sequence_length: int
    max_crops: int
    lr: float
    dtype: DType
    gradient_checkpointing: bool


def sizes_of(model: str) -> Sizes:
    """Rows, rate and arithmetic for a model, whatever it is called and wherever it lies.

    A row holds the largest picture of the model's processor and some text, and has no more
    positions than the model.
    """
    config, processor = known_config(model), None
    if config is None:
        config, processor = load_config(model), load_processor(model).config
    small = is_small(config)
    tokens, crops = largest_picture(config, processor)
    tokens = math.ceil((tokens + TEXT_TOKENS) / ROW_STEP) * ROW_STEP
    positions = config.llm_config.max_position_embeddings
    return Sizes(
        sequence_length=min(positions, max(tokens, 2048 if small else 4096)),
        max_crops=max(crops, 8 if small else 64),
        lr=5e-4 if small else 1e-5,
        dtype="float32" if small else "bfloat16",
        gradient_checkpointing=not small,
    )


def largest_picture(
    config: NanoMolmo2Config, processor: ProcessorConfig | None = None
) -> tuple[int, int]:
    """(tokens, crops) of the picture that needs most of a row."""
    if processor is None or processor.multicrop is None:
        return config.num_visual_tokens, 1
    cut = processor.multicrop
    side = math.ceil(cut.patches_per_side / cut.pooling_size)
    crops = 1 + cut.max_crops  # the overview too
    return crops * side * (side + 1), crops  # every row of tokens has an end
