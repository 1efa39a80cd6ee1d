"""Tags of pictures in questions: taken out where pictures stand, named elsewhere, never kept."""

from __future__ import annotations

from typing import Any

import pytest

from nanomolmo2.data.placeholders import find_tag, place_tags

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(said: str, **more: str) -> dict[str, str]:
    return {"type": "text", "text": said, **more}


def placed(*contents: Any, images: int = 1, video: bool = False) -> list[Any]:
    found, problem = place_tags(contents, images, video)
    assert problem is None
    return found


@pytest.mark.parametrize(
    ("said", "images", "expected"),
    [
        ("<image>What is this?", 1, "What is this?"),
        ("<image>\nWhat is this?", 1, "What is this?"),
        ("What is this?\n<image>", 1, "What is this?"),
        ("What is this? <image>", 1, "What is this?"),
        ("Is <image> red?", 1, "Is red?"),
        ("And now <image> what?", 1, "And now what?"),
        ("A\n<image>\nB", 1, "A\nB"),
        ("<Image 1>What?", 1, "What?"),
        ("<image_1><image_2>\nSame?", 2, "Same?"),
        ("<image1> or <image2>?", 2, "Image 1 or Image 2?"),
        ("<image 2> vs <image 1>:\nwhich?", 2, "Image 2 vs Image 1:\nwhich?"),
        ("Compare <image> with <image>.", 2, "Compare Image 1 with Image 2."),
        ("<image>Compare with<image>!", 2, "Compare with Image 2!"),
        ("First:\n<image>\nSecond:\n<image>", 2, "First:\nImage 1\nSecond:\nImage 2"),
        ("Is <image-2> like <image-1>?", 2, "Is Image 2 like Image 1?"),
        ("<image>", 1, ""),
        ("a < image > b", 0, "a < image > b"),
        ("  kept as it is\n", 3, "  kept as it is\n"),
    ],
)
def test_texts(said: str, images: int, expected: str) -> None:
    assert placed(said, images=images) == [expected]


def test_a_later_question_names_the_picture_it_shows() -> None:
    said = ["<image>What is this?", "<image>\nAnd this?", "<image>This?", "Like <image_1>?"]
    expected = ["What is this?", "Image 2\nAnd this?", "Image 3\nThis?", "Like Image 1?"]
    assert placed(*said, images=3) == expected
    assert placed("What?", "<image>And now?", images=1) == ["What?", "And now?"]


def test_parts() -> None:
    assert placed([IMAGE, text("Red?", style="vqa2")]) == [[text("Red?", style="vqa2")]]
    assert placed([text("<image>What?"), text("And <image>?")], images=2) == [
        [text("What?"), text("And Image 2?")]
    ]
    said = [text("Compare"), IMAGE, text("with"), IMAGE, text(", please.")]
    assert placed(said, images=2) == [[text("Compare Image 1 with Image 2, please.")]]
    assert placed([IMAGE, IMAGE, text("Same?")], images=2) == [[text("Same?")]]
    assert placed([text("Same?"), IMAGE, IMAGE], images=2) == [[text("Same?")]]
    assert placed([IMAGE, text("What?")], [IMAGE, text("And it?")], images=2) == [
        [text("What?")],
        [text("Image 2 And it?")],
    ]


@pytest.mark.parametrize(
    ("contents", "images", "shown"),
    [
        (["<image><image>Same?"], 1, 2),
        (["<image>What?"], 0, 1),
        (["<image_3>What?"], 2, 3),
        (["<image>What?", "<image><image>And?"], 2, 3),
        ([[IMAGE, IMAGE, text("What?")]], 1, 2),
    ],
)
def test_tags_without_a_picture(contents: list[Any], images: int, shown: int) -> None:
    with pytest.raises(ValueError, match=f"shows {shown} pictures, but it has {images}"):
        place_tags(contents, images, False)


@pytest.mark.parametrize(
    ("contents", "images", "expected", "problem"),
    [
        (["<image>What?"], 2, ["What?"], "shows 1 pictures, but it has 2"),
        (["<image>What?", "<image>And?"], 1, ["What?", "And?"], "taken as shown again"),
        (["<video>Who?"], 0, ["Who?"], "shows a video, but it has none"),
    ],
)
def test_what_may_be_a_mistake_is_told(
    contents: list[Any], images: int, expected: list[str], problem: str
) -> None:
    found, told = place_tags(contents, images, False)
    assert found == expected
    assert told is not None and problem in told


def test_a_video_is_shown_by_its_own_tag() -> None:
    assert placed("<video>\nWho?", images=0, video=True) == ["Who?"]
    assert placed([VIDEO, text("Who?")], images=0, video=True) == [[text("Who?")]]
    assert placed("<video>\nWho?", images=3) == ["Who?"]  # its frames


@pytest.mark.parametrize(
    "tag",
    [
        "<image>",
        "<IMG>",
        "<image_placeholder>",
        "<|image_1|>",
        "<|vision_start|>",
        "<ImageHere>",
        "[IMG]",
        "<im_patch>",
        "<|video|>",
        "<image/>",
        "{{image}}",
    ],
)
def test_any_tag_is_found(tag: str) -> None:
    assert find_tag(f"Is{tag}this red?") == tag


@pytest.mark.parametrize(
    "said",
    [
        '<points coords="1 1 500 500">images</points>',
        "[image](a.png)",
        '<img src="a.png">',
        "an image <b>bold</b>",
    ],
)
def test_what_is_no_tag(said: str) -> None:
    assert find_tag(said) is None
