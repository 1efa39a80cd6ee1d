"""Changes of a recipe, one by one: `Recipe` in, `Recipe` out.

with_parts     what learns
with_lora      small matrices in place of the decoder
with_qlora     beside a decoder that is rounded to 4 or 8 bits
with_rate      how fast, all parts in proportion
with_steps     how long; a shorter run warms up for fewer steps
with_values    any field, by its path in the recipe's JSON
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

from nanomolmo2.config import describe
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import PARTS, OptimConfig
from nanomolmo2.training.recipe import Recipe

# Of the vision encoder, as a share of the leading part's. Of `tiny` on 32 pictures a fifth learns
# more than nothing does, and the same rate spoils what it sees: see docs/log.md.
VISION_RATE = 0.2
LORA_RATE = 2e-4  # at least: the matrices start at zero
POINTS_RATE = 1e-4  # at least, of what selects visual tokens: MolmoPoint's in all its stages
ALPHA = 2.0  # of LoRA, for each rank: as `LoraConfig` has it
# Fields whose keys are free: their contents are checked when the recipe is made of them.
_FREE = ("optimisers", "options")


def with_rate(recipe: Recipe, lr: float) -> Recipe:
    """The leading part learns at a peak rate of ``lr``; the others keep their ratio to it."""
    before = recipe.optimisers[recipe.leading_part].lr
    if before == lr:
        return recipe

    def scaled(rate: float) -> float:
        if rate == before or not before:
            return lr
        return rounded(rate * lr / before)

    optimisers = {
        part: dataclasses.replace(
            config,
            lr=scaled(config.lr),
            matrix_lr=scaled(config.matrix_lr) if config.matrix_lr else 0.0,
        )
        for part, config in recipe.optimisers.items()
    }
    return dataclasses.replace(recipe, optimisers=optimisers)


def with_parts(recipe: Recipe, parts: Sequence[str]) -> Recipe:
    """Other parts learn; those that the recipe has no rates for get them from its leading part.

    LoRA stays, or goes where ``llm`` is to learn.

    Raises: ValueError for a part that there is not.
    """
    if set(parts) == set(recipe.train):
        return recipe
    lora = None if "llm" in parts else recipe.lora
    wanted = {*parts, *(["lora"] if lora is not None else [])}
    train = (*(part for part in PARTS if part in wanted), *sorted(wanted - set(PARTS)))
    optimisers = {part: recipe.optimisers.get(part) or new_rates(recipe, part) for part in train}
    return dataclasses.replace(
        recipe,
        train=train,
        optimisers=optimisers,
        lora=lora,
        frozen_weights="" if lora is None else recipe.frozen_weights,
    )


def new_rates(recipe: Recipe, part: str) -> OptimConfig:
    """Of a part that a recipe has none for: the leading part's, less for the vision encoder and at
    least `POINTS_RATE` for the point modules.
    """
    config = recipe.optimisers[recipe.leading_part]
    if part == "points":
        return points_rates(config)
    return vision_rates(config) if part == "vision" else config


def points_rates(leading: OptimConfig) -> OptimConfig:
    """Of the point modules, by those of the leading part."""
    return dataclasses.replace(leading, lr=max(leading.lr, POINTS_RATE))


def vision_rates(leading: OptimConfig) -> OptimConfig:
    """Of the vision encoder, by those of the leading part."""
    return dataclasses.replace(leading, lr=rounded(VISION_RATE * leading.lr))


def rounded(rate: float) -> float:
    """0.0001, not 0.00010000000000000002: people read it."""
    return float(f"{rate:.6g}")


def with_lora(recipe: Recipe, rank: int | None = None) -> Recipe:
    """LoRA in place of the decoder.

    Args:
        rank: of the matrices, which are scaled alike at every rank; None = the default's.
    """
    lora = recipe.lora or LoraConfig()
    if rank is not None and rank != lora.rank:
        lora = dataclasses.replace(lora, rank=rank, alpha=ALPHA * rank)
    train, optimisers = recipe.train, dict(recipe.optimisers)
    if recipe.lora is None:
        train = (*(part for part in train if part != "llm"), "lora")
        before = optimisers.pop("llm", None) or new_rates(recipe, "lora")
        optimisers["lora"] = dataclasses.replace(before, lr=max(before.lr, LORA_RATE))
    return dataclasses.replace(recipe, train=train, optimisers=optimisers, lora=lora)


def with_qlora(recipe: Recipe, bits: int = 4) -> Recipe:
    """The layers beside the matrices of a recipe with LoRA rounded to 4 or 8 bits."""
    return dataclasses.replace(recipe, frozen_weights="nf4" if bits == 4 else "int8")


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """Another length. In a shorter run warm-ups keep their share, so that it gets to its rates."""
    optimisers = recipe.optimisers
    if steps < recipe.steps:
        optimisers = {
            part: dataclasses.replace(
                config, warmup_steps=round(config.warmup_steps * steps / recipe.steps)
            )
            for part, config in optimisers.items()
        }
    return dataclasses.replace(recipe, steps=steps, optimisers=optimisers)


# ---- any field ----


def with_values(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Set fields by ``path=value``.

    Args:
        settings: paths into the recipe's JSON, such as ``optimisers.llm.warmup_steps=5`` or
            ``data.0.sampling_weight=0.5``; values are JSON, and text where they are not.
    Raises: ValueError for what is no setting, for a field that there is not, with the names that
        are nearest, and for a value of another type or range.
    """
    if not settings:
        return recipe
    values = recipe.to_dict()
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"found {setting[:60]!r}, expected field=value, as in clip_norm=0.5")
        _set(values, path.strip().split("."), _value(text))
    return Recipe.from_dict(values)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def _set(values: Any, path: Sequence[str], value: Any) -> None:
    """Put a value at its place in nested objects and lists."""
    for depth, key in enumerate(path):
        above = ".".join(path[:depth])
        known = list(values) if isinstance(values, dict) else _numbers(values)
        last = depth + 1 == len(path)
        if key not in known and not (last and depth and path[depth - 1] in _FREE):
            raise ValueError(_no_field(key, above, values, known))
        place: Any = key if isinstance(values, dict) else int(key)
        if last:
            values[place] = value
        else:
            values = values[place]


def _numbers(values: Any) -> list[str]:
    return [str(i) for i in range(len(values))] if isinstance(values, list) else []


def _no_field(key: str, above: str, values: Any, known: Sequence[str]) -> str:
    where = above or "the recipe"
    if not isinstance(values, (dict, list)):
        return f"{where} is {describe(values)} and has no fields: set it as a whole"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
    has = "did you mean" if near is not known else "it has"
    return f"{where} has no field {key[:60]!r}: {has} {', '.join(near) or 'none'}"
