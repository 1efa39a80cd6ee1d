"""Layouts: each data set's fields to an example, and what is wrong with a record by its cause."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.layouts import LAYOUTS, Record, address_key, layout_of
from nanomolmo2.processor.points import Point, parse_points

URL = "https://example.org/a b.jpg?size=1"


def png(width: int = 200, height: int = 100) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png(50, 50))
    (tmp_path / "broken.png").write_bytes(png()[:60])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / f"{address_key(URL)}.png").write_bytes(png())
    return tmp_path


def read(values: dict, folder: Path = Path(), seed: int = 0, **options) -> Example:
    record = Record(values, "here", folder, np.random.default_rng(seed), **options)
    return LAYOUTS[layout_of(values)](record)


def talk(example: Example) -> list[list[str]]:
    """Texts of the branches; user and assistant take turns."""
    for branch in example.branches:
        roles = [message["role"] for message in branch.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    return [[message["content"] for message in branch.messages] for branch in example.branches]


def cause(values: dict, folder: Path = Path(), **options) -> str:
    with pytest.raises(BadExample) as error:
        read(values, folder, **options)
    assert error.value.detail.startswith("here: ")
    return error.value.cause


# ---- our own layout ----


def test_branches(folder):
    example = read(
        {
            "images": ["a.png", str(folder / "b.png")],
            "branches": [
                {
                    "messages": [
                        {"role": "user", "content": "One?"},
                        {"role": "assistant", "content": "Yes."},
                        {"role": "user", "content": "Two?"},
                        {"role": "assistant", "content": "No."},
                    ],
                    "task": "presence",
                    "truth": {"count": 1},
                },
                {"question": "Three?", "answer": "Maybe."},
            ],
        },
        folder,
    )
    assert [image.size for image in example.images] == [(200, 100), (50, 50)]
    assert talk(example) == [["One?", "Yes.", "Two?", "No."], ["Three?", "Maybe."]]
    assert (example.branches[0].task, example.branches[1].task) == ("presence", "")
    assert example.branches[0].truth == {"count": 1}


def test_short_forms(folder):
    assert talk(read({"image": "a.png", "question": "?", "answer": "!"}, folder)) == [["?", "!"]]
    [[question, answer]] = talk(read({"image": "a.png", "caption": "Red."}, folder))
    assert question and answer == "Red."
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert talk(read({"image": "a.png", "messages": messages}, folder)) == [["?", "!"]]


def test_text_only():
    example = read({"question": "2 + 2?", "answer": "4"})
    assert example.images == [] and example.video is None
    assert talk(example) == [["2 + 2?", "4"]]


def test_a_system_message_goes_before_the_first_question():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    assert talk(read({"messages": messages})) == [["Be short.\n\n2 + 2?", "4"]]


def test_content_in_parts_loses_only_its_pictures(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "Red?", "style": "vqa2"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]
    example = read({"image": "a.png", "messages": messages}, folder)
    assert example.branches[0].messages[0]["content"] == parts[1:]
    assert cause({"messages": messages}) == "missing picture"
    parts[0]["image"] = "a.png"
    assert cause({"messages": messages}, folder) == "bad record"


def test_points_in_pixels_become_molmo2s_text(folder):
    values = {
        "image": "a.png",
        "question": "Point to the dogs.",
        "points": [{"x": 100, "y": 25}, {"x": 20.0, "y": 100}],
        "label": "dogs",
    }
    [[_, answer]] = talk(read(values, folder))
    assert answer == '<points coords="1 1 100 1000 2 500 250">dogs</points>'
    [[_, answer]] = talk(read({**values, "mode": "point_count"}, folder))
    assert answer.startswith("Counting the <points") and answer.endswith("a total of 2.")
    [[_, answer]] = talk(read({**values, "points": []}, folder))
    assert answer == "There are none."


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"time": "0:01"}, "has the time '0:01', expected seconds"),
        ({"time": [1]}, r"has the time \[1\], expected seconds"),
        ({}, "in a video has no 'time'"),
        ({"image": "2", "time": 1}, "names the image '2', expected 1"),
    ],
)
def test_the_time_of_a_point(values, error, folder):
    video = {"frames": ["a.png", "a.png"], "times": [0, 1]}
    point = {"x": 10, "y": 10, **values}
    with pytest.raises(BadExample, match=error) as bad:
        read({"video": video, "question": "Where?", "points": [point]}, folder)
    assert bad.value.cause == "bad points"


def test_points_as_pairs(folder):
    """The picture has 200 x 100 pixels."""
    values = {"image": "a.png", "question": "Where?", "points": [[50, 25], [100, 75]]}
    expected = '<points coords="1 1 250 250 2 500 750">point</points>'
    assert talk(read(values, folder)) == [["Where?", expected]]
    for wrong in ([1], [1, 2, 3], ["a", "b"], "ab", [201, 5]):
        assert cause({**values, "points": [wrong]}, folder) == "bad points"


def test_an_answer_that_is_a_number_is_for_evaluation_alone():
    values = {"question": "How many?", "answer": 3}
    with pytest.raises(BadExample, match="found the answer 3, expected text: put it in quotes"):
        read(values)
    assert talk(read(values, needs_answer=False)) == [["How many?", "3"]]
    assert cause({**values, "answer": True}, needs_answer=False) == "bad record"


def test_points_of_several_labels_and_pictures(folder):
    content = {
        "points": [
            {"x": 10, "y": 10, "label": "dog", "image": 2},
            {"x": 5, "y": 5, "label": "cat"},
            {"x": 5, "y": 6, "label": "dog", "image": 1},
        ]
    }
    messages = [{"role": "user", "content": "Point."}, {"role": "assistant", "content": content}]
    example = read({"images": ["a.png", "b.png"], "messages": messages}, folder)
    [[_, answer]] = talk(example)
    found = parse_points(answer, [(200, 100), (50, 50)])
    assert [(p.label, p.image, p.x, p.y) for p in found] == [
        ("dog", 1, 5, 6),
        ("dog", 2, 10, 10),
        ("cat", 1, 5, 5),
    ]


@given(
    places=st.lists(st.tuples(st.floats(0, 200), st.floats(0, 100)), max_size=8, unique=True),
)
def test_points_come_back_where_they_were(places):
    values = {
        "image": png(),
        "question": "?",
        "points": [{"x": x, "y": y} for x, y in places],
        "label": "dot",
    }
    [[_, answer]] = talk(read(values))
    found = sorted((p.x, p.y) for p in parse_points(answer, [(200, 100)]))
    written = sorted((round(5 * x) / 5, round(10 * y) / 10) for x, y in places)
    assert np.allclose(found, written)


def test_frames_of_a_video(folder):
    values = {
        "video": {"frames": ["a.png"] * 3, "times": [0, 0.5, 1]},
        "question": "Point.",
        "points": [{"x": 100, "y": 50, "time": 0.5}],
        "label": "dot",
    }
    example = read(values, folder)
    assert example.images == [] and example.video.times == (0, 0.5, 1)
    [[_, answer]] = talk(example)
    assert parse_points(answer, video_size=(200, 100)) == [
        Point(100, 50, id=1, label="dot", time=0.5)
    ]
    values["video"]["times"] = [0]
    assert cause(values, folder) == "bad record"


def test_a_video_file_is_opened_by_the_processor(folder):
    values = {"video": "clip.mp4", "question": "?", "answer": "!"}
    assert read(values, folder).video == folder / "clip.mp4"
    assert cause({**values, "video": "none.mp4"}, folder) == "missing video"
    assert cause({**values, "image": "a.png"}, folder) == "bad record"


ASKED = {"question": "?", "answer": "!"}
USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": "none.png", **ASKED}, "missing picture"),
        ({"image": "https://example.org/none.jpg", **ASKED}, "missing picture"),
        ({"image": "broken.png", **ASKED}, "broken picture"),
        ({"image": "text.png", **ASKED}, "broken picture"),
        ({"image": b"GIF89a", **ASKED}, "broken picture"),
        ({"image": "", **ASKED}, "broken picture"),
        ({"image": 5, **ASKED}, "bad record"),
        ({"image": {"bytes": None, "path": None}, **ASKED}, "bad record"),
        ({"image": "a.png", "images": ["b.png"], **ASKED}, "bad record"),
        ({"images": "a.png", **ASKED}, "bad record"),
        ({"images": [None], **ASKED}, "bad record"),
        ({"image": "a.png"}, "no answer"),
        ({"image": "a.png", "question": "?"}, "no answer"),
        ({"image": "a.png", "question": "?", "answer": " \n"}, "no answer"),
        ({"image": "a.png", "answer": "!"}, "bad record"),
        ({"question": "?", "answer": 5}, "bad record"),
        ({"branches": []}, "no answer"),
        ({"branches": [5]}, "bad record"),
        ({"branches": {}}, "bad record"),
        ({"branches": [{}]}, "no answer"),
        ({"messages": []}, "bad record"),
        ({"messages": {}}, "bad record"),
        ({"messages": [5]}, "bad record"),
        ({"messages": [ASSISTANT]}, "bad record"),
        ({"messages": [USER, USER, ASSISTANT]}, "bad record"),
        ({"messages": [USER]}, "no answer"),
        ({"messages": [USER, ASSISTANT, USER]}, "no answer"),
        ({"messages": [{"role": "system", "content": "?"}]}, "bad record"),
        ({"messages": [{"role": "subtitle", "content": "?"}, USER, ASSISTANT]}, "bad record"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "bad record"),
        ({**ASKED, "task": 5}, "bad record"),
        ({**ASKED, "truth": []}, "bad record"),
        ({**ASKED, "video": {"frames": []}}, "bad record"),
        ({"question": "?", "points": 5}, "bad points"),
        ({"question": "?", "points": [{"x": 1}]}, "bad points"),
        ({"question": "?", "points": [{"x": 1, "y": True}]}, "bad points"),
        ({"image": "a.png", "question": "?", "points": [{"x": 201, "y": 5}]}, "bad points"),
        ({"image": "a.png", "question": "?", "points": [{"x": 1, "y": -1}]}, "bad points"),
        ({"image": "a.png", "question": "?", "points": [{"x": np.nan, "y": 1}]}, "bad points"),
        ({"image": "a.png", "question": "?", "points": [{"x": 10**400, "y": 1}]}, "bad points"),
        ({"question": "?", "points": [{"x": 1, "y": 1, "label": ["a"]}]}, "bad points"),
        ({"question": "?", "points": [{"x": 1, "y": 1, "time": "a"}]}, "bad points"),
        ({"question": "?", "points": [{"x": 1, "y": 1}]}, "bad points"),
        ({"question": "?", "points": [], "mode": "all"}, "bad points"),
    ],
)
def test_what_is_wrong_with_a_record(values, expected, folder):
    assert cause(values, folder) == expected


# ---- LLaVA ----


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_llava(folder):
    values = {"id": "1", "image": "a.png", "conversations": said("<image>\nRed?", "Yes.", "?", "!")}
    example = read(values, folder)
    assert len(example.images) == 1
    assert talk(example) == [["Red?", "Yes.", "?", "!"]]
    assert talk(read(values, folder, separate_turns=True)) == [["Red?", "Yes."], ["?", "!"]]
    assert talk(read({"conversations": said("?", "!")})) == [["?", "!"]]


@pytest.mark.parametrize(
    ("text", "num_pictures", "expected"),
    [
        ("Red?\n<image>", 1, "Red?"),
        ("Is <image> red?", 1, "Is red?"),
        ("<image><image>\nSame?", 2, "Same?"),
        ("<image>\n<image>\n\nSame?", 2, "Same?"),
        ("Compare <image> with <image>.", 2, "Compare Image 1 with Image 2."),
        ("<image>\nIs it like <image>?", 2, "Is it like Image 2?"),
        ("<video>\nWho?", 0, "Who?"),
        ("a < image > b", 0, "a < image > b"),
    ],
)
def test_placeholders(text, num_pictures, expected, folder):
    values = {"image": ["a.png"] * num_pictures, "conversations": said(text, "Yes <image>.")}
    assert talk(read(values, folder)) == [[expected, "Yes <image>."]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"conversations": said("<image>\nRed?", "Yes.")}, "missing picture"),
        ({"conversations": []}, "no answer"),
        ({"conversations": None}, "no answer"),
        ({"conversations": said("?")}, "no answer"),
        ({"conversations": [{"from": "bot", "value": "?"}]}, "bad record"),
        ({"conversations": [{"from": "human"}]}, "bad record"),
        ({"conversations": ["?"]}, "bad record"),
        ({"conversations": "?"}, "bad record"),
        ({"image": "none.png", "conversations": said("?", "!")}, "missing picture"),
    ],
)
def test_what_is_wrong_with_llava(values, expected, folder):
    assert cause(values, folder) == expected


# ---- the Cauldron and FineVision ----


def test_cauldron():
    texts = [{"user": "Red?", "assistant": "Yes.", "source": "x"}, {"user": "?", "assistant": "!"}]
    values = {"images": [{"bytes": png(), "path": None}], "texts": texts, "source": "y"}
    example = read(values)
    assert example.images[0].size == (200, 100)
    assert talk(example) == [["Red?", "Yes.", "?", "!"]]
    assert talk(read(values, separate_turns=True)) == [["Red?", "Yes."], ["?", "!"]]
    assert read({"images": None, "texts": texts}).images == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"images": [], "texts": []}, "no answer"),
        ({"images": [{"bytes": b"", "path": "x.png"}], "texts": []}, "missing picture"),
        ({"images": [{"bytes": b"x", "path": "x.png"}], "texts": []}, "broken picture"),
        ({"images": [], "texts": [{"user": "?", "assistant": None}]}, "bad record"),
        ({"images": [], "texts": [{"user": "?", "assistant": ""}]}, "no answer"),
        ({"images": [], "texts": [5]}, "bad record"),
    ],
)
def test_what_is_wrong_with_cauldron(values, expected):
    assert cause(values) == expected


# ---- PixMo and CoSyn ----


def test_pixmo_cap(folder):
    values = {"image_url": URL, "caption": "All red.", "transcripts": ["so red", "", "very red"]}
    example = read(values, folder)
    assert [b.task for b in example.branches] == ["long_caption", "transcript"]
    drawn = {talk(read(values, folder, seed))[1][1] for seed in range(20)}
    assert drawn == {"so red", "very red"}
    assert len(read({"image_url": URL, "caption": "Red."}, folder).branches) == 1
    assert cause({**values, "caption": ""}, folder) == "no answer"


def test_styles_of_the_first_stage(folder):
    """Nine of ten captions say how long they are, in units of 15 characters, more or less."""
    values = {"image_url": URL, "caption": "x" * 300, "transcripts": []}
    asked = [talk(read(values, folder, seed, prompts="styles"))[0][0] for seed in range(300)]
    hints = [int(q.split()[1].rstrip(":")) for q in asked if q != "long_caption:"]
    assert all(q.startswith("long_caption") and q.endswith(":") for q in asked)
    assert 0.83 < len(hints) / 300 < 0.96
    assert 19 < sum(hints) / len(hints) < 20.5
    assert np.std(hints) == pytest.approx(25 / 15, abs=0.3)


def test_pixmo_points(folder):
    values = {
        "image_url": URL,
        "label": "Red dots",
        "points": [{"x": 50.0, "y": 25.0}, {"x": 100.0, "y": 0.0}],
        "count": 2,
        "collection_method": "pointing",
    }
    [[question, answer]] = talk(read(values, folder))
    assert "Red dots" in question
    assert answer == '<points coords="1 1 500 250 2 1000 000">Red dots</points>'
    assert talk(read(values, folder, prompts="styles"))[0][0] == "pointing: red dots"
    counting = read({**values, "collection_method": "counting"}, folder, prompts="styles")
    assert counting.branches[0].task == "point_count"
    assert talk(counting)[0][0] == "point_count: red dots"
    assert "a total of 2" in talk(counting)[0][1]
    assert talk(read({**values, "points": [], "count": 0}, folder))[0][1] == "There are none."
    assert cause({**values, "points": [{"x": 101, "y": 0}], "count": 1}, folder) == "bad points"
    assert cause({**values, "count": 3}, folder) == "bad points"
    assert cause({**values, "label": " "}, folder) == "bad points"
    assert cause({**values, "points": None}, folder) == "bad points"


def test_the_picture_of_an_address_is_found_by_either_checksum(folder):
    values = {"image_url": "https://example.org/other.jpg", "label": "dot", "points": []}
    assert cause(values, folder) == "missing picture"
    checksum = hashlib.sha256(png()).hexdigest()
    (folder / checksum).write_bytes(png())
    assert read({**values, "image_sha256": checksum}, folder).images[0].size == (200, 100)


def test_a_picture_that_is_not_the_one_of_the_points(folder):
    """Addresses give other pictures after a while, and the points would lie anywhere."""
    values = {"image_url": URL, "label": "dot", "points": []}
    right, wrong = hashlib.sha256(png()).hexdigest(), "0" * 64
    assert read({**values, "image_sha256": right}, folder).images
    assert cause({**values, "image_sha256": wrong}, folder) == "changed picture"


@pytest.mark.parametrize("as_lists", [False, True])
def test_cosyn_point(as_lists):
    points = [[{"x": 50.0, "y": 50.0}], []]
    if as_lists:  # how datasets writes a sequence of objects
        points = [{"x": [50.0], "y": [50.0]}, {"x": [], "y": []}]
    values = {
        "image": {"bytes": png(), "path": None},
        "questions": ["Where is the Sum?", "Where?"],
        "answer_points": points,
    }
    example = read(values)
    assert talk(example) == [
        ["Where is the Sum?", '<points coords="1 1 500 500">Where is the Sum?</points>'],
        ["Where?", "There are none."],
    ]
    named = read({**values, "names": ["sum", "x"]}, prompts="styles")
    assert talk(named)[0] == [
        "cosyn_point: where is the sum?",
        '<points coords="1 1 500 500">sum</points>',
    ]
    assert cause({**values, "questions": ["?"]}) == "bad record"
    assert cause({**values, "questions": [], "answer_points": []}) == "no answer"
    assert cause({**values, "questions": [None, "?"]}) == "bad record"


# ---- pictures where the text shows them, in every layout ----


def test_tags_are_taken_out_of_our_own_layout(folder):
    pictures = {"images": ["a.png", "b.png"]}
    asked = {**pictures, "question": "<image><image>\nSame?", "answer": "No."}
    assert talk(read(asked, folder)) == [["Same?", "No."]]
    messages = [
        {"role": "system", "content": "<image>Be short."},
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "<image>And this?"},
        {"role": "assistant", "content": "Blue <image>."},
    ]
    example = read({**pictures, "messages": messages}, folder)
    assert talk(example) == [
        ["Be short.\n\nWhat is this?", "Red.", "Image 2\nAnd this?", "Blue <image>."]
    ]
    branches = [{"question": "<image>\nRed?", "answer": "!"}] * 2
    example = read({"image": "a.png", "branches": branches}, folder)
    assert talk(example) == [["Red?", "!"]] * 2
    assert example.notes == ()


def test_numbering_runs_on_through_a_conversation(folder):
    values = {"image": ["a.png"] * 3}
    texts = said("<image>\nRed?", "Yes.", "Is <image> like <image>?", "No.")
    read_so = talk(read({**values, "conversations": texts}, folder))
    assert read_so == [["Red?", "Yes.", "Is Image 2 like Image 3?", "No."]]
    apart = read({**values, "conversations": texts}, folder, separate_turns=True)
    assert talk(apart) == [["Red?", "Yes."], ["Is Image 2 like Image 3?", "No."]]


def test_tags_of_other_layouts():
    bytes_of = {"bytes": png(), "path": None}
    texts = [{"user": "<image_1>Red?", "assistant": "Yes."}]
    assert talk(read({"images": [bytes_of], "texts": texts})) == [["Red?", "Yes."]]
    values = {"image": bytes_of, "questions": ["<image>Where?"], "answer_points": [[]]}
    assert talk(read(values))[0][0] == "Where?"


@pytest.mark.parametrize("text", ["<image>", "<image><image>?", "see <image_2>"])
def test_a_tag_without_its_picture_is_a_bad_record(text, folder):
    asked = {"question": text, "answer": "!"}
    images = ["a.png"] if text != "<image>" else []
    assert cause({"images": images, **asked}, folder) == "missing picture"
    texts = said(text, "!")
    assert cause({"image": images, "conversations": texts}, folder) == "missing picture"


def test_fewer_tags_than_pictures_are_noted(folder):
    record = Record(
        {"images": ["a.png", "b.png"], "question": "<image>?", "answer": "!"},
        "here",
        folder,
        np.random.default_rng(0),
    )
    LAYOUTS["own"](record)
    [(found, detail)] = record.notes
    assert found == "picture tags and pictures differ"
    assert detail == "here: its text shows 1 pictures, but it has 2"


# ---- points in other units, and in videos ----


@pytest.mark.parametrize(
    ("scale", "x", "y"), [("unit", 0.5, 0.25), ("percent", 50, 25), ("thousandths", 500, 250)]
)
def test_points_in_other_units(scale, x, y, folder):
    point = {"x": x, "y": y}
    values = {"image": "a.png", "question": "?", "label": "dot", "points": [point]}
    expected = '<points coords="1 1 500 250">dot</points>'
    assert talk(read({**values, "points_scale": scale}, folder))[0][1] == expected
    assert talk(read(values, folder, points_scale=scale))[0][1] == expected  # of the whole source
    answer = {"points": [point], "label": "dot"}
    asked = {"question": "?", "answer": {**answer, "points_scale": scale}}
    assert talk(read({"image": "a.png", **asked}, folder))[0][1] == expected
    branch = {"question": "?", "answer": answer, "points_scale": scale}
    assert talk(read({"image": "a.png", "branches": [branch]}, folder))[0][1] == expected
    whole = {"branches": [{"question": "?", "answer": answer}], "points_scale": scale}
    assert talk(read({"image": "a.png", **whole}, folder))[0][1] == expected


def test_a_record_goes_before_its_source(folder):
    values = {"image": "a.png", "question": "?", "points": [{"x": 100, "y": 25}], "label": "dot"}
    stated = read({**values, "points_scale": "pixels"}, folder, points_scale="percent")
    assert talk(stated)[0][1] == '<points coords="1 1 500 250">dot</points>'


@pytest.mark.parametrize(
    ("scale", "x"), [("unit", 1.1), ("percent", 101), ("thousandths", -1), ("inches", 1), (5, 1)]
)
def test_points_outside_of_their_unit(scale, x, folder):
    point = {"points": [{"x": x, "y": 0.5}], "points_scale": scale}
    assert cause({"image": "a.png", "question": "?", **point}, folder) == "bad points"


def test_points_in_a_video_file(folder):
    """The file's own size is asked for; an animated GIF needs no decoder of the extra."""
    frames = [Image.new("RGB", (80, 40), color) for color in ("red", "green", "blue")]
    frames[0].save(
        folder / "clip.gif", save_all=True, append_images=frames[1:], duration=500, loop=0
    )
    values = {"video": "clip.gif", "question": "Point.", "label": "dot"}
    for scale, x, y in (("pixels", 20, 10), ("percent", 25, 25)):
        points = [{"x": x, "y": y, "time": 0.5}]
        example = read({**values, "points": points, "points_scale": scale}, folder)
        assert talk(example) == [["Point.", '<points coords="0.5 1 250 250">dot</points>']]
        assert example.video == folder / "clip.gif"
    assert cause({**values, "points": [{"x": 81, "y": 1, "time": 0}]}, folder) == "bad points"
    (folder / "clip.gif").write_bytes(b"GIF89a")
    assert cause({**values, "points": [{"x": 1, "y": 1, "time": 0}]}, folder) == "not encodable"


def test_points_in_a_video_file_of_frames_and_sound(folder):
    av = pytest.importorskip("av")
    with av.open(str(folder / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 30 * shade, np.uint8))
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    values = {"video": "film.mp4", "question": "Point.", "label": "dot"}
    [[_, answer]] = talk(read({**values, "points": [{"x": 16, "y": 12, "time": 0.5}]}, folder))
    assert answer == '<points coords="0.5 1 250 250">dot</points>'


# ---- one picture, many times ----


@pytest.mark.parametrize("values", [{"url": "a.png"}, {"path": None}, {}])
def test_an_object_that_holds_no_picture_is_named(values, folder):
    with pytest.raises(BadExample, match="in place of a picture, expected its path") as error:
        read({"images": [values], "question": "?", "answer": "Yes."}, folder)
    assert str(values) in str(error.value)


def test_a_picture_is_decoded_once(folder, monkeypatch):
    """By whatever name: six large ones took six times the memory."""
    (folder / "linked.png").symlink_to("a.png")
    names = ["a.png", "./a.png", str(folder / "a.png"), "linked.png", {"path": "a.png"}]
    example = read({"images": [*names, *["b.png"] * 60], **ASKED}, folder)
    assert len({id(image) for image in example.images}) == 2
    assert len(example.images) == 65
    twice = read({"images": [png(), {"bytes": png()}], **ASKED})
    assert twice.images[0] is twice.images[1]
    video = {"frames": ["a.png"] * 50, "times": list(range(50))}
    frames = read({"video": video, **ASKED}, folder).video.frames
    assert len({id(frame) for frame in frames}) == 1


def test_the_pictures_of_a_record_have_a_size_together(folder, monkeypatch):
    from nanomolmo2.data import record

    monkeypatch.setattr(record, "MAX_RECORD_PIXELS", 200 * 100 + 50 * 50)
    assert len(read({"images": ["a.png", "b.png", "a.png"], **ASKED}, folder).images) == 3
    Image.new("RGB", (50, 50)).save(folder / "c.png")
    with pytest.raises(BadExample, match="22,500 pixels together") as error:
        read({"images": ["a.png", "b.png", "c.png"], **ASKED}, folder)
    assert error.value.cause == "broken picture"


# ---- what is no picture ----


@pytest.mark.parametrize("field", ["image", "images", "video"])
@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_told_so(field, name, folder):
    value = [name] if field == "images" else name
    with pytest.raises(BadExample, match=r"the name of its (picture|video) is empty: give a path"):
        read({field: value, **ASKED}, folder)


def test_devices_and_pipes_are_no_pictures(folder):
    """Where a checksum is asked for, they were read before they were looked at."""
    os.mkfifo(folder / "pipe.png")
    for name in ("/dev/zero", "pipe.png", "/proc/self/environ", "."):
        assert cause({"image": name, **ASKED}, folder) == "broken picture"
        assert cause({"video": name, **ASKED}, folder) == "missing video"
        pixmo = {"image": name, "label": "dot", "points": [], "image_url": URL}
        assert cause({**pixmo, "image_sha256": "0" * 64}, folder) == "broken picture"


def test_names_that_no_file_can_have(folder):
    for name in ("x" * 300 + ".png", "a\0.png", "a/" * 3000):
        assert cause({"image": name, **ASKED}, folder) in ("broken picture", "missing picture")
        assert cause({"video": name, **ASKED}, folder) in ("broken picture", "missing video")


def test_addresses_that_are_no_text(folder):
    assert cause({"image": "http://\ud800", **ASKED}, folder) == "missing picture"
    assert len(address_key("http://\ud800")) == 64
    pixmo = {"image_url": URL, "label": "dot", "points": []}
    assert cause({**pixmo, "image_sha256": "../a"}, folder) == "bad record"


def test_a_speaker_that_is_no_name(folder):
    assert cause({"conversations": [{"from": [], "value": "?"}]}, folder) == "bad record"
    assert cause({"conversations": [{"from": {}, "value": "?"}]}, folder) == "bad record"


def test_a_local_address_is_a_path(folder):
    example = read({"image": (folder / "a.png").as_uri(), **ASKED}, folder)
    assert example.images[0].size == (200, 100)


# ---- whatever a file may hold ----

# fmt: off
KEYS = [
    "role", "content", "from", "value", "type", "text", "user", "assistant", "points", "x", "y",
    "label", "image", "mode", "messages", "question", "answer", "frames", "times", "time", "bytes",
    "path",
]
FIELDS = [
    "image", "images", "video", "branches", "messages", "question", "answer", "points", "label",
    "mode", "caption", "task", "truth", "conversations", "texts", "image_url", "transcripts",
    "count", "image_sha256", "questions", "answer_points", "names",
]
# fmt: on
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats()
    | st.sampled_from(
        ["", "?", "user", "assistant", "human", "gpt", "<image>", "text", "image", URL, "a\0.png"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


PICTURE = png()


@given(values=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), asked=st.booleans())
def test_any_record_is_an_example_or_a_bad_one(values, asked):
    """A crash of the reader would end a run; only `BadExample` is counted and skipped."""
    if asked:  # get further: to the points, the captions, the transcripts
        values = {"question": "?", "image_url": PICTURE, "image": PICTURE, "label": "x", **values}
    for layout in LAYOUTS.values():
        record = Record(values, "here", Path("nowhere"), np.random.default_rng(0))
        try:
            example = layout(record)
        except BadExample:
            continue
        assert example.branches
        assert all(branch.messages[-1]["role"] == "assistant" for branch in example.branches)
