"""Predictions against what real tensors take; benchmarks/memory.py compares with the system's
count of whole processes."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.accelerate import checkpoint_activations, defaults
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.recipes import RECIPES, recipe
from nanomolmo2.training import activations, plan
from nanomolmo2.training.frozen import prepare
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import Optimizers, components
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
    shape = activations.shape_of(setup, NanoMolmo2(setup.model))
    one, two = activations.decoder_passes(shape, 1), activations.decoder_passes(shape, 2)
    monkeypatch.setattr(activations, "FakeTensorMode", contextlib.nullcontext)
    real = activations.decoder_passes(shape, 7)
    expected = one.deeper(two, 7)
    assert expected.saved == pytest.approx(real.saved, rel=1e-6)
    assert expected.saved + expected.work == pytest.approx(real.saved + real.work, rel=0.02)


FROZEN = {
    "train": ("connector",),
    "optimisers": {"connector": recipe("smoke").optimisers["connector"]},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        FROZEN,
        LORA,
        {**LORA, "frozen_weights": "nf4"},
        {**LORA, "frozen_weights": "int8", "gradient_checkpointing": True},
    ],
    ids=["full", "checkpointing", "frozen", "lora", "qlora", "qlora8"],
)
def test_a_whole_step_takes_what_was_predicted(changes):
    """All tensors that exist during two steps of two passes, the model's own included: 10 %."""
    setup = smoke(max_crops=4, **changes)
    made = setup.recipe
    with activations.Live([]) as live:
        torch.manual_seed(0)
        model = prepare(defaults(NanoMolmo2(setup.model)), made)
        if made.gradient_checkpointing:
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
                pictures = torch.randn(setup.rows * made.max_crops, 3, side, side)
                model.loss(
                    ids,
                    pictures,  # which a run holds to the end of backward
                    labels=labels,
                    subsegment_ids=torch.zeros_like(ids),
                    reduction="sum",
                ).backward()
                del pictures
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


def test_what_is_frozen_is_counted_in_its_own_dtype():
    """On one rank: float32 what learns and norms, 2 bytes the rest, 4.5 bits of QLoRA's layers."""
    setup = smoke(**LORA, dtype="bfloat16")
    model = plan.on_meta(setup)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norms = sum(p.numel() for n, p in model.llm.named_parameters() if "norm" in n)
    total = sum(p.numel() for p in model.parameters())
    memory = predict(setup)
    assert memory.weights == 4 * (learns + norms) + 2 * (total - learns - norms)
    assert memory.moments == 8 * learns and memory.gradients == 4 * learns
    config = setup.model.llm_config
    D, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width, narrow = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers * (2 * D * width + 2 * D * narrow + 3 * D * inner)
    rounded = predict(setup.change(frozen_weights="nf4"))
    tables = 7 * config.num_hidden_layers * 256 * 2 * 4  # the values of every byte, of each layer
    assert rounded.weights == memory.weights - 2 * layers + layers * 4.5 / 8 + tables
    assert rounded.moments == memory.moments


def test_lora_on_a_4b_model_fits_24_gb(capsys, monkeypatch):
    """And nothing is downloaded to say so."""

    def offline(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("nanomolmo2.convert.pretrained.fetch", offline)
    data = str(Path(__file__).parents[2] / "docs" / "example.jsonl")
    options = ["--data", data, "--model", "allenai/Molmo2-4B", "--gpus", "1"]
    assert cli.main(["plan", *options, "--lora", "--gpu-memory", "24GB"]) == 0
    out = capsys.readouterr().out
    assert "fits into 24 GB" in out and "4 records" in out and "(connector, lora)" in out
    assert "4,851 M weights, 90 M of them learn" in out


@pytest.mark.parametrize(("connector", "weights"), [("mlp", "1,013 M"), ("pooling", "998 M")])
def test_the_base_design_is_planned_without_network(connector, weights, monkeypatch, capsys):
    """Its sizes are known; only the records' tokens are not counted without the tokenizer."""

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("nanomolmo2.convert.pretrained.fetch", offline)
    data = str(Path(__file__).parents[2] / "docs" / "example.jsonl")
    options = ["plan", "base", "--connector", connector, "--data", data, "--epochs", "2"]
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert f"base: {weights} weights" in out and "steps: 2, " in out and "4 records" in out
    assert cli.main([*options, "--llm", "someone/else"]) == 1
    assert "no network" in capsys.readouterr().err


def test_what_does_not_fit_names_the_option():
    setup = smoke()
    assert plan._option("LoRA in place of llm") == "--lora"
    for change, _ in [found for kind in plan._changes(setup) for found in kind]:
        assert plan._option(change).startswith(("--", "torchrun --nproc-per-node "))
    lora = smoke(**LORA)
    kinds = [[name for name, _ in kind] for kind in plan._changes(lora)]
    assert ["QLoRA"] in kinds and plan._option("QLoRA") == "--qlora"
    rounded = dict(found for kind in plan._changes(lora) for found in kind)["QLoRA"]
    assert predict(rounded).total < predict(lora).total


def test_own_data_are_counted_in_rows(capsys):
    data = str(Path(__file__).parents[2] / "docs" / "example.jsonl")
    assert cli.main(["plan", "--data", data, "--model", "tiny", "--steps", "10"]) == 0
    out = capsys.readouterr().out
    # Two rows of 8 pictures a step, 0.7 of them not of what tiny knows already: 16 * 0.7 * 10 / 4.
    assert "steps: 10" in out and "4 records" in out and "10 steps are about 28 epochs" in out
    assert cli.main(["plan", "--data", "nothing.jsonl", "--model", "tiny"]) == 1
    assert "there is no nothing.jsonl" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "expected a recipe, --data FILE or --model MODEL" in capsys.readouterr().err


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
    for wrong in (["--gpu-memory", "much"], ["--gpu-memory", "0GB"], ["--gpus", "0"]):
        assert cli.main(["plan", "smoke", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
