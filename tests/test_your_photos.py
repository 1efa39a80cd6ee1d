"""docs/your-photos.md, from a folder of photos to corrections: all of its commands, in order.

The training is cut short: what is looked at is that each command takes what the one before it
wrote, and that the numbers are those that one gets by hand.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.convert.pretrained import load_config
from tests.photos import HEIGHT, WIDTH, draw_photos
from tests.test_readme import blocks

PAGE = Path(__file__).parents[1] / "docs" / "your-photos.md"
SHORT = ["--steps", "4", "--batch-size", "1", "--sequence-length", "512", "--workers", "0"]
SHORT += ["--val-every", "4", "--val-limit", "1"]


def commands() -> list[list[str]]:
    lines = [line for b in blocks(PAGE) if b.language == "bash" for line in b.code.splitlines()]
    return [shlex.split(line)[1:] for line in lines]


def shows_by_example(arguments: list[str]) -> bool:
    """Whether a command teaches a word by showing it, or asks the model that was taught."""
    return arguments[0] == "teach" or (arguments[0] == "ask" and "nuts" in arguments)


def can_find() -> bool:
    """Whether the bundled model finds by example."""
    return load_config("tiny").finder_dim is not None


def best_matching(points: list[tuple[float, float]], boxes: list[list[float]]) -> int:
    """The most points that can each have a box of its own, by trying everything."""
    if not points:
        return 0
    (x, y), others = points[0], points[1:]
    most = best_matching(others, boxes)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if x0 <= x <= x1 and y0 <= y <= y1:
            most = max(most, 1 + best_matching(others, boxes[:i] + boxes[i + 1 :]))
    return most


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    boxes = draw_photos(tmp_path / "photos")
    assert len(boxes) == 24
    said = {}
    for arguments in commands():
        if shows_by_example(arguments) and not can_find():
            continue
        short = SHORT if arguments[0] == "train" else []
        if arguments[0] == "teach" and "--data" in arguments:
            short = ["--minutes", "0.1"]
        assert cli.main([*arguments, *short]) == 0, (arguments, capsys.readouterr().err)
        said[" ".join(arguments[:2])] = capsys.readouterr().out

    # Import: every box of the table, exactly.
    assert "wrote 24 records to nuts.jsonl: 24 point, 24 count" in said["data import"]
    for record in read(tmp_path / "nuts.jsonl"):
        point, count = record["branches"]
        drawn = boxes[Path(record["image"]).name]
        assert point["truth"]["boxes"] == [list(box) for box in drawn]
        assert count["truth"] == {"count": len(drawn)}

    # Split: 19 and 5 photos, none in both, none lost.
    train, val = (read(tmp_path / "parts" / f"{name}.jsonl") for name in ("train", "val"))
    names = [Path(record["image"]).name for record in [*train, *val]]
    assert (len(train), len(val), sorted(names)) == (19, 5, sorted(boxes))

    # Training with validation.
    log = read(tmp_path / "runs" / "nuts" / "log.jsonl")
    assert any("val_loss" in line for line in log)

    # Evaluation: the mean of what the answers are worth, computed here.
    predictions = read(tmp_path / "runs" / "nuts" / "eval" / "predictions.jsonl")
    worth: dict[str, list[float]] = {"point": [], "count": []}
    for line in predictions:
        drawn = [list(map(float, box)) for box in boxes[Path(line["images"][0]["path"]).name]]
        places = [(point["x"], point["y"]) for point in line.get("points", [])]
        if line["task"] == "point":
            hits = best_matching(places, drawn)
            worth["point"].append(2 * hits / (len(places) + len(drawn)))
        else:
            stated = re.search(r"total of (\d+)", line["answer"])
            number = int(stated[1]) if stated else len(places)  # points alone are counted
            worth["count"].append(float(number == len(drawn)))
    scores = json.loads((tmp_path / "nuts.json").read_text())
    for task, values in worth.items():
        assert len(values) == 5
        assert scores[task] == pytest.approx(sum(values) / 5), predictions
        assert f"{task}" in said["eval parts/val.jsonl"]
    assert (tmp_path / "runs" / "nuts" / "eval" / "index.html").exists()

    # Use.
    assert Image.open(tmp_path / "answer.png").size == (WIDTH, HEIGHT)
    assert json.loads(said["ask photos/01.png"])["images"][0]["width"] == WIDTH

    # Corrections: a task for each photo that was asked about, with the points of its answer.
    tasks = json.loads((tmp_path / "corrections.json").read_text())
    assert len(tasks) == 5
    taken: dict[tuple[str, str], int] = {}  # (picture, label) -> points of the first answer
    for line in sorted(predictions, key=lambda line: line["task"] != "point"):
        labels = Counter(point["label"] for point in line.get("points", []))
        for label, number in labels.items():
            taken.setdefault((line["images"][0]["path"], label), number)
    exported = sum(len(task["predictions"][0]["result"]) for task in tasks)
    assert exported == sum(taken.values()) > 0
