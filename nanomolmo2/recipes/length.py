"""How long a run is: epochs to steps, and the length of a run of which nobody said it.

A step learns from rows, into which examples are packed, so that the steps of an epoch follow from
the lengths of the examples: see `nanomolmo2.data.amount`.
"""

from __future__ import annotations

import dataclasses
import math

from nanomolmo2.convert.pretrained import load_config
from nanomolmo2.data.amount import Amount, measure
from nanomolmo2.data.photos import with_photos
from nanomolmo2.data.sources import open_mixture
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.recipes.changes import with_steps
from nanomolmo2.training.build import processor_of, processor_of_rows
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.replay import with_replay
from nanomolmo2.training.setup import count_weights, known_config, sizes_in
from nanomolmo2.training.trainer import row_plan

SMALL = 100_000_000  # weights
FEWEST, MOST = 40, 10_000  # steps
LARGEST_BATCH = 128  # rows a step that a default chooses
EPOCHS = 3
LARGE_DATA = 100_000  # records; of so many a model sees every one once
# A small model knows little of the world: it sees few records often, until it saw so many in all.
SEEN, MOST_EPOCHS = 1_500, 50


def with_epochs(recipe: Recipe, epochs: float) -> Recipe:
    """A recipe that sees its data so often. Raises: as opening the data and the processor does."""
    return with_steps(recipe, amount_of(recipe).steps(epochs, recipe.batch_size))


def with_default_length(recipe: Recipe, *, more_rows: bool = True) -> Recipe:
    """A recipe with steps that suit its data, and more rows a step where those were too many.

    Args:
        more_rows: off keeps the rows of a step as they are.
        Data or a processor that cannot be opened leave it as it is: training says what is wrong.
    """
    try:
        amount = amount_of(recipe)
        epochs = default_epochs(amount.records, is_small(config_of(recipe)))
    except (OSError, ValueError, ImportError):
        return recipe
    steps, batch = amount.steps(epochs, recipe.batch_size), recipe.batch_size
    while more_rows and steps > MOST and batch < LARGEST_BATCH:
        batch *= 2
        steps = math.ceil(steps / 2)
    recipe = dataclasses.replace(recipe, batch_size=batch)
    return with_steps(recipe, min(max(steps, FEWEST), MOST))


def default_epochs(records: int, small: bool) -> float:
    """How often a run sees its records, if nobody says it."""
    if not small:
        return EPOCHS if records < LARGE_DATA else 1
    return max(EPOCHS, min(MOST_EPOCHS, SEEN / records))


def amount_of(recipe: Recipe) -> Amount:
    """The amount of a recipe's data, in its rows; no weights are read.

    Raises: FileNotFoundError, ValueError, ImportError as `open_mixture`; OSError without network
        for a processor on the hub.
    """
    processor = processor_of_rows(processor_of(recipe), config_of(recipe))
    own = open_mixture(recipe.data, recipe.seed)
    mixture = with_replay(with_photos(own) if recipe.photos else own, recipe, processor)
    encode = EncodeTree(processor, recipe.loss_weighting)
    amount = measure(mixture, encode, row_plan(recipe, processor))
    held_out = recipe.validation.share if recipe.validation else 0.0
    return dataclasses.replace(amount, records=max(1, round(amount.records * (1 - held_out))))


def config_of(recipe: Recipe) -> NanoMolmo2Config:
    """Sizes of a recipe's model."""
    found = recipe.architecture or known_config(recipe.model) or load_config(recipe.model)
    return sizes_in(recipe, found)


def is_small(config: NanoMolmo2Config) -> bool:
    """Whether a model is so small that it learns in float32, at a higher rate, with its eyes."""
    return count_weights(config) < SMALL
