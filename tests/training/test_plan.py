"""Predictions against what real tensors take; benchmarks/memory.py compares with the system's
count of whole processes."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.accelerate import checkpoint_activations, defaults
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.recipes import RECIPES, recipe
from nanomolmo2.training import plan
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import Optimizers, components, set_trainable
from nanomolmo2.training.plan import Setup, predict, report, setup_for, switches

LORA = {
    "train": ("connector", "lora"),
    "lora": LoraConfig(),
    "optimisers": dict.fromkeys(("connector", "lora"), recipe("smoke").optimisers["llm"]),
}


def smoke(ranks: int = 1, layers: int = 2, **changes) -> Setup:
    setup = setup_for(dataclasses.replace(recipe("smoke"), **changes), ranks, "cpu")
    llm = dataclasses.replace(setup.model.llm_config, num_hidden_layers=layers)
    return dataclasses.replace(setup, model=dataclasses.replace(setup.model, llm_config=llm))


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, LORA]
)
def test_fake_tensors_of_two_depths_tell_of_real_tensors_of_any(monkeypatch, changes):
    setup = smoke(layers=7, **changes)
    shape = plan._shape(setup, NanoMolmo2(setup.model))
    one, two = plan._decoder(shape, 1), plan._decoder(shape, 2)
    monkeypatch.setattr(plan, "FakeTensorMode", contextlib.nullcontext)
    real = plan._decoder(shape, 7)
    expected = one.deeper(two, 7)
    assert expected.saved == pytest.approx(real.saved, rel=1e-6)
    assert expected.saved + expected.work == pytest.approx(real.saved + real.work, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_step_takes_what_was_predicted(checkpointing):
    """All tensors that exist during two steps of two passes, the model's own included: 10 %."""
    setup = smoke(max_crops=4, gradient_checkpointing=checkpointing)
    made = setup.recipe
    with plan._Live([]) as live:
        torch.manual_seed(0)
        model = defaults(NanoMolmo2(setup.model))
        set_trainable(model, made.train)
        if checkpointing:
            checkpoint_activations(model, "full")
        optimizers = Optimizers(components(model, made.train, made.optimisers))
        side = setup.model.vision_config.image_size
        image = setup.model.num_visual_tokens * made.max_crops
        for step in range(2):
            optimizers.set_rates(step, 2)
            for _ in range(2):
                ids = torch.randint(0, 600, (setup.rows, made.sequence_length))
                ids[:, :image] = setup.model.image_token_id
                labels = ids.clone()
                labels[:, :image] = -100
                model.loss(
                    ids,
                    torch.randn(setup.rows * made.max_crops, 3, side, side),
                    labels=labels,
                    subsegment_ids=torch.zeros_like(ids),
                    reduction="sum",
                ).backward()
            optimizers.clip(1.0)
            optimizers.step()
    assert predict(setup).total == pytest.approx(live.peak, rel=0.1)


def test_weights_gradients_and_moments_are_counted():
    setup = smoke()
    weights = sum(p.numel() for p in NanoMolmo2(setup.model).parameters())
    memory = predict(setup)
    assert (memory.weights, memory.gradients, memory.moments) == (
        4 * weights,
        4 * weights,
        8 * weights,
    )
    quarter = predict(smoke(ranks=4))
    assert quarter.weights == weights  # a quarter of four bytes
    lora = predict(smoke(**LORA))
    assert lora.weights > memory.weights and lora.moments < memory.moments / 2
    rates = dataclasses.replace(setup.recipe.optimisers["llm"], matrix_lr=0.02)
    muon = predict(smoke(optimisers=dict.fromkeys(setup.recipe.train, rates)))
    assert memory.moments / 2 < muon.moments < memory.moments * 0.8


def test_a_frozen_vision_encoder_is_whole_on_every_rank():
    parts = {"train": ("connector", "llm")}
    setup = smoke(ranks=4, **parts)
    model = NanoMolmo2(setup.model)
    vision = sum(p.numel() for p in model.vision_encoder.parameters())
    others = sum(p.numel() for p in model.parameters()) - vision
    assert predict(setup).weights == 4 * vision + others


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name):
    made = recipe(name)
    setup = setup_for(made, 2, "cuda", "molmo2-4b" if name in ("stage2", "stage3") else None)
    text = report(setup)
    assert f"{made.batch_size * made.sequence_length:,} tokens" in text
    assert f"steps: {made.steps:,}" in text


def test_switches_make_it_fit():
    setup = smoke()
    memory = predict(setup).total
    found = switches(setup, 0.7 * memory)
    assert {"gradient_checkpointing", "micro_batch_size 1"} <= {s.what for s in found}
    for switch in found:
        assert predict(switch.setup).total == switch.memory.total <= 0.7 * memory
    limit = min(switch.memory.total for switch in found) - 1
    together = switches(setup, limit)
    assert all(s.what.startswith("gradient_checkpointing + micro_batch_size 1") for s in together)
    assert together and all(s.memory.total <= limit for s in together)
    assert switches(setup, 1e3) == []
    text = report(setup, 0.7 * memory)
    assert "does not fit" in text and "fits with gradient_checkpointing" in text
    assert "use a smaller model" in report(setup, 1e3)
    assert "does not" not in report(setup, memory)


def test_what_cannot_be_planned_is_said():
    with pytest.raises(ValueError, match=r"batch_size 4 cannot be shared by 3 ranks"):
        setup_for(recipe("smoke"), 3, "cpu")
    with pytest.raises(ValueError, match=r"sizes of 'runs/stage1/model' are not known.*--arch"):
        setup_for(recipe("stage2"), 8, "cuda")


def test_the_command(capsys):
    arguments = ["plan", "smoke", "--gpus", "2", "--gpu-memory", "24GiB", "--max-crops", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "512 tokens and 2 crops" in out and "fits into 25.77 GB" in out
    for wrong in (["--gpu-memory", "much"], ["--gpus", "0"]):
        assert cli.main(["plan", "smoke", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
