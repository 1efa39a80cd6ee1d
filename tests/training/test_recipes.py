from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.recipes import RECIPES, finetune, recipe, smoke
from nanomolmo2.training.trainer import train_recipe
from tests.training.recipes import toy


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_goes_to_json_and_back(name: str, tmp_path: Path) -> None:
    made = recipe(name)
    assert made.name == name
    made.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == made == recipe(str(tmp_path / "recipe.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_runs_two_steps_at_toy_size(name: str, tmp_path: Path) -> None:
    """Also in its own dtype: on a CPU bfloat16 goes the way of several ranks."""
    made = toy(recipe(name), steps=2)
    assert train_recipe(made, tmp_path, workers=0, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert math.isfinite(line["loss"])
        norms = {key.removeprefix("grad_norm_") for key in line if key.startswith("grad_norm_")}
        assert norms == set(made.train)
    model, _ = load(str(tmp_path / "model"))
    assert next(model.parameters()).dtype == getattr(torch, made.dtype)


def test_molmo2s_numbers() -> None:
    rates = {
        name: [recipe(name).optimisers[part].lr for part in ("connector", "vision", "llm")]
        for name in ("stage1", "stage2", "stage3")
    }
    assert rates == {
        "stage1": [2e-4, 6e-6, 2e-5],
        "stage2": [5e-6, 5e-6, 1e-5],
        "stage3": [5e-6, 5e-6, 1e-5],
    }
    assert [recipe(n).sequence_length for n in rates] == [2560, 16_384, 36_864]
    assert [recipe(n).max_crops for n in rates] == [16, 128, 384]
    warmups = {part: rate.warmup_steps for part, rate in recipe("stage1").optimisers.items()}
    assert warmups == {"connector": 200, "vision": 2000, "llm": 2000}
    for name in rates:
        for rate in recipe(name).optimisers.values():
            assert (rate.betas, rate.eps, rate.weight_decay) == ((0.9, 0.95), 1e-6, 0.0)
            assert (rate.final_ratio, rate.matrix_lr) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ("tail",)}, "train is .*expected at least one of"),
        ({"train": ()}, "expected at least one of"),
        ({"train": ("connector", "lora")}, "lora is to be trained, but optimisers has only"),
        ({"lora": LoraConfig()}, "lora and train disagree"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"feature_cache": "cache"}, "needs a frozen vision encoder"),
        ({"architecture": None, "llm": "x"}, "are the parts of an architecture"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(smoke(), **changes)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'smok': choose one of tiny, smoke"):
        recipe("smok")


def test_a_file_that_lacks_a_field_says_which(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"name": "my"}')
    with pytest.raises(
        ValueError, match=r"my.json: Recipe lacks the field\(s\) model, data, steps"
    ):
        recipe(str(tmp_path / "my.json"))


def test_differences_are_those_that_change_numbers() -> None:
    made = smoke()
    assert made.differences(replace(made, steps=99, keep=5, save_every=1)) == []
    assert made.differences(replace(made, seed=1, z_loss=0.1)) == ["z_loss", "seed"]


def test_lora_trains_no_weight_of_the_decoder(tmp_path: Path) -> None:
    made = finetune(["emoji"], "tiny", steps=2, lora=True)
    assert made.train == ("connector", "lora")
    assert train_recipe(toy(made, steps=2), tmp_path, workers=0, quiet=True)
    model, _ = load(str(tmp_path / "model"))  # merged: a plain model
    assert not [name for name in model.state_dict() if "lora" in name]
