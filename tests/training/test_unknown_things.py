"""The bundled model learns a thing that it does not know, and keeps what it knows.

30 drawn pictures of walnuts, the command as a person gives it, and 24 other pictures to measure on.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nanomolmo2 import cli
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.exam import EMOJI
from nanomolmo2.evaluation.exam import Asked, Exam, answer_all
from nanomolmo2.processor.points import parse_count, parse_points

SIZE = 192
COUNT, POINT, DESCRIBE = (
    "How many walnuts are there?",
    "Point to the walnuts.",
    "What is in this picture?",
)
Circle = tuple[float, float, float]  # centre and radius, pixels


def draw_walnut(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    draw.ellipse((x - r, y - 0.85 * r, x + r, y + 0.85 * r), (150, 98, 55), (70, 40, 20), 2)
    draw.line((x - 0.9 * r, y, x + 0.9 * r, y), (80, 50, 25), 3)
    for k in (-0.5, 0.0, 0.5):
        left, right = x + (k - 0.25) * r, x + (k + 0.25) * r
        draw.arc((left, y - 0.6 * r, right, y - 0.05 * r), 0, 300, (90, 55, 30), 2)
        draw.arc((left, y + 0.05 * r, right, y + 0.6 * r), 60, 360, (90, 55, 30), 2)


def draw_leaf(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    corners = [(x - r, y), (x, y - r / 2), (x + r, y), (x, y + r / 2)]
    draw.polygon(corners, (60, 150, 70), (20, 80, 30))


def picture(rng: random.Random, number: int) -> tuple[Image.Image, list[Circle]]:
    """So many walnuts, and up to two leaves, on a plain colour."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(150, 250) for _ in range(3)))
    draw, placed = ImageDraw.Draw(image), list[Circle]()
    leaves = rng.randint(0, 2)
    while len(placed) < number + leaves:
        r = rng.uniform(15, 27)
        x, y = rng.uniform(r, SIZE - r), rng.uniform(r, SIZE - r)
        if all(math.hypot(x - a, y - b) > r + other for a, b, other in placed):
            (draw_walnut if len(placed) < number else draw_leaf)(draw, x, y, r)
            placed.append((x, y, r))
    return image, placed[:number]


def pictures(seed: int, count: int) -> list[tuple[Image.Image, list[Circle]]]:
    """One in six without a walnut, the others with one to five."""
    rng = random.Random(seed)
    return [picture(rng, 0 if i % 6 == 5 else 1 + i % 5) for i in range(count)]


def write_data(folder: Path) -> Path:
    """30 records with three questions each."""
    lines = []
    for i, (image, walnuts) in enumerate(pictures(1, 30)):
        image.save(folder / f"{i}.png")
        points = [{"x": x, "y": y} for x, y, _ in walnuts]
        number = len(points)
        said = f"{number} walnuts." if number > 1 else "A walnut." if number else "Nothing."
        answers = {
            COUNT: {"points": points, "label": "walnut", "mode": "point_count"},
            POINT: {"points": points, "label": "walnut"},
            DESCRIBE: said,
        }
        branches = [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in answers.items()
        ]
        lines.append(json.dumps({"image": f"{i}.png", "branches": branches}) + "\n")
    path = folder / "walnuts.jsonl"
    path.write_text("".join(lines))
    return path


def scores(model: str) -> dict[str, float]:
    """Of 24 pictures that were not learned from: counts that are right, F1 of the points, each of
    which must lie on a walnut of its own, and answers that say the word where one is there."""
    held_out = pictures(2, 24)
    exam = Exam(EMOJI, "seen")
    for i, (image, _) in enumerate(held_out):
        exam.examples.append(Example([np.asarray(image)], []))
        for task, question in (("count", COUNT), ("point", POINT), ("caption", DESCRIBE)):
            messages = [{"role": "user", "content": question}]
            exam.asked.append(Asked(i, Branch(messages, task)))
    answer_all(*load(model, dtype=torch.float32), exam, 64)
    found: dict[str, list[float]] = {"count": [], "point": [], "word": []}
    for one in exam.asked:
        walnuts = held_out[one.example][1]
        if one.branch.task == "count":
            count = 0 if "There are none" in one.answer else parse_count(one.answer)
            found["count"].append(count == len(walnuts))
        elif one.branch.task == "point":
            left, said = list(walnuts), parse_points(one.answer, [(SIZE, SIZE)])
            for point in said:
                hit = [w for w in left if math.hypot(point.x - w[0], point.y - w[1]) <= w[2]]
                left = [w for w in left if w not in hit[:1]]
            right, total = len(walnuts) - len(left), len(walnuts) + len(said)
            found["point"].append(2 * right / total if total else 1.0)
        elif walnuts:
            found["word"].append("walnut" in one.answer)
    return {name: float(np.mean(values)) for name, values in found.items()}


def fine_tuned(data: Path, out: Path, *options: str) -> dict[str, float]:
    """What the report on old abilities says: after, less before."""
    run = ["train", "--data", str(data), "--out", str(out), "--workers", "0", "--batch-size", "1"]
    assert cli.main([*run, *options]) == 0
    found = json.loads((out / "abilities.json").read_text())
    before, after = found["before"]["emoji"], found["after"]["emoji"]
    return {row: after[row] - before[row] for row in before}


@pytest.mark.slow
def test_tiny_learns_a_thing_it_does_not_know_and_keeps_what_it_knows(
    tmp_path: Path, capsys
) -> None:
    """Three minutes on a free core. Measured: counts .00 -> .67, points .17 -> .75, the word .00 ->
    1.00 (with the vision encoder at half of its rate .58, .73, .95); of the emoji presence stayed,
    counts fell by .12 (.08), points by .35 (.31).
    """
    before = scores("tiny")
    assert before["word"] == 0  # it has no such word
    lost = fine_tuned(write_data(tmp_path), tmp_path / "run", "--steps", "60")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 new word: walnut;" in said
    assert "mixing in 30% of what tiny was trained on (emoji)" in said
    assert "what it could do before (emoji, 96 questions): before -> after" in said
    after = scores(str(tmp_path / "run" / "model"))
    assert after["count"] >= before["count"] + 0.3
    assert after["point"] >= before["point"] + 0.3
    assert after["word"] >= 0.6
    assert lost["presence"] >= -0.15 and lost["count"] >= -0.3 and lost["caption_f1"] >= -0.2
    assert lost["point_f1"] >= -0.6  # coordinates suffer the most


@pytest.mark.slow
def test_without_replay_the_report_says_what_was_forgotten(tmp_path: Path, capsys) -> None:
    """One minute on a free core."""
    options = ("--replay", "0", "--steps", "15", "--lr", "2e-3")
    lost = fine_tuned(write_data(tmp_path), tmp_path / "run", *options)
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing of what tiny was trained on is mixed in: it may forget what it knows" in said
    assert lost["caption_f1"] < -0.2
    assert "it forgot some of what it could do before: " in said
    assert said.endswith("; try --replay 0.3") or "; try --replay 0.3 " in said
