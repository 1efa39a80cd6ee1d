"""A run that is measured while it goes on: nothing changes but the model that is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomolmo2.cli import main
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.sources import open_source
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.recipes import smoke
from nanomolmo2.training.checkpoint import random_state
from nanomolmo2.training.distributed import World
from nanomolmo2.training.recipe import Recipe, ValidationConfig
from nanomolmo2.training.trainer import RecipeStage, build, train_recipe
from nanomolmo2.training.validation import Validation
from tests.training.recipes import toy
from tests.training.test_split import write

pytestmark = pytest.mark.usefixtures("one_thread")


def train(recipe: Recipe, out: Path, **options: Any) -> bool:
    return train_recipe(recipe, out, workers=options.pop("workers", 0), quiet=True, **options)


def measured(recipe: Recipe, folder: Path, **validation: Any) -> Recipe:
    data = () if "share" in validation else (write(folder / "val.jsonl", range(90, 94)),)
    return replace(recipe, validation=ValidationConfig(data=data, **validation))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def values(out: Path) -> dict[int, dict[str, float]]:
    """Step -> what was measured; a repeated measurement must find the same."""
    found: dict[int, dict[str, float]] = {}
    for line in lines(out):
        scores = {name: value for name, value in line.items() if name.startswith("val_")}
        if scores:
            assert found.setdefault(line["step"], scores) == scores
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(str(out / "model"))[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def script(monkeypatch: pytest.MonkeyPatch, *found: float) -> None:
    """Let the measurements find these losses, one after the other."""
    left = iter(found)
    monkeypatch.setattr(Validation, "_loss", lambda self, loss, world: next(left))


@pytest.fixture(scope="module")
def dropped() -> Recipe:
    """It draws at random in every step."""
    return toy(smoke(), steps=4, residual_dropout=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": ("connector", "llm")},
        pytest.param({"train": ("connector", "llm"), "feature_cache": "features"}),
    ],
)
def test_measuring_changes_no_bit(dropped: Recipe, tmp_path: Path, changes: dict) -> None:
    """With dropout, of everything or beside a frozen encoder, whose features are kept or not."""
    if "feature_cache" in changes:
        changes = {**changes, "feature_cache": str(tmp_path / "features")}
    recipe = replace(dropped, **changes)
    assert train(recipe, tmp_path / "without")
    measuring = measured(recipe, tmp_path, every=1, best="last", limit=1)
    assert train(measuring, tmp_path / "with")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert list(values(tmp_path / "with")) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_measuring_changes_no_bit_with_a_worker(dropped: Recipe, tmp_path: Path) -> None:
    assert train(dropped, tmp_path / "without", workers=1)
    recipe = measured(dropped, tmp_path, every=2, best="last", limit=1)
    assert train(recipe, tmp_path / "with", workers=1)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_the_generators_stay_where_they_were(dropped: Recipe, tmp_path: Path) -> None:
    recipe = measured(dropped, tmp_path, every=1, limit=1)
    model, processor = build(recipe)
    stage = RecipeStage(recipe, model, processor, World())
    before = random_state()
    scores = stage.evaluate()
    after = random_state()
    assert torch.equal(before.pop("torch"), after.pop("torch")) and before == after
    assert model.training and set(scores) == {"val_loss", "val_count"}


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_loss_is_the_mean_over_all_labels(
    dropped: Recipe, tmp_path: Path, micro_batch_size: int
) -> None:
    """Of every record alone, added up: packing and dropout are not in it."""
    recipe = measured(replace(dropped, micro_batch_size=micro_batch_size), tmp_path, limit=0)
    recipe = replace(recipe, sequence_length=100)  # several rows
    model, processor = build(recipe)
    found = RecipeStage(recipe, model, processor, World()).evaluate()
    model.eval()
    total = count = 0.0
    assert recipe.validation is not None
    source = open_source(recipe.validation.data[0])
    for i in range(len(source)):
        encoded = EncodeTree(processor)(source[i])
        labels = torch.from_numpy(encoded.labels)[None]
        pixels = torch.from_numpy(encoded.pixel_values)
        ids = torch.from_numpy(encoded.input_ids)[None]
        with torch.no_grad():
            logits = model(ids, pixel_values=pixels)
        learned = labels[0, 1:] != -100
        chances = logits[0, :-1].log_softmax(-1).gather(1, labels[0, 1:].clamp(min=0)[:, None])
        total -= float(chances[learned].sum())
        count += int(learned.sum())
    assert list(found) == ["val_loss"]
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_several_ranks_measure_every_row_once(dropped: Recipe, tmp_path: Path) -> None:
    """Each rank has as many batches, so that none waits for another for ever."""
    recipe = replace(measured(dropped, tmp_path, limit=0), sequence_length=60)
    model, processor = build(recipe)
    stage = RecipeStage(recipe, model, processor, World())
    assert stage.validation is not None
    rows = stage.validation.rows
    alone = [batch.input_ids for batch in rows.batches()]
    assert len(alone) > 3
    for world in (2, 3, 5):
        per_rank = []
        for rank in range(world):
            rows._kept = None
            batches = list(rows.batches(rank, world))
            assert len(batches) == len(list(rows.batches(rank, world)))  # what was kept
            per_rank.append(batches)
        assert len({len(batches) for batches in per_rank}) == 1
        real = [
            batch.input_ids
            for batches in per_rank
            for batch in batches
            if (batch.labels != -100).any()
        ]
        assert sorted(map(str, real)) == sorted(map(str, alone))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(dropped: Recipe, tmp_path: Path) -> None:
    """Their weights are spread over both; the first answers with a copy."""
    recipe = measured(replace(dropped, residual_dropout=0.0, steps=2), tmp_path, every=1, limit=1)
    assert train(recipe, tmp_path / "one")
    recipe.save(tmp_path / "toy.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "nanomolmo2", "train", str(tmp_path / "toy.json")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), "--workers", "0"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert [len(line) for line in two.values()] == [2, 2, 2]
    assert two[0]["val_loss"] == pytest.approx(one[0]["val_loss"], rel=1e-6)
    assert two[2]["val_loss"] == pytest.approx(one[2]["val_loss"], rel=1e-4)
    assert two[0]["val_count"] == one[0]["val_count"]
    best = [json.loads((tmp_path / n / "best.json").read_text())["step"] for n in ("one", "two")]
    assert best[0] == best[1]


@pytest.mark.parametrize("stops", [[1, 2], pytest.param([3], marks=pytest.mark.slow)])
def test_a_resumed_run_measures_as_one_that_was_never_stopped(
    dropped: Recipe, tmp_path: Path, stops: list[int]
) -> None:
    recipe = measured(dropped, tmp_path, every=2, limit=1)
    assert train(recipe, tmp_path / "whole")
    for number, steps in enumerate(stops):
        assert not train(recipe, tmp_path / "parts", stop_after=steps, resume=number > 0)
    assert train(replace(recipe, validation=None), tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    ours, theirs = ((tmp_path / n / "best.json").read_text() for n in ("parts", "whole"))
    assert ours == theirs
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_the_model_is_that_of_the_best_step(
    dropped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script(monkeypatch, 9.0, 5.0, 3.0, 4.0, 4.5)
    recipe = replace(measured(dropped, tmp_path, every=1, limit=0), keep=1, save_every=100)
    assert train_recipe(recipe, tmp_path / "run", workers=0)
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["000000002", "000000004"]
    stored = torch.load(tmp_path / "run/checkpoints/000000002/checkpoint.pt", weights_only=True)
    found = weights(tmp_path / "run")
    head = "connector."
    assert any(name.startswith(head) for name in found)
    assert all(
        torch.equal(found[name], value)
        for name, value in stored["weights"].items()
        if name.startswith(head)
    )
    said = capsys.readouterr().err
    assert "step 2: val_loss 3 (the best so far)" in said
    assert (
        "the model is that of step 2 of 4, the best: val_loss 3, 9 before the first step, 4.5 at "
        "the end" in said
    )
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["value"]) == (2, 3.0)


def test_a_run_stops_early_and_stays_stopped(
    dropped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 9.0, 5.0, 6.0, 7.0)
    recipe = measured(replace(dropped, steps=20), tmp_path, every=1, limit=0, patience=2)
    assert train(recipe, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    before = weights(tmp_path / "run")
    assert train(recipe, tmp_path / "run", resume=True)  # and nothing is measured again
    assert len(losses(tmp_path / "run")) == 3
    assert same(weights(tmp_path / "run"), before)


def test_other_validation_data_look_for_the_best_anew(
    dropped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script(monkeypatch, 9.0, 1.0, 6.0, 5.0, 7.0)
    recipe = measured(dropped, tmp_path, every=1, limit=0)
    assert not train(recipe, tmp_path / "run", stop_after=1)
    write(tmp_path / "val.jsonl", range(95, 98))
    assert train_recipe(recipe, tmp_path / "run", workers=0, resume=True)
    assert "the best step is looked for anew" in capsys.readouterr().err
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["value"]) == (3, 5.0)


def test_every_line_has_the_rates_and_a_measurement_its_losses(
    dropped: Recipe, tmp_path: Path
) -> None:
    recipe = measured(dropped, tmp_path, every=4, limit=1)
    train(recipe, tmp_path / "run")
    for line in lines(tmp_path / "run"):
        if "val_loss" in line:
            assert set(line) == {"stage", "step", "val_loss", "val_count"}
        else:
            parts = {name for name in line if name.startswith("lr_")}
            assert parts == {f"lr_{part}" for part in recipe.train}
    config = recipe.optimisers["llm"]
    rates = [line["lr_llm"] for line in lines(tmp_path / "run") if "loss" in line]
    assert rates == pytest.approx([config.lr * config.factor(step, 4) for step in range(4)])


def test_bad_validation_records_are_told(tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "val.jsonl", range(90, 92), questions=1)
    with open(data.path, "a") as stream:
        stream.write('{"image": "none.png", "question": "Red?", "answer": "Yes."}\n')
    recipe = replace(toy(smoke(), steps=1), validation=ValidationConfig(data=(data,), limit=0))
    assert train_recipe(recipe, tmp_path / "run", workers=0)
    said = capsys.readouterr().err
    assert "left out 1 of 3 validation records (missing picture 1):" in said
    assert said.count("none.png") == 1
    Path(data.path).write_text('{"question": "Red?"}\n')
    with pytest.raises(ValueError, match=r"none of the 1 validation records can be measured \(no"):
        train(recipe, tmp_path / "other")


def test_what_is_odd_in_the_validation_data_is_said_once(tmp_path: Path) -> None:
    data = write(tmp_path / "val.jsonl", range(90, 91), questions=1)
    text = Path(data.path).read_text()
    Path(data.path).write_text(text.replace('"image"', '"boxs": 1, "image"'))
    config = ValidationConfig(data=(data,), every=1, limit=1)
    recipe = replace(toy(smoke(), steps=2), validation=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # as they come after other code has set filters
        train(recipe, tmp_path / "run")
    assert sum("boxs (1)" in str(warning.message) for warning in caught) == 1


def test_a_measure_that_there_is_not_leaves_a_folder_to_start_in(tmp_path: Path) -> None:
    recipe = measured(toy(smoke(), steps=1), tmp_path, limit=1, best="tracks")
    with pytest.raises(ValueError, match=r"choose \(--best\) val_loss, count, last"):
        train(recipe, tmp_path / "run")
    again = replace(recipe, validation=replace(recipe.validation, best="count"))
    assert train(again, tmp_path / "run")


# ---- rates that are too high ----


def test_a_rate_that_diverges_stops_with_what_to_try(tmp_path: Path) -> None:
    recipe = toy(smoke(), steps=40, save_every=1)
    config = replace(recipe.optimisers["llm"], lr=100.0, matrix_lr=0.0, warmup_steps=1)
    recipe = replace(recipe, optimisers=dict.fromkeys(recipe.train, config))
    with pytest.raises(ValueError) as error:
        train(recipe, tmp_path)
    said = str(error.value)
    assert "the loss diverges" in said or "is nan" in said or "is inf" in said
    assert "lower the learning rate (--lr 10 in place of 100; --find-lr looks for one)" in said
    assert "is intact" in said or "there is no checkpoint yet" in said
    assert "\n" not in said and not (tmp_path / "model").exists()


# ---- the command line ----


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_the_command_measures(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    training = write(tmp_path / "a" / "my.jsonl", range(6))
    held = write(tmp_path / "b" / "held.jsonl", range(4, 8))
    toy(smoke(), steps=2, data=(training,)).save("toy.json")
    options = ["--workers", 0, "--val-every", 1, "--val-limit", 0]
    assert run("train", "toy.json", "--val", held.path, "--out", "one", *options) == 0
    said = capsys.readouterr().err
    assert "warning: 4 of 8 validation records (50%) show pictures" in said
    assert list(values(Path("one"))) == [0, 1, 2]
    assert run("train", "toy.json", "--val-share", 0.4, "--out", "two", *options) == 0
    split = json.loads(Path("two/split.json").read_text())
    assert 4 <= len(split["sources"][0]["held_out"]) <= 6
    assert Recipe.load("two/recipe.json").validation == ValidationConfig(
        share=0.4, every=1, limit=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val", "a", "--val-share", "0.1"], "--val and --val-share both say"),
        (["--val-share", "1"], "--val-share must be above 0 and below 1"),
        (["--val-share", "nan"], "--val-share must be above 0 and below 1"),
        (["--patience", "2"], "give --val FILE or --val-share 0.1 too"),
        (["--val-share", "0.1", "--best", "last", "--patience", "2"], "best is 'last'"),
        (["--val-share", "0.1", "--val-every", "0"], "--val-every must be 1 or more"),
        (["--find-lr", "--resume"], "--find-lr looks for a rate before a run starts"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    data = write(tmp_path / "my.jsonl", range(3))
    out = tmp_path / "run"
    assert run("train", "smoke", "--data", data.path, "--out", out, *options) != 0
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()
