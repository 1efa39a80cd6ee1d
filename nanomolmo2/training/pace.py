"""How many steps a run has time for: the first steps of it are timed, and thrown away."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import read_metrics
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.split import open_split
from nanomolmo2.training.trainer import open_stage, settle_new_words

TIMED = 5  # steps; the first one is slow, and does not count
RESERVE = 0.18  # of the time: for the exams before and after, loading, writing and a last measuring
FEWEST = 10  # steps


@dataclass(frozen=True)
class Pace:
    """What a run costs here.

    Attributes:
        step, measurement: seconds; of a run that measures nothing the second is 0.
        spent: seconds that it took to find out.
    """

    step: float
    measurement: float
    spent: float

    def steps_in(self, recipe: Recipe, minutes: float) -> int:
        """The steps of a recipe that fit into so many minutes, at least `FEWEST`."""
        left = 60 * minutes * (1 - RESERVE) - self.spent
        if recipe.validation is None:
            return max(FEWEST, int(left / self.step))
        steps = FEWEST
        for _ in range(4):  # how often it is measured follows from the number of steps
            every = recipe.validation.steps_between(steps)
            left_for_steps = left - self.measurement * (2 + steps // every)
            steps = max(FEWEST, int(left_for_steps / self.step))
        return steps


def measure_pace(recipe: Recipe, cache_dir: str | Path = "checkpoints") -> Pace:
    """Take a few steps of a recipe, and measure it once, on a model that is then forgotten.

    Raises: as `open_stage`, and where the first steps fail.
    """
    start = time.perf_counter()
    world = World()
    recipe = settle_new_words(recipe, world, lambda text: None)
    stage = open_stage(recipe, open_split(recipe), world, cache_dir).stage
    stage.begin()
    optimizers = stage.optimizers()
    seconds, measurement = list[float](), 0.0
    with closing(stage.batches(range(TIMED), None, 0)) as batches:
        last = time.perf_counter()
        for batch, _ in batches:
            read_metrics(stage.gradients(batch))
            optimizers.clip(recipe.clip_norm)
            optimizers.step()
            stage.after_step()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
    if stage.validation is not None:
        stage.evaluate()
        measurement = time.perf_counter() - last
    step = statistics.median(seconds[1:] or seconds)
    return Pace(step, measurement, time.perf_counter() - start)
