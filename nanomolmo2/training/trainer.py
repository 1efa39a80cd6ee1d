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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanomolmo2.accelerate import defaults
from nanomolmo2.accelerate.quantization import dequantize, is_quantized
from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.convert.pretrained import (
    load,
    load_language_model,
    load_processor,
    load_vision_encoder,
)
from nanomolmo2.data.loader import PackedLoader, RowPlan, Step, merge_states
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.sources import open_mixture
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.forms import check_batch
from nanomolmo2.processor import Processor
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.training.distributed import (
    World,
    full_state_dict,
    full_tensor,
    gather_objects,
    shard,
    sum_over_ranks,
)
from nanomolmo2.training.dropout import residual_dropout
from nanomolmo2.training.feature_cache import FeatureCache
from nanomolmo2.training.fingerprint import fingerprints
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.lora import add_lora, merge_lora
from nanomolmo2.training.metrics import info_to_people, open_trackers
from nanomolmo2.training.optim import OptimConfig, Selection, clear_rows, components, set_trainable
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import (
    MODEL_FOLDER,
    RECIPE_FILE,
    Info,
    Resume,
    check_outside,
    claimed,
)


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: Resume = False,
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
        resume: go on behind the newest checkpoint of ``out``. Where there is none the run starts
            anew, and a line says so; "required" makes that an error.
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
    out, info = Path(out), info_to_people(quiet or not world.is_main)
    config = LoopConfig(workers=workers, stop_after=stop_after, stop_at=max_steps, quiet=quiet)
    check_outside(out, [source.path for source in recipe.data])
    with claimed(out, resume, world=world, inputs=[recipe.model], info=info):
        recipe = resolve_recipe(recipe, out, bool(resume), max_steps)
        return _train(recipe, out, resume, config, world, log_to, cache_dir, info)


def _train(
    recipe: Recipe,
    out: Path,
    resume: Resume,
    config: LoopConfig,
    world: World,
    log_to: Sequence[str],
    cache_dir: str | Path,
    info: Info,
) -> bool:
    """`train_recipe` in a folder that is this run's."""
    model, processor = build(recipe, cache_dir, info)
    shard(
        model,
        world,
        dtype=getattr(torch, recipe.dtype),
        gradient_checkpointing=recipe.gradient_checkpointing,
        compile=recipe.compile,
    )
    _seed(recipe.seed + world.rank)  # ranks must not drop out the same places
    stage = RecipeStage(recipe, model, processor, world)
    if world.is_main:
        for sentence in stage.warnings():
            info(f"warning: {sentence}")
    config = dataclasses.replace(
        config,
        log_every=recipe.log_every,
        save_every=recipe.save_every,
        keep=recipe.keep,
        clip_norm=recipe.clip_norm,
    )
    trackers = open_trackers(log_to, out, recipe.to_dict()) if world.is_main else []
    if world.is_main and not (resume and (out / RECIPE_FILE).exists()):
        recipe.save(out / RECIPE_FILE)
    finished = run(model, [stage], out, config, resume=resume, world=world, trackers=trackers)
    if stage.left_out:
        info(f"warning: {stage.left_out}: nanomolmo2 inspect --audit names them")
    if finished:
        save_model(recipe, model, processor, out / MODEL_FOLDER, world)
    return finished


def resolve_recipe(recipe: Recipe, out: Path, resume: bool, max_steps: int | None) -> Recipe:
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


def build(
    recipe: Recipe, cache_dir: str | Path = "checkpoints", info: Info = lambda text: None
) -> tuple[NanoMolmo2, Processor]:
    """Model and processor of a recipe, in float32, with the parts frozen that do not learn.

    Quantised weights become floating point ones of the same values, of which ``info`` is told.
    """
    _seed(recipe.seed)
    name = None if recipe.model == "base" else recipe.model
    if recipe.architecture is None:
        model, processor = load(name, cache_dir=cache_dir, dtype=torch.float32)
        if is_quantized(model):
            info(f"the weights of {recipe.model} are quantised: training starts from rounded ones")
            model = dequantize(model)
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
            f"{limit} positions: shorten the rows (--sequence-length {limit})"
        )
    defaults(model)
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
    """Write the trained model, LoRA merged, in the recipe's dtype; call it on every rank."""
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
        self._given = mixture is not None
        self.loader = PackedLoader(
            mixture or open_mixture(recipe.data, recipe.seed),
            EncodeTree(processor, recipe.loss_weighting),
            RowPlan(
                batch_size=recipe.batch_size,
                max_tokens=recipe.sequence_length,
                max_crops=recipe.max_crops,
                pad_token_id=processor.pad_token_id,
                micro_batch_size=recipe.micro_batch_size,
                packing_buffer=recipe.packing_buffer,
                crop_weight=recipe.crop_weight,
            ),
            rank=world.rank,
            world=world.size,
            max_bad_fraction=recipe.max_bad_fraction,
        )
        # Also without a folder: features are then rounded alike, and so are all losses.
        frozen = "vision" not in recipe.train
        self.dropout = residual_dropout(model.llm, recipe.residual_dropout)
        self.cache = FeatureCache.of_model(recipe.feature_cache or None, model) if frozen else None
        row = full_tensor(model.llm.embed_tokens.weight)[model.config.image_token_id]
        self.holds_placeholder = not bool(row.any())
        self._told: set[str] = set()  # causes of what was left out
        self.left_out = ""

    def components(self) -> Mapping[str, tuple[nn.Module | Selection, OptimConfig]]:
        return components(self.model, self.recipe.train, self.recipe.optimisers)

    def batches(self, steps: range, state: Any, workers: int) -> Generator[tuple[Any, Any]]:
        self.loader.workers = 1 if workers else 0
        if state is not None:
            self.loader.load_state_dict(state)
        for _, step in zip(steps, self.loader, strict=False):
            yield step, step.state

    def warnings(self) -> list[str]:
        """What is probably a mistake in the data: to be said once, before the first step."""
        return self.loader.warnings()

    def remarks(self, batch: Step) -> list[str]:
        """The first example of every cause that was left out; the log counts all of them."""
        if batch.bad:
            causes = ", ".join(f"{cause} {n}" for cause, n in batch.bad.items())
            number = sum(batch.bad.values())
            self.left_out = f"left out {number} of {batch.drawn} examples ({causes})"
        new = {c: text for c, text in batch.first_bad.items() if c not in self._told}
        self._told |= new.keys()
        return [f"warning: left out ({cause}): {text}" for cause, text in new.items()]

    def sources(self) -> dict[str, str] | None:
        return None if self._given else fingerprints(self.recipe.data)

    def sources_changed(self) -> None:
        self.loader.expect_changes()

    def join_ranks(self, state: Any) -> object:
        return merge_states(gather_objects(state))

    def gradients(self, batch: Step) -> dict[str, float | Tensor]:
        """Nothing is read from the device: the loop reads all metrics of a step at once."""
        on_cpu = [label_weights(micro) for micro in batch.micro_batches]
        weights = [self._moved(weight).requires_grad_() for weight in on_cpu]
        total = sum_over_ranks(self._moved(torch.stack([w.sum() for w in on_cpu]).sum()))
        loss = torch.zeros((), device=self.world.device)
        for micro, weight in zip(batch.micro_batches, weights, strict=True):
            micro = check_batch(micro, self.model.config).prepared()
            part = self._loss(micro.to(self.world.device), weight) / total
            part.backward()
            loss += part.detach()
        self._hold_placeholder()
        metrics: dict[str, float | Tensor] = {"loss": sum_over_ranks(loss)}
        return metrics | self._by_task(batch, weights, total) | self._counts(batch)

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device of this rank, without waiting for it."""
        return tensor.to(self.world.device, non_blocking=True)

    def _loss(self, batch: Batch, weights: Tensor) -> Tensor:
        batch = dataclasses.replace(batch, loss_weights=weights)
        if self.cache is not None and batch.pixel_values is not None:
            features = self.cache.features(batch.pixel_values)
            batch = dataclasses.replace(batch, pixel_values=None, visual_features=features)
        if self.recipe.dropout_at_targets:
            assert batch.loss_rows is not None
            self.dropout.at_rows(batch.loss_rows, batch.input_ids.shape)
        return self.model.loss(batch, reduction="sum", z_loss=self.recipe.z_loss)

    def _by_task(
        self, step: Step, weights: Sequence[Tensor], total: Tensor
    ) -> dict[str, float | Tensor]:
        """The mean loss of every task. What the step's loss gains by a label's weight is the loss
        of that label, over the weight of the step.
        """
        if any(weight.grad is None for weight in weights):
            return {}
        names = sorted({name for tasks in gather_objects(step.tasks) for name in tasks})
        place = {name: i for i, name in enumerate(names)}
        task_of_branch = torch.tensor([place[name] for name in step.tasks], dtype=torch.long)
        sums = torch.zeros(2, len(names), device=self.world.device)  # weighted loss, weight
        for branches, weight in zip(step.branches, weights, strict=True):
            assert weight.grad is not None
            task = self._moved(task_of_branch[branches.clamp(min=0).flatten()])
            values = torch.stack((weight.grad * weight * total, weight))
            sums.index_add_(1, task, values.detach().flatten(1))  # shared tokens weigh 0
        sums = sum_over_ranks(sums)
        # A task without a label in this step comes out as nan, and is left out when it is read.
        means = (sums[0] / sums[1]).unbind()
        return {f"loss_{name}": mean for name, mean in zip(names, means, strict=True) if name}

    def _counts(self, step: Step) -> dict[str, float | Tensor]:
        names = ("tokens", "padding", "capacity", "examples", "crops")
        numbers = torch.tensor([float(step.counts.get(name, 0)) for name in names])
        if self.world.size > 1:
            numbers = sum_over_ranks(self._moved(numbers))
        sums = dict(zip(names, numbers.unbind(), strict=True))
        metrics: dict[str, float | Tensor] = {n: sums[n] for n in ("tokens", "examples", "crops")}
        metrics["padding"] = sums["padding"] / (sums["tokens"] + sums["padding"])
        metrics["row_fill"] = sums["tokens"] / sums["capacity"]
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
    np.random.seed(seed % 2**32)
    random.seed(seed)
