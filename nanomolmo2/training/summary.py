"""What a run is about to do, in a few lines for people, before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nanomolmo2.data.amount import Amount
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.training.optim import OptimConfig, Selection
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import ADAPTER_FOLDER, MODEL_FOLDER

ABSURD_EPOCHS = 200  # seen so often, few data are known by heart
TOO_FEW_EPOCHS = 0.5  # most of the data are never seen
FEW_STEPS = 40  # which are not many, however few the data are
COMPONENTS = {"vision": "vision_encoder", "connector": "connector", "llm": "llm"}
COMPONENTS["points"] = "point_predictor"


def summary(
    recipe: Recipe,
    model: NanoMolmo2,
    parts: Mapping[str, tuple[nn.Module | Selection, OptimConfig]],
    amount: Amount | None,
    folder: Path,
) -> list[str]:
    """Lines on what learns, on how much data, and where it goes.

    Args:
        parts: what learns, see `optim.components`.
        amount: of the data; None where it is not known.
        folder: of the run.
    """
    lines = [what_learns(model, parts)]
    if amount is not None:
        lines += [how_much(recipe, amount), *warnings(recipe, amount)]
    written = f"{folder / MODEL_FOLDER}"
    if recipe.lora is not None:
        written += f" with the matrices merged, and what was learned apart in {ADAPTER_FOLDER}"
    lines.append(
        f"writes to {folder}: a checkpoint every {recipe.save_every} steps, and at the end "
        f"{written}"
    )
    if recipe.frozen_weights:
        lines.append(
            f"the language model's layers are rounded to {recipe.frozen_weights} while the "
            f"matrices learn: the merged model has the rounded values, in {recipe.dtype}"
        )
    return lines


def what_learns(
    model: NanoMolmo2, parts: Mapping[str, tuple[nn.Module | Selection, OptimConfig]]
) -> str:
    """The parts that learn, how many of their weights, and their peak rates."""
    told, total = [], 0
    for name, (part, config) in parts.items():
        learned = count_learned(part)
        total += learned
        rates = f"{config.lr:g}"
        if config.matrix_lr:
            rates += f", matrices {config.matrix_lr:g}"
        # The connector may learn with rows of the table, which are no weights of its module.
        of = f" of {in_millions(max(learned, count(model, name)))}" if name in COMPONENTS else ""
        told.append(f"{name} ({in_millions(learned)}{of} weights, rate {rates})")
    everything = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"learns: {', '.join(told)}; {in_millions(total)} of {in_millions(everything)} weights in "
        f"all"
    )


def count_learned(part: nn.Module | Selection) -> int:
    """Weights of a component that change."""
    if isinstance(part, nn.Module):
        return sum(p.numel() for p in part.parameters() if p.requires_grad)
    frozen = sum(rows * p[0].numel() for p, rows in part.frozen_rows.items())
    return sum(p.numel() for p in part.parameters) - frozen


def count(model: NanoMolmo2, component: str) -> int:
    """All weights of a part."""
    module: nn.Module = getattr(model, COMPONENTS[component])
    return sum(parameter.numel() for parameter in module.parameters())


def how_much(recipe: Recipe, amount: Amount) -> str:
    """Records, rows, steps and epochs."""
    what = "example that can be made up" if amount.made_up else "record"
    of = "" if amount.pictures is None else f" about {counted(amount.pictures, 'picture')}"
    examples = round(recipe.batch_size * amount.examples_per_row)
    epochs = amount.epochs(recipe.steps, recipe.batch_size)
    return (
        f"data: {counted(amount.records, what)}{of}; a step learns from "
        f"{counted(recipe.batch_size, 'row')} of at most {recipe.sequence_length:,} tokens, about "
        f"{counted(examples, 'example')}; {counted(recipe.steps, 'step')} "
        f"{'is' if recipe.steps == 1 else 'are'} about {rounded(epochs)} "
        f"{'epoch' if rounded(epochs) == '1' else 'epochs'}"
    )


def warnings(recipe: Recipe, amount: Amount) -> list[str]:
    """Of a length that is probably a mistake."""
    if amount.made_up:
        return []
    epochs = amount.epochs(recipe.steps, recipe.batch_size)
    one = amount.steps(1, recipe.batch_size)
    one_epoch = f"one epoch is {counted(one, 'step')}"
    if epochs > ABSURD_EPOCHS and recipe.steps > FEW_STEPS:
        return [
            f"warning: the data are seen about {epochs:,.0f} times, which learns them by heart: "
            f"{one_epoch}"
        ]
    if epochs < TOO_FEW_EPOCHS:
        return [f"warning: about {epochs:.0%} of the data are seen at all: {one_epoch}"]
    return []


def counted(number: int, what: str) -> str:
    """``1 row``, ``2 rows``, ``2 examples that can be made up``."""
    first, _, rest = what.partition(" ")
    return f"{number:,} {first}{'' if number == 1 else 's'}{' ' if rest else ''}{rest}"


def in_millions(number: int) -> str:
    """``2.84 M``."""
    return f"{number / 1e6:,.2f} M" if number >= 5_000 else str(number)


def rounded(number: float) -> str:
    """Two digits, as far as they mean something: ``0.031``, ``2.5``, ``130``."""
    if number >= 100 or not number:
        return f"{number:,.0f}"
    digits = max(0, 1 - math.floor(math.log10(number)))
    return f"{number:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{number:.0f}"
