"""The model of a recipe: from its files or fresh, in the form that learns, and back to plain files.

recipe -> build -> model, processor -> (training) -> plain_model -> save_model
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nanomolmo2.accelerate import defaults
from nanomolmo2.accelerate.new_rows import has_new_rows
from nanomolmo2.accelerate.quantization import dequantize, is_quantized
from nanomolmo2.convert.fresh import fresh_processor
from nanomolmo2.convert.parts import LLM
from nanomolmo2.convert.pretrained import (
    check_agreement,
    load,
    load_config,
    load_language_model,
    load_processor,
    load_vision_encoder,
)
from nanomolmo2.models import LanguageModel, NanoMolmo2
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor import Processor
from nanomolmo2.training.distributed import World, full_state_dict
from nanomolmo2.training.frozen import finish, prepare, save_adapter
from nanomolmo2.training.new_words import add_new_words
from nanomolmo2.training.point_head import init_head_rows, point_processor, with_point_head
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import ADAPTER_FOLDER, Info
from nanomolmo2.training.setup import known_config


def build(
    recipe: Recipe,
    cache_dir: str | Path = "checkpoints",
    info: Info = lambda text: None,
    *,
    split_table: bool = False,
) -> tuple[NanoMolmo2, Processor]:
    """Model and processor of a recipe, in the form that `prepare` gives it.

    Quantised weights become floating point ones of the same values, of which ``info`` is told.
    """
    seed_all(recipe.seed)
    name = None if recipe.model == "base" else recipe.model
    if recipe.architecture is None:
        # As stored where what is frozen becomes bfloat16: no float32 copy of a large model.
        stored = name is not None and recipe.dtype == "bfloat16"
        dtype = None if stored else torch.float32
        model, processor = load(name, cache_dir=cache_dir, dtype=dtype, device="cpu")
        if is_quantized(model):
            info(f"the weights of {recipe.model} are quantised: training starts from rounded ones")
            model = dequantize(model)
        model, processor = add_new_words(model, processor, recipe.new_words or (), recipe.seed)
        if recipe.point_head:
            if model.config.point_config is not None:
                info(f"{recipe.model} already points by selecting: --points adds nothing")
            model, processor = with_point_head(model, processor)
    else:
        processor = processor_of(recipe)
        check_agreement(recipe.architecture, processor)
        model = NanoMolmo2(recipe.architecture)
        init_head_rows(model)
        if recipe.vision:
            start_from(
                model.vision_encoder, load_vision_encoder(recipe.vision, cache_dir=cache_dir)
            )
        if recipe.llm:
            start_from(model.llm, load_language_model(recipe.llm, cache_dir=cache_dir))
    limit = model.config.llm_config.max_position_embeddings
    processor = processor_of_rows(processor, model.config)
    if recipe.sequence_length > limit:
        raise ValueError(
            f"sequence_length is {recipe.sequence_length}, but the model {recipe.model} has "
            f"{limit} positions: shorten the rows (--sequence-length {limit})"
        )
    return prepare(defaults(model), recipe, split_table=split_table), processor


def processor_of(recipe: Recipe) -> Processor:
    """The processor of a recipe's model: its own, or for parts of their own that of these parts;
    where the model points by selecting what it sees, one that writes points so.
    """
    sizes = recipe.architecture
    if recipe.model != "base":
        processor = load_processor(recipe.model)
    elif sizes is None:
        processor = load_processor()
    else:
        processor = fresh_processor(sizes, recipe.llm or LLM.repository)
    if recipe.point_head:
        sizes = known_config(recipe.model) or load_config(recipe.model)
    elif sizes is None or sizes.point_config is None:
        return processor
    return point_processor(processor, sizes)


def processor_of_rows(processor: Processor, model: NanoMolmo2Config) -> Processor:
    """The processor for rows of several examples: every visual token has its place in them."""
    config = processor.config
    if config.multicrop is not None or config.image_tokens is not None:
        return processor
    return processor.with_settings(image_tokens=model.num_visual_tokens)


@torch.no_grad()
def start_from(part: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights of a pretrained part into one that may differ at its ends.

    It may have fewer blocks, more rows in its embedding table, and in a head that writes them
    (those stay as they are), and a head of its own where the pretrained one uses the table.

    Raises: ValueError for weights that are missing or of another shape.
    """
    found = pretrained.state_dict()
    found.setdefault("lm_head.weight", found.get("embed_tokens.weight", torch.empty(0)))
    for name, target in part.state_dict().items():
        source = found.get(name)
        if source is None or source.shape[1:] != target.shape[1:] or len(source) > len(target):
            shape = "missing" if source is None else tuple(source.shape)
            raise ValueError(
                f"{name} is {tuple(target.shape)} in the recipe's architecture and {shape} in the "
                f"checkpoint: choose the checkpoint of the same sizes"
            )
        expected = len(target)
        if name == "lm_head.weight" and isinstance(part, LanguageModel):
            expected = min(expected, part.config.vocab_size)
        if len(source) < expected and name != "embed_tokens.weight":
            raise ValueError(f"{name} has {len(source)} rows, expected {expected}")
        target[: len(source)].copy_(source)


def save_model(
    recipe: Recipe, model: NanoMolmo2, processor: Processor, folder: Path, world: World
) -> None:
    """Write the trained model, LoRA merged, in the recipe's dtype; call it on every rank.

    What LoRA and the parts beside it learned is also written apart, to ``adapter`` beside it, but
    where new words changed the tokenizer: the base model has another.
    """
    if recipe.lora is not None and not recipe.new_words:
        save_adapter(recipe, model, folder.with_name(ADAPTER_FOLDER), world)
    plain = plain_model(recipe, model, world)
    if plain is not None:
        plain.save_pretrained(folder, processor=processor)


def plain_model(recipe: Recipe, model: NanoMolmo2, world: World) -> NanoMolmo2 | None:
    """What was trained so far as a model of its own, on the CPU of the first rank, LoRA merged, in
    the recipe's dtype; None elsewhere. Call it on every rank.
    """
    weights = full_state_dict(model)
    if not world.is_main:
        return None
    with torch.device("meta"):
        plain = NanoMolmo2(model.config)
        plain = prepare(plain, recipe, split_table=has_new_rows(model.llm))
    plain.load_state_dict(weights, assign=True)
    return finish(plain, getattr(torch, recipe.dtype))


def seed_all(seed: int) -> None:
    """Start every generator that a run draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
