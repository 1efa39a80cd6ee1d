"""Labels of Label Studio, CVAT, YOLO, FiftyOne and tables, in the layouts that these publish."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanomolmo2.data.labels.importing import import_labels
from nanomolmo2.data.labels.questions import Asking
from nanomolmo2.data.labels.report import ImportReport
from nanomolmo2.data.labels.shapes import mask_of
from nanomolmo2.data.labels.yaml import parse_yaml
from nanomolmo2.data.record import address_key
from tests.data.sources import picture
from tests.data.test_labels import asked, records

SIZE = WIDTH, HEIGHT = 80, 60


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, WIDTH, HEIGHT).save(path)


def run(path: Path, format: Any, **options: Any) -> tuple[list[dict[str, Any]], ImportReport]:
    """Records (only what the labels say) and the report."""
    options.setdefault("asking", Asking(negatives=0))
    out = (path if path.is_dir() else path.parent) / "out.jsonl"
    report = import_labels(path, out, format, **options)
    return records(out), report


# ---- Label Studio ----


def result(kind: str, **value: Any) -> dict[str, Any]:
    sides = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {
        "id": "x1",
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "value": value,
        **sides,
    }


def studio(path: Path, *results: dict[str, Any], image: str = "a.png", **more: Any) -> Path:
    task = {"id": 1, "data": {"image": image}, "annotations": [{"id": 5, "result": list(results)}]}
    path.write_text(json.dumps([{**task, **more}]))
    return path


def test_label_studio(tmp_path: Path) -> None:
    """Places are percent; a rectangle turns around its first corner, clockwise."""
    save(tmp_path / "a.png")
    results = [
        result(
            "rectanglelabels", x=25, y=50, width=50, height=25, rotation=0, rectanglelabels=["Car"]
        ),
        result(
            "rectanglelabels", x=50, y=0, width=25, height=20, rotation=90, rectanglelabels=["Bus"]
        ),
        result("keypointlabels", x=10, y=10, width=0.5, keypointlabels=["nose"]),
        result("polygonlabels", points=[[0, 0], [50, 0], [50, 50], [0, 50]], polygonlabels=["mat"]),
        result(
            "ellipselabels", x=50, y=50, radiusX=25, radiusY=25, rotation=0, ellipselabels=["egg"]
        ),
        result("choices", choices=["sunny"]) | {"from_name": "weather"},
        result("textarea", text=["Two cars."]) | {"from_name": "caption"},
        {"type": "relation", "from_id": "x1", "to_id": "x2", "direction": "right"},
        result("rectanglelabels", x=0, y=0, width=5, height=5, rectanglelabels=[]),
    ]
    (record,), report = run(studio(tmp_path / "export.json", *results), "label-studio")
    truth = asked(record)
    assert truth["Point to the car."] == {"points": [[40, 37.5]], "boxes": [[20, 30, 60, 45]]}
    # 20 x 12 pixels at 40, 0; turned it hangs down on the left of that corner.
    assert truth["Point to the bus."]["boxes"] == [[28, 0, 40, 20]]
    assert truth["Point to the bus."]["points"] == [[34, 10]]
    assert truth["Point to the nose."] == {"points": [[8, 6]]}
    assert truth["Point to the mat."]["masks"] == [[[0, 0], [40, 0], [40, 30], [0, 30]]]
    assert truth["Point to the egg."]["boxes"] == [[20, 15, 60, 45]]
    assert truth["Point to the egg."]["points"] == [[40, 30]]
    assert truth["What is the weather?"] == {"answers": ["sunny"]}
    assert truth["Caption this picture."]["answers"] == ["Two cars."]
    assert report.dropped.counts == {"not readable": 1, "without a label": 1}


def test_label_studio_brush(tmp_path: Path) -> None:
    """The bytes were written by label-studio-sdk 2.1.2 (converter.brush.mask2rle) for this mask."""
    save(tmp_path / "a.png")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 30:45] = True
    brush = result("brushlabels", format="rle", rle=BRUSH, brushlabels=["leaf"])
    (record,), _ = run(studio(tmp_path / "export.json", brush), "label-studio")
    truth = asked(record)["Point to the leaf."]
    assert np.array_equal(mask_of(truth["masks"][0]), mask)
    assert truth["boxes"] == [[30, 10, 45, 20]]
    broken = result("brushlabels", format="rle", rle=BRUSH[:20], brushlabels=["leaf"])
    with pytest.raises(ValueError, match="1 x not readable"):
        run(studio(tmp_path / "export.json", broken), "label-studio")


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/data/local-files/?d=shop/day%201/a.png", "shop/day 1/a.png"),
        ("/data/upload/12/1a2b3c4d-a.png", "a.png"),
        ("/data/upload/12/1a2b3c4d-a.png", "upload/1a2b3c4d-a.png"),
        ("https://example.org/photos/a.png?size=2", "photos/a.png"),
        ("https://example.org/photos/17", f"{address_key('https://example.org/photos/17')}.png"),
        ("s3://bucket/photos/a.png", "a.png"),
        ("C:\\photos\\a.png", "a.png"),
    ],
)
def test_names_of_pictures_in_label_studio(tmp_path: Path, image: str, file: str) -> None:
    save(tmp_path / "here" / file)
    save(tmp_path / "here" / "other" / "b.png", 1)
    point = result("keypointlabels", x=10, y=10, keypointlabels=["nose"])
    path = studio(tmp_path / "export.json", point, image=image)
    (record,), _ = run(path, "label-studio", images=tmp_path / "here")
    assert record["image"] == f"here/{file}"


def test_label_studio_tasks_that_nobody_finished(tmp_path: Path) -> None:
    """No annotation says nothing, an empty one that there is nothing; the last one counts."""
    for seed, name in enumerate("abcd"):
        save(tmp_path / f"{name}.png", seed)

    def cat(x: int) -> dict[str, Any]:
        return result("keypointlabels", x=x, y=50, keypointlabels=["cat"])

    annotations = {
        "a": [],
        "b": [{"result": []}],
        "c": [{"result": [cat(10)], "was_cancelled": True}],
        "d": [{"result": [cat(10)]}, {"result": [cat(20)]}],
    }
    tasks = [
        {"id": i, "data": {"image": f"{name}.png"}, "annotations": given}
        for i, (name, given) in enumerate(annotations.items())
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    (b, d), report = run(tmp_path / "export.json", "label-studio", asking=Asking(("point",)))
    assert (b["image"], asked(b)) == ("b.png", {"Point to the cat.": {"points": []}})
    assert (d["image"], asked(d)) == ("d.png", {"Point to the cat.": {"points": [[16, 30]]}})
    assert report.dropped.first["task without an annotation"] == "task 0"
    assert report.dropped.counts["task without an annotation"] == 2


def test_label_studio_json_min(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    sides = {"original_width": WIDTH, "original_height": HEIGHT}
    item = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0, "rectanglelabels": ["Car"]}
    task = {
        "image": "a.png",
        "id": 1,
        "label": [{**item, **sides}],
        "choice": {"choices": ["x", "y"]},
    }
    (tmp_path / "min.json").write_text(json.dumps([task]))
    (record,), _ = run(tmp_path / "min.json", "label-studio")
    assert asked(record)["Point to the car."]["boxes"] == [[20, 30, 60, 45]]
    assert asked(record)["What does this picture show?"] == {"answers": ["x, y"]}


# ---- CVAT ----

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><labels><label><name>car</name></label></labels></task></meta>
  <image id="0" name="day 1/a.png" subset="default" width="80" height="60">
    <box label="car" source="manual" occluded="0" xtl="10.00" ytl="20.00" xbr="30.00" ybr="30.00">
      <attribute name="colour">red</attribute>
    </box>
    <box label="van" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90.0" z_order="0"/>
    <polygon label="mat" points="0.00,0.00;40.00,0.00;40.00,30.00;0.00,30.00" z_order="0"/>
    <polyline label="lane" points="0,0;30,0;30,10" z_order="0"/>
    <points label="wheel" points="1.5,2.5;50,40" z_order="0"/>
    <ellipse label="egg" cx="40.00" cy="30.00" rx="20.00" ry="10.00" rotation="90" z_order="0"/>
    <mask label="leaf" rle="1, 2, 2, 1" left="5" top="6" width="3" height="2" z_order="0"/>
    <skeleton label="man" z_order="0">
      <points label="head" occluded="0" outside="0" points="10,10"/>
      <points label="hip" occluded="0" outside="0" points="12,22"/>
      <points label="foot" occluded="0" outside="0" points="10,40"/>
      <points label="hand" occluded="0" outside="1" points="99,99"/>
    </skeleton>
    <tag label="daylight" source="manual"/>
    <cuboid label="car" xtl1="1" ytl1="1" z_order="0"/>
    <mask label="leaf" rle="1, 2" left="5" top="6" width="3" height="2" z_order="0"/>
    <points label="wheel" points="1.5" z_order="0"/>
  </image>
</annotations>
"""


def test_cvat(tmp_path: Path) -> None:
    save(tmp_path / "images" / "day 1" / "a.png")
    (tmp_path / "annotations.xml").write_text(CVAT)
    (record,), report = run(tmp_path / "annotations.xml", "cvat")
    assert record["image"] == "images/day 1/a.png"
    truth = asked(record)
    assert truth["Point to the car."] == {"points": [[20, 25]], "boxes": [[10, 20, 30, 30]]}
    assert truth["Point to the van."]["boxes"] == [[25, 15, 35, 35]]  # turned around its centre
    assert truth["Point to the mat."]["points"] == [[20, 15]]
    assert truth["Point to the lane."] == {"points": [[20, 0]]}  # halfway along 40 pixels
    assert truth["Point to the wheel."] == {"points": [[1.5, 2.5], [50, 40]]}
    assert truth["How many wheels are there?"] == {"count": 2}
    assert truth["Point to the egg."]["boxes"] == [[30, 10, 50, 50]]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[6, 6:8] = mask[7, 7] = True
    assert np.array_equal(mask_of(truth["Point to the leaf."]["masks"][0]), mask)
    assert truth["Point to the man."] == {"points": [[12, 22]]}  # nearest to the middle of three
    assert truth["What does this picture show?"] == {"answers": ["daylight"]}
    assert report.dropped.counts == {
        "attribute of a thing": 1,
        "part of a skeleton that is outside": 1,
        "unknown shape": 1,
        "not readable": 2,
    }


def test_cvat_as_a_zip_and_as_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "images" / "day 1" / "a.png")
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("annotations.xml", CVAT)
    (record,), _ = run(tmp_path / "export.zip", "cvat")
    (tmp_path / "annotations.xml").write_text(CVAT)
    import_labels(tmp_path, tmp_path / "again.jsonl", "cvat", asking=Asking(negatives=0))
    assert records(tmp_path / "again.jsonl") == [record]
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("labels.xml", CVAT)
    with pytest.raises(ValueError, match=r"is no zip with an annotations.xml in it"):
        run(tmp_path / "export.zip", "cvat")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>', "has a document type"),
        ('<!DOCTYPE a SYSTEM "/etc/passwd"><annotations/>', "has a document type"),
        ("<annotations>", "is not valid XML"),
        ("", "is not valid XML"),
        ("<html/>", "begins with <html>, expected CVAT's <annotations>"),
        ('<annotations><track id="0"/></annotations>', "holds the tracks of a video"),
        ("<annotations/>", "it names no pictures"),
    ],
)
def test_files_that_are_no_cvat(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "annotations.xml").write_text(content)
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "annotations.xml", "cvat")


# ---- YOLO ----


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """images/train/{a,b}.jpg and images/val/c.jpg, with labels of a and c."""
    for seed, name in enumerate(("train/a.jpg", "train/b.jpg", "val/c.jpg")):
        save(tmp_path / "images" / name, seed)
        (tmp_path / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text(
        "0 0.5 0.5 0.25 0.5\n"
        "1 0 0 0.5 0 0.5 0.5 0 0.5\n"
        "7 0.5 0.5 0.1 0.1\n"
        "0 0.5 0.5 0 0.1\n"
        "0 1.9 0.5 0.1 0.1\n"
        "0 0.5 0.5\n"
        "dog 0.5 0.5 0.1 0.1\n"
        "\n"
    )
    (tmp_path / "labels" / "val" / "c.txt").write_text("0 0.25 0.5 0.1 0.1 0.93\n")
    data = (
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: stop_sign\n  1: 'door mat'\n"
    )
    (tmp_path / "data.yaml").write_text(data)
    return tmp_path


def test_yolo(yolo: Path) -> None:
    (a, c), report = run(yolo / "data.yaml", "yolo")
    assert a["image"] == "images/train/a.jpg"
    assert asked(a)["Point to the stop sign."] == {
        "points": [[40, 30]],
        "boxes": [[30, 15, 50, 45]],
    }
    assert asked(a)["Point to the door mat."]["masks"] == [[[0, 0], [40, 0], [40, 30], [0, 30]]]
    assert asked(c)["Point to the stop sign."]["boxes"] == [[16, 27, 24, 33]]
    assert report.dropped.counts == {
        "without a label": 1,
        "shape without a size": 1,
        "outside of the picture": 1,
        "not readable": 2,
        "score at the end of a line, left out": 1,
        "picture of which nothing is asked": 1,
    }
    assert report.dropped.first["without a label"].endswith("a.txt, line 3: class 7 has no name")
    assert report.notes.counts == {
        "parts taken together, --part takes one": 2,
        "picture without a text of labels: taken as one that shows nothing": 1,
    }


def test_one_part_of_yolo_and_pictures_that_show_nothing(yolo: Path) -> None:
    (_, b), _ = run(yolo, "yolo", part="train", asking=Asking(("count",), negatives=2))
    assert asked(b) == {
        "How many door mats are there?": {"count": 0},
        "How many stop signs are there?": {"count": 0},
    }
    with pytest.raises(ValueError, match="has no part 'test', only train, val"):
        run(yolo, "yolo", part="test")


def test_yolo_texts_without_their_pictures(yolo: Path) -> None:
    (yolo / "images" / "train" / "a.jpg").unlink()
    _, report = run(yolo, "yolo")
    assert report.dropped.first["missing picture"] == f"of {yolo}/labels/train/a.txt"
    for name in ("train/b.jpg", "val/c.jpg"):
        (yolo / "images" / name).unlink()
    with pytest.raises(ValueError, match=r"none of the \d pictures|nothing in"):
        run(yolo, "yolo")


def test_yolo_poses_have_boxes(yolo: Path) -> None:
    (yolo / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.25 0.5 0.4 0.4 2 0.6 0.6 2\n")
    (yolo / "data.yaml").write_text("train: images/train\nnames: [man]\nkpt_shape: [2, 3]\n")
    (a,), _ = run(yolo, "yolo")
    assert asked(a)["Point to the man."] == {"points": [[40, 30]], "boxes": [[30, 15, 50, 45]]}


def test_yolo_without_yaml_and_lists_of_pictures(yolo: Path) -> None:
    (yolo / "data.yaml").unlink()
    (yolo / "classes.txt").write_text("stop_sign\nmat\n")
    found, _ = run(yolo, "yolo")
    assert [record["image"] for record in found] == ["images/train/a.jpg", "images/val/c.jpg"]
    (yolo / "train.txt").write_text("./images/val/c.jpg\n/elsewhere/gone.jpg\n")
    (yolo / "data.yaml").write_text("train: train.txt\nnames: [stop_sign]\n")
    (record,), report = run(yolo, "yolo")
    assert record["image"] == "images/val/c.jpg"
    assert report.dropped.counts["missing picture"] == 1
    (yolo / "data.yaml").unlink()
    (yolo / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"neither a data.yaml nor a classes.txt"):
        run(yolo, "yolo")


KEYS = ("path", "train", "names", "kpt_shape")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: ../a b # root\ntrain: 'x # y'\n", {"path": "../a b", "train": "x # y"}),
        ('names:\n  0: cat\n  1: "dog\'s" # no\n', {"names": {"0": "cat", "1": "dog's"}}),
        ("names: ['a', \"b c\",\n  d e, 'it''s',]\n", {"names": ["a", "b c", "d e", "it's"]}),
        ("names: {0: a, 1: 'b, c'}\n", {"names": {"0": "a", "1": "b, c"}}),
        ("train:\n- a\n- b\nnames:\n", {"train": ["a", "b"], "names": ""}),
        (
            "---\ndownload: |\n  - x: [\n  for i in y: z\nkpt_shape: [17, 3]\n",
            {"kpt_shape": ["17", "3"]},
        ),
        ("names:\n  2: bob's car # it's\n", {"names": {"2": "bob's car"}}),
        ("roboflow:\n  names: {a: [b]}\n  path: c\npath: d\n", {"path": "d"}),
    ],
)
def test_yaml_as_pyyaml_reads_it(text: str, expected: Any) -> None:
    yaml = pytest.importorskip("yaml")
    found = parse_yaml(text, Path("data.yaml"), KEYS)
    assert found == expected

    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): texts(inner) for key, inner in value.items()}
        return [texts(inner) for inner in value] if isinstance(value, list) else str(value or "")

    loaded = yaml.safe_load(text)
    assert found == {key: texts(loaded[key]) for key in KEYS if key in loaded}


@pytest.mark.parametrize(
    "text",
    ["names:\n  - {a: b}\n", "names: *x\n", "names: [a, [b]]\n", "names: [a\n", "names: |\n  a\n"],
)
def test_other_yaml_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"data.yaml, line [12] .* is YAML of a form that is not"):
        parse_yaml(text, Path("data.yaml"), KEYS)


# ---- FiftyOne ----


def samples(path: Path, **fields: Any) -> Path:
    value = {"filepath": "data/a.png", "tags": [], "_media_type": "image", "metadata": None}
    path.mkdir(exist_ok=True)
    save(path / "data" / "a.png")
    (path / "samples.json").write_text(json.dumps({"samples": [{**value, **fields}]}))
    return path


def detections(*things: dict[str, Any]) -> dict[str, Any]:
    return {"_cls": "Detections", "detections": [{"_cls": "Detection", **t} for t in things]}


def test_fiftyone_data_set(tmp_path: Path) -> None:
    truth = detections(
        {"label": "car", "bounding_box": [0.25, 0.5, 0.5, 0.25]},
        {"label": "car", "bounding_box": [0.25, 0.5, 0, 0.25]},
        {"bounding_box": [0.25, 0.5, 0.1, 0.25]},
    )
    model = detections({"label": "bus", "bounding_box": [0, 0, 1, 1], "confidence": 0.9})
    folder = samples(tmp_path / "set", ground_truth=truth, predictions=model)
    (record,), report = run(folder, "fiftyone")
    assert record["image"] == "data/a.png"
    assert asked(record)["Point to the car."] == {
        "points": [[40, 37.5]],
        "boxes": [[20, 30, 60, 45]],
    }
    assert report.dropped.counts == {"shape without a size": 1, "without a label": 1}
    (record,), _ = run(folder / "samples.json", "fiftyone", part="predictions")
    assert asked(record).keys() == {"Point to the bus.", "How many buses are there?"}
    folder = samples(tmp_path / "set", one=truth, two=model)
    with pytest.raises(ValueError, match="no labels in the field 'ground_truth', it has one, two"):
        run(folder, "fiftyone")


def test_fiftyone_keypoints_lines_and_classes(tmp_path: Path) -> None:
    points = {"_cls": "Keypoint", "label": "nose", "points": [[0.5, 0.5], [math.nan, math.nan]]}
    line = {
        "_cls": "Polyline",
        "label": "mat",
        "points": [[[0, 0], [0.5, 0], [0.5, 0.5], [0, 0.5]]],
    }
    cases = {
        "Point to the nose.": {"_cls": "Keypoints", "keypoints": [points]},
        "Point to the mat.": {"_cls": "Polylines", "polylines": [line | {"closed": True}]},
        "What does this picture show?": {"_cls": "Classification", "label": "park"},
    }
    found = {
        question: asked(run(samples(tmp_path / "set", ground_truth=value), "fiftyone")[0][0])[
            question
        ]
        for question, value in cases.items()
    }
    assert found["Point to the nose."] == {"points": [[40, 30]]}
    assert found["Point to the mat."]["masks"] == [[[0, 0], [40, 0], [40, 30], [0, 30]]]
    assert found["What does this picture show?"] == {"answers": ["park"]}


def test_fiftyone_labels(tmp_path: Path) -> None:
    """labels.json names pictures without their ending, and labels by number or name."""
    for seed, name in enumerate("abc"):
        save(tmp_path / "data" / f"{name}.png", seed)
    labels = {
        "a": [{"label": 1, "bounding_box": [0.25, 0.5, 0.5, 0.25]}],
        "b": [{"label": "tram", "bounding_box": [0, 0, 0.5, 0.5]}],
        "c": 0,
        "d": None,
    }
    content = {"classes": ["car", "bus"], "labels": labels}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (a, b, c), report = run(tmp_path / "labels.json", "fiftyone")
    assert asked(a)["Point to the bus."]["boxes"] == [[20, 30, 60, 45]]
    assert asked(b)["Point to the tram."]["boxes"] == [[0, 0, 40, 30]]
    assert asked(c) == {"What does this picture show?": {"answers": ["car"]}}
    assert report.dropped.counts == {"missing picture": 1}
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match="neither 'samples' nor 'labels'"):
        run(tmp_path / "labels.json", "fiftyone")


# ---- tables ----


def table(folder: Path, text: str, **options: Any) -> tuple[list[dict[str, Any]], ImportReport]:
    for seed, name in enumerate("ab"):
        save(folder / f"{name}.png", seed)
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return run(folder / "labels.csv", "csv", **options)


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (
            "image,label,x,y\na.png,Bolt,10,20\na.png,Bolt,30.5,40\n",
            {"points": [[10, 20], [30.5, 40]]},
        ),
        (
            "image,label,x,y,image_width,image_height\na.png,bolt,10,20,80,60\n",
            {"points": [[10, 20]]},
        ),
        ("\ufefffilename;class;X;Y\r\na.png;bolt;10,5;20\r\n", {"points": [[10.5, 20]]}),
        ("a.png\tbolt\t10\t20\n", {"points": [[10, 20]]}),
        ("a.png,10,20,30,40,bolt\n", {"points": [[20, 30]], "boxes": [[10, 20, 30, 40]]}),
        (
            "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,80,60,bolt,10,20,30,40\n",
            {"points": [[20, 30]], "boxes": [[10, 20, 30, 40]]},
        ),
        (
            "image,x1,y1,x2,y2,label\na.png,10,20,30,40,bolt\n",
            {"points": [[20, 30]], "boxes": [[10, 20, 30, 40]]},
        ),
        (
            "image,label,x0,y0,x1,y1\na.png,bolt,10,20,30,40\n",
            {"points": [[20, 30]], "boxes": [[10, 20, 30, 40]]},
        ),
        (
            'image|label|x|y|w|h\n"a.png"|bolt|10|20|20|20\n',
            {"points": [[20, 30]], "boxes": [[10, 20, 30, 40]]},
        ),
    ],
)
def test_tables_of_places(tmp_path: Path, text: str, truth: dict[str, Any]) -> None:
    (record,), report = table(tmp_path, text)
    assert asked(record)["Point to the bolt."] == truth
    assert not report.dropped.counts


def test_tables_of_other_things(tmp_path: Path) -> None:
    (a, b), _ = table(tmp_path, "image,label,count\na.png,bolt,3\na.png,nut,0\nb.png,bolt,1\n")
    assert asked(a) == {
        "How many bolts are there?": {"count": 3},
        "How many nuts are there?": {"count": 0},
    }
    assert [branch["answer"] for branch in a["branches"]] == ["3", "There are none."]
    (a, b), _ = table(tmp_path, 'image,caption\na.png,"A bolt, new."\nb.png,A nut.\n')
    assert asked(a)["Caption this picture."] == {"answers": ["A bolt, new."]}
    (a,), _ = table(tmp_path, "image,question,answer\na.png,Is it new?,Yes\na.png,Of steel?,No\n")
    assert asked(a) == {"Is it new?": {"answers": ["Yes"]}, "Of steel?": {"answers": ["No"]}}
    (a, b), _ = table(tmp_path, "image,label\na.png,ripe\nb.png,green\n")
    assert asked(b) == {"What does this picture show?": {"answers": ["green"]}}


def test_a_table_says_what_is_not_there(tmp_path: Path) -> None:
    """A label without a place: none of it; no label either: none of any."""
    text = "image,label,x,y\na.png,bolt,,\na.png,nut,5,5\nb.png,,,\n"
    (a, b), _ = table(tmp_path, text, asking=Asking(("count",), negatives=3))
    assert asked(a) == {
        "How many nuts are there?": {"count": 1},
        "How many bolts are there?": {"count": 0},
    }
    assert asked(b) == {"How many nuts are there?": {"count": 0}}


def test_scales_and_mistakes_of_tables(tmp_path: Path) -> None:
    text = "image,label,x,y\na.png,bolt,0.5,0.25\n"
    for scale, factor in (("unit", 1), ("percent", 100), ("thousandths", 1000)):
        scaled = f"image,label,x,y\na.png,bolt,{0.5 * factor},{0.25 * factor}\n"
        (record,), _ = table(tmp_path, scaled, points_scale=scale)
        assert asked(record)["Point to the bolt."] == {"points": [[40, 15]]}
    text = (
        "image,label,x,y\na.png,bolt,1,2\na.png,bolt,80.5,2\na.png,bolt,one,2\na.png,,3,4\n"
        "a.png,bolt,5,\n,bolt,1,2\ngone.png,bolt,1,2\n"
    )
    (record,), report = table(tmp_path, text)
    assert asked(record)["How many bolts are there?"] == {"count": 1}
    assert report.dropped.first == {
        "outside of the picture": "line 3 of labels.csv",
        "not readable": "line 7: it names no picture",
        "without a label": "line 5 of labels.csv",
        "missing picture": "gone.png",
    }
    assert report.dropped.counts["not readable"] == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: expected lines such as"),
        ("foo,bar\n1,2\n", r"none of its columns \(foo, bar\) is called image"),
        ("image,x,y\na.png,1,2\n", "says nothing of its pictures"),
        ("image,question\na.png,What?\n", "says nothing of its pictures"),
        (
            "image,label,x,y,width,height\na.png,b,1,2,3,4\n",
            "call them x, y, w and h if they are a",
        ),
    ],
)
def test_tables_that_say_nothing(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table(tmp_path, text)


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("image,label\na.png,Vögel\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"is no text in UTF-8 .*: save it as UTF-8"):
        run(tmp_path / "labels.csv", "csv")


BRUSH = list(
    bytes.fromhex(
        "00004b00391bff0cf700c77ffc040c031dfff010300c77ffc040c031dfff010300c77ffc040c031dfff01030"
        "0c77ffc040c031dfff010300c77ffc040c031dfff328b000"
    )
)
