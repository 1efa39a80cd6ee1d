"""`VLM.find`: what is asked, what is made of what was found, and what is refused.

Most tests say themselves what is found where (`finds`); the last ones ask a net.
"""

from __future__ import annotations

import asyncio
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2 import VLM
from nanomolmo2.generation import finding
from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.find import question_of, read_examples
from nanomolmo2.generation.finding import Found
from nanomolmo2.processor import Encoded, Point, parse_points
from nanomolmo2.things.find_stage import spaced
from nanomolmo2.things.questions import content_of
from nanomolmo2.things.wordings import EVERYDAY, PLACES
from tests.find_model import find_vlm
from tests.small_model import small_model, small_processor

SIZE = (400, 300)  # 32 x 22 patches of 12.5 x 13.6 pixels, two by two in a window
Finds = Callable[..., list[Encoded]]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return find_vlm()


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", SIZE, "green")


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Finds:
    """``finds([...], [...])``: a list of candidates for each picture; gives the prompts."""

    def install(*found: Sequence[Found]) -> list[Encoded]:
        prompts: list[Encoded] = []

        def find_in(model: object, encoded: Encoded, cache: object = None) -> list[list[Found]]:
            prompts.append(encoded)
            return [list(one) for one in found]

        monkeypatch.setattr(finding, "find_in", find_in)
        return prompts

    return install


def thing(x: float, y: float, confidence: float = 0.9, size: float = 20.0) -> Found:
    return Found(x, y, size, confidence)


def places(answer: Answer) -> list[tuple[float, float]]:
    return [(point.x, point.y) for point in answer.points]


# ---- the question ----


def words(examples: Any, **options: bool) -> list[str]:
    """The parts of a question, ``*`` for a point."""
    (message,) = question_of(read_examples(*examples), **options)
    return [part.get("text", "*") for part in message["content"]]  # type: ignore[union-attr]


def test_the_question_is_a_sentence_without_spaces_beside_points() -> None:
    one = [[(1, 2)]]
    assert words(one) == ["Point to everything like", "*", "."]
    three = [[(1, 2), (3, 4), (5, 6)], [(7, 8), (9, 1)]]
    like = ["Point to everything like", "*", ",", "*", "and", "*"]
    assert words(three) == [*like, ", not like", "*", "and", "*", "."]
    assert words(three, in_second=True) == [
        *like,
        *("in the second picture, not like", "*", "and", "*", "."),
    ]
    assert words(one, in_second=True) == ["Point to everything like", "*", "in the second picture."]


@pytest.mark.parametrize("unlike", [[], [(7.0, 8.0)], [(7.0, 8.0), (9.0, 1.0)]])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_it_is_asked_as_training_asks(number: int, unlike: list[tuple[float, float]]) -> None:
    """The same parts as half of the questions about scenes have, and so the same ids."""
    like = [(float(i), 50.0) for i in range(number)]

    def as_dicts(points: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
        return [{"x": x, "y": y, "image": 1} for x, y in points]

    wording = "Point to everything like {like}{place}{but}."
    but = ", not like {unlike}"
    assert {wording, but, *PLACES[:2]} <= EVERYDAY
    for place in PLACES[:2]:
        filled = wording.replace("{but}", but if unlike else "").replace("{place}", place)
        content = content_of(filled, like=as_dicts(like), unlike=as_dicts(unlike))
        (learned,) = spaced([{"role": "user", "content": content}], _WithoutSpaces())
        (message,) = question_of(read_examples(like, unlike), in_second=bool(place))
        assert message == learned


class _WithoutSpaces(np.random.Generator):
    """Draws what leaves the spaces out."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self) -> float:  # type: ignore[override]
        return 0.9


def test_examples_are_points_of_the_prompt(vlm: VLM, picture, finds: Finds) -> None:
    """Column 17, line 0: window 8 of the first line, its second patch. Column 0, line 21: the first
    window of line 10, its third patch.
    """
    there = [thing(220, 10), thing(10, 290)]
    prompts = finds(there, there)
    vlm.find(picture, [(220, 10)], [(10, 290)], reference=picture)
    (encoded,) = prompts
    assert encoded.image_sizes == (SIZE, SIZE)
    first = 36  # visual tokens of the overview
    assert encoded.point_targets is not None
    assert encoded.point_targets[:, 0].tolist() == [first + 8, first + 160]
    assert encoded.point_targets[:, 1].tolist() == [1, 2]


# ---- what is made of it ----


def test_points_come_in_the_order_of_the_models_lists(vlm: VLM, picture, finds: Finds) -> None:
    """By window, then patch, then third of a patch, column by column; they are found the likeliest
    first.
    """
    finds([thing(10, 200), thing(200, 10, 0.8), thing(11, 2, 0.7), thing(6, 10, 0.6)])
    answer = vlm.find(picture, [(10, 200)])
    assert places(answer) == [(6, 10), (11, 2), (200, 10), (10, 200)]
    assert [point.id for point in answer.points] == [1, 2, 3, 4]
    assert [point.confidence for point in answer.points] == [0.6, 0.7, 0.8, 0.9]
    assert {(p.label, p.image, p.size, p.time) for p in answer.points} == {("thing", 1, 20, None)}
    assert (answer.count, answer.problems) == (4, ())
    assert answer.image_sizes == (SIZE,)
    assert answer.confidence == pytest.approx((0.9 * 0.8 * 0.7 * 0.6) ** 0.25)
    assert answer.input_tokens > 36 and answer.usage.completion_tokens == 0
    assert {"prepare", "generate"} <= answer.timings.keys()


def test_the_text_says_the_same(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(200, 60), thing(100, 30, 0.8)])
    answer = vlm.find(picture, [(200, 60)])
    assert answer.text == (
        'Counting the <points coords="1 1 250 100 2 500 200">thing</points> shows a total of 2.'
    )
    assert answer.coordinates == answer.text
    assert [(p.x, p.y, p.id) for p in parse_points(answer.text, [SIZE])] == [
        (100, 30, 1),
        (200, 60, 2),
    ]
    found = answer.to_dict()
    assert (found["count"], found["points"][0]["size"]) == (2, 20)
    assert found["points"][0]["confidence"] == 0.8


def test_unlikely_candidates_are_left_out(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(200, 60), thing(100, 30, 0.5), thing(300, 30, 0.49)])
    assert places(vlm.find(picture, [(200, 60)])) == [(100, 30), (200, 60)]
    assert vlm.find(picture, [(200, 60)], min_confidence=0.05).count == 3
    assert places(vlm.find(picture, [(200, 60)], min_confidence=0.9)) == [(200, 60)]
    none = vlm.find(picture, [(200, 60)], min_confidence=1)
    assert (none.text, none.count, none.points) == ("There are none.", 0, ())
    assert none.confidence == pytest.approx(0.1)


def test_a_middle_beside_the_picture_is_on_its_edge(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(-4, 20), thing(398, 303)])
    assert places(vlm.find(picture, [(2, 20)])) == [(0, 20), (398, 300)]


def test_with_a_reference_the_second_picture_is_asked_about(vlm: VLM, finds: Finds) -> None:
    reference, picture = Image.new("RGB", (64, 48)), Image.new("RGB", SIZE)
    prompts = finds([thing(30, 20, 0.8)], [thing(150, 150)])
    answer = vlm.find(picture, [(30, 20)], reference=reference)
    assert [(p.x, p.y, p.image) for p in answer.points] == [(150, 150, 2)]
    assert answer.image_sizes == prompts[0].image_sizes == ((64, 48), SIZE)
    assert answer.problems == ()
    first, second = answer.draw()  # type: ignore[misc]
    assert first.size == (64, 48) and not np.asarray(first).any()
    assert second.size == SIZE and np.asarray(second)[150, 150].any()
    text = '<points coords="2 1 375 500">thing</points>'
    assert answer.text == f"Counting the {text} shows a total of 1."


def test_examples_may_lie_in_both_pictures(vlm: VLM, picture, finds: Finds) -> None:
    prompts = finds([thing(30, 20)], [thing(390, 250), thing(100, 100)])
    reference = Image.new("RGB", (64, 48))
    answer = vlm.find(picture, [(30, 20, 1), Point(390, 250, 2)], [(100, 100, 2)], reference)
    assert places(answer) == [(390, 250)]
    assert prompts[0].point_targets is not None and len(prompts[0].point_targets) == 3


def test_what_a_counterexample_marks_is_not_listed(vlm: VLM, picture, finds: Finds) -> None:
    """Of two that lie under it, the likelier goes; one in the reference removes nothing."""
    candidates = [thing(200, 60), thing(100, 30, 0.8), thing(106, 36, 0.7), thing(300, 30, 0.6)]
    finds(candidates, candidates)
    answer = vlm.find(picture, [(200, 60)], unlike=[(102, 32)])
    assert sorted(places(answer)) == [(106, 36), (200, 60), (300, 30)]
    assert vlm.find(picture, [(200, 60)], [(102, 32)], reference=picture).count == 4


def test_an_example_on_bare_ground_is_warned_of(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(200, 60), thing(100, 30, 0.12), thing(300, 30)])
    with pytest.warns(UserWarning, match="nothing seems to be there: confidence 0.00") as said:
        answer = vlm.find(picture, [(200, 60), (10, 250)])
    assert said[0].filename == __file__
    (problem,) = answer.problems
    assert problem.startswith("nothing seems to be there: confidence 0.00 at (10, 250)")
    with pytest.warns(UserWarning, match=r"confidence 0.12 at \(104, 34\)"):
        vlm.find(picture, [(104, 34)])


def test_an_example_counts_as_seen_where_it_lies_on_the_thing(
    vlm: VLM, picture, finds: Finds
) -> None:
    """40 pixels long, so up to 30 beside its middle; of a tiny one up to 1.25 patches, 15.6."""
    finds([thing(200, 60, size=40), thing(300, 60, size=4), thing(50, 250)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vlm.find(picture, [(218, 84), (315, 60)]).problems == ()
    for place in ((219, 84), (316, 60)):
        with pytest.warns(UserWarning, match="nothing seems to be there"):
            vlm.find(picture, [place])


def test_an_example_in_the_reference_is_looked_up_there(vlm: VLM, picture, finds: Finds) -> None:
    finds([], [thing(200, 60)])
    with pytest.warns(UserWarning, match="nothing seems to be there"):
        answer = vlm.find(picture, [(200, 60)], reference=picture)
    assert answer.count == 1


def test_nothing_similar_is_said(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(200, 60), thing(300, 60, 0.4)])
    answer = vlm.find(picture, [(200, 60)])
    assert answer.count == 1
    assert answer.problems == (
        "nothing like the example was found beside the example itself: the likeliest place has "
        "confidence 0.40",
    )
    # What is listed for a slider is no find.
    listed = vlm.find(picture, [(200, 60)], min_confidence=0.05)
    assert (listed.count, listed.problems) == (2, answer.problems)
    finds([thing(200, 60)], [])
    other = vlm.find(picture, [(200, 60)], reference=picture)
    assert (other.count, other.text) == (0, "There are none.")
    assert other.problems == (
        "nothing like the example was found: the likeliest place has confidence 0.00",
    )


def test_more_than_was_learned_is_said(vlm: VLM, picture, finds: Finds) -> None:
    many = [thing(5 + 20 * (i % 19), 5 + 20 * (i // 19), 0.9, 10) for i in range(61)]
    finds(many[:60])
    assert vlm.find(picture, [(5, 5)]).problems == ()
    finds([*many, thing(390, 290, 0.2)])
    answer = vlm.find(picture, [(5, 5)], min_confidence=0.1)
    assert answer.count == 62
    assert answer.problems[0].startswith("61 things were listed, more than the 60 of a kind")


def test_max_crops_are_those_of_one_call(vlm: VLM, finds: Finds) -> None:
    """Tiles show 160 pixels each: 5 x 2 of them keep the size of the picture."""
    prompts = finds([thing(10, 10)])
    processor, wide = vlm.processor, Image.new("RGB", (800, 200))
    for max_crops in (None, 1, np.int64(2)):
        vlm.find(wide, [(10, 10)], max_crops=max_crops)
    assert vlm.processor is processor
    crops = [int(one.image_num_crops[0]) for one in prompts]  # type: ignore[index]
    assert crops == [1 + 10, 1 + 1, 1 + 2]


# ---- forms of pictures, threads, loops ----


def test_a_picture_may_have_any_form(vlm: VLM, finds: Finds, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    prompts = finds([thing(10, 10)], [thing(10, 10)])
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms: list[Any] = [str(tmp_path / "a.png"), tmp_path / "a.png", data, io.BytesIO(data)]
    forms += [Image.fromarray(pixels), pixels, pixels[None], pixels / 255, tensor, [pixels]]
    for form in forms:
        vlm.find(form, [(10, 10)])
        vlm.find(pixels, [(10, 10)], reference=form)
    first = prompts[0].pixel_values
    assert first is not None
    assert all(np.array_equal(one.pixel_values[: len(first)], first) for one in prompts)


def test_places_may_be_of_numpy_and_torch(vlm: VLM, picture, finds: Finds) -> None:
    prompts = finds([thing(30, 40)])
    forms: list[Any] = [[(30, 40)], np.array([[30, 40]]), torch.tensor([[30.0, 40.0]])]
    forms += [[[np.float32(30), np.int64(40)]], [Point(30, 40)], ((30, 40, 1),), iter([(30, 40)])]
    for form in forms:
        assert vlm.find(picture, form).count == 1
    targets = [one.point_targets.tolist() for one in prompts]  # type: ignore[union-attr]
    assert targets == [targets[0]] * len(forms)


def test_find_in_an_event_loop(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(30, 40), thing(90, 40)])

    async def both() -> list[Answer]:
        asked = [vlm.find_async(picture, like=[(30, 40)]) for _ in range(2)]
        return list(await asyncio.gather(*asked))

    assert [answer.count for answer in asyncio.run(both())] == [2, 2]


# ---- what is refused ----

INSIDE = [(30, 40)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"like": []}, "like is empty, expected at least one place"),
        ({"like": (30, 40)}, r"like is \(30, 40\), expected a list of places"),
        ({"like": "30,40"}, "like is '30,40', expected a list of places"),
        ({"like": None}, "like is None, expected a list of places"),
        ({"like": ["30,40"]}, r"like\[0\] is '30,40', expected \(x, y\) in pixels"),
        ({"like": [("30", "40")]}, r"like\[0\] is"),
        ({"like": [(30,)]}, r"like\[0\] is \(30,\), expected \(x, y\)"),
        ({"like": [(30, 40), (1, 2, 3, 4)]}, r"like\[1\] is \(1, 2, 3, 4\)"),
        ({"like": [(True, 40)]}, r"like\[0\] is \(True, 40\)"),
        ({"like": [(math.nan, 40)]}, r"like\[0\] is \(nan, 40\)"),
        ({"like": [(30, -math.inf)]}, r"like\[0\] is \(30, -inf\)"),
        ({"like": [(30, 40, 3)]}, r"like\[0\] names picture 3"),
        ({"like": [(30, 40, 0)]}, r"like\[0\] names picture 0"),
        ({"like": [(30, 40, 1.5)]}, r"like\[0\] names picture 1.5"),
        ({"like": [Point(30, 40, time=2.0)]}, "at 2.0 s of a video"),
        ({"unlike": [(30, math.nan)]}, r"unlike\[0\] is \(30, nan\)"),
        ({"unlike": [(30, 40)]}, r"\(30, 40\) is in like and in unlike"),
        ({"like": [(30, 40, 2)]}, "names the second picture, but there is one"),
        ({"like": [(401, 40)]}, r"\(401, 40\) lies outside of the picture, which is 400 x 300"),
        ({"like": [(30, -1)]}, r"\(30, -1\) lies outside of the picture"),
        ({"unlike": [(30, 301)]}, r"\(30, 301\) lies outside of the picture"),
        ({"min_confidence": 1.1}, "min_confidence is 1.1, expected a number from 0"),
        ({"min_confidence": -0.1}, "min_confidence is -0.1"),
        ({"min_confidence": math.nan}, "min_confidence is nan"),
        ({"min_confidence": True}, "min_confidence is True"),
        ({"min_confidence": "0.5"}, "min_confidence is '0.5'"),
        ({"max_crops": 0}, "max_crops is 0, expected a whole number from 1 on"),
        ({"max_crops": 2.5}, "max_crops is 2.5"),
        ({"max_crops": True}, "max_crops is True"),
        ({"image": None}, "image holds no picture, expected one"),
        ({"image": []}, "image holds no picture"),
        ({"image": "none-such.png"}, "there is no file none-such.png"),
        ({"reference": []}, "reference holds no picture"),
    ],
)
def test_bad_input_is_refused(
    vlm: VLM, picture, finds: Finds, arguments: dict[str, Any], message: str
) -> None:
    prompts = finds([thing(30, 40)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vlm.find(**{"image": picture, "like": INSIDE, **arguments})
    assert not prompts


def test_several_pictures_are_refused(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(30, 40)])
    with pytest.raises(ValueError, match="image holds 2 pictures, expected one"):
        vlm.find([picture, picture], INSIDE)
    with pytest.raises(ValueError, match="reference holds 2 pictures"):
        vlm.find(picture, INSIDE, reference=np.zeros((2, 30, 30, 3), np.uint8))


def test_a_place_of_the_other_picture_is_told_apart(vlm: VLM, picture, finds: Finds) -> None:
    """People click in the picture they ask about: examples lie in the reference."""
    finds([thing(30, 20)], [])
    reference = Image.new("RGB", (64, 48))
    with pytest.raises(ValueError, match=r"64 x 48 pixels; .* asked about is 400 x 300: examples"):
        vlm.find(picture, [(200, 100)], reference=reference)
    with pytest.raises(ValueError, match="64 x 48 pixels: give pixels from its top-left corner"):
        vlm.find(picture, [(500, 100)], reference=reference)
    with pytest.raises(ValueError, match="outside of the picture, which is 400 x 300"):
        vlm.find(picture, [(30, 20), (500, 100, 2)], reference=reference)


def test_too_many_crops_for_the_context_are_refused(vlm: VLM, finds: Finds) -> None:
    prompts = finds([thing(30, 40)])
    with pytest.raises(ValueError, match=r"holds 4,096: choose a smaller max_crops"):
        vlm.find(Image.new("RGB", (3200, 3200)), INSIDE, max_crops=400)
    assert not prompts


def test_a_model_that_reads_pictures_as_a_whole_has_no_crops(picture, finds: Finds) -> None:
    """What it could find has no order of its own then: line by line."""
    finds([thing(90, 40), thing(30, 40), thing(60, 20)])
    whole = VLM(small_model(), small_processor())
    assert places(whole.find(picture, INSIDE)) == [(60, 20), (30, 40), (90, 40)]
    with pytest.raises(ValueError, match="reads a picture as a whole, not in crops"):
        whole.find(picture, INSIDE, max_crops=2)


# ---- with a net ----


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((240, 200))


def test_a_net_finds_the_same_alone_and_after_other_questions(scene: Image.Image) -> None:
    fresh, known = find_vlm(reuse_bytes=0), find_vlm()
    known.find(scene, [(200, 20)], min_confidence=0)
    expected = fresh.find(scene, [(50, 60)], min_confidence=0)
    answer = known.find(scene, [(50, 60)], min_confidence=0)
    assert expected.count and answer.count == expected.count
    for one, other in zip(answer.points, expected.points, strict=True):
        assert (one.x, one.y) == pytest.approx((other.x, other.y), abs=1e-3)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
        assert 0 <= one.x <= 240 and 0 <= one.y <= 200


@pytest.mark.filterwarnings("ignore:nothing seems to be there")
def test_a_second_click_does_not_see_the_picture_again(scene: Image.Image) -> None:
    vlm = find_vlm()
    seen: list[int] = []
    encoder = vlm.model.vision_encoder
    features = encoder.features

    def counted(images: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(images))
        return features(images, *rest)

    encoder.features = counted  # type: ignore[method-assign]
    try:
        for place in ((50, 60), (51, 60), (120, 99)):
            vlm.find(scene, [place], min_confidence=0)
        assert len(seen) == 1
        vlm.find(scene, [(50, 60)], min_confidence=0, max_crops=1)  # another cut of it
        assert len(seen) == 2
    finally:
        del encoder.features


def test_a_model_that_has_not_learned_it_says_so(scene: Image.Image) -> None:
    vlm = VLM(small_model(), small_processor())
    with pytest.raises(
        ValueError, match=r"cannot find by example .* such as .nanomolmo2 train find"
    ):
        vlm.find(scene, [(50, 60)])
