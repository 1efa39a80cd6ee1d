"""Points of data keep their pixels up to the targets of a point model, through every layout.

The text of an answer has thousandths: in a picture of 1500 pixels those are 1.5 pixels apart,
enough to end in another cell. Places here lie within that of a border between cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.cli import main
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.layouts import LAYOUTS, Record, address_key, layout_of
from nanomolmo2.data.placeholders import place_tags
from nanomolmo2.data.sources import open_source
from nanomolmo2.emoji.clips import ClipConfig, ask_about_clip, render_clip
from nanomolmo2.emoji.questions import EVERYTHING, make_branches
from nanomolmo2.emoji.scenes import SceneConfig, render_scene
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.processor import format_points, parse_points
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.processor.point import Point, join_points, tags_of
from tests.golden_points import golden_processor

WIDTH, HEIGHT = 1500, 1000
URL = "https://example.org/large.jpg"
# One cell is 62.5 x 41.67 pixels. Thousandths of these are on the other side of a border.
PLACES = [(562.4, 501.0), (187.4, 990.4), (1438.0, 41.6), (10.0, 10.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    large = Image.new("RGB", (WIDTH, HEIGHT), "gray")
    for name in ("large.png", f"{address_key(URL)}.png"):
        large.save(folder / name)
    return folder


def cell_of(x: float, y: float) -> tuple[int, int, int]:
    """(row, slot, cell) on a grid of 8 x 8 patches behind an overview of 9 rows, by hand."""
    across, down = int(24 * x / WIDTH), min(int(24 * y / HEIGHT), 23)
    c, r = across // 3, down // 3
    return 9 + (r // 2) * 4 + c // 2, 2 * (r % 2) + c % 2, 3 * (across % 3) + down % 3


def targets(example: Example) -> list[list[tuple[int, int, int]]]:
    """Of every list of points of an example."""
    encoded = EncodeTree(golden_processor())(example)
    lists: list[list[tuple[int, int, int]]] = [[]]
    assert encoded.point_targets is not None
    for row, slot, cell in encoded.point_targets.tolist():
        if row == 1_000_000:
            lists.append([])
        else:
            lists[-1].append((row, slot, cell))
    return lists[:-1]


def read(values: dict[str, Any], folder: Path, **options: Any) -> Example:
    record = Record(values, "here", folder, np.random.default_rng(0), **options)
    return LAYOUTS[layout_of(values)](record)


def percent(places: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"x": 100 * x / WIDTH, "y": 100 * y / HEIGHT} for x, y in places]


def test_the_places_are_hard() -> None:
    """What is asked here would fail with thousandths; see `cell_of`."""
    for x, y in PLACES[:3]:
        rounded = round(1000 * x / WIDTH) * WIDTH / 1000, round(1000 * y / HEIGHT) * HEIGHT / 1000
        assert cell_of(*rounded) != cell_of(x, y)


ANSWER = {"points": [list(place) for place in PLACES], "label": "bolt"}
QUESTION = {"role": "user", "content": "<image>\nPoint to the bolts."}


@pytest.mark.parametrize(
    "values",
    [
        {"question": "Point.", **ANSWER},
        {"question": "Point.", "answer": ANSWER},
        {"question": "How many?", "answer": {**ANSWER, "mode": "point_count"}},
        {"messages": [QUESTION, {"role": "assistant", "content": ANSWER}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                QUESTION,
                {"role": "assistant", "content": ANSWER},
            ]
        },
        {"branches": [{"question": "Point.", **ANSWER}]},
        {"question": "Point.", "points": percent(PLACES), "points_scale": "percent"},
        {
            "question": "Point.",
            "points": [{"x": x / WIDTH, "y": y / HEIGHT} for x, y in PLACES],
            "points_scale": "unit",
        },
    ],
)
def test_our_own_layout(folder: Path, values: dict[str, Any]) -> None:
    example = read({"image": "large.png", **values}, folder)
    assert targets(example) == [sorted(cell_of(*place) for place in PLACES)]


def test_several_labels_are_several_lists(folder: Path) -> None:
    points = [{"x": x, "y": y, "label": f"bolt {i % 2}"} for i, (x, y) in enumerate(PLACES)]
    example = read({"image": "large.png", "question": "Point.", "points": points}, folder)
    expected = [sorted(cell_of(*place) for place in PLACES[i::2]) for i in range(2)]
    assert targets(example) == expected


def test_separate_turns(folder: Path) -> None:
    turns = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Again."}]
    messages = [QUESTION, *turns, turns[0]]
    example = read({"image": "large.png", "messages": messages}, folder, separate_turns=True)
    assert targets(example) == [sorted(cell_of(*place) for place in PLACES)] * 2


@pytest.mark.parametrize("method", ["pointing", "counting"])
@pytest.mark.parametrize("columns", [False, True])
def test_pixmo_points(folder: Path, method: str, columns: bool) -> None:
    points: Any = percent(PLACES)
    if columns:
        points = {axis: [point[axis] for point in points] for axis in "xy"}
    values = {"image_url": URL, "label": "bolts", "points": points, "collection_method": method}
    assert targets(read(values, folder)) == [sorted(cell_of(*place) for place in PLACES)]


def test_cosyn_points(folder: Path) -> None:
    values = {
        "image": "large.png",
        "questions": ["Where are <image> bolts?", "And here?"],
        "answer_points": [percent(PLACES), percent(PLACES[:1])],
    }
    expected = [sorted(cell_of(*place) for place in part) for part in (PLACES, PLACES[:1])]
    assert targets(read(values, folder)) == expected


def test_text_coordinates_are_taken_at_their_word(folder: Path) -> None:
    """LLaVA and the Cauldron have texts: what they say is thousandths."""
    text = format_points([Point(x, y) for x, y in PLACES], "bolt", [(WIDTH, HEIGHT)])
    said = [(p.x, p.y) for p in parse_points(str(text), [(WIDTH, HEIGHT)])]
    for values in (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]},
        {"texts": [{"user": "?", "assistant": text}]},
    ):
        values = json.loads(json.dumps(values))
        values["images"] = ["large.png"]
        assert targets(read(values, folder)) == [sorted(cell_of(*place) for place in said)]


def test_a_question_keeps_the_points_it_remembers() -> None:
    """Tags of pictures are taken out of a question; what it remembers moves along."""
    written = format_points([Point(562.4, 501.0)], "bolt", [(WIDTH, HEIGHT)])
    question = join_points(["<image>\nWhat is ", written, " <image>?"])
    (placed,), _ = place_tags([question], 2, False)
    (tag,) = tags_of(placed)
    assert placed[tag.start : tag.stop] == str(written)
    assert tag.points == (Point(562.4, 501.0),)
    assert "<image>" not in placed


def test_points_of_a_question_are_in_the_scale_of_the_record(folder: Path) -> None:
    part = {"type": "point", "x": 100 * 562.4 / WIDTH, "y": 100 * 501 / HEIGHT}
    values = {
        "image": "large.png",
        "points_scale": "percent",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]},
            {"role": "assistant", "content": "A bolt."},
        ],
    }
    example = read(values, folder)
    content: Any = example.branches[0].messages[0]["content"]
    assert content[1] == {
        "type": "point", "x": pytest.approx(562.4), "y": pytest.approx(501)
    }  # fmt: skip
    processor = golden_processor(points_in_prompt=True)
    encoded = EncodeTree(processor)(example)
    assert encoded.point_targets is not None
    assert encoded.point_targets.tolist() == [list(cell_of(562.4, 501.0))]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"x": 101, "y": 3}, "outside of 0 to 100"),
        ({"x": "1", "y": 3}, "expected 'x' and 'y'"),
        ({"x": 1, "y": 3, "image": "a"}, "names the image"),
        ({"x": 1, "y": 3, "time": "a"}, "has the time"),
    ],
)
def test_bad_points_of_a_question(folder: Path, part: dict[str, Any], said: str) -> None:
    content = [{"type": "text", "text": "?"}, {"type": "point", **part}]
    values = {"image": "large.png", "question": content, "answer": "A.", "points_scale": "percent"}
    with pytest.raises(BadExample, match=said) as error:
        read(values, folder)
    assert error.value.cause == "bad points"


def test_imported_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO boxes, YOLO boxes and a table of points; the middle of a box is the point."""
    boxes = [(x - 8, y - 8, 16, 16) for x, y in PLACES if 8 <= y <= HEIGHT - 8]
    inside = [place for place in PLACES if 8 <= place[1] <= HEIGHT - 8]
    image = {"id": 1, "file_name": "large.png", "width": WIDTH, "height": HEIGHT}
    (folder / "coco.json").write_text(
        json.dumps(
            {
                "images": [image],
                "categories": [{"id": 1, "name": "bolt"}],
                "annotations": [
                    {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
                    for i, box in enumerate(boxes)
                ],
            }
        )
    )
    lines = [f"large.png,bolt,{x},{y}" for x, y in inside]
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *lines]) + "\n")
    expected = [sorted(cell_of(*place) for place in inside)] * 2  # pointing, and counting
    for source, file in (("coco", "coco.json"), ("csv", "points.csv")):
        out = folder / f"{source}.jsonl"
        assert main(["data", "import", "--from", source, str(folder / file), str(out)]) == 0
        example = open_source(out)[0]
        assert targets(example) == expected


# ---- emoji ----


def test_emoji_points_are_the_middles_of_objects() -> None:
    """The text is snapped to a coarse grid; a point model learns the very middle."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(4):
        scene = render_scene(rng, Sprites.load(), SceneConfig())
        for branch in make_branches(scene, rng, snap=20):
            tags = tags_of(branch.messages[1]["content"])
            if branch.task in ("point", "count") and branch.truth["count"]:
                (tag,) = tags
                assert [[p.x, p.y] for p in tag.points] == branch.truth["points"]
                found += 1
            elif branch.task == "points":
                middles = [[o.center for o in scene.objects]]
                if branch.truth["nouns"] != [EVERYTHING]:
                    nouns = [group["noun"] for group in branch.truth["groups"]]
                    middles = [
                        [o.center for o in scene.objects if o.category == noun] for noun in nouns
                    ]
                assert [[(p.x, p.y) for p in tag.points] for tag in tags] == middles
                found += 1
            else:
                assert not tags
    assert found > 5


def test_emoji_clips_keep_middles_times_and_objects() -> None:
    rng = np.random.default_rng(5)
    config = ClipConfig(track=2, video_point=2, absent=0.0)
    found = 0
    for _ in range(3):
        clip = render_clip(rng, Sprites.load(), config)
        for branch in ask_about_clip(clip, rng, config, snap=20):
            answer: Any = branch.messages[1]["content"]
            if branch.task not in ("track", "video_point") or not tags_of(answer):
                continue
            (tag,) = tags_of(answer)
            times = {branch.truth.get("time", p.time) for p in tag.points}
            expected = {
                (number, *o.center(frame), time)
                for number, o in enumerate(clip.named(branch.truth["noun"]))
                for frame, time in enumerate(clip.video.times)
                if time in times and o.center(frame) is not None
            }
            assert {(p.id, p.x, p.y, p.time) for p in tag.points} == expected
            found += 1
    assert found > 4
