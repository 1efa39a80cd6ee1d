"""Fine-tuning a model that finds all at once: its recipe, whole runs, the time they take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.data.photos import VARIANTS, Photos
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.recipes import finetune
from nanomolmo2.things.find_model import CONFIG, find_processor
from nanomolmo2.training.distributed import World
from nanomolmo2.training.pace import Pace
from nanomolmo2.training.recipe import ValidationConfig
from nanomolmo2.training.split import open_split
from nanomolmo2.training.trainer import open_stage, settle_new_words, train_recipe
from tests.photos import draw_photos


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the preset with random weights; nothing that it could forget."""
    folder = tmp_path_factory.mktemp("finds") / "model"
    torch.manual_seed(0)
    processor = find_processor().with_settings(trained_on=())
    NanoMolmo2(CONFIG).save_pretrained(folder, processor=processor)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos of nuts, three records about each."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for name, boxes in draw_photos(folder / "photos", 5).items():
        points = [{"x": (a + c) / 2, "y": (b + d) / 2} for a, b, c, d in boxes]
        of_photo = {"image": f"photos/{name}", "points": points, "label": "hex nut"}
        lines += [
            {**of_photo, "question": "Point to the hex nuts.", "task": "point"},
            {**of_photo, "question": "How many hex nuts are there?", "mode": "point_count"},
            {"image": f"photos/{name}", "question": "Any cog?", "answer": "There are none."},
        ]
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_its_recipe_looks_at_photos_and_finds(start: Path, data: Path) -> None:
    recipe = finetune([str(data)], str(start))
    assert recipe.photos and recipe.find_weight == 1.0 and "points" in recipe.train
    assert recipe.max_crops == 20  # four photos, each an overview and four tiles
    # 50 epochs of 5 photos are 250 looks at them; a row holds four, a step two rows.
    assert recipe.steps == 40
    other = finetune([str(data)], "tiny-point")
    assert not other.photos and other.find_weight == 0


def test_a_step_learns_from_photos_and_trains_what_finds(start: Path, data: Path) -> None:
    recipe = replace(finetune([str(data)], str(start), steps=2), batch_size=1)
    world = World()
    recipe = settle_new_words(recipe, world, lambda text: None)
    assert recipe.new_words == ("hex", "nut", "Any", "cog")
    opened = open_stage(recipe, open_split(recipe), world)
    stage = opened.stage
    (source,) = stage.mixture.sources
    assert isinstance(source, Photos) and len(source) == 5
    (looks,) = stage.loader._maker.mixture.sources
    assert len(looks) == 5 * VARIANTS
    stage.begin()
    optimizers = stage.optimizers()
    step, _ = next(iter(stage.batches(range(1), None, 0)))
    assert {"point", ""} <= set(step.tasks)
    metrics = stage.gradients(step)
    assert 0 <= float(metrics["finder_recall"]) <= 1 and float(metrics["finder_loss"]) > 0
    finder = opened.model.finder
    assert finder is not None
    before = {name: p.detach().clone() for name, p in finder.named_parameters()}
    optimizers.step()
    moved = [name for name, p in finder.named_parameters() if not torch.equal(p, before[name])]
    assert "patch.embed.weight" in moved and "add.weight" in moved and "patch.way.weight" in moved


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(
    start: Path, data: Path, tmp_path: Path
) -> None:
    recipe = replace(
        finetune([str(data)], str(start), steps=3),
        batch_size=1,
        sequence_length=1024,
        max_crops=5,
        validation=ValidationConfig(share=0.2, every=2, limit=0),
    )
    assert train_recipe(recipe, tmp_path / "whole", workers=0, quiet=True)
    assert not train_recipe(recipe, tmp_path / "parts", workers=0, quiet=True, stop_after=1)
    assert train_recipe(recipe, tmp_path / "parts", workers=0, quiet=True, resume=True)
    logs = []
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        read = [json.loads(line) for line in lines]
        logs.append([(one.get("loss"), one.get("val_loss")) for one in read])
    assert logs[0] == logs[1] and len(logs[0]) == 6  # three steps, measured before, after 2 and 3


# ---- time ----


@pytest.mark.parametrize(
    ("minutes", "steps"),
    [
        # 60 * .82 - 8 = 41.2 seconds; 6 measurements and two more of 2 seconds each leave 25.2.
        (1.0, 12),
        (0.1, 10),  # the fewest
        # 600 * .82 - 8 = 484; less 2 * (2 + 8) = 464 s for steps of 2 seconds.
        (10.0, 232),
    ],
)
def test_the_steps_that_fit_into_some_minutes(data: Path, minutes: float, steps: int) -> None:
    pace = Pace(step=2.0, measurement=2.0, spent=8.0)
    recipe = replace(finetune([str(data)], "tiny", steps=4), validation=ValidationConfig(share=0.2))
    assert pace.steps_in(recipe, minutes) == pytest.approx(steps, abs=1)
    plain = replace(recipe, validation=None)
    assert pace.steps_in(plain, 10.0) == 242


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--minutes", "1", "--steps", "3"], "says how long to train"),
        (["--minutes", "1", "--find-lr"], "is for one process that trains on own data"),
    ],
)
def test_minutes_that_cannot_be(
    data: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data", str(data), *options]) == 2
    assert problem in capsys.readouterr().err


def test_a_run_takes_as_many_steps_as_there_is_time_for(
    start: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paces = []

    def measure(recipe: object, cache_dir: object) -> Pace:
        paces.append(recipe)
        return Pace(2.0, 0.0, 0.0)

    trained = []
    monkeypatch.setattr("nanomolmo2.training.pace.measure_pace", measure)
    monkeypatch.setattr(
        "nanomolmo2.training.trainer.train_recipe", lambda recipe, out, **_: trained.append(recipe)
    )
    options = ["--model", str(start), "--minutes", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--data", str(data), *options]) == 0
    assert trained[0].steps == 24  # 49.2 seconds
    assert "24 steps of about 2.0 s each" in capsys.readouterr().out


# ---- the command ----


@pytest.mark.slow
def test_a_word_is_learned_from_photos(
    start: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("nanomolmo2.training.pace.FEWEST", 2)
    monkeypatch.setattr("nanomolmo2.training.pace.TIMED", 1)
    out = tmp_path / "learned"
    teach = ["teach", "hex nut", "--data", str(data), "--model", str(start), "--out", str(out)]
    assert cli.main([*teach, "--minutes", "0.001"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}, and {out / 'report.html'}" in said and "F1 of points" in said
    assert {"config.json", "model.safetensors", "report.html", "run"} <= {
        path.name for path in out.iterdir()
    }
    assert not (out / "words.json").exists()  # no example was given
    page = (out / "report.html").read_text()
    # One photo of five is held out: three answers about it, each with its picture inside.
    assert page.count("data:image/jpeg;base64,") == 3 and 'src="pictures' not in page
    assert "Point to the hex nuts." in page and "There are none." in page
    photo = str(data.parent / "photos" / "00.png")
    assert cli.main(["ask", photo, "How many hex nuts are there?", "--model", str(out)]) == 0
    capsys.readouterr()
    assert cli.main([*teach, "--minutes", "0.001"]) == 2
    assert f"{out} is not empty, it holds" in capsys.readouterr().err


def test_data_that_never_point_to_the_word_get_a_warning(
    start: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ValueError("far enough")

    monkeypatch.setattr("nanomolmo2.cli.train.Train.train_into", stop)
    teach = ["teach", "washer", "--data", str(data), "--model", str(start)]
    assert cli.main([*teach, "--out", str(tmp_path / "learned")]) == 1
    err = capsys.readouterr().err
    assert "points to washer: its labels are hex nut" in err and "far enough" in err
