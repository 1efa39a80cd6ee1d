"""A trained model on a person's own data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanomolmo2.convert.pretrained import load_config, load_processor
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor import ProcessorConfig
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.plan import count_weights, known_config
from nanomolmo2.training.recipe import DType, Recipe

SMALL = 100_000_000  # weights; smaller models learn in float32, at a higher rate, in shorter rows
TEXT_TOKENS = 256  # of a row, beside its largest picture
ROW_STEP = 512  # rows are a multiple of it, as far as the model's positions allow


def finetune(
    data: Sequence[str] = ("my.jsonl",),
    model: str = "tiny",
    *,
    steps: int = 40,
    lora: bool = False,
) -> Recipe:
    """A trained model on own data: the connector and the decoder learn, or LoRA matrices of it.

    Rows, rates and arithmetic follow from the configuration of the model, see `sizes_of`.

    Args:
        data: files of records, see docs/data.md.
        model: a folder, ``tiny``, ``base`` or a name on the hub.
        steps: 40 steps of 2 rows are enough to see that it learns.
    Raises: ValueError where there is no such model; OSError without network for a name on the hub.
    """
    sizes = sizes_of(model)
    rates = adamw(sizes.lr, min(10, steps))
    parts = ("connector", "lora") if lora else ("connector", "llm")
    optimisers = dict.fromkeys(parts, rates)
    if lora:  # its matrices start at zero and take larger steps
        optimisers["lora"] = adamw(max(sizes.lr, 2e-4), min(10, steps))
    return Recipe(
        name="finetune",
        model=model,
        data=tuple(SourceConfig(path) for path in data),
        steps=steps,
        batch_size=2,
        micro_batch_size=1,
        sequence_length=sizes.sequence_length,
        max_crops=sizes.max_crops,
        packing_buffer=8,
        train=parts,
        optimisers=optimisers,
        lora=LoraConfig() if lora else None,
        dtype=sizes.dtype,
        gradient_checkpointing=sizes.gradient_checkpointing,
        save_every=100,
    )


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
    small = count_weights(config) < SMALL
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
