"""The trainer: the losses of the CPU, and two waits a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanomolmo2.training.distributed import World, shard
from nanomolmo2.training.loop import LoopConfig, run
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.trainer import RecipeStage, build
from tests.device.simulated import DEVICE, Waits, count_waits
from tests.training import recipes

STEPS = 3
NUMBERS = ("loss", "tokens", "examples", "crops", "padding", "row_fill", "grad_norm_")


class Watched(RecipeStage):
    """Keeps the waits of every step, from the beginning of one to that of the
    next: gradients, clipping, the optimisers' step, the log."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waits: list[Waits] = []
        self._counting = count_waits()

    def gradients(self, batch: Any) -> Any:
        if self.waits:
            self._counting.__exit__(None, None, None)
        self._counting = count_waits()
        self.waits.append(self._counting.__enter__())
        return super().gradients(batch)


class Trained(NamedTuple):
    waits: list[Waits]
    log: list[dict[str, Any]]
    weights: dict[str, Any]  # on the CPU


def train(recipe: Recipe, place: torch.device | str, folder: Path) -> Trained:
    """A few steps by the loop."""
    model, processor = build(recipe)
    world = World(device=torch.device(place))
    shard(model, world, gradient_checkpointing=recipe.gradient_checkpointing)
    torch.manual_seed(0)
    stage = Watched(recipe, model, processor, world)
    config = LoopConfig(workers=0, quiet=True, log_every=1, save_every=100, stop_after=STEPS)
    run(model, [stage], folder, config, world=world)
    stage._counting.__exit__(None, None, None)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return Trained(stage.waits, log, weights)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing and dropout": {
        "gradient_checkpointing": True,
        "residual_dropout": 0.1,
        "dropout_at_targets": True,
    },
    "frozen vision": {"train": ("connector", "llm", "embeddings")},
    "new rows alone": {"train": ("connector",)},
}


def recipe(variant: str) -> Recipe:
    chosen = recipes.toy(recipes.smoke(), steps=10, **VARIANTS[variant])
    # AdamW with the usual eps makes whole steps of gradients that are 0 but for rounding.
    rates = {part: replace(rate, eps=1e-3) for part, rate in chosen.optimisers.items()}
    return replace(chosen, optimisers=rates)


@pytest.fixture(scope="module", params=VARIANTS)
def on_device(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Trained]:
    return request.param, train(recipe(request.param), DEVICE, tmp_path_factory.mktemp("device"))


def test_the_numbers_of_the_cpu(on_device: tuple[str, Trained], tmp_path: Path) -> None:
    variant, found = on_device
    expected = train(recipe(variant), "cpu", tmp_path)
    assert len(found.log) == STEPS
    for a, b in zip(found.log, expected.log, strict=True):
        assert a.keys() == b.keys()
        assert any(name.startswith("grad_norm_") for name in a)
        for name in a:
            if name.startswith(NUMBERS) and name != "tokens_per_second":
                assert a[name] == pytest.approx(b[name], rel=1e-4), name  # written in 5 digits
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_a_step_waits_twice_at_most(on_device: tuple[str, Trained]) -> None:
    waits = on_device[1].waits[1]  # the first step makes moments, the last writes a checkpoint
    assert len(waits) <= 2, str(waits)
