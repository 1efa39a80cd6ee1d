"""Layouts: each data set's fields to an example, and what is wrong with a record by its cause."""

from __future__ import annotations

import hashlib
import io
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
        ("Is <image> red?", 1, "Is  red?"),
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
