"""Predictions as labels for other programs, and back again."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomolmo2.data.labels.export import export_predictions
from nanomolmo2.data.labels.importing import import_labels
from nanomolmo2.data.labels.questions import Asking
from nanomolmo2.processor.points import Point, format_points, points_to_json
from tests.data.sources import picture, write_records
from tests.data.test_labels import records

WIDTH, HEIGHT = 80, 60
CAT = '<points coords="1 1 500 500 2 250 100">cat</points>'


def line(name: str, answer: str, task: str = "point", **more: Any) -> dict[str, Any]:
    """As an evaluation writes it."""
    scorer = {"point": "points"}.get(task, task)
    images = [{"path": name, "width": WIDTH, "height": HEIGHT}]
    question = {"task": task, "scorer": scorer, "question": "?", "answer": answer}
    return {**question, "images": images, **more}


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Two points, a count that repeats them, no points, a caption, and lines without pictures."""
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("ab"):
        picture(seed, WIDTH, HEIGHT).save(tmp_path / "images" / f"{name}.png")
    return write_records(
        tmp_path / "predictions.jsonl",
        line("images/a.png", f"Counting the {CAT} shows a total of 2.", "count", score=1.0),
        line("images/a.png", CAT, score=0.5),
        line("images/b.png", "There are none.", score=0.0),
        line("images/b.png", "A garden.", "caption", score=0.1),
        {**line("images/b.png", CAT), "images": []},
        {
            "question": "?",
            "text": CAT,
            "video": {"path": "a.mp4"},
            "images": line("x", "")["images"],
        },
    )


def test_coco(predictions: Path, tmp_path: Path) -> None:
    report = export_predictions(predictions, tmp_path / "out.json", "coco")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "images/a.png", "width": 80, "height": 60},
        {"id": 2, "file_name": "images/b.png", "width": 80, "height": 60},
    ]
    common = {"image_id": 1, "category_id": 1, "num_keypoints": 1, "iscrowd": 0}
    assert content["annotations"] == [
        {"id": 1, "keypoints": [40, 30, 2], **common},
        {"id": 2, "keypoints": [20, 6, 2], **common},
    ]
    assert content["categories"] == [
        {"id": 1, "name": "cat", "supercategory": "", "keypoints": ["point"], "skeleton": []}
    ]
    assert (report.pictures, report.labels) == (2, {"cat": 2})
    assert report.dropped.counts == {
        "points of a label that another question has given": 1,
        "answer without points": 1,
        "prediction that names no picture, with its width and height": 1,
        "prediction about a video": 1,
    }


def test_label_studio(predictions: Path, tmp_path: Path) -> None:
    (tmp_path / "studio").mkdir()
    out = tmp_path / "studio" / "out.json"
    export_predictions(predictions, out, "label-studio", root=tmp_path)
    first, second = json.loads(out.read_text())
    assert first["data"] == {"image": "/data/local-files/?d=images/a.png"}
    (prediction,) = first["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("nanomolmo2", 0.75)
    assert [result["value"] for result in prediction["result"]] == [
        {"x": 50, "y": 50, "width": 0.5, "keypointlabels": ["cat"]},
        {"x": 25, "y": 10, "width": 0.5, "keypointlabels": ["cat"]},
    ]
    result = prediction["result"][0]
    assert (result["original_width"], result["original_height"]) == (80, 60)
    assert len({result["id"] for result in prediction["result"]}) == 2
    assert second["predictions"][0]["result"] == []
    config = ElementTree.parse(out.with_name("out.label_config.xml")).getroot()
    keypoints = config.find("KeyPointLabels")
    assert keypoints is not None
    assert (result["type"], result["from_name"]) == ("keypointlabels", keypoints.get("name"))
    assert result["to_name"] == keypoints.get("toName") == config.find("Image").get("name")  # type: ignore[union-attr]
    assert [label.get("value") for label in keypoints] == ["cat"]


def test_what_ask_prints(tmp_path: Path) -> None:
    """Its points are in pixels already; a label may hold anything, also in the configuration."""
    picture(0, WIDTH, HEIGHT).save(tmp_path / "a b&c.png")
    label = 'nuts & "bolts"'
    point = {"image": 1, "id": 1, "label": label, "x": 8.0, "y": 6.0}
    images = [{"path": str(tmp_path / "a b&c.png"), "width": WIDTH, "height": HEIGHT}]
    answer = {"question": "?", "text": "...", "points": [point], "images": images, "video": None}
    path = write_records(tmp_path / "answers.jsonl", answer)
    export_predictions(path, tmp_path / "out.json", "label-studio")
    (task,) = json.loads((tmp_path / "out.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=a%20b%26c.png"
    assert task["predictions"][0]["result"][0]["value"]["x"] == 10
    assert "score" not in task["predictions"][0]
    config = ElementTree.parse(tmp_path / "out.label_config.xml")
    assert [found.get("value") for found in config.iter("Label")] == [label]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        ('{"question": "?", "answer": "None."}\n', "1 x prediction that names no picture"),
    ],
)
def test_predictions_of_nothing(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        export_predictions(tmp_path / "p.jsonl", tmp_path / "out.json", "coco")
    assert not (tmp_path / "out.json").exists()


def test_a_label_that_was_missed_is_in_the_configuration(tmp_path: Path) -> None:
    """Or people could not add what the model did not find."""
    picture(0, WIDTH, HEIGHT).save(tmp_path / "a.png")
    path = write_records(tmp_path / "p.jsonl", line("a.png", "There are none.", reference=CAT))
    report = export_predictions(path, tmp_path / "out.json", "label-studio")
    assert report.labels == {"cat": 0}
    assert '<Label value="cat"/>' in (tmp_path / "out.label_config.xml").read_text()
    export_predictions(path, tmp_path / "coco.json", "coco")
    assert [c["name"] for c in json.loads((tmp_path / "coco.json").read_text())["categories"]] == [
        "cat"
    ]


def test_no_predictions_are_written_over(predictions: Path) -> None:
    with pytest.raises(ValueError, match="which is read: name another place"):
        export_predictions(predictions, predictions, "coco")


PLACES = st.lists(
    st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT)), max_size=5, unique_by=lambda p: p
)


@given(things=st.dictionaries(st.sampled_from(["cat", "stop sign", "QR code"]), PLACES, min_size=1))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.parametrize("target", ["coco", "label-studio"])
def test_points_come_back_as_they_went(target: Any, things: Any, tmp_path: Path) -> None:
    """Export, correct nothing, import: the same points, to the half hundredth of a pixel."""
    picture(0, WIDTH, HEIGHT).save(tmp_path / "a.png")
    lines = []
    for label, places in things.items():
        points = [Point(x, y, id=i, label=label) for i, (x, y) in enumerate(places, start=1)]
        text = format_points(points, label, [(WIDTH, HEIGHT)])
        given = points_to_json(points, [(WIDTH, HEIGHT)])
        lines.append(line("a.png", text, points=given))
    path = write_records(tmp_path / "predictions.jsonl", *lines)
    out = tmp_path / "out.json"
    export_predictions(path, out, target)
    if target == "label-studio":  # as when somebody looks at the predictions and submits them
        tasks = json.loads(out.read_text())
        out.write_text(json.dumps([{**task, "annotations": task["predictions"]} for task in tasks]))
    expected = {label: places for label, places in things.items() if places}
    if not expected:
        return
    import_labels(out, tmp_path / "my.jsonl", target, asking=Asking(("point",), negatives=0))
    (record,) = records(tmp_path / "my.jsonl")
    found = {b["answer"]["label"]: b["truth"]["points"] for b in record["branches"]}
    assert found.keys() == expected.keys()
    for label, places in expected.items():
        assert len(found[label]) == len(places)
        for place, point in zip(places, found[label], strict=True):
            assert point == pytest.approx(place, abs=0.0051)
