"""Evaluation of point models: what reads answers gets text coordinates, and finds the same places.

The model has random weights: what is right here is what it answers.
"""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.emoji.exam import make_exam
from nanomolmo2.evaluation import evaluate
from nanomolmo2.evaluation.exam import answer_all, score
from nanomolmo2.evaluation.lmms_eval import Requests
from nanomolmo2.generation.answer import SELECTED
from nanomolmo2.generation.pipeline import Answer, Pipeline
from nanomolmo2.processor import parse_points
from tests.golden_points import golden_folder, picture

QUESTIONS = ("Point to the lamps.", "Point to the eggs.", "Where?")
LENGTH = 40  # of answers, which never end by themselves


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_pretrained(golden_folder(tmp_path_factory.mktemp("golden") / "model"))


@pytest.fixture(scope="module")
def answers(pipeline: Pipeline) -> list[Answer]:
    shot = picture(0, (150, 100))
    return [pipeline.ask(shot, question, max_new_tokens=LENGTH) for question in QUESTIONS]


def boxes(answer: Answer) -> list[list[float]]:
    """Around each point, wider than what thousandths round off."""
    return [[p.x - 0.3, p.y - 0.3, p.x + 0.3, p.y + 0.3] for p in answer.points]


@pytest.fixture
def data(tmp_path: Path, answers: list[Answer]) -> Path:
    picture(0, (150, 100)).save(tmp_path / "lamps.png")
    records: list[dict[str, Any]] = [
        {"image": "lamps.png", "question": question, "boxes": boxes(answer)}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    nowhere = [[0, 0, 0.1, 0.1]]
    records.append({"image": "lamps.png", "question": "Point to the cups.", "boxes": nowhere})
    path = tmp_path / "lamps.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_model_points(answers: list[Answer]) -> None:
    """Or all of this would say nothing."""
    assert all(answer.points for answer in answers)
    assert all(SELECTED.search(answer.text) for answer in answers)


def test_its_own_points_are_all_right(
    pipeline: Pipeline,
    data: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F1 is 1 for three questions, and 0 for the one whose truth is elsewhere."""
    monkeypatch.setattr("nanomolmo2.evaluation.run.max_new_tokens", lambda question: LENGTH)
    out = tmp_path / "out"
    report = evaluate(pipeline, data, baselines=pipeline, out=out)
    (row,) = report.rows
    assert row.score == 3 / 4
    assert row.baselines["untrained model"] == row.score
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines[3:]] == [0.0]
    for line, answer in zip(lines, answers, strict=False):
        assert not SELECTED.search(line["answer"])
        found = [(p["image"], p["id"], p["x"], p["y"]) for p in line["points"]]
        for (image, id, x, y), point in zip(found, answer.points, strict=False):
            assert (image, id) == (point.image, point.id)
            assert x == pytest.approx(point.x, abs=0.08)
            assert y == pytest.approx(point.y, abs=0.06)
    again = evaluate(pipeline, data, baselines=pipeline, out=out)  # read from the folder
    assert again.scores == report.scores


def test_an_exam_gets_coordinates(pipeline: Pipeline) -> None:
    """Batches of emoji questions; the answers are those of one by one."""
    exam = make_exam("seen", 2, tasks=("point", "count"))
    exam.benchmark = replace(exam.benchmark, max_new_tokens={"point": 40, "count": 50})
    answer_all(pipeline.model, pipeline.processor, exam, batch_size=3)
    assert score(exam).counts["count"] == 4
    assert any("<points" in one.answer for one in exam.asked)
    for one in exam.asked:
        assert not SELECTED.search(one.answer)
        images = exam.examples[one.example].images
        alone = pipeline.ask(
            images,
            str(one.branch.messages[0]["content"]),
            max_new_tokens=exam.benchmark.limit(one.branch.task),
            lookup=False,
        )
        assert one.answer == alone.coordinates
        assert len(parse_points(one.answer, alone.image_sizes)) == len(alone.points)


def test_lmms_eval_gets_coordinates(pipeline: Pipeline) -> None:
    shot = picture(0, (150, 100))
    adapter = Requests.__new__(Requests)
    adapter.pipeline, adapter.batch_size, adapter.style = pipeline, 2, ""
    given: Any = adapter
    given.task_dict = {"made_up": {"test": [{"image": shot}]}}
    given.cache_hook = types.SimpleNamespace(add_partial=lambda *kept: None)
    settings = {"max_new_tokens": LENGTH}
    arguments = (QUESTIONS[0], settings, lambda record: [record["image"]], 0, "made_up", "test")
    (text,) = adapter.generate_until([types.SimpleNamespace(args=arguments)])
    alone = pipeline.ask(shot, QUESTIONS[0], max_new_tokens=LENGTH, lookup=False)
    assert text == alone.coordinates
    assert not SELECTED.search(text)
