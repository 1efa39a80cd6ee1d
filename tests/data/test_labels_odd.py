"""Labels that are legal and odd: each is told, and none of them becomes a wrong truth."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from nanomolmo2.data.labels.export import export_predictions
from nanomolmo2.data.labels.importing import import_labels
from nanomolmo2.data.labels.questions import Asking
from nanomolmo2.data.split_file import split_file
from tests.data.sources import write_records
from tests.data.test_labels import asked, box, coco, pictures, records
from tests.data.test_labels_export import line
from tests.data.test_labels_formats import run, save

__all__ = ["pictures"]  # the fixture


def test_a_picture_listed_twice_is_asked_about_once(pictures: Path, tmp_path: Path) -> None:
    """Each entry was asked for what only the other one marks: "How many cats?" had the answer that
    there are none, of a picture with a cat.
    """
    images = [{"id": i, "file_name": "a.png", "width": 80, "height": 60} for i in (1, 2)]
    found = [box(1, 1, 10, 10, 20, 10), box(2, 2, 0, 0, 10, 10), box(2, 1, 10, 10, 20, 10)]
    labels = coco(tmp_path / "coco.json", found, images=images)
    report = import_labels(labels, tmp_path / "my.jsonl", "coco", asking=Asking(("count",)))
    (record,) = records(tmp_path / "my.jsonl")
    assert asked(record) == {
        "How many stop signs are there?": {"count": 1},
        "How many cats are there?": {"count": 1},
    }
    assert list(report.notes.counts) == [
        "picture that is listed again: what is said of it is taken together"
    ]


def test_a_mask_that_cannot_be_is_told_and_its_box_taken(pictures: Path, tmp_path: Path) -> None:
    """A size of 10^6 x 10^6 asked for a terabyte."""
    mask = {"size": [10**6, 10**6], "counts": [10**12]}
    labels = coco(tmp_path / "coco.json", [box(1, 1, 10, 10, 20, 10, segmentation=mask)])
    report = import_labels(labels, tmp_path / "my.jsonl", "coco", asking=Asking(("point",), 0))
    (record,) = records(tmp_path / "my.jsonl")
    assert asked(record)["Point to the stop sign."] == {
        "points": [[20, 15]],
        "boxes": [[10, 10, 30, 20]],
    }
    assert report.dropped.counts["mask that is not readable: its box is taken"] == 1


def test_a_question_about_classes_has_one_answer(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    tags = '<tag label="indoor"/><tag label="night"/><tag label="indoor"/>'
    (tmp_path / "annotations.xml").write_text(
        f'<annotations><image name="a.png" width="80" height="60">{tags}</image></annotations>'
    )
    (record,), _ = run(tmp_path, "cvat")
    assert asked(record) == {"What does this picture show?": {"answers": ["indoor, night"]}}


def test_single_values_of_json_min(tmp_path: Path) -> None:
    """They stand as texts among the fields of the task."""
    save(tmp_path / "a.png")
    task = {"id": 1, "image": "a.png", "choice": "Cat", "note": "x", "created_at": "2024-01-01"}
    (tmp_path / "min.json").write_text(json.dumps([task]))
    (record,), report = run(tmp_path / "min.json", "label-studio")
    assert asked(record) == {"What does this picture show?": {"answers": ["cat"]}}
    assert report.dropped.first == {
        "text of JSON-MIN, which does not say whether it is a label: export as JSON": "task 1: note"
    }


def test_yolo_takes_data_yaml_before_others_and_tells_of_keypoints(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.4 .4 .4 2 .6 .6 2\n")
    (tmp_path / "aug.yaml").write_text("hsv: 1\n")
    (tmp_path / "data.yaml").write_text("train: images\nkpt_shape: [2, 3]\nnames: [cat]\n")
    (record,), report = run(tmp_path, "yolo")
    assert asked(record)["Point to the cat."]["points"] == [[40, 30]]
    assert report.dropped.counts == {"keypoints of a pose, whose names nobody tells": 2}
    with pytest.raises(ValueError, match="no part 'val', only train: name another --part"):
        run(tmp_path, "yolo", part="val")


def test_fiftyone_without_labels_is_told(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png")
    save(tmp_path / "data" / "b.png", 1)
    thing = {"_cls": "Detection", "label": "cat", "bounding_box": [0.25, 0.5, 0.25, 0.25]}
    truth = {"_cls": "Detections", "detections": [thing]}
    samples = [
        {"filepath": "data/a.png", "ground_truth": truth},
        {"filepath": "data/b.png", "ground_truth": None},
    ]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    _, report = run(tmp_path, "fiftyone")
    assert report.notes.first == {
        "picture without labels: taken as one that shows nothing": "data/b.png"
    }
    with pytest.raises(ValueError, match="it has ground_truth: name one by --part"):
        run(tmp_path, "fiftyone", part="seg")


@pytest.mark.parametrize(("places", "is_told"), [("0.5,0.25", 1), ("1,1", 0), ("0.5,30", 0)])
def test_shares_that_are_taken_as_pixels_are_told(
    tmp_path: Path, places: str, is_told: int
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "my.csv").write_text(f"image,label,x,y\na.png,cat,{places}\n")
    _, report = run(tmp_path / "my.csv", "csv")
    assert sum("--points-scale" in note for note in report.notes.counts) == is_told


def test_predictions_that_label_studio_cannot_show(tmp_path: Path) -> None:
    """A picture above the document root, and a label with a code for terminals, which is no XML."""
    answer = '<points coords="1 1 500 500">\x1bcat</points>'
    predictions = write_records(tmp_path / "predictions.jsonl", line("a.png", answer))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "tasks.json"
    report = export_predictions(predictions, out, "label-studio")
    assert "noted: 1 x picture outside of the document root" in report.lines()[-1]
    (label,) = ElementTree.parse(out.with_suffix(".label_config.xml")).iter("Label")
    assert label.get("value") == "cat"
    report = export_predictions(predictions, out, "label-studio", root=tmp_path)
    assert not report.notes.counts


def test_predictions_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"line 1 is not valid JSON .*: nothing was written"):
        export_predictions(tmp_path / "predictions.jsonl", tmp_path / "out.json", "coco")
    assert not (tmp_path / "out.json").exists()


def test_a_split_tells_which_pictures_are_not_there(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "a.png")
    data = write_records(
        tmp_path / "my.jsonl", *({"image": n, "question": "?", "answer": "1"} for n in names)
    )
    save(tmp_path / "b.png")
    about = split_file(data, tmp_path / "parts", [0.4])
    assert about["missing_pictures"] == ["a.png"]
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        split_file(data, tmp_path / "other", [0.4], images=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()
