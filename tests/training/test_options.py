"""Options of ``train``: the recipe that they make, what is said of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nanomolmo2.cli import main, parse
from nanomolmo2.cli.recipe_options import PARTS, RecipeOptions
from nanomolmo2.cli.train import Train
from nanomolmo2.data.amount import Amount
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.recipes import base
from nanomolmo2.training import optim
from nanomolmo2.training.metrics import RunLog, seconds_as_text
from nanomolmo2.training.optim import components, set_trainable
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.summary import how_much, rounded, warnings, what_learns
from tests.small_model import small_model, small_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was never trained."""
    path = tmp_path_factory.mktemp("saved") / "small"
    small_model().save_pretrained(path, processor=small_processor())
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works there: ``my.jsonl`` with six records about the pictures in ``photos``, a ``small``
    model, both used by `small_run`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64), "green" if name == "a" else "blue").save(f"photos/{name}.png")
    lines = [
        {"image": f"{name}.png", "question": f"Is there a dog {n}?", "answer": "Yes."}
        for n in "123"
        for name in "ab"
    ]
    Path("my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(saved, "small")
    return tmp_path


def small_run(*options: str) -> list[str]:
    return ["train", "--data", "my.jsonl", "--images", "photos", "--model", "small", *options]


def made(*options: str) -> Recipe:
    """The recipe that a command line would train."""
    command = parse(small_run(*options))
    assert isinstance(command, Train)
    command.check_recipe_options()
    return command.make_recipe()


def rates(recipe: Recipe) -> dict[str, float]:
    return {part: config.lr for part, config in recipe.optimisers.items()}


# ---- what they make ----


def test_a_run_by_the_options_people_expect(folder: Path, capsys) -> None:
    options = ["--lr", "1e-3", "--epochs", "4", "--batch-size", "1", "--sequence-length", "100"]
    options += ["--max-crops", "3", "--seed", "5", "--max-bad-share", "0.2", "--workers", "0"]
    options += ["--train", "connector", "llm", "embeddings", "--set", "log_every=1", "--out", "run"]
    assert main(small_run(*options)) == 0
    recipe = Recipe.load("run/recipe.json")
    assert (recipe.sequence_length, recipe.max_crops, recipe.batch_size) == (100, 3, 1)
    assert (recipe.seed, recipe.max_bad_fraction) == (5, 0.2)
    assert recipe.train == ("connector", "llm", "embeddings")
    assert rates(recipe) == {"connector": 2e-3, "llm": 1e-3, "embeddings": 1e-3}
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert len(steps) == recipe.steps == 8  # 3 pictures a row: an epoch of 6 is 2 rows
    assert sum(line["examples"] for line in steps) == 4 * 6
    said = capsys.readouterr().err
    assert said.count("learns: connector (") == 1
    assert "data: 6 records about 2 pictures; a step learns from 1 row of at most 100" in said
    assert "about 3 examples; 8 steps are about 4 epochs" in said
    assert "writes to run: a checkpoint every 100 steps, and at the end run/model" in said
    assert said.count("the other 5 steps will take about") == 1
    assert said.index("writes to run") < said.index("the other 5 steps")


def test_old_and_new_names_of_the_folder_of_pictures(folder: Path) -> None:
    for name in ("--images", "--pictures"):
        command = parse(["train", "--data", "my.jsonl", name, "photos"])
        assert isinstance(command, Train)
        assert command.pictures == Path("photos")


def test_what_learns_can_be_chosen(folder: Path) -> None:
    assert made().train == ("vision", "connector", "llm", "embeddings")
    assert made("--train", "vision").train == ("vision",)
    assert made("--train", "connector", "--lora").train == ("connector", "lora")
    assert made("--feature-cache", "features").train == ("connector", "llm", "embeddings")
    with_rank = made("--lora-rank", "4")
    assert with_rank.lora is not None
    assert (with_rank.lora.rank, with_rank.lora.alpha, with_rank.train[-1]) == (4, 8.0, "lora")


def test_one_rate_of_one_part_goes_before_all(folder: Path) -> None:
    found = made("--lr", "1e-3", "--set", "optimisers.connector.lr=7e-3", "--set", "dtype=bfloat16")
    assert (rates(found)["connector"], rates(found)["llm"]) == (7e-3, 1e-3)
    assert found.dtype == "bfloat16"
    alone = made("--train", "connector", "--lr", "1e-5")  # though it was never trained
    assert rates(alone) == {"connector": 1e-5}


def test_a_warm_up_of_ones_own_stays_in_a_short_run(folder: Path) -> None:
    found = made("--steps", "8", "--set", "optimisers.llm.warmup_steps=6")
    warm_ups = {part: config.warmup_steps for part, config in found.optimisers.items()}
    assert warm_ups == {"vision": 2, "connector": 2, "llm": 6, "embeddings": 2}


def test_the_base_design_learns_at_its_rates_whatever_the_command() -> None:
    options = RecipeOptions(data=("none.jsonl",), model="base")
    assert rates(options.make_recipe()) == {"connector": 2e-4, "llm": 1e-5}
    named = dataclasses.replace(options, recipe="base", model=None)
    assert rates(named.make_recipe()) == rates(base()) == {"connector": 2e-4, "llm": 2e-5}
    slow = dataclasses.replace(named, lr=1e-5)
    assert rates(slow.make_recipe()) == {"connector": 2e-4, "llm": 1e-5}
    short = dataclasses.replace(named, steps=200)  # a hundredth of the recipe's
    assert [o.warmup_steps for o in short.make_recipe().optimisers.values()] == [2, 20]


def test_parts_are_those_of_training() -> None:
    assert PARTS == optim.PARTS


# ---- runs that go on ----


def test_a_run_goes_on_with_what_was_derived_from_its_data(folder: Path, capsys) -> None:
    """More records would make another length, and so another schedule."""
    run = small_run("--out", "run", "--workers", "0", "--lr", "1e-3", "--sequence-length", "64")
    assert main([*run, "--max-steps", "1"]) == 0
    began = Recipe.load("run/recipe.json")
    resumed = parse([*run, "--resume"])
    assert isinstance(resumed, Train)
    with open("my.jsonl", "a") as stream:
        stream.write('{"question": "1?", "answer": "2"}\n' * 500)
    assert resumed.recipe_in(Path("run")) == began
    capsys.readouterr()
    longer = dataclasses.replace(resumed, steps=began.steps + 1)
    assert longer.recipe_in(Path("run")) == began
    assert f"keeps its length of {began.steps} steps: --max-steps" in capsys.readouterr().err
    assert main([*run, "--resume", "--lora"]) == 1
    assert "train, optimisers, lora differ" in capsys.readouterr().err
    assert main(["train", "smoke", "--out", "run", "--resume"]) == 1
    assert "holds a run of the recipe finetune, not of smoke" in capsys.readouterr().err


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lr", "0"), "--lr must be above 0, found 0"),
        (("--lr", "-1e-4"), "--lr must be above 0, found -0.0001"),
        (("--lr", "nan"), "--lr must be above 0, found nan"),
        (("--lr", "fast"), "--lr must be a number, found 'fast'"),
        (("--epochs", "0"), "--epochs must be above 0, found 0"),
        (("--epochs", "inf"), "--epochs must be above 0, found inf"),
        (("--epochs", "1", "--steps", "3"), "--steps and --epochs both say how long"),
        (("--train", "visoin"), "--train names 'visoin', expected some of vision, connector, llm"),
        (("--lora-rank", "4", "--train", "llm"), "LoRA leaves the llm as it is"),
        (("--lora-rank", "0"), "--lora-rank must be 1 or more, found 0"),
        (("--batch-size", "0"), "--batch-size must be 1 or more, found 0"),
        (("--images", "nowhere"), "--images is nowhere, which is no folder"),
        (("--feature-cache", "f", "--train", "vision"), "--feature-cache keeps the features of a"),
        (("--set", "rubbish"), "--set: found 'rubbish', expected field=value"),
        (("--set", "clip_nrom=1"), "no field 'clip_nrom': did you mean clip_norm"),
        (("--set", "steps=soon"), "--set: Recipe.steps: expected int, found 'soon'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: Path, capsys, options: tuple[str, ...], said: str
) -> None:
    before = sorted(os.listdir())
    assert main(small_run(*options, "--out", "run")) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1 and err.startswith("nanomolmo2: ")
    assert sorted(os.listdir()) == before


def test_options_that_tiny_does_not_have(capsys) -> None:
    given = ["--lr", "1e-3", "--epochs", "2", "--set", "a=1", "--log-to", "wandb"]
    assert main(["train", "tiny", *given]) == 2
    assert "--lr, --epochs, --set, --log-to are not for the recipe tiny" in capsys.readouterr().err


# ---- what is said ----


def test_what_learns_is_counted() -> None:
    """The rows of the base vocabulary stay, those beyond it learn with the connector."""
    model = small_model()
    assert isinstance(model, NanoMolmo2)
    set_trainable(model, ("connector", "llm"))
    recipe = base()
    said = what_learns(model, components(model, recipe.train, recipe.optimisers))
    llm = model.config.llm_config
    table = model.llm.embed_tokens.weight.numel()
    new_rows = llm.additional_vocab_size * llm.hidden_size
    connector = sum(p.numel() for p in model.connector.parameters())
    decoder = sum(p.numel() for p in model.llm.parameters())
    assert f"connector ({_millions(connector + new_rows)} of" in said
    assert f"llm ({_millions(decoder - table)} of {_millions(decoder)} weights, rate 2e-05)" in said
    everything = sum(p.numel() for p in model.parameters())
    learned = _millions(connector + new_rows + decoder - table)
    assert said.endswith(f"; {learned} of {_millions(everything)} weights in all")


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def test_a_length_that_is_probably_a_mistake_is_told() -> None:
    recipe = dataclasses.replace(base(), steps=100, batch_size=2)
    # 2 rows of 5 are 10 examples a step, 1,000 in all.
    assert warnings(recipe, Amount(500, None, 5.0)) == []
    assert warnings(recipe, Amount(2000, None, 5.0)) == []  # as --epochs 0.5 asks for
    assert warnings(recipe, Amount(4000, None, 5.0)) == [
        "warning: about 25% of the data are seen at all: one epoch is 400 steps"
    ]
    assert warnings(recipe, Amount(4, None, 5.0)) == [
        "warning: the data are seen about 250 times, which learns them by heart: one epoch is 1 "
        "step"
    ]
    assert warnings(recipe, Amount(4000, None, 5.0, made_up=True)) == []
    short = dataclasses.replace(recipe, steps=40)
    assert warnings(short, Amount(1, 1, 5.0)) == []
    assert "data: 1 record about 1 picture; a step learns from 2 rows" in how_much(
        recipe, Amount(1, 1, 5.0)
    )


def test_time_is_told_once_after_three_steps(tmp_path: Path, capsys) -> None:
    """The first step, in which processes start, does not count."""
    log = RunLog(tmp_path, every=1)
    with log.progress("finetune", 63, 0):
        for step, seconds in enumerate((60.0, 1.0, 3.0, 9.0), start=1):
            log.step("finetune", step, {"loss": 1.0, "compute_seconds": seconds})
    said = capsys.readouterr().err
    assert said.count("the other") == 1
    assert "the other 60 steps will take about 2 minutes (2 s each)" in said
    with log.progress("short", 3, 0):
        for step in (1, 2, 3):
            log.step("short", step, {"loss": 1.0, "compute_seconds": 1.0})
    assert "the other" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1, "1 second"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "1.5 hours"),
        (36_000, "10 hours"),
        (200_000, "2.3 days"),
    ],
)
def test_seconds_as_people_say_them(seconds: float, said: str) -> None:
    assert seconds_as_text(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.0312, "0.031"), (2.54, "2.5"), (3.0, "3"), (25.4, "25"), (1234.5, "1,234")],
)
def test_numbers_are_told_as_far_as_they_mean_something(number: float, said: str) -> None:
    assert rounded(number) == said
