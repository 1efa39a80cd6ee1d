"""Public benchmarks through evaluation: the numbers of a report, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.evaluation import evaluate
from nanomolmo2.evaluation.public import PUBLIC
from tests.evaluation.test_public import chartqa_json, parquet, picture, stored, write
from tests.evaluation.test_run import scripted, tag

SCENE = Path(cli.__file__).parents[1] / "assets/demo/scene.png"


def flat(name: str, folder: Path, *answers: str, split: str | None = None) -> dict[str, float]:
    source = PUBLIC[name].open(folder, split)
    return evaluate(scripted(*answers), source, batch_size=1, baselines=False).flat()


def test_the_parts_of_a_benchmark(tmp_path: Path) -> None:
    """.57 and Yes; .59 is within 5 %."""
    chartqa_json(tmp_path)
    assert flat("chartqa", tmp_path, "0.59", "No", split="val") == {
        "chartqa": 0.5,
        "chartqa_human": 1,
        "chartqa_augmented": 0,
    }


def test_point_bench_is_the_mean_of_its_categories(tmp_path: Path) -> None:
    """Two questions of one category, one of another: 3 of 4 and 1 of 2 would be the means."""
    picture(tmp_path / "selected_images/a.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[:20] = 255
    (tmp_path / "selected_masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "selected_masks/a.png")
    item = {"image_filename": "a.png", "mask_filename": "a.png", "user_input": "Point to it."}
    categories = ("Counting", "Spatial", "Spatial")
    write(tmp_path / "data.json", [{**item, "category": one} for one in categories])
    inside, outside = tag((500, 100)), tag((500, 100), (500, 900))
    assert flat("pointbench", tmp_path, inside, inside, outside) == {
        "pointbench": pytest.approx(2 / 3),
        "pointbench_counting": 1,
        "pointbench_spatial": 0.5,
        "pointbench_average": 0.75,
    }


def test_counts_have_their_further_numbers(tmp_path: Path) -> None:
    rows = [{"image": stored(), "question": f"How many {i}?", "number": 2} for i in range(3)]
    parquet(tmp_path / "data/test-0.parquet", *rows)
    # By its points; by what it says, which is one too many; nothing.
    said = (f"Counting the {tag((1, 1), (2, 2))} shows a total of 9.", "three", "I cannot tell")
    assert flat("countbenchqa", tmp_path, *said) == {
        "countbenchqa": pytest.approx(1 / 3),
        "countbenchqa_within_one": pytest.approx(2 / 3),
        "countbenchqa_mae": pytest.approx(1 / 2),
    }


def test_one_score_for_questions_of_two_kinds(tmp_path: Path) -> None:
    """A choice, and a word."""
    letters = "Which?\n\nA. left\nB. right\nPlease answer directly with only the letter."
    rows: list[dict[str, Any]] = [
        {"image": stored(), "question": letters, "answer": "B"},
        {"image": stored(), "question": "How many?\nPlease ...", "answer": "2"},
    ]
    parquet(tmp_path / "test.parquet", *rows)
    assert flat("realworldqa", tmp_path, "A. left", "two") == {
        "realworldqa": 0.5,
        "realworldqa_choice": 0,
        "realworldqa_short": 1,
    }


def test_the_command_measures_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three sunflowers and a snail, which the picture of the demo shows."""
    image = {"bytes": SCENE.read_bytes(), "path": None}
    rows = [
        {"image": image, "question": f"How many {noun} are there?", "number": count}
        for noun, count in (("sunflowers", 3), ("snails", 2))
    ]
    parquet(tmp_path / "data/test-0.parquet", *rows)
    target = tmp_path / "scores.json"
    command = ["eval", "countbenchqa", "--files", str(tmp_path), "--json", str(target)]
    assert cli.main(command) == 0
    found = json.loads(target.read_text())
    assert found == {
        "countbenchqa": 0.5,
        "countbenchqa_within_one": 1,
        "countbenchqa_mae": pytest.approx(1 / 2),
    }
    assert "| countbenchqa" in capsys.readouterr().out


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "chartqa", "--files", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no questions of ChartQA, split test: found no .parquet or .json files" in error
    assert error.count("\n") == 1
