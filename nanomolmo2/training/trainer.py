"""A recipe as a run: model, data and loss put together for the loop.

    recipe -> build -> parts that learn -> shards -> RecipeStage -> loop.run -> DIR/model

S rows a step on R ranks: each rank learns from S / R of them, some at a time. Losses and gradients
are sums, divided by the weight of all labels of the step on all ranks, so neither the ranks nor the
micro-batches change what is computed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.convert.pretrained import (
    load,
    load_language_model,
    load_processor,
    load_vision_encoder,
)
from nanomolmo2.data.example import Example
from nanomolmo2.data.loader import PackedLoader, Step, merge_states
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.sources import open_mixture
from nanomolmo2.models.nanomolmo2 import NanoMolmo2
from nanomolmo2.processor import Encoded, Processor
from nanomolmo2.processor.processor import LossWeighting
from nanomolmo2.training.distributed import (
    World,
    full_state_dict,
    gather_objects,
    shard,
    sum_over_ranks,
    whole,
)
from nanomolmo2.training.feature_cache import FeatureCache
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.lora import add_lora, merge_lora
from nanomolmo2.training.metrics import open_trackers
from nanomolmo2.training.optim import OptimConfig, Selection, clear_rows, components, set_trainable
from nanomolmo2.training.recipe import Recipe

RECIPE_FILE, MODEL_FOLDER = "recipe.json", "model"


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    stop_after: int | None = None,
    workers: int = 1,
    log_to: Sequence[str] = (),
    quiet: bool = False,
    world: World | None = None,
    cache_dir: str | Path = "checkpoints",
) -> bool:
    """Train by a recipe in ``out``; when it is done, the model is written to ``out/model``.

    Args:
        resume: go on behind the newest checkpoint of ``out``.
        max_steps: stop there, to be resumed; beyond the recipe's steps it makes the recipe longer.
        stop_after: stop after so many steps of this call.
        workers: 1 prepares data in another process, 0 between steps.
        log_to: trackers beside ``log.jsonl``: tensorboard, trackio, wandb.
        world: ranks of this run; by default those that torchrun started.
        cache_dir: of the converted weights of ``base``.
    Returns: whether the recipe is done.
    Raises: as `loop.run`; ValueError if ``out`` holds a run of another recipe.
    """
    if world is None:
        with World.from_env() as world:
            return train_recipe(
                recipe,
                out,
                resume=resume,
                max_steps=max_steps,
                stop_after=stop_after,
                workers=workers,
                log_to=log_to,
                quiet=quiet,
                world=world,
                cache_dir=cache_dir,
            )
    out = Path(out)
    recipe = _settle(recipe, out, resume, max_steps)
    model, processor = build(recipe, cache_dir)
    shard(
        model,
        world,
        dtype=getattr(torch, recipe.dtype),
        gradient_checkpointing=recipe.gradient_checkpointing,
        compile=recipe.compile,
    )
    _seed(recipe.seed + world.rank)  # ranks must not drop out the same places
    stage = RecipeStage(recipe, model, processor, world)
    config = LoopConfig(
        log_every=recipe.log_every,
        save_every=recipe.save_every,
        keep=recipe.keep,
        clip_norm=recipe.clip_norm,
        workers=workers,
        stop_after=stop_after,
        stop_at=max_steps,
        quiet=quiet,
    )
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
    trackers = open_trackers(log_to, out, recipe.to_dict()) if world.is_main else []
    if world.is_main and not (out / RECIPE_FILE).exists():
        recipe.save(out / RECIPE_FILE)
    finished = run(model, [stage], out, config, resume=resume, world=world, trackers=trackers)
    if finished:
        save_model(recipe, model, processor, out / MODEL_FOLDER, world)
    return finished


def _settle(recipe: Recipe, out: Path, resume: bool, max_steps: int | None) -> Recipe:
    """The recipe of this call: on resume that of the run, else the given one."""
    path = out / RECIPE_FILE
    if resume and path.exists():
        stored = Recipe.load(path)
        if names := stored.differences(recipe):
            raise ValueError(
                f"{out} holds a run of another recipe: {', '.join(names)} differ from {path}; "
                f"resume with the options it was started with, or choose another folder"
            )
        recipe = dataclasses.replace(recipe, steps=stored.steps)
    if max_steps is not None and max_steps > recipe.steps:
        recipe = dataclasses.replace(recipe, steps=max_steps)
    return recipe


# ---- the model ----


def build(recipe: Recipe, cache_dir: str | Path = "checkpoints") -> tuple[NanoMolmo2, Processor]:
    """Model and processor of a recipe, in float32, with the parts frozen that do not learn."""
    _seed(recipe.seed)
    name = None if recipe.model == "base" else recipe.model
    if recipe.architecture is None:
        model, processor = load(name, cache_dir=cache_dir, dtype=torch.float32)
    else:
        processor = load_processor(name)
        model = NanoMolmo2(recipe.architecture)
        if recipe.vision:
            start_from(
                model.vision_encoder, load_vision_encoder(recipe.vision, cache_dir=cache_dir)
            )
        if recipe.llm:
            start_from(model.llm, load_language_model(recipe.llm, cache_dir=cache_dir))
    limit = model.config.llm_config.max_position_embeddings
    config = processor.config
    if config.multicrop is None and config.image_tokens is None:
        # Rows of several examples need every visual token to have its place.
        config = dataclasses.replace(config, image_tokens=model.config.num_visual_tokens)
        processor = Processor(config, processor.tokenizer)
    if recipe.sequence_length > limit:
        raise ValueError(
            f"sequence_length is {recipe.sequence_length}, but the model {recipe.model} has "
            f"{limit} positions: shorten the rows"
        )
    model.llm.residual_dropout = recipe.residual_dropout
    model.llm.dropout_at_targets = recipe.dropout_at_targets
    if recipe.lora is not None:
        add_lora(model.llm, recipe.lora)
    set_trainable(model, recipe.train)
    return model, processor


@torch.no_grad()
def start_from(part: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights of a pretrained part into one that may differ at its ends.

    It may have fewer blocks, more rows in its embedding table (those stay as they are), and a head
    of its own where the pretrained one uses the table.

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
        if len(source) < len(target) and name != "embed_tokens.weight":
            raise ValueError(f"{name} has {len(source)} rows, expected {len(target)}")
        target[: len(source)].copy_(source)


def save_model(
    recipe: Recipe, model: NanoMolmo2, processor: Processor, folder: Path, world: World
) -> None:
    """Write the trained model, LoRA merged, whole, in the recipe's dtype; call it on every rank."""
    weights = full_state_dict(model)
    if not world.is_main:
        return
    with torch.device("meta"):
        plain = NanoMolmo2(model.config)
        if recipe.lora is not None:
            add_lora(plain.llm, recipe.lora)
    plain.load_state_dict(weights, assign=True)
    merge_lora(plain.llm, final=True)
    plain.to(getattr(torch, recipe.dtype)).save_pretrained(folder, processor=processor)


# ---- the data and the steps ----


@dataclass(frozen=True)
class EncodeTree:
    """An example as training sees it; can be sent to worker processes."""

    processor: Processor
    loss_weighting: LossWeighting = "token"

    def __call__(self, example: Example) -> Encoded:
        return self.processor.encode_tree(
            example.images,
            [branch.messages for branch in example.branches],
            video=example.video,
            loss_weighting=self.loss_weighting,
        )


class RecipeStage(Stage):
    """The one stage of a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        model: NanoMolmo2,
        processor: Processor,
        world: World,
        mixture: Mixture | None = None,
    ) -> None:
        """
        Args:
            model: as `build` made it, sharded or not.
            mixture: in place of the recipe's data.
        """
        self.name, self.steps = recipe.name, recipe.steps
        self.recipe, self.model, self.world = recipe, model, world
        self.loader = PackedLoader(
            mixture or open_mixture(recipe.data, recipe.seed),
            EncodeTree(processor, recipe.loss_weighting),
            pad_token_id=processor.pad_token_id,
            batch_size=recipe.batch_size,
            max_tokens=recipe.sequence_length,
            max_crops=recipe.max_crops,
            micro_batch_size=recipe.micro_batch_size,
            rank=world.rank,
            world=world.size,
            bad_share=recipe.bad_share,
            pool=recipe.pool,
            crop_weight=recipe.crop_weight,
        )
        # Also without a folder: features are then rounded alike, and so are all losses.
        frozen = "vision" not in recipe.train
        self.cache = FeatureCache.of_model(recipe.feature_cache or None, model) if frozen else None
        row = whole(model.llm.embed_tokens.weight)[model.config.image_token_id]
        self.holds_placeholder = not bool(row.any())

    def components(self) -> Mapping[str, tuple[nn.Module | Selection, OptimConfig]]:
        return components(self.model, self.recipe.train, self.recipe.optimisers)

    def batches(self, steps: range, state: Any, workers: int) -> Generator[tuple[Any, Any]]:
        self.loader.workers = 1 if workers else 0
        if state is not None:
            self.loader.load_state_dict(state)
        for _, step in zip(steps, self.loader, strict=False):
            yield step, step.state

    def join_ranks(self, state: Any) -> Any:
        return merge_states(gather_objects(state))

    def gradients(self, batch: Step) -> dict[str, float]:
        device = self.world.device
        weights = [
            label_weights(micro).to(device).requires_grad_() for micro in batch.micro_batches
        ]
        total = sum_over_ranks(torch.stack([w.detach().sum() for w in weights]).sum())
        loss = torch.zeros((), device=device)
        for micro, weight in zip(batch.micro_batches, weights, strict=True):
            part = self._loss(micro.to(device), weight) / total
            part.backward()
            loss += part.detach()
        self._hold_placeholder()
        metrics = {"loss": float(sum_over_ranks(loss))}
        return metrics | self._by_task(batch, weights, float(total)) | self._counts(batch)

    def _loss(self, batch: Batch, weights: Tensor) -> Tensor:
        inputs: dict[str, Any] = {**batch.tensors(), "loss_weights": weights}
        if self.cache is not None and "pixel_values" in inputs:
            inputs["visual_features"] = self.cache.features(inputs.pop("pixel_values"))
        loss: Tensor = self.model.loss(**inputs, reduction="sum", z_loss=self.recipe.z_loss)
        return loss

    def _by_task(self, step: Step, weights: Sequence[Tensor], total: float) -> dict[str, float]:
        """The mean loss of every task. What the step's loss gains by a label's weight is the loss
        of that label, over the weight of the step.
        """
        sums: dict[str, list[float]] = {}  # task -> weighted loss, weight
        for branches, weight in zip(step.branches, weights, strict=True):
            if weight.grad is None:
                return {}
            number = branches.to(weight.device).clamp(min=0).flatten()  # shared tokens weigh 0
            for column, value in enumerate((weight.grad * weight * total, weight)):
                by_branch = torch.zeros(len(step.tasks), device=weight.device)
                by_branch.index_add_(0, number, value.detach().flatten())
                for task, part in zip(step.tasks, by_branch.tolist(), strict=True):
                    sums.setdefault(task, [0.0, 0.0])[column] += part
        joined: dict[str, list[float]] = {}
        for rank in gather_objects(sums):
            for task, parts in rank.items():
                joined[task] = [a + b for a, b in zip(joined.get(task, (0, 0)), parts, strict=True)]
        return {f"loss_{t}": a / b for t, (a, b) in sorted(joined.items()) if t and b > 0}

    def _counts(self, step: Step) -> dict[str, float]:
        names = ("tokens", "padding", "room", "examples", "crops")
        numbers = torch.tensor([float(step.counts.get(name, 0)) for name in names])
        sums = dict(zip(names, sum_over_ranks(numbers.to(self.world.device)).tolist(), strict=True))
        metrics = {name: sums[name] for name in ("tokens", "examples", "crops")}
        metrics["padding"] = sums["padding"] / (sums["tokens"] + sums["padding"])
        metrics["row_fill"] = sums["tokens"] / sums["room"]
        bad = {f"bad_{cause.replace(' ', '_')}": float(n) for cause, n in step.bad.items()}
        return metrics | bad

    def _hold_placeholder(self) -> None:
        """Features are added to the image token's row. Where it is zero it stays zero, so that
        programs that replace it by the features compute the same.
        """
        gradient = self.model.llm.embed_tokens.weight.grad
        if self.holds_placeholder and gradient is not None:
            row = self.model.config.image_token_id
            clear_rows(gradient, row + 1, first=row)


def label_weights(batch: Batch) -> Tensor:
    """(B, T) float32: what each label weighs in the loss; 0 where nothing is learned."""
    assert batch.labels is not None
    weights = (batch.labels != IGNORED_LABEL).float()
    if batch.loss_weights is not None:
        weights *= batch.loss_weights
    weights[:, 0] = 0  # nothing stands before it
    return weights


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
