"""What records declare: fields that nobody reads, and what can never fit into a row."""

from __future__ import annotations

from typing import Any

import pytest

from nanomolmo2.data.fields import FIELDS, RowLimits, declared, unread_fields
from nanomolmo2.data.layouts import LAYOUTS
from nanomolmo2.processor import MultiCrop, Processor, ProcessorConfig
from nanomolmo2.processor.config import VideoConfig
from tests.small_model import small_processor

ASKED = {"question": "?", "answer": "!"}
PNG = b"\x89PNG\r\n\x1a\n"


def test_every_layout_says_what_it_reads() -> None:
    assert FIELDS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"image_path": "a.png"},
        {"img": "a.png"},
        {"imgs": ["a", "b"]},
        {"image_paths": ["a.png"]},
        {"picture": "a"},
        {"photo": "holiday"},
        {"file_name": "000123"},
        {"pixel_values": [[0, 1], [2, 3]]},
        {"image_url": "https://example.org/a"},
        {"image_id": 7},
        {"video_path": "a"},
        {"clip": "a.mp4"},
        {"thing": "folder/a.JPG"},
        {"thing": "https://example.org/a.webp?size=1"},
        {"thing": ["a.mov"]},
        {"thing": {"bytes": PNG, "path": None}},
        {"thing": PNG},
        {"meta": {"image": "a.png"}},
        {"media": [{"file_name": "a.jpg"}]},
        {"thing": "data:image/png;base64,AAAA"},
    ],
)
def test_fields_that_look_like_pictures(values: dict[str, Any]) -> None:
    assert unread_fields({**values, **ASKED}, "own") == ([*values], [])


def test_pictures_within_the_parts_of_a_record() -> None:
    message = {"role": "user", "content": "?", "image": "a.png"}
    assert unread_fields({"messages": [message]}, "own") == (["messages.image"], [])
    branch = {**ASKED, "images": ["a.png"]}
    assert unread_fields({"branches": [branch, branch]}, "own") == (["branches.images"], [])
    turn = {"from": "human", "value": "?", "image": "a.png"}
    assert unread_fields({"conversations": [turn]}, "llava") == (["conversations.image"], [])
    assert unread_fields({"images": [], "texts": [], "video": "a.mp4"}, "cauldron")[0] == ["video"]


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ({"image": "a.png", "image_size": [1, 2], "photographer": "Ann"}, ["image_size"]),
        ({"image": "a.png", "source": "web", "licence": "CC0"}, ["source", "licence"]),
        ({"image": "a.png", "id": 3, "width": 4, "height": 5, "objects": [], "counts": []}, []),
        ({"images": ["a.png"], "image_path": None}, ["image_path"]),
        ({"image": "coco/1.png", "name": "coco/1.png"}, ["name"]),
        ({"image": "a.png", "meta": {"camera": "old"}}, ["meta"]),
        ({"imagination": "much", "path_length": 3}, ["imagination", "path_length"]),
    ],
)
def test_other_fields_are_named_only(values: dict[str, Any], others: list[str]) -> None:
    pictures, found = unread_fields({**values, **ASKED}, "own")
    assert pictures == []
    assert found == [*others, *(["photographer"] if "photographer" in values else [])]


def test_what_a_record_declares() -> None:
    needs = declared({"images": ["a", "b"], **ASKED}, "own")
    assert (needs.pictures, needs.frames, needs.characters) == (2, 0, 2)
    needs = declared({"video": {"frames": ["a"] * 13, "times": [0]}, "caption": "abc"}, "own")
    assert (needs.pictures, needs.frames, needs.characters) == (0, 13, 3)
    messages = [{"role": "user", "content": [{"type": "text", "text": "abcd"}]}]
    branches = [{"messages": messages}, ASKED]
    assert declared({"image": "a", "branches": branches}, "own").characters == 6
    said = [{"from": "human", "value": "abc"}]
    assert declared({"conversations": said, "notes": "x" * 99}, "llava").characters == 3
    assert declared({"image_url": "x", "caption": "ab"}, "pixmo_cap").pictures == 1


def limits(processor: Processor | None, max_tokens: int = 100, max_crops: int = 8) -> RowLimits:
    return RowLimits.of(processor, max_tokens, max_crops)


def refused(row: RowLimits, **values: Any) -> str:
    return row.refuse(declared({**ASKED, **values}, "own")) or ""


def test_what_can_never_fit_is_refused() -> None:
    row = limits(small_processor())  # four tokens a picture
    assert not refused(row, images=["a"] * 8)
    assert "9 pictures are at least 9 crops, and a row holds 8" in refused(row, images=["a"] * 9)
    thirteen = {"frames": ["a"] * 13, "times": []}
    assert "13 frames are at least 13 crops" in refused(row, video=thirteen)
    assert not refused(row, video={"frames": ["a"] * 8})
    many = limits(small_processor(), max_crops=60)
    assert not refused(many, images=["a"] * 24)
    assert "26 pictures are at least 104 tokens" in refused(many, images=["a"] * 26)
    assert not refused(row, question="a" * 100)
    assert "10,000,001 characters" in refused(row, question="a" * 10_000_000)


def test_a_picture_that_is_cut_has_two_crops_at_least() -> None:
    small = small_processor()
    crops = MultiCrop(max_crops=4, image_size=56, overlap_margins=(1, 1))
    config = ProcessorConfig.molmo2(multicrop=crops, video=VideoConfig())
    names = (config.image_token, config.image_start_token, config.image_end_token)
    assert all(name in small.tokenizer.special_ids for name in names)
    row = limits(Processor(config, small.tokenizer))
    assert not refused(row, images=["a"] * 4)
    assert "5 pictures are at least 10 crops" in refused(row, images=["a"] * 5)


def test_the_least_that_is_counted_is_never_more_than_what_is_encoded() -> None:
    processor = small_processor()
    row = limits(processor)
    text = "How many dogs are in the picture, and which of them is asleep?"
    ids = processor.tokenizer.encode_text(text)
    assert len(text) <= len(ids) * row.token_length
