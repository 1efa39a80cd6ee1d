"""A recipe as a run: model, data and loss put together for the loop.

    recipe -> build.build -> parts that learn -> shards -> RecipeStage -> loop.run -> DIR/model

S rows a step on R ranks: each rank learns from S / R of them, some at a time. Losses and gradients
are sums, divided by the weight of all labels of the step on all ranks, so neither the ranks nor the
micro-batches change what is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate import bf16_matmul, checkpoint_activations
from nanomolmo2.accelerate.device import device_text
from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.convert.pretrained import (
    load_processor,
)
from nanomolmo2.data.amount import measure
from nanomolmo2.data.loader import PackedLoader, RowPlan, Step, merge_states
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.photos import VARIANTS, with_photos
from nanomolmo2.data.sources import open_source
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.forms import check_batch
from nanomolmo2.processor import Processor
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.training.build import (
    build,
    plain_model,
    save_model,
    seed_all,
    start_from,
)
from nanomolmo2.training.checkpoint import Checkpoints, Start
from nanomolmo2.training.distributed import (
    World,
    full_tensor,
    gather_objects,
    shard,
    sum_over_ranks,
)
from nanomolmo2.training.dropout import residual_dropout
from nanomolmo2.training.feature_cache import FeatureCache
from nanomolmo2.training.find_terms import (
    Finding,
    FindPart,
    FindStep,
    find_loss,
)
from nanomolmo2.training.fingerprint import fingerprints
from nanomolmo2.training.frozen import placeholder, start_of
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.metrics import info_to_people, open_trackers
from nanomolmo2.training.new_words import settle_words
from nanomolmo2.training.optim import OptimConfig, Selection, clear_rows, components
from nanomolmo2.training.point_terms import TermSums
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.replay import (
    replay_note,
    report_abilities,
    start_abilities,
    with_replay,
    with_sources_of,
)
from nanomolmo2.training.run_folder import (
    MODEL_FOLDER,
    RECIPE_FILE,
    Info,
    Resume,
    check_outside,
    claimed,
)
from nanomolmo2.training.split import Split, open_split, shared_split
from nanomolmo2.training.summary import summary
from nanomolmo2.training.validation import Validation, load_best
from nanomolmo2.training.watch import Watch
from nanomolmo2.training.word_looks import learns_words, take_words

__all__ = [
    "Opened",
    "RecipeStage",
    "build",
    "label_weights",
    "open_stage",
    "resolve_recipe",
    "row_plan",
    "save_model",
    "settle_new_words",
    "start_from",
    "train_recipe",
]


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
        recipe = settle_new_words(recipe, world, info)
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
    split = shared_split(recipe, out, world, info)
    opened = open_stage(recipe, split, world, cache_dir, info)
    model, stage = opened.model, opened.stage
    if world.is_main:
        if note := replay_note(recipe, opened.processor):
            info(note)
        for sentence in stage.warnings():
            info(f"warning: {sentence}")
        info(f"on {device_text(world.device)}, {recipe.dtype}")
        for line in () if config.quiet else stage.summary(out):
            info(line)
    if stage.validation is not None:
        info(stage.validation.plan)
    config = dataclasses.replace(
        config,
        log_every=recipe.log_every,
        save_every=recipe.save_every,
        keep=recipe.keep,
        clip_norm=recipe.clip_norm,
        evaluate_every=stage.validation.every if stage.validation else 0,
    )
    trackers = open_trackers(log_to, out, recipe.to_dict()) if world.is_main else []
    if world.is_main and not (resume and (out / RECIPE_FILE).exists()):
        recipe.save(out / RECIPE_FILE)
    abilities = None
    if world.is_main:
        split.save(out)
        abilities = start_abilities(recipe, out, cache_dir, info, world.device)
    start = opened.start
    finished = run(
        model, [stage], out, config, resume=resume, world=world, trackers=trackers, start=start
    )
    if stage.left_out:
        info(f"warning: {stage.left_out}: nanomolmo2 inspect --audit names them")
    if finished:
        load_best(stage, model, Checkpoints(out, world=world, start=start), info)
        processor = with_sources_of(recipe, opened.processor)
        save_model(recipe, model, processor, out / MODEL_FOLDER, world)
        if world.is_main and learns_words(recipe, model.config):
            dtype = getattr(torch, recipe.dtype)
            learned = take_words(out / MODEL_FOLDER, split, dtype, info, seed=recipe.seed)
            if learned is not None and not learned.others:
                info("nothing else is asked in these data: `teach --data` learns it and no more")
    if finished and abilities is not None:
        report_abilities(abilities, recipe, out, info, world.device)
    return finished


class Opened(NamedTuple):
    """What a recipe makes.

    Attributes:
        start: weights that are left out of checkpoints.
    """

    model: NanoMolmo2
    processor: Processor
    start: Start
    stage: RecipeStage


def open_stage(
    recipe: Recipe,
    split: Split,
    world: World,
    cache_dir: str | Path = "checkpoints",
    info: Info = lambda text: None,
) -> Opened:
    """Model, sharded if need be, and steps of a recipe; call it on every rank."""
    model, processor = build(recipe, cache_dir, info, split_table=True)
    if recipe.photos:  # a small model, whose steps are to be short
        model = bf16_matmul(checkpoint_activations(model, "none"))
    start = start_of(model, recipe)
    shard(
        model,
        world,
        dtype=getattr(torch, recipe.dtype),
        gradient_checkpointing=recipe.gradient_checkpointing,
        compile=recipe.compile,
    )
    seed_all(recipe.seed + world.rank)  # ranks must not drop out the same places
    return Opened(model, processor, start, RecipeStage(recipe, model, processor, world, split))


def resolve_recipe(recipe: Recipe, out: Path, resume: bool, max_steps: int | None) -> Recipe:
    """The recipe of this call: on resume that of the run, else the given one."""
    path = out / RECIPE_FILE
    if resume and path.exists():
        stored = Recipe.load(path)
        if recipe.validation is None:  # none was named: it goes on as it began
            recipe = dataclasses.replace(recipe, validation=stored.validation)
        if names := stored.differences(recipe):
            raise ValueError(
                f"{out} holds a run of another recipe: {', '.join(names)} differ from {path}; "
                f"resume with the options it was started with, or choose another folder"
            )
        recipe = dataclasses.replace(recipe, steps=stored.steps, new_words=stored.new_words)
    if max_steps is not None and max_steps > recipe.steps:
        recipe = dataclasses.replace(recipe, steps=max_steps)
    return recipe


def settle_new_words(recipe: Recipe, world: World, info: Info) -> Recipe:
    """The recipe with the new words of its data; every rank has those that the first one found."""
    if recipe.new_words is not None or recipe.architecture is not None:
        return dataclasses.replace(recipe, new_words=recipe.new_words or ())
    if world.is_main:
        name = None if recipe.model == "base" else recipe.model
        # Data and models that cannot be opened are told of where every rank opens them.
        with contextlib.suppress(OSError, ValueError, ImportError):
            sources = [open_source(config) for config in recipe.data]
            recipe = settle_words(recipe, sources, load_processor(name).tokenizer, info)
    words = recipe.new_words or ()
    return dataclasses.replace(
        recipe, new_words=gather_objects(words)[0] if world.size > 1 else words
    )


# ---- the data and the steps ----


class RecipeStage(Stage):
    """The one stage of a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        model: NanoMolmo2,
        processor: Processor,
        world: World,
        split: Split | None = None,
    ) -> None:
        """
        Args:
            model: as `build` made it, sharded or not.
            split: what to learn from and to measure on; by default what the recipe says.
        """
        self.name, self.steps = recipe.name, recipe.steps
        self.recipe, self.model, self.world = recipe, model, world
        split = split or open_split(recipe)
        encode = EncodeTree(processor, recipe.loss_weighting)
        rows = row_plan(recipe, processor)
        self.encode, self.rows = encode, rows
        self.mixture = with_replay(self._own(split.mixture, 1), recipe, processor)
        self.loader = PackedLoader(
            with_replay(self._own(split.mixture, VARIANTS), recipe, processor),
            encode,
            rows,
            rank=world.rank,
            world=world.size,
            max_bad_fraction=recipe.max_bad_fraction,
        )
        # Also without a folder: features are then rounded alike, and so are all losses.
        frozen = "vision" not in recipe.train
        self.dropout = residual_dropout(model.llm, recipe.residual_dropout)
        self.cache = FeatureCache.of_model(recipe.feature_cache or None, model) if frozen else None
        table, row = placeholder(model)
        self.holds_placeholder = not bool(full_tensor(table)[row].any())
        self.split = split
        self.finder = Finding.of(recipe, model, processor)
        self.validation = Validation.of(recipe, split, encode, rows, processor)
        history = None if self.validation is None else self.validation.history
        self.watch = Watch(recipe.steps, history)
        self._told: set[str] = set()  # causes of what was left out
        self.left_out = ""

    def _own(self, mixture: Mixture, variants: int) -> Mixture:
        """The run's own data, of which each photo has so many looks if the recipe wants others."""
        return with_photos(mixture, variants) if self.recipe.photos else mixture

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
        sentences = self.loader.warnings()
        if self.validation is not None:
            sentences += self.validation.warnings(self.split.mixture)
        return sentences

    def summary(self, folder: Path) -> list[str]:
        """What the run is about to do in its folder: lines for people."""
        try:
            amount = measure(self.mixture, self.encode, self.rows)
        except ValueError:  # the first step says what is wrong with the data
            amount = None
        return summary(self.recipe, self.model, self.components(), amount, folder)

    def remarks(self, batch: Step) -> list[str]:
        """The first example of every cause that was left out; the log counts all of them."""
        if batch.bad:
            causes = ", ".join(f"{cause} {n}" for cause, n in batch.bad.items())
            number = sum(batch.bad.values())
            self.left_out = f"left out {number} of {batch.drawn} examples ({causes})"
        new = {c: text for c, text in batch.first_bad.items() if c not in self._told}
        self._told |= new.keys()
        said = [f"warning: left out ({cause}): {text}" for cause, text in new.items()]
        if self.validation is not None:
            said += self.validation.remarks
            self.validation.remarks.clear()
        return said

    def sources(self) -> dict[str, str] | None:
        return fingerprints(self.recipe.data)

    def sources_changed(self) -> None:
        self.loader.expect_changes()

    def join_ranks(self, state: Any) -> object:
        return merge_states(gather_objects(state))

    def gradients(self, batch: Step) -> dict[str, float | Tensor]:
        """Nothing is read from the device: the loop reads all metrics of a step at once."""
        on_cpu = [label_weights(micro) for micro in batch.micro_batches]
        weights = [self._moved(weight).requires_grad_() for weight in on_cpu]
        total = sum_over_ranks(self._moved(torch.stack([w.sum() for w in on_cpu]).sum()))
        loss, points = torch.zeros((), device=self.world.device), self.model.config.point_config
        terms = None if points is None else TermSums(points, self.world.device)
        finds = FindStep(self.finder, batch.micro_batches)
        for number, (micro, weight) in enumerate(zip(batch.micro_batches, weights, strict=True)):
            micro = check_batch(micro, self.model.config).prepared()
            summed = self._loss(micro.to(self.world.device), weight, terms, finds.of(number))
            part = finds.add(number, summed / total)
            part.backward()
            loss += part.detach()
        self._hold_placeholder()
        metrics: dict[str, float | Tensor] = {"loss": sum_over_ranks(loss)}
        metrics |= self._by_task(batch, weights, total)
        metrics |= {} if terms is None else terms.metrics()
        return metrics | finds.metrics() | self._counts(batch)

    def evaluate(self) -> dict[str, float]:
        """See `Validation.measure`."""
        if self.validation is None:
            return {}
        return self.validation.measure(
            self.model,
            self._summed_loss,
            self.world,
            lambda: plain_model(self.recipe, self.model, self.world),
        )

    def _summed_loss(self, batch: Batch) -> tuple[float, float]:
        """(loss of all labels of a batch, their weight), added up."""
        weights = label_weights(batch)
        finds = FindStep(self.finder, [batch])
        micro = check_batch(batch, self.model.config).prepared().to(self.world.device)
        summed, labels = self._loss(micro, self._moved(weights), finds=finds.of(0)), weights.sum()
        return float(labels * finds.add(0, summed / labels)) if labels else 0.0, float(labels)

    def lower_rate(self) -> str:
        rate = self.recipe.optimisers[self.recipe.leading_part].lr
        return (
            f"lower the learning rate (--lr {rate / 10:g} in place of {rate:g}; --find-lr looks "
            f"for one)"
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device of this rank, without waiting for it."""
        return tensor.to(self.world.device, non_blocking=True)

    def _loss(
        self,
        batch: Batch,
        weights: Tensor,
        terms: TermSums | None = None,
        finds: FindPart | None = None,
    ) -> Tensor:
        """The sum over the labels of a batch; the terms of a model that points are added up too.
        What a model finds that finds all at once is told to ``finds``.
        """
        batch = dataclasses.replace(batch, loss_weights=weights)
        if self.cache is not None and batch.pixel_values is not None:
            features = self.cache.features(batch.pixel_values)
            batch = dataclasses.replace(batch, pixel_values=None, visual_features=features)
        if self.recipe.dropout_at_targets:
            assert batch.loss_rows is not None
            self.dropout.at_rows(batch.loss_rows, batch.input_ids.shape)
        if terms is None and finds is None:
            return self.model.loss(batch, reduction="sum", z_loss=self.recipe.z_loss)
        states = None
        if finds is not None:
            batch = self.model.encoded(batch)
            states = self.model.states(batch)
            finds.sums = find_loss(self.model, batch, states, finds.targets.to(self.world.device))
        parts = self.model.loss_terms(
            batch, self.recipe.z_loss, counts_text=terms is not None, states=states
        )
        if terms is not None:
            assert batch.labels is not None
            terms.add(parts, batch.labels, weights)
        return parts.total

    def _by_task(
        self, step: Step, weights: Sequence[Tensor], total: Tensor
    ) -> dict[str, float | Tensor]:
        """The mean loss of every task. What the step's loss gains by a label's weight is the loss
        of that label, over the weight of the step: of the label of a point's marker, the loss of
        the token and of what is selected there.
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
        table, row = placeholder(self.model)
        if self.holds_placeholder and table.grad is not None:
            clear_rows(table.grad, row + 1, first=row)


def row_plan(recipe: Recipe, processor: Processor) -> RowPlan:
    """The rows of a recipe's steps."""
    return RowPlan(
        batch_size=recipe.batch_size,
        max_tokens=recipe.sequence_length,
        max_crops=recipe.max_crops,
        pad_token_id=processor.pad_token_id,
        micro_batch_size=recipe.micro_batch_size,
        packing_buffer=recipe.packing_buffer,
        crop_weight=recipe.crop_weight,
    )


def label_weights(batch: Batch) -> Tensor:
    """(B, T) float32: what each label weighs in the loss; 0 where nothing is learned."""
    assert batch.labels is not None
    weights = (batch.labels != IGNORED_LABEL).float()
    if batch.loss_weights is not None:
        weights *= batch.loss_weights
    weights[:, 0] = 0  # nothing stands before it
    return weights
