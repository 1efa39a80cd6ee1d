"""Public benchmarks from made-up files in the layouts in which they are published."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.evaluation.public import PUBLIC
from nanomolmo2.evaluation.questions import find_questions

SIZE = (60, 40)


def picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)
    return path


def stored(size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """A picture as the hub has it in a column."""
    stream = io.BytesIO()
    Image.new("RGB", size, "white").save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "a.png"}


def parquet(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


PEOPLE = ["net"] * 7 + ["mesh"] * 3
AS_PEOPLE = [{"answer": text, "answer_id": i + 1} for i, text in enumerate(PEOPLE)]
INSTRUCTED = "Please answer directly with a single word or number."
LETTERED = "Please answer directly with only the letter of the correct option and nothing else."
CHOICES = "Which?\n\nA. left\nB. right\n" + LETTERED


def chartqa_json(folder: Path) -> None:
    picture(folder / "ChartQA Dataset/val/png/7.png")
    for part, label in (("human", "0.57"), ("augmented", "Yes")):
        item = {"imgname": "7.png", "query": f"What {part}?", "label": label}
        write(folder / f"ChartQA Dataset/val/val_{part}.json", [item])


def docvqa_json(folder: Path, images: str = "documents") -> None:
    picture(folder / images / "x_1.png")
    about = {"questionId": 1, "docId": 2, "image": "documents/x_1.png", "data_split": "val"}
    item = {**about, "question": "Which date?", "answers": ["1/8/93", "Jan 8"]}
    write(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [item]})


def infovqa_json(folder: Path) -> None:
    picture(folder / "infographicsvqa_images/38.jpeg")
    item = {"questionId": 1, "image_local_name": "38.jpeg", "question": "How many?"}
    content = {"data": [{**item, "answers": ["10%"]}]}
    write(folder / "infographicsVQA_val_v1.0_withQT.json", content)


def textvqa_json(folder: Path) -> None:
    picture(folder / "train_images/003a.jpg")
    item = {"question_id": 1, "image_id": "003a", "question": "what is it?", "set_name": "val"}
    write(folder / "TextVQA_0.5.1_val.json", {"data": [{**item, "answers": PEOPLE}]})
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "003a"}]})


def vqav2_json(folder: Path) -> None:
    picture(folder / "val2014/COCO_val2014_000000262148.jpg")
    asked = [{"image_id": 262148, "question": "What is it?", "question_id": 262148000}]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    known = {"question_id": 262148000, "image_id": 262148, "answer_type": "other"}
    content = {"annotations": [{**known, "answers": AS_PEOPLE}]}
    write(folder / "v2_mscoco_val2014_annotations.json", content)


def aokvqa_json(folder: Path) -> None:
    picture(folder / "val2017/000000000042.jpg")
    item = {"image_id": 42, "question_id": "q", "question": "What?", "choices": ["cat", "dog"]}
    write(folder / "aokvqa_v1p0_val.json", [{**item, "correct_choice_idx": 1}])


def pointbench_json(folder: Path) -> None:
    picture(folder / "selected_images/spatial/a.jpg")
    mask = np.zeros((40, 60, 3), np.uint8)
    mask[10:20, 30:50] = 255
    (folder / "selected_masks/spatial").mkdir(parents=True)
    Image.fromarray(mask).save(folder / "selected_masks/spatial/a_mask.png")
    item = {"image_filename": "a.jpg", "category": "spatial", "user_input": "Point left of it."}
    without = {**item, "user_input": "without a mask"}
    write(folder / "data.json", [{**item, "mask_filename": "a_mask.png", "count": 1}, without])


def screenspot_v2_json(folder: Path) -> None:
    picture(folder / "screenspotv2_image/pc_1.png")
    item = {"img_filename": "pc_1.png", "bbox": [10, 20, 30, 5], "instruction": "close it"}
    for platform in ("desktop", "web", "mobile"):
        found = [{**item, "data_type": "icon", "data_source": "windows"}]
        write(folder / f"screenspot_{platform}_v2.json", found)


def screenspot_pro_json(folder: Path) -> None:
    picture(folder / "images/word_windows/1.png")
    item = {"img_filename": "word_windows/1.png", "bbox": [10, 20, 40, 25], "id": "word_1"}
    about = {"instruction": "close it", "ui_type": "text", "group": "Office", "img_size": [60, 40]}
    write(folder / "annotations/word_windows.json", [{**item, **about}])


def columns(name: str, **values: Any) -> Callable[[Path], None]:
    """A parquet file with one row."""
    return lambda folder: parquet(folder / name, {"image": stored(), **values})


MMMU = {"id": "validation_Art_1", "question": "Where is <image 1>?", "image_1": stored()}
MMMU_ROWS = "Art/validation-00000-of-00001.parquet"
OPTIONS = {"question_type": "multiple-choice", "options": "['Rome', 'Oslo']", "answer": "B"}
ASKED_OPTIONS = "Where is <image 1>?\nOnly return the correct answer option.\nA. Rome\nB. Oslo"

# name, split, files, question, truth, what is said
CASES: list[tuple[str, str | None, Callable[[Path], None], str, dict[str, Any], str]] = [
    (
        "chartqa",
        "val",
        chartqa_json,
        "chart_qa: What human?",
        {"answers": ["0.57"], "scorer": "relaxed", "parts": {"source": "human"}},
        "0.57",
    ),
    (
        "chartqa",
        None,
        columns("data/test-00000-of-00001.parquet", query="Q?", label=["4"], human_or_machine=1),
        "chart_qa: Q?",
        {"answers": ["4"], "scorer": "relaxed", "parts": {"source": "augmented"}},
        "4",
    ),
    (
        "chartqa",
        None,
        columns("data/test-00000-of-00001.parquet", question="Q?", answer="4", type="human_test"),
        "chart_qa: Q?",
        {"answers": ["4"], "scorer": "relaxed", "parts": {"source": "human"}},
        "4",
    ),
    (
        "docvqa",
        None,
        docvqa_json,
        "doc_qa: Which date?",
        {"answers": ["1/8/93", "Jan 8"], "scorer": "anls"},
        "1/8/93",
    ),
    (
        "docvqa",
        "validation",
        columns("DocVQA/validation-00000-of-00006.parquet", question="Q?", answers=["a"]),
        "doc_qa: Q?",
        {"answers": ["a"], "scorer": "anls"},
        "a",
    ),
    (
        "infovqa",
        None,
        infovqa_json,
        "info_qa: How many?",
        {"answers": ["10%"], "scorer": "anls"},
        "10%",
    ),
    (
        "infovqa",
        None,
        columns("InfographicVQA/validation-0.parquet", question="Q?", answers=["a"]),
        "info_qa: Q?",
        {"answers": ["a"], "scorer": "anls"},
        "a",
    ),
    (
        "textvqa",
        None,
        textvqa_json,
        "text_vqa: what is it?",
        {"answers": PEOPLE, "scorer": "vqa"},
        "net",
    ),
    (
        "textvqa",
        None,
        columns("data/validation-00000-of-00003.parquet", question="Q?", answers=PEOPLE),
        "text_vqa: Q?",
        {"answers": PEOPLE, "scorer": "vqa"},
        "net",
    ),
    (
        "vqav2",
        None,
        vqav2_json,
        "vqa2: What is it?",
        {"answers": PEOPLE, "scorer": "vqa"},
        "net",
    ),
    (
        "vqav2",
        None,
        columns(
            "data/validation-0.parquet", question="Q?", answers=AS_PEOPLE, answer_type="yes/no"
        ),
        "vqa2: Q?",
        {"answers": PEOPLE, "scorer": "vqa", "parts": {"kind": "yes_no"}},
        "net",
    ),
    (
        "realworldqa",
        None,
        columns("data/test-0.parquet", question=f"How many?\n{INSTRUCTED}", answer="3"),
        "vqa2: How many?",
        {"answers": ["3"], "scorer": "option", "parts": {"kind": "short"}},
        "3",
    ),
    (
        "realworldqa",
        None,
        columns("data/test-0.parquet", question=CHOICES, answer="B"),
        CHOICES,
        {
            "answer": "B",
            "choices": ["left", "right"],
            "scorer": "option",
            "parts": {"kind": "choice"},
        },
        "B",
    ),
    (
        "aokvqa",
        None,
        aokvqa_json,
        "What?\nOnly return the correct answer option.\nA. cat\nB. dog",
        {"answer": "B", "choices": ["cat", "dog"], "scorer": "option"},
        "B. dog",
    ),
    (
        "aokvqa",
        None,
        columns(
            "data/validation-0.parquet", question="Q?", choices=["x", "y"], correct_choice_idx=0
        ),
        "Q?\nOnly return the correct answer option.\nA. x\nB. y",
        {"answer": "A", "choices": ["x", "y"], "scorer": "option"},
        "A. x",
    ),
    (
        "ai2d",
        None,
        columns("data/test-0.parquet", question="Q?", options=["moon", "sun"], answer="1"),
        "Q?\nOnly return the correct answer option.\nA. moon\nB. sun",
        {"answer": "B", "choices": ["moon", "sun"], "scorer": "option"},
        "B. sun",
    ),
    (
        "ai2d",  # letters in the diagram
        None,
        columns("data/test-0.parquet", question="Q?", options=["d", "a", "none"], answer="1"),
        "Q?\nOnly return the correct answer option.\nD\nA\nnone",
        {"answers": ["A"], "scorer": "option"},
        "A",
    ),
    (
        "mmmu",
        None,
        lambda folder: parquet(folder / MMMU_ROWS, {**MMMU, **OPTIONS}),
        ASKED_OPTIONS,
        {
            "answer": "B",
            "choices": ["Rome", "Oslo"],
            "scorer": "mmmu",
            "parts": {"subject": "Art"},
        },
        "B",
    ),
    (
        "mmmu",
        None,
        lambda folder: parquet(
            folder / MMMU_ROWS,
            {**MMMU, "question_type": "open", "options": "[]", "answer": "$14"},
        ),
        "vqa2: Where is <image 1>?",
        {"answers": ["$14"], "scorer": "mmmu", "parts": {"subject": "Art"}},
        "$14",
    ),
    (
        "countbenchqa",
        None,
        columns("data/test-0.parquet", question="How many cups?", number=4, text="Four cups"),
        "How many cups?",
        {"count": 4, "scorer": "point_count"},
        "4",
    ),
    (
        "pixmo_count",
        None,
        columns("data/test-0.parquet", question="<image> How many cups?", answer="4 cups"),
        "How many cups?",
        {"count": 4, "scorer": "point_count"},
        "4",
    ),
    (
        "pointbench",
        None,
        pointbench_json,
        "Point left of it.",
        {
            # Columns 30 to 49, rows 10 to 19 of 40: runs go down the columns.
            "masks": [
                {"size": [40, 60], "counts": [30 * 40 + 10, 10, *[30, 10] * 19, 10 * 40 + 20]}
            ],
            "scorer": "in_mask",
            "parts": {"category": "spatial"},
        },
        "",
    ),
    (
        "screenspot_v2",
        None,
        screenspot_v2_json,
        "Click close it",
        {
            "boxes": [[10, 20, 40, 25]],
            "scorer": "click",
            "parts": {"platform": "desktop", "target": "icon", "both": "desktop_icon"},
        },
        "",
    ),
    (
        "screenspot_v2",  # corners as shares of the sides
        None,
        columns(
            "data/test-0.parquet",
            instruction="go",
            bbox=[0.5, 0.25, 1.0, 0.75],
            data_type="text",
            data_source="ios",
        ),
        "Click go",
        {
            "boxes": [[30, 10, 60, 30]],
            "scorer": "click",
            "parts": {"platform": "mobile", "target": "text", "both": "mobile_text"},
        },
        "",
    ),
    (
        "screenspot_pro",
        None,
        screenspot_pro_json,
        "Click close it",
        {
            "boxes": [[10, 20, 40, 25]],
            "scorer": "click",
            "parts": {"group": "office", "target": "text", "both": "office_text"},
        },
        "",
    ),
    (
        "screenspot_pro",
        None,
        columns("data/train-0.parquet", instruction="go", bbox="[1, 2, 3, 4.5]", ui_type="icon"),
        "Click go",
        {"boxes": [[1, 2, 3, 4.5]], "scorer": "click", "parts": {"target": "icon"}},
        "",
    ),
]
NAMES = [f"{case[0]}{number}" for number, case in enumerate(CASES)]


@pytest.mark.parametrize(("name", "split", "files", "question", "truth", "said"), CASES, ids=NAMES)
def test_a_question_is_read(
    name: str,
    split: str | None,
    files: Callable[[Path], None],
    question: str,
    truth: dict[str, Any],
    said: str,
    tmp_path: Path,
) -> None:
    files(tmp_path)
    source = PUBLIC[name].open(tmp_path, split)
    example = source[0]
    (branch,) = example.branches
    assert branch.task == name
    assert branch.messages[0] == {"role": "user", "content": question}
    assert [m["content"] for m in branch.messages[1:]] == ([said] if said else [])
    assert branch.truth == truth
    assert json.loads(json.dumps(truth)) == truth
    assert [image.size for image in example.images] == [SIZE]
    assert pickle.loads(pickle.dumps(source))[0].branches == example.branches
    # And evaluation can score it.
    (asked,) = find_questions([source], limit=1).asked
    assert (asked.task, asked.scorer) == (name, truth["scorer"])


def test_every_benchmark_is_among_the_cases() -> None:
    assert {case[0] for case in CASES} == set(PUBLIC)


def read(name: str, folder: Path, split: str | None = None, number: int = 0) -> Example:
    return PUBLIC[name].open(folder, split)[number]


def test_all_files_of_a_benchmark_are_read(tmp_path: Path) -> None:
    """Human questions before augmented ones; every platform; several shards in order."""
    chartqa_json(tmp_path / "a")
    source = PUBLIC["chartqa"].open(tmp_path / "a", "val")
    assert [source[i].branches[0].truth["parts"] for i in range(len(source))] == [
        {"source": "human"},
        {"source": "augmented"},
    ]
    screenspot_v2_json(tmp_path / "b")
    found = PUBLIC["screenspot_v2"].open(tmp_path / "b")
    platforms = [found[i].branches[0].truth["parts"]["platform"] for i in range(3)]
    assert (platforms, len(found)) == (["desktop", "web", "mobile"], 3)
    for number in (1, 0):
        row = {"image": stored(), "question": f"{number}?", "answers": ["a"]}
        parquet(tmp_path / f"c/data/validation-0000{number}-of-00002.parquet", row)
    texts = PUBLIC["textvqa"].open(tmp_path / "c")
    assert [texts[i].branches[0].messages[0]["content"] for i in range(len(texts))] == [
        "text_vqa: 0?",
        "text_vqa: 1?",
    ]


def test_two_data_sets_of_one_repository_are_told_apart(tmp_path: Path) -> None:
    for name in ("DocVQA", "InfographicVQA"):
        row = {"image": stored(), "question": f"{name}?", "answers": ["a"]}
        parquet(tmp_path / name / "data/validation-0.parquet", row)
    asked = [read(name, tmp_path).branches[0].messages[0] for name in ("docvqa", "infovqa")]
    assert [message["content"] for message in asked] == [
        "doc_qa: DocVQA?",
        "info_qa: InfographicVQA?",
    ]


def test_pictures_lie_where_archives_have_put_them(tmp_path: Path) -> None:
    docvqa_json(tmp_path / "a", "spdocvqa_images")
    assert read("docvqa", tmp_path / "a").images[0].size == SIZE
    # Two ways to write an accent.
    pointbench_json(tmp_path / "b")
    data = json.loads((tmp_path / "b/data.json").read_text())
    data[0]["image_filename"] = "caf\u00e9.jpg"
    write(tmp_path / "b/data.json", data)
    os.rename(
        tmp_path / "b/selected_images/spatial/a.jpg",
        tmp_path / "b/selected_images/cafe\u0301.jpg",
    )
    assert read("pointbench", tmp_path / "b").images[0].size == SIZE


def test_pictures_of_pixmo_count_lie_under_their_checksum(tmp_path: Path) -> None:
    import hashlib

    content = stored()["bytes"]
    digest = hashlib.sha256(content).hexdigest()
    row = {"image_url": "https://a.example/1.png", "label": "Red Cups", "count": 3}
    parquet(tmp_path / "data/test-0.parquet", {**row, "image_sha256": digest})
    with pytest.raises(BadExample, match="nothing is downloaded here") as error:
        read("pixmo_count", tmp_path)
    assert error.value.cause == "missing picture"
    (tmp_path / f"{digest}.png").write_bytes(content)
    (branch,) = read("pixmo_count", tmp_path).branches
    assert branch.messages[0]["content"] == "How many red cups are there?"
    assert branch.truth == {"count": 3, "scorer": "point_count"}


def test_options_that_are_pictures_are_shown_without_any(tmp_path: Path) -> None:
    options = "[\"<img='a.png'>\", \"<img='b.png'>\"]"
    parquet(tmp_path / MMMU_ROWS, {**MMMU, **OPTIONS, "options": options})
    assert read("mmmu", tmp_path).images == []


def test_items_of_point_bench_without_a_mask_are_left_out(tmp_path: Path) -> None:
    pointbench_json(tmp_path)
    assert len(PUBLIC["pointbench"].open(tmp_path)) == 1


# ---- what is not as it should be ----


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    write(tmp_path / "other.json", [])
    with pytest.raises(ValueError) as error:
        PUBLIC["chartqa"].open(tmp_path, "val")
    assert str(error.value) == (
        f"{tmp_path} holds no questions of ChartQA, split val: found other.json, expected "
        f"val_human.json and val_augmented.json with png/<imgname>; or validation-*.parquet with "
        f"the columns query or question, label or answer, image"
    )
    with pytest.raises(ValueError, match=r"found no \.parquet or \.json files"):
        PUBLIC["mmmu"].open(picture(tmp_path / "empty/a.png").parent)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        PUBLIC["mmmu"].open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        PUBLIC["mmmu"].open(tmp_path / "other.json")
    with pytest.raises(ValueError, match="split is 'all', expected one of train, val, dev, test"):
        PUBLIC["mmmu"].open(tmp_path, "all")


def test_another_split_is_not_taken_for_the_one_that_was_asked_for(tmp_path: Path) -> None:
    parquet(
        tmp_path / "data/train-0.parquet", {"image": stored(), "question": "Q", "answers": ["a"]}
    )
    with pytest.raises(ValueError, match=r"split val: found data/train-0\.parquet, expected"):
        PUBLIC["textvqa"].open(tmp_path)
    assert len(PUBLIC["textvqa"].open(tmp_path, "train")) == 1


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    chartqa_json(tmp_path)
    (tmp_path / "ChartQA Dataset/val/val_augmented.json").unlink()
    with pytest.raises(ValueError, match=r"lacks val_augmented\.json beside val_human\.json"):
        PUBLIC["chartqa"].open(tmp_path, "val")
    vqav2_json(tmp_path / "b")
    (tmp_path / "b/v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match="has no answers: v2_mscoco_val2014_annotations"):
        PUBLIC["vqav2"].open(tmp_path / "b")


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "test-0.parquet", {"image": stored(), "text": "Q"})
    with pytest.raises(ValueError, match="has the columns image, text, expected also question, n"):
        PUBLIC["countbenchqa"].open(tmp_path)


def test_a_json_file_with_something_else(tmp_path: Path) -> None:
    write(tmp_path / "val_v1.0.json", {"questions": []})
    with pytest.raises(ValueError, match="holds the keys questions, expected an object with the"):
        PUBLIC["docvqa"].open(tmp_path)
    write(tmp_path / "val_v1.0.json", {"data": [{"question": "Q"}, 7]})
    source = PUBLIC["docvqa"].open(tmp_path)
    with pytest.raises(BadExample, match="found the fields question, expected also image"):
        source[0]
    with pytest.raises(BadExample, match="found 7, expected an object"):
        source[1]
    (tmp_path / "val_v1.0.json").write_text("{")
    with pytest.raises(ValueError, match="copy it again"):
        PUBLIC["docvqa"].open(tmp_path)


def test_answers_that_are_not_public(tmp_path: Path) -> None:
    row = {"image": stored(), "question": "Q", "answers": None}
    parquet(tmp_path / "data/test-0.parquet", row)
    with pytest.raises(BadExample, match="are often not public; choose another split") as error:
        read("textvqa", tmp_path, "test")
    assert error.value.cause == "no answer"


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"options": "__import__('os')"}, "expected a list"),
        ({"options": "[1, 2"}, "expected a list"),
        ({"options": "['a']"}, "is none of its 1 options"),
        ({"question": ""}, "its question is '', expected a text"),
        ({"image_1": {"bytes": b"no picture", "path": None}}, "found text, expected a picture"),
    ],
)
def test_a_record_that_is_not_as_it_should_be(
    values: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    parquet(tmp_path / MMMU_ROWS, {**MMMU, **OPTIONS, **values})
    with pytest.raises(BadExample, match=wrong):
        read("mmmu", tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_no_record_names_a_file_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret.png")
    item = {"image": name, "question": "Q", "answers": ["a"]}
    write(tmp_path / "in/val_v1.0.json", {"data": [item]})
    with pytest.raises(BadExample, match="lies outside of"):
        read("docvqa", tmp_path / "in")


def test_a_picture_that_is_missing(tmp_path: Path) -> None:
    docvqa_json(tmp_path)
    (tmp_path / "documents/x_1.png").unlink()
    with pytest.raises(BadExample, match=r"there is no .*documents/x_1\.png") as error:
        read("docvqa", tmp_path)
    assert error.value.cause == "missing picture"
    with pytest.raises(IndexError, match="docvqa has no question 1, only 1"):
        read("docvqa", tmp_path, number=1)
