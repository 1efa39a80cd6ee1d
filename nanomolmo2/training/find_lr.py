"""Looking for a learning rate: a short run whose rate grows from step to step, until it diverges.

    rates 1e-7 ... 1, a step each -> losses, smoothed -> a suggestion, as JSON and a picture

The rates of all parts keep their proportions. Nothing of a run is touched, and the model is thrown
away afterwards.

Source: Leslie N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2015), section 3.3,
where a rate is read off the curve; the rule here is that of most libraries since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanomolmo2.checks import check_replaceable, written
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import Stage, read_metrics
from nanomolmo2.training.metrics import info_to_people
from nanomolmo2.training.plot import draw_rates
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.split import shared_split
from nanomolmo2.training.trainer import open_stage, settle_new_words

STEPS, LOWEST, HIGHEST = 80, 1e-7, 1.0
SMOOTHING = 0.8  # share of the past in a smoothed loss
DIVERGED = 3.0  # times the least smoothed loss, plus 1: there the search ends
FELL = 0.01  # share of the loss; what fell by less has not fallen
JSON_FILE, PICTURE = "find_lr.json", "find_lr.png"
WINDOWS = 8  # part of the search over which a slope is taken
RULE = (
    "the rate at which the loss falls fastest, but at most a tenth of that at which the smoothed "
    "loss is least"
)


@dataclass(frozen=True)
class Sweep:
    """What the search found.

    Attributes:
        rates: the highest of all parts (of AdamW, where that moves any), and ``losses`` at them.
        smoothed: means of the losses so far, the newest with the most weight.
        diverged: rate at which the loss exploded; None if it never did.
        suggested: by `RULE`; None if the loss never fell.
        parts: the suggested rate of every part, by its name in the log.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: float | None
    suggested: float | None
    parts: dict[str, float]


def find_lr(
    recipe: Recipe,
    out: str | Path,
    *,
    steps: int | None = None,
    world: World | None = None,
    cache_dir: str | Path = "checkpoints",
    quiet: bool = False,
) -> Sweep:
    """Look for the rate of a recipe, and write ``find_lr.json`` and ``find_lr.png`` into ``out``.

    Args:
        out: a new or empty folder, or one of an earlier search.
        steps: of the search, each with another rate; None = `STEPS`.
    Raises: ValueError where the folder holds other things, or the recipe cannot be trained.
    """
    if world is None:
        with World.from_env() as world:
            return find_lr(recipe, out, steps=steps, world=world, cache_dir=cache_dir, quiet=quiet)
    out, info = Path(out), info_to_people(quiet or not world.is_main)
    steps = steps or STEPS
    check_replaceable(out, [JSON_FILE, PICTURE])
    split = shared_split(recipe, out, world, info)
    recipe = settle_new_words(recipe, world, info)
    stage = open_stage(recipe, split, world, cache_dir, info).stage
    info(f"trying {steps} rates from {LOWEST:g} to {HIGHEST:g}, a step each")
    found = sweep(stage, steps=steps, clip_norm=recipe.clip_norm)
    if world.is_main:
        with written(out / JSON_FILE) as temporary:
            text = json.dumps({"rule": RULE, **asdict(found)}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        try:
            draw_rates(found.rates, found.losses, found.smoothed, found.suggested, out / PICTURE)
        except ImportError as error:
            info(f"no picture was drawn: {error}")
    return found


def sweep(stage: Stage, *, steps: int, clip_norm: float = 1.0) -> Sweep:
    """Train a stage with growing rates; its model is of no use then. Call it on every rank."""
    stage.begin()
    optimizers = stage.optimizers()
    leading = next(iter(optimizers.parts.values()))  # AdamW, if there is any
    peak = max(group["peak_lr"] for group in leading.param_groups)
    groups = [group for part in optimizers.parts.values() for group in part.param_groups]
    factors = {name: rate / peak for name, rate in optimizers.rates().items()}
    rates, losses, diverged = list[float](), list[float](), None
    with closing(stage.batches(range(steps), None, 0)) as batches:
        for step, (batch, _) in enumerate(batches):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / max(1, steps - 1))
            for group in groups:
                group["lr"] = group["peak_lr"] * rate / peak
            loss = read_metrics(stage.gradients(batch))["loss"]
            if math.isfinite(loss):
                rates.append(rate)
                losses.append(loss)
            if has_diverged(loss, losses):
                diverged = rate
                break
            optimizers.clip(clip_norm)
            optimizers.step()
            stage.after_step()
    smoothed = smooth_losses(losses)
    suggested = suggest(rates, losses)
    parts = {name: suggested * factor for name, factor in factors.items()} if suggested else {}
    return Sweep(rates, losses, smoothed, diverged, suggested, parts)


def has_diverged(loss: float, losses: Sequence[float]) -> bool:
    """Whether the loss exploded: it is no number, or far above the least of the smoothed ones."""
    smoothed = smooth_losses(losses)
    return not math.isfinite(loss) or smoothed[-1] > DIVERGED * max(0.0, min(smoothed)) + 1


def smooth_losses(losses: Sequence[float]) -> list[float]:
    """Exponential means; the first ones are not drawn towards 0."""
    smoothed, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**number))
    return smoothed


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """A rate by `RULE`; None if the loss never fell.

    How fast it falls at a rate is the slope of a line through the losses around it, over the
    logarithm of the rate.
    """
    smoothed, window = smooth_losses(losses), max(3, len(losses) // WINDOWS)
    least = int(np.argmin(smoothed)) if len(losses) >= 2 * window else 0
    if least < window or smoothed[least] > smoothed[0] - FELL * abs(smoothed[0]):
        return None
    logs, values = np.log(np.asarray(rates)), np.asarray(losses)
    slopes = [
        np.polyfit(logs[i : i + window], values[i : i + window], 1)[0]
        for i in range(least + 1 - window + 1)
    ]
    steepest = int(np.argmin(slopes)) + window // 2
    return float(min(rates[steepest], rates[least] / 10))
