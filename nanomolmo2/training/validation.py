"""Measuring a model while it learns: the loss of the validation data, and scores of its answers.

The loss is that of the training: the same rows, weights and arithmetic, but without dropout, over
every record once. The scores are those of `nanomolmo2 eval`, on some of the records.

B rows of T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeAlias

import torch

from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.data.example import BadExample, Source
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.inspect import Encode, read_record
from nanomolmo2.data.loader import RowPlan
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.packing import Waiting, join
from nanomolmo2.data.photos import photos_of
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, Processor, collate
from nanomolmo2.processor.collate import labels_of
from nanomolmo2.training.checkpoint import (
    Checkpoints,
    is_sharded,
    random_state,
    set_random_state,
)
from nanomolmo2.training.distributed import World, gather_objects
from nanomolmo2.training.fingerprint import fingerprints
from nanomolmo2.training.loop import Stage
from nanomolmo2.training.recipe import LAST, VAL_LOSS, Recipe
from nanomolmo2.training.run_folder import BEST_FILE, Info
from nanomolmo2.training.split import Split, Together, overlap_warning
from nanomolmo2.training.watch import History, summary

SummedLoss: TypeAlias = Callable[[Batch], tuple[float, float]]  # its labels' loss and weight
Plain: TypeAlias = Callable[[], NanoMolmo2 | None]
KEPT_BYTES = 2**30  # of batches that stay in memory from one measurement to the next


class ValidationRows:
    """The validation data as batches, packed as the training packs its rows.

    Attributes:
        bad: records that cannot be measured, by cause, once they were read.
        first_bad: a sentence on the first of them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encode,
        rows: RowPlan,
        limits: RowLimits,
        *,
        photos: bool = False,
    ) -> None:
        """
        Args:
            photos: records about one picture are measured together: it is seen once.
        """
        self.source = Together(sources)
        self.examples = Together(photos_of(sources)) if photos else self.source
        self.encode, self.rows, self.limits = encode, rows, limits
        self.bad, self.first_bad = Counter[str](), ""
        self._kept: list[Batch] | None = None

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Those of one rank of so many. Every rank gets as many: the last may be one that was
        there before, without a label.

        Raises: ValueError if no record can be measured.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] = []
        size, number, first = 0, 0, None
        for number, batch in enumerate(self._all(), start=1):
            first = first or batch
            if (number - 1) % world == rank:
                size += _num_bytes(batch)
                if size <= KEPT_BYTES:
                    kept.append(batch)
                yield batch
        if first is None:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.bad.items())
            raise ValueError(
                f"none of the {len(self.source)} validation records can be measured ({causes}); "
                f"the first: {self.first_bad}"
            )
        if number % world and rank >= number % world:
            assert first.labels is not None
            empty = first.labels.new_full(first.labels.shape, IGNORED_LABEL)
            filler = dataclasses.replace(first, labels=empty)
            kept.append(filler)
            yield filler
        self._kept = kept if size <= KEPT_BYTES else None

    def _all(self) -> Iterator[Batch]:
        """Every row once, some at a time."""
        self.bad.clear()
        rows: list[Encoded] = []
        for row in self._packed():
            rows.append(row)
            if len(rows) == self.rows.micro_batch_size:
                yield collate(rows, self.rows.pad_token_id)
                rows = []
        if rows:
            yield collate(rows, self.rows.pad_token_id)

    def _packed(self) -> Iterator[Encoded]:
        packer: Any = self.rows.packer()
        for k, i in self.examples.places:
            source = self.examples.sources[k]
            try:
                encoded = read_record(source, i, self.encode, self.limits).encoded
                if (labels_of(encoded) == IGNORED_LABEL).all():
                    raise BadExample("no answer", "nothing in it is learned")
                packer.add(Waiting(encoded))
            except BadExample as bad:
                self.first_bad = self.first_bad or bad.detail
                self.bad[bad.cause] += 1
            if packer.full:
                yield join([waiting.encoded for waiting in packer.take()])
        while packer.waiting:
            yield join([waiting.encoded for waiting in packer.take()])


def _num_bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in batch.tensors().values())


def score_answers(
    model: NanoMolmo2, processor: Processor, source: Together, limit: int
) -> dict[str, float]:
    """``val_`` and the name of a task -> score of the model's answers, 0 to 1.

    Args:
        limit: examples that are asked about.
    Raises: ValueError if nothing of the data can be scored.
    """
    from nanomolmo2.evaluation import evaluate

    report = evaluate(Pipeline(model, processor), source.some(limit), baselines=False)
    return {f"val_{task}": score for task, score in report.scores.items()}


class Validation:
    """What a run is measured on, and what was found so far.

    Attributes:
        every: steps between two measurements.
        rows: the data.
        history: all measurements.
        remarks: sentences that are still to be said.
    """

    def __init__(
        self, recipe: Recipe, rows: ValidationRows, processor: Processor, history: History
    ) -> None:
        assert recipe.validation is not None
        self.config, self.steps = recipe.validation, recipe.steps
        self.every = self.config.steps_between(recipe.steps)
        self.rows, self.processor, self.history = rows, processor, history
        self.remarks: list[str] = []
        self._scores_answers = self.config.limit > 0

    @classmethod
    def of(
        cls, recipe: Recipe, split: Split, encode: Encode, rows: RowPlan, processor: Processor
    ) -> Self | None:
        """That of a recipe; None where it has none."""
        if recipe.validation is None:
            return None
        limits = RowLimits.of(processor, recipe.sequence_length, recipe.max_crops)
        packed = ValidationRows(split.validation, encode, rows, limits, photos=recipe.photos)
        history = History(recipe.validation.best, recipe.validation.patience, _key(recipe, split))
        return cls(recipe, packed, processor, history)

    @property
    def plan(self) -> str:
        """A sentence on what will be measured, and when."""
        total = len(self.rows.source)
        scored = min(total, self.config.limit)
        answers = f", and the answers to {scored} of them" if scored else ""
        often = "every step" if self.every == 1 else f"every {self.every} steps"
        return (
            f"validation before the first step, {often} and at the end: the loss of {total} "
            f"records{answers}"
        )

    def warnings(self, training: Mixture) -> list[str]:
        """What is probably a mistake in the data."""
        found = overlap_warning(self.rows.source.sources, training.sources)
        return [found] if found and self.config.data else []

    def measure(
        self, model: NanoMolmo2, loss: SummedLoss, world: World, plain: Plain
    ) -> dict[str, float]:
        """``val_loss`` of all validation data, the same on every rank, and ``val_TASK`` of some
        answers. It leaves no trace: all generators of random numbers stay where they were.

        Args:
            loss: of a batch, as the training has it.
            plain: a copy of the model that is not sharded, for the first rank; asked for where it
                is sharded, on every rank.
        """
        state = random_state()
        model.eval()
        try:
            with torch.no_grad():
                return {VAL_LOSS: self._loss(loss, world), **self._scores(model, world, plain)}
        finally:
            set_random_state(state)
            model.train()

    def _loss(self, loss: SummedLoss, world: World) -> float:
        total = weight = 0.0
        for batch in self.rows.batches(world.rank, world.size):
            summed, labels = loss(batch)
            total, weight = total + summed, weight + labels
        if not self.history.measured and (bad := self.rows.bad):
            causes = ", ".join(f"{cause} {number}" for cause, number in bad.items())
            self.remarks.append(
                f"warning: left out {bad.total()} of {len(self.rows.source)} validation records "
                f"({causes}): {self.rows.first_bad}"
            )
        totals, weights = zip(*gather_objects((total, weight)), strict=True)
        return sum(totals) / sum(weights)

    def _scores(self, model: NanoMolmo2, world: World, plain: Plain) -> dict[str, float]:
        if not self._scores_answers:
            return {}
        scores, problem = dict[str, float](), ""
        whole = plain() if is_sharded(model) else model
        if whole is not None:  # elsewhere the first rank answers
            source, limit = self.rows.source, self.config.limit
            said_before = bool(self.history.measured)  # what is wrong with the data
            try:
                with warnings.catch_warnings():
                    if said_before:
                        warnings.simplefilter("ignore", UserWarning)
                    scores = score_answers(whole.to(world.device), self.processor, source, limit)
            except (ValueError, torch.OutOfMemoryError) as error:  # such as nothing to score
                problem = str(error).partition("\n")[0]
        scores, problem = gather_objects((scores, problem))[0]
        if problem:
            self._scores_answers = False
            self.remarks.append(f"no answers are scored, the loss alone is measured: {problem}")
        return scores


def _key(recipe: Recipe, split: Split) -> str:
    """Another one where what chooses the best, or what it is measured on, is another."""
    validation = recipe.validation
    assert validation is not None
    parts: list[Any] = [
        validation.best,
        [source.to_dict() for source in validation.data],
        fingerprints(validation.data),
        split.held_out,
    ]
    if validation.best not in (VAL_LOSS, LAST):
        parts.append(validation.limit)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_best(stage: Stage, model: NanoMolmo2, checkpoints: Checkpoints, info: Info) -> None:
    """Put the best weights of a run that is done into its model, and say which they are.

    Call it on every rank.
    """
    history = stage.history
    if history is None or history.best is None:
        return
    best, problem = history.best, ""
    world = checkpoints.world
    if best is not history.trained[-1]:
        position = None
        if world.is_main:
            try:
                position = checkpoints.at(best.step)
            except (OSError, ValueError, TypeError) as error:
                problem = str(error)
        if world.size > 1:
            position, problem = gather_objects((position, problem))[0]
        if position is not None:  # shards are read with their moments or not at all
            optimizers = stage.optimizers() if is_sharded(model) else None
            checkpoints.restore(position, model, optimizers)
    said = summary(history, stage.steps)
    if problem:
        said.append(
            f"warning: the checkpoint of step {best.step} is damaged ({problem}): the model is "
            f"that of the last step instead"
        )
    for sentence in said:
        info(sentence)
    if world.is_main:
        history.save(checkpoints.folder.parent / BEST_FILE, stage.steps, said)
