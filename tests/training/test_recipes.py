from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.recipes import RECIPES, finetune, recipe, smoke
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.recipe import Recipe
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


# ---- files of earlier versions ----

OLD = Path(__file__).parents[1] / "data" / "old_recipes"  # as they were written by 4d31627


@pytest.mark.parametrize("name", ["smoke", "stage1"])
def test_a_file_of_before_the_registry_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    """Every source had a block of emoji settings, and some fields had other names."""
    old = Recipe.load(OLD / f"{name}.json")
    assert old.differences(recipe(name)) == recipe(name).differences(old) == []
    old.save(tmp_path / "new.json")
    assert Recipe.load(tmp_path / "new.json") == old


def test_no_recipe_of_molmo2_speaks_of_emoji(tmp_path: Path) -> None:
    for name in ("base", "stage1", "stage2", "stage3", "finetune"):
        recipe(name).save(tmp_path / "recipe.json")
        assert "emoji" not in (tmp_path / "recipe.json").read_text()
    assert Recipe.load(OLD / "stage1.json") == recipe("stage1")  # the blocks are dropped


def test_an_old_block_of_the_emoji_source_is_read(tmp_path: Path) -> None:
    values = json.loads((OLD / "smoke.json").read_text())
    values["data"][0]["emoji"]["length"] = 77
    values["pool"] = 5
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    old = Recipe.load(tmp_path / "recipe.json")
    assert old.data[0].options["length"] == 77
    assert old.packing_buffer == 5
    assert set(old.differences(smoke())) == {"data", "packing_buffer"}


def test_a_recipe_is_read_without_the_world_it_trains_in() -> None:
    code = (
        "import sys; from nanomolmo2.training.recipe import Recipe\n"
        f"made = Recipe.load({str(OLD / 'smoke.json')!r}); print(made.data[0].registered)\n"
        "print([name for name in sys.modules if 'nanomolmo2.emoji' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["emoji", "[]"], done.stderr


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    made = toy(smoke(), steps=4)
    train_recipe(made, tmp_path / "whole", workers=0, quiet=True)
    train_recipe(made, tmp_path / "run", workers=0, quiet=True, stop_after=2)
    path = tmp_path / "run" / "recipe.json"
    values = json.loads(path.read_text())
    for new, old in (("packing_buffer", "pool"), ("max_bad_fraction", "bad_share")):
        values[old] = values.pop(new)
    for source in values["data"]:
        source["rate"] = source.pop("sampling_weight")
        source["pictures"] = source.pop("image_folder")
        source["emoji"] = source.pop("options")
    path.write_text(json.dumps(values))
    assert train_recipe(made, tmp_path / "run", workers=0, quiet=True, resume=True)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "run")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_unknown_options_stop_a_run_at_its_start(tmp_path: Path) -> None:
    source = replace(smoke().data[0], options={"lenght": 5})
    with pytest.raises(ValueError, match=r"EmojiConfig does not know the field\(s\) lenght"):
        train_recipe(toy(smoke(), data=(source,)), tmp_path, workers=0, quiet=True)


def test_lora_trains_no_weight_of_the_decoder(tmp_path: Path) -> None:
    made = finetune(["emoji"], "tiny", steps=2, lora=True)
    assert made.train == ("connector", "lora")
    assert train_recipe(toy(made, steps=2), tmp_path, workers=0, quiet=True)
    model, _ = load(str(tmp_path / "model"))  # merged: a plain model
    assert not [name for name in model.state_dict() if "lora" in name]
