"""Labels of COCO, and what all formats share: names, pictures, questions, what is dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data.labels.importing import import_labels
from nanomolmo2.data.labels.labelled import human
from nanomolmo2.data.labels.questions import Asking, article, plural
from nanomolmo2.data.labels.shapes import inside_of, inside_of_mask, mask_of, read_counts, runs_of
from nanomolmo2.data.sources import open_source
from tests.data.sources import picture

WIDTH, HEIGHT = 80, 60


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.png to d.png, of 80 x 60 pixels, all different."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate("abcd"):
        picture(seed, WIDTH, HEIGHT).save(folder / f"{name}.png")
    return folder


def coco(path: Path, annotations: list[dict[str, Any]], **more: Any) -> Path:
    """A COCO file about a.png (id 1) to d.png (id 4) with the categories of stop signs and cats."""
    images = [
        {"id": i, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate("abcd", start=1)
    ]
    content = {
        "images": images,
        "annotations": [{"id": 10 + i, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": 1, "name": "stop_sign"}, {"id": 2, "name": "cat"}],
    }
    path.write_text(json.dumps({**content, **more}))
    return path


def box(image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0, **more}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(record: dict[str, Any]) -> dict[str, Any]:
    """Question -> truth."""
    return {branch["question"]: branch["truth"] for branch in record["branches"]}


def test_boxes_become_points_counts_and_truth(pictures: Path, tmp_path: Path) -> None:
    """A box is x, y, width, height: its point is the centre; a category that is not there is asked
    for too."""
    labels = coco(tmp_path / "coco.json", [box(1, 1, 10, 10, 20, 10), box(1, 1, 50, 30, 10, 20)])
    report = import_labels(labels, tmp_path / "my.jsonl", "coco")
    first, *others = records(tmp_path / "my.jsonl")
    assert first["image"] == "pictures/a.png"
    assert asked(first) == {
        "Point to the stop sign.": {
            "points": [[20, 15], [55, 40]],
            "boxes": [[10, 10, 30, 20], [50, 30, 60, 50]],
        },
        "How many stop signs are there?": {"count": 2},
    }
    assert [record["image"] for record in others] == [f"pictures/{name}.png" for name in "bcd"]
    for record in others:  # nothing is marked there, and stop signs would have been
        assert asked(record)["How many stop signs are there?"] == {"count": 0}
    assert report.to_dict()["questions"] == {"point": 4, "count": 4}
    assert report.labels == {"stop sign": 2}
    assert not report.dropped.counts
    branches = open_source(tmp_path / "my.jsonl")[0].branches
    tag = '<points coords="1 1 250 250 2 688 667">stop sign</points>'
    assert [branch.messages[1]["content"] for branch in branches] == [
        tag,
        f"Counting the {tag} shows a total of 2.",
    ]
    branches = open_source(tmp_path / "my.jsonl")[1].branches
    assert {branch.messages[1]["content"] for branch in branches} == {"There are none."}


def test_a_point_lies_inside_of_its_shape(pictures: Path, tmp_path: Path) -> None:
    """The centre of a crescent's box is none of the crescent."""
    crescent = [10, 10, 40, 10, 40, 20, 20, 20, 20, 40, 40, 40, 40, 50, 10, 50]
    hollow = np.zeros((HEIGHT, WIDTH), bool)
    hollow[5:25, 50:70] = True
    hollow[8:22, 53:67] = False
    annotations = [
        box(1, 1, 10, 10, 30, 40, segmentation=[crescent]),
        box(2, 2, 50, 5, 20, 20, segmentation=runs_of(hollow)),
        box(
            3, 2, 0, 0, 50, 20, segmentation=[[0, 0, 10, 0, 10, 20, 0, 20], [40, 0, 50, 0, 50, 10]]
        ),
    ]
    import_labels(coco(tmp_path / "coco.json", annotations), tmp_path / "my.jsonl", "coco")
    truths = [record["branches"][0]["truth"] for record in records(tmp_path / "my.jsonl")]
    ((x, y),) = truths[0]["points"]
    assert 10 < x < 20 or not 20 < y < 40
    assert truths[0]["boxes"] == [[10, 10, 40, 50]]
    assert truths[0]["masks"] == [
        [list(p) for p in zip(crescent[::2], crescent[1::2], strict=True)]
    ]
    ((x, y),) = truths[1]["points"]
    assert hollow[int(y), int(x)]
    assert np.array_equal(mask_of(truths[1]["masks"][0]), hollow)
    assert truths[2]["points"] == [[5, 10]]  # of the larger of two parts
    assert truths[2]["masks"] == [
        [[[0, 0], [10, 0], [10, 20], [0, 20]], [[40, 0], [50, 0], [50, 10]]]
    ]


def test_what_is_dropped_is_counted_by_its_cause(pictures: Path, tmp_path: Path) -> None:
    annotations = [
        box(1, 1, 10, 10, 20, 10),
        box(1, 2, 5, 5, 0, 10),  # 11: no size
        box(2, 1, -10, 5, 30, 10),  # cut at the edge: centre 10, 10
        box(2, 1, 100, 5, 30, 10),  # 13: outside
        box(2, 1, 5, 5),  # 14: no box
        box(3, 9, 5, 5, 10, 10),  # 15: no such category
        box(4, 2, 0, 0, 30, 30, iscrowd=1),  # 16
        box(4, 1, 0, 0, 30, 30, segmentation="?"),  # its box is taken
        box(77, 1, 0, 0, 30, 30),  # 18: no such image
        box(5, 1, 0, 0, 30, 30),
    ]
    path = coco(tmp_path / "coco.json", annotations)
    content = json.loads(path.read_text())
    content["images"].append({"id": 5, "file_name": "gone.png"})
    path.write_text(json.dumps(content))
    report = import_labels(path, tmp_path / "my.jsonl", "coco")
    assert report.to_dict()["dropped"] == {
        "shape without a size": {"count": 1, "first": "annotation 11 of a.png: a box of 0 x 10"},
        "outside of the picture": {"count": 1, "first": "annotation 13 of b.png"},
        "not readable": {"count": 1, "first": "annotation 14 of b.png"},
        "category that is not listed": {"count": 1, "first": "annotation 15 of c.png: 9"},
        "crowd, whose things are not told apart": {"count": 1, "first": "annotation 16 of d.png"},
        "missing picture": {"count": 1, "first": "gone.png"},
        "annotation of a picture that is not listed": {
            "count": 1,
            "first": "annotation 18 of image 77",
        },
    }
    a, b, c, d = map(asked, records(tmp_path / "my.jsonl"))
    # A cat was marked in the first, badly: nobody knows that there is none.
    assert a.keys() == {"Point to the stop sign.", "How many stop signs are there?"}
    assert b["Point to the stop sign."] == {"points": [[10, 10]], "boxes": [[0, 5, 20, 15]]}
    assert c["How many stop signs are there?"] == {"count": 0}
    assert not any("cat" in question for question in d)
    assert d["Point to the stop sign."]["boxes"] == [[0, 0, 30, 30]]


def test_single_things_beside_a_crowd_are_pointed_at_and_not_counted(
    pictures: Path, tmp_path: Path
) -> None:
    annotations = [box(1, 2, 0, 0, 10, 10), box(1, 2, 20, 0, 50, 50, iscrowd=1)]
    import_labels(coco(tmp_path / "coco.json", annotations), tmp_path / "my.jsonl", "coco")
    assert asked(records(tmp_path / "my.jsonl")[0]).keys() == {"Point to the cat."}


def test_captions_with_the_categories_that_are_known(pictures: Path, tmp_path: Path) -> None:
    annotations = [
        box(1, 2, 0, 0, 10, 10),
        {"image_id": 1, "caption": "A cat  on a mat.\n"},
        {"image_id": 1, "caption": "The mat has a cat."},
        {"image_id": 2, "caption": " "},
    ]
    path = coco(tmp_path / "coco.json", annotations)
    report = import_labels(path, tmp_path / "my.jsonl", "coco", asking=Asking(("caption",)))
    (record,) = records(tmp_path / "my.jsonl")
    truth = {"answers": ["A cat on a mat.", "The mat has a cat."], "categories": ["cat"]}
    assert record["branches"] == [
        {"task": "caption", "question": q, "answer": a, "truth": truth}
        for q, a in zip(
            ("Caption this picture.", "Describe this picture in one sentence."),
            truth["answers"],
            strict=True,
        )
    ]
    assert report.dropped.counts == {"not readable": 1, "picture of which nothing is asked": 3}


def test_keypoints(pictures: Path, tmp_path: Path) -> None:
    """Those with names are things of their own, where they can be seen; a single one is the point
    of its thing."""
    categories = [
        {"id": 1, "name": "person", "keypoints": ["left_eye", "nose"]},
        {"id": 2, "name": "bolt", "keypoints": ["point"]},
    ]
    annotations = [
        box(1, 1, 0, 0, 40, 60, keypoints=[10, 12, 2, 14, 20, 1], num_keypoints=2),
        box(2, 2, 10, 10, 20, 20, keypoints=[12, 13, 2], num_keypoints=1),
        {"image_id": 3, "category_id": 1, "keypoints": [30, 30, 2, 40, 30, 2]},
    ]
    path = coco(tmp_path / "coco.json", annotations, categories=categories)
    import_labels(path, tmp_path / "my.jsonl", "coco", asking=Asking(negatives=0))
    a, b, c = map(asked, records(tmp_path / "my.jsonl"))
    assert a == {
        "Point to the left eye.": {"points": [[10, 12]]},
        "Point to the person.": {"points": [[20, 30]], "boxes": [[0, 0, 40, 60]]},
        "How many people are there?": {"count": 1},
    }
    assert b["Point to the bolt."] == {"points": [[12, 13]], "boxes": [[10, 10, 30, 30]]}
    assert c["Point to the person."] == {"points": [[30, 30]]}
    assert c["Point to the nose."] == {"points": [[40, 30]]}


def test_lvis_says_what_was_looked_for(pictures: Path, tmp_path: Path) -> None:
    path = coco(tmp_path / "coco.json", [box(1, 1, 0, 0, 9, 9), box(2, 2, 0, 0, 9, 9)])
    content = json.loads(path.read_text())
    for image, negative, partly in zip(
        content["images"], ([], [1], [2], []), ([1], [], [], []), strict=True
    ):
        image |= {"neg_category_ids": negative, "not_exhaustive_category_ids": partly}
    path.write_text(json.dumps(content))
    import_labels(path, tmp_path / "my.jsonl", "coco")
    a, b, c = map(asked, records(tmp_path / "my.jsonl"))
    assert a.keys() == {"Point to the stop sign."}
    assert b["How many stop signs are there?"] == {"count": 0}
    assert c.keys() == {"Point to the cat.", "How many cats are there?"}


def test_options_of_what_is_asked(pictures: Path, tmp_path: Path) -> None:
    many = [box(1, 1, 10 * i, 0, 5, 5) for i in range(4)]
    path = coco(tmp_path / "coco.json", [*many, box(2, 2, 0, 0, 9, 9)])
    asking = Asking(("presence",), negatives=0, most=3)
    report = import_labels(path, tmp_path / "my.jsonl", "coco", asking=asking)
    (record,) = records(tmp_path / "my.jsonl")
    assert record["image"] == "pictures/b.png"
    assert asked(record) == {"Is there a cat?": {"answers": ["Yes."]}}
    assert report.dropped.counts["more than 3 of a label: not asked about"] == 4
    asking = Asking(("presence",), negatives=5)
    import_labels(path, tmp_path / "my.jsonl", "coco", asking=asking)
    assert asked(records(tmp_path / "my.jsonl")[1]) == {
        "Is there a cat?": {"answers": ["Yes."]},
        "Is there a stop sign?": {"answers": ["No."]},
    }


def test_negatives_depend_on_the_seed_alone(pictures: Path, tmp_path: Path) -> None:
    categories = [{"id": i, "name": f"kind {i}"} for i in range(1, 21)]
    annotations = [box(1, i, 0, 0, 9, 9) for i in range(1, 21)]
    path = coco(tmp_path / "coco.json", annotations, categories=categories)
    made = []
    for seed in (0, 0, 1):
        import_labels(path, tmp_path / "my.jsonl", "coco", asking=Asking(negatives=3, seed=seed))
        made.append((tmp_path / "my.jsonl").read_bytes())
    assert made[0] == made[1] != made[2]
    questions = [asked(record) for record in records(tmp_path / "my.jsonl")]
    assert [len(question) for question in questions] == [40, 6, 6, 6]
    assert len({tuple(question) for question in questions[1:]}) > 1


@pytest.mark.parametrize(
    ("orientation", "place"),
    [(1, (10, 5)), (3, (70, 55)), (6, (55, 10)), (8, (5, 70)), (5, (5, 10)), (7, (55, 70))],
)
def test_labels_of_stored_pixels_turn_with_their_picture(
    tmp_path: Path, orientation: int, place: tuple[int, int]
) -> None:
    """A camera that was held upright writes lying pixels with a note. A dot at 10, 5 of the stored
    80 x 60 is found, in what training sees, at the place that the labels get."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    image.paste("red", (8, 3, 12, 7))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    path = coco(tmp_path / "coco.json", [box(1, 1, 8, 3, 4, 4)])
    report = import_labels(path, tmp_path / "my.jsonl", "coco")
    truth = records(tmp_path / "my.jsonl")[0]["branches"][0]["truth"]
    found = np.asarray(open_source(tmp_path / "my.jsonl")[0].images[0])
    rows, columns = np.nonzero(found[:, :, 1] == 0)
    centre = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    assert centre == place
    if orientation == 3:  # the size does not tell: labels are taken as those of the upright picture
        assert truth["points"] == [[10, 5]]
        assert list(report.notes.counts) == [
            "turned by an EXIF note: the labels are taken as those of the upright picture"
        ]
    else:
        assert truth["points"] == [list(place)]
        assert bool(report.notes.counts) == (orientation != 1)


def test_masks_turn_with_their_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[0:10, 0:30] = True
    annotations = [box(1, 1, 0, 0, 30, 10, segmentation=runs_of(mask))]
    import_labels(coco(tmp_path / "coco.json", annotations), tmp_path / "my.jsonl", "coco")
    truth = records(tmp_path / "my.jsonl")[0]["branches"][0]["truth"]
    turned = mask_of(truth["masks"][0])
    assert np.array_equal(turned, np.rot90(mask, -1))  # clockwise
    assert truth["boxes"] == [[50, 0, 60, 30]]
    ((x, y),) = truth["points"]
    assert turned[int(y), int(x)]


def test_pictures_of_another_size(pictures: Path, tmp_path: Path) -> None:
    """Labels of a larger copy are scaled; of another shape nobody knows what they mean."""
    path = coco(tmp_path / "coco.json", [box(1, 1, 20, 20, 40, 20), box(2, 1, 0, 0, 9, 9)])
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": 160, "height": 120}
    content["images"][1] |= {"width": 100, "height": 100}
    path.write_text(json.dumps(content))
    report = import_labels(path, tmp_path / "my.jsonl", "coco", asking=Asking(negatives=0))
    (record,) = records(tmp_path / "my.jsonl")
    assert asked(record)["Point to the stop sign."]["boxes"] == [[10, 10, 30, 20]]
    assert "picture of another size than its labels say" in report.dropped.counts
    assert report.notes.counts == {"labels scaled from another size of the picture": 1}


def test_where_pictures_are_found(tmp_path: Path) -> None:
    """As in the published COCO: annotations/instances_val2017.json beside val2017/ and train2017/,
    which hold pictures of the same name."""
    for folder, seed in (("train2017", 0), ("val2017", 1), ("annotations", 2)):
        (tmp_path / folder).mkdir()
        if folder != "annotations":
            picture(seed, WIDTH, HEIGHT).save(tmp_path / folder / "a.png")
    labels = coco(tmp_path / "annotations" / "instances_val2017.json", [box(1, 1, 0, 0, 9, 9)])
    import_labels(labels, tmp_path / "my.jsonl", "coco")
    assert records(tmp_path / "my.jsonl")[0]["image"] == "val2017/a.png"
    import_labels(labels, tmp_path / "my.jsonl", "coco", images=tmp_path / "train2017")
    assert records(tmp_path / "my.jsonl")[0]["image"] == "train2017/a.png"
    labels = labels.rename(labels.with_name("labels.json"))
    with pytest.raises(ValueError, match=r"4 x missing|several pictures of this name"):
        import_labels(labels, tmp_path / "my.jsonl", "coco", images=tmp_path)


def test_one_file_is_not_taken_for_two_pictures(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    picture(0, WIDTH, HEIGHT).save(tmp_path / "val" / "a.png")
    path = coco(tmp_path / "coco.json", [box(1, 1, 0, 0, 9, 9), box(2, 1, 0, 0, 9, 9)])
    content = json.loads(path.read_text())
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "val/a.png", "test/a.png"
    path.write_text(json.dumps(content))
    report = import_labels(path, tmp_path / "my.jsonl", "coco")
    assert [record["image"] for record in records(tmp_path / "my.jsonl")] == ["val/a.png"]
    assert report.dropped.first["several pictures of this name"].startswith("test/a.png and val/a")


def test_paths_lead_from_where_the_records_lie(pictures: Path, tmp_path: Path) -> None:
    """Also where a link leads to their folder: ``..`` goes up from its target."""
    labels = coco(tmp_path / "coco.json", [box(1, 1, 0, 0, 9, 9)])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    import_labels(labels, tmp_path / "link" / "my.jsonl", "coco")
    assert records(tmp_path / "link" / "my.jsonl")[0]["image"] == "../../pictures/a.png"
    assert open_source(tmp_path / "link" / "my.jsonl")[0].images[0].size == (WIDTH, HEIGHT)


def test_labels_whose_pictures_are_missing(tmp_path: Path) -> None:
    labels = coco(tmp_path / "coco.json", [box(1, 1, 0, 0, 9, 9)])
    out = tmp_path / "my.jsonl"
    out.write_text("before")
    with pytest.raises(ValueError, match=r"none of the 4 pictures that \S+coco.json names can be"):
        import_labels(labels, out, "coco")
    with pytest.raises(ValueError, match=r"\(first: a.png\); they were looked for in \S+; nothing"):
        import_labels(labels, out, "coco", images=tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 4 pictures"):
        import_labels(labels, out, "coco")
    assert out.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "coco.json", "my.jsonl"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no list of 'images'"),
        ('{"images": []}', "it names no pictures"),
        (
            '{"images": [3, {"id": 1}]}',
            r"1 x not readable, first image 1: it has no file_name\); nothing was written",
        ),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_files_that_are_no_coco(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        import_labels(tmp_path / "coco.json", tmp_path / "my.jsonl", "coco")
    assert not (tmp_path / "my.jsonl").exists()


def test_values_of_wrong_types_are_dropped(pictures: Path, tmp_path: Path) -> None:
    odd: list[Any] = [None, True, "x", [], {}, [[]], [None] * 4, ["a"] * 4, [1e400] * 4, -1]
    annotations = [box(1, 1, 0, 0, 9, 9)]
    for value in odd:
        annotations += [{"image_id": value, "category_id": 1, "bbox": [0, 0, 9, 9]}]
        annotations += [{"image_id": 2, "category_id": value, "bbox": [0, 0, 9, 9]}]
        annotations += [{"image_id": 2, "category_id": 1, "bbox": value}]
        annotations += [{"image_id": 2, "category_id": 1, "segmentation": value}]
        annotations += [{"image_id": 2, "category_id": 1, "keypoints": value}]
        annotations += [{"image_id": 2, "caption": value if value != "x" else 7}]
    path = coco(tmp_path / "coco.json", annotations)
    report = import_labels(path, tmp_path / "my.jsonl", "coco")
    assert report.labels == {"stop sign": 1}
    counts = report.dropped.counts
    assert counts.pop("picture of which nothing is asked") == 1  # of stop signs some were lost
    assert sum(counts.values()) == 6 * len(odd)


# ---- the parts ----


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("stop_sign", "stop sign"),
        ("StopSign", "stop sign"),
        ("STOP SIGN", "stop sign"),
        (" Stop  sign\n", "stop sign"),
        ("QR code", "QR code"),
        ("t-shirt", "t-shirt"),
        ("<points>", "points"),
        ("Vögel", "vögel"),
        ("交通灯", "交通灯"),
        ("__", ""),
    ],
)
def test_names_of_labels(label: str, expected: str) -> None:
    assert human(label) == expected


@pytest.mark.parametrize(
    ("label", "many", "one"),
    [
        ("traffic light", "traffic lights", "a traffic light"),
        ("bus", "buses", "a bus"),
        ("glass", "glasses", "a glass"),
        ("berry", "berries", "a berry"),
        ("key", "keys", "a key"),
        ("fox", "foxes", "a fox"),
        ("person", "people", "a person"),
        ("apple", "apples", "an apple"),
        ("scissors", "scissors", "any scissors"),
        ("birds", "birds", "any birds"),
    ],
)
def test_plurals_and_articles(label: str, many: str, one: str) -> None:
    assert plural(label) == many
    assert article(label) == one


def test_masks_as_run_lengths() -> None:
    """The compressed text is what pycocotools 2.0.11 writes of this mask."""
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    assert runs_of(mask) == {"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}
    assert np.array_equal(mask_of(runs_of(mask)), mask)
    assert read_counts("5220003") == [5, 2, 2, 2, 2, 2, 5]
    with pytest.raises(ValueError, match="counts are not those"):
        mask_of({"size": [4, 5], "counts": [5]})


def test_a_point_inside_of_odd_shapes() -> None:
    star = [
        (50 + r * np.cos(t), 50 + r * np.sin(t))
        for r, t in zip([40, 15] * 5, np.arange(10) * np.pi / 5, strict=True)
    ]
    assert inside_of([star], (100, 100)) == pytest.approx((50, 50))
    half = [(90, 10), (150, 10), (150, 90), (90, 90)]  # of which a strip is in the picture
    found = inside_of([half], (100, 100))
    assert found is not None
    assert 90 < found[0] < 100 and 10 < found[1] < 90
    assert inside_of([[(200, 0), (300, 0), (300, 50)]], (100, 100)) is None
    assert inside_of_mask(np.zeros((3, 3), bool)) is None
