"""`VLM.find`: what is looked at, what is made of what was found, and what is refused.

Most tests say themselves what is found where (`finds`); the last ones ask a net.
"""

from __future__ import annotations

import asyncio
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import nanomolmo2
from nanomolmo2 import VLM
from nanomolmo2.convert.pretrained import load
from nanomolmo2.generation import finding
from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.find import crops_of
from nanomolmo2.generation.finding import Found, Seen
from nanomolmo2.models.finder import CANDIDATES
from nanomolmo2.processor import Point, parse_points
from nanomolmo2.processor.crops import resize
from nanomolmo2.processor.point_space import View
from nanomolmo2.things.find_model import CROPS
from tests.find_model import find_net, find_vlm
from tests.small_model import small_model, small_processor

ASSETS = Path(nanomolmo2.__file__).parent / "assets"
SIZE = (400, 300)  # 32 x 22 patches of 12.5 x 13.6 pixels, two by two in a window


class Look(NamedTuple):
    """What `look_for` was given."""

    pictures: list[Seen]
    like: list[Point]
    unlike: list[Point]
    candidates: int = CANDIDATES


Finds = Callable[..., list[Look]]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return find_vlm()


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", SIZE, "green")


@pytest.fixture(autouse=True)
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at each picture, but for the tests that are about several of them."""
    if request.node.get_closest_marker("several_looks") is None:
        monkeypatch.setattr(finding, "LOOKS", 1)


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Finds:
    """``finds([...], [...])``: a list of candidates for each picture; gives what was looked at."""

    def install(*found: Sequence[Found]) -> list[Look]:
        looks: list[Look] = []

        def look_for(model: object, *given: Any) -> list[list[Found]]:
            looks.append(Look(*given))
            return [list(one) for one in found]

        monkeypatch.setattr(finding, "look_for", look_for)
        return looks

    return install


def thing(x: float, y: float, confidence: float = 0.9, size: float = 20.0) -> Found:
    return Found(x, y, size, confidence)


def raise_a_little(confidence: float) -> float:
    return finding.calibrated(thing(0, 0, confidence), 0.3).confidence


def places(answer: Answer) -> list[tuple[float, float]]:
    return [(point.x, point.y) for point in answer.points]


# ---- what is looked at ----


def test_examples_are_patches_of_their_pictures(vlm: VLM, picture, monkeypatch) -> None:
    """Column 17, line 0: window 8 of the first line. Column 0, line 21: the first window of line
    10. The second picture's patches come behind the 704 of the first.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    finder = vlm.model.finder
    assert finder is not None
    wanted = finder.wanted

    def remembered(patches: Any, states: Any, like_states: Any, examples: Any, *rest: Any) -> Any:
        seen.append((examples, rest[-1]))
        return wanted(patches, states, like_states, examples, *rest)

    monkeypatch.setattr(finder, "wanted", remembered)
    like = [(220, 10), (399.9, 300, 2)]
    vlm.find(picture, like, [(10, 290)], reference=picture, min_confidence=0)
    ((examples, gates),) = seen
    assert examples.tolist() == [17, 704 + 703, 21 * 32]
    assert gates.sign().tolist() == [1, 1, -1]
    rows = finding.see(vlm.model, crops_of(vlm.model, vlm.processor, None, [SIZE]), picture).rows
    assert (len(rows), rows[17], rows[21 * 32], rows[703]) == (704, 8, 160, 175)


@pytest.fixture(params=["L", "LA", "P", "RGBA", "I;16", "JPEG that is turned"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A picture that is no RGB, as a file."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 140, 4), dtype=np.uint8)
    path, mode = tmp_path / "a.png", request.param
    if mode == "I;16":
        Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0]).save(path)
    elif mode == "JPEG that is turned":
        path = tmp_path / "a.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise[..., :3]).save(path, exif=exif)
    else:
        Image.fromarray(noise, "RGBA").convert(mode).save(path)
    return path


def test_a_question_in_words_sees_the_same_pixels(vlm: VLM, file: Path, finds: Finds) -> None:
    """Only that there is no overview, and that patches are in the order of the picture."""
    encoded = vlm.processor.encode([{"role": "user", "content": "How many?"}], [file])
    looks = finds([thing(10, 10)])
    with counted(vlm) as seen:
        vlm.find(file, [(10, 10)])
    assert encoded.pixel_values is not None and encoded.point_space is not None
    np.testing.assert_array_equal(torch.cat(seen), encoded.pixel_values[1:])
    (shown,) = looks[0].pictures
    assert (shown.size,) == encoded.image_sizes
    (view,) = encoded.point_space.views
    assert shown.view == view._replace(first_row=0)
    row, _ = finding.grid_of(encoded.point_space, 0)
    np.testing.assert_array_equal(shown.rows + view.first_row, row.ravel())


@pytest.mark.parametrize("size", [(400, 300), (90, 700), (30, 20)])
def test_points_are_ordered_as_those_of_a_prompt(vlm: VLM, finds: Finds, size) -> None:
    rng = np.random.default_rng(1)
    places = [(float(x), float(y)) for x, y in rng.uniform(0, size, (300, 2))]
    places += [(0.0, 0.0), (float(size[0]), float(size[1]))]
    finds([thing(x, y) for x, y in places])
    picture = Image.new("RGB", size)
    answer = vlm.find(picture, places[:1])
    asking = vlm.processor.with_settings(multicrop=crops_of(vlm.model, vlm.processor, None, [size]))
    encoded = asking.encode([{"role": "user", "content": "How many?"}], [picture])
    assert encoded.point_space is not None
    expected = [point for _, point in encoded.point_space.order(Point(x, y) for x, y in places)]
    assert [(p.x, p.y) for p in answer.points] == [(p.x, p.y) for p in expected]


def test_many_crops_are_seen_some_at_a_time(vlm: VLM, monkeypatch) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    crops = CROPS  # 2 x 2
    whole = finding.see(vlm.model, crops, pixels)
    monkeypatch.setattr(finding, "MOST_CROPS", 3)
    with counted(vlm) as seen:
        parts = finding.see(vlm.model, crops, pixels)
    assert [len(tiles) for tiles in seen] == [3, 1]
    torch.testing.assert_close(parts.features, whole.features)
    torch.testing.assert_close(parts.tokens, whole.tokens)


def test_large_pictures_are_told_apart_by_all_of_their_pixels(monkeypatch) -> None:
    """Read whole or in bands, as an image or an array."""
    pixels = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    other = pixels.copy()
    other[59, 79, 2] ^= 1
    whole = finding._digest(pixels)
    assert finding._digest(Image.fromarray(pixels)) == whole != finding._digest(other)
    monkeypatch.setattr(finding, "_BAND", 7 * 80)  # 8 bands of 7 lines, and one of 4
    banded = finding._digest(Image.fromarray(pixels))
    assert banded == finding._digest(Image.fromarray(pixels)) != whole
    assert banded != finding._digest(Image.fromarray(other))


def test_patches_of_windows_that_are_not_whole() -> None:
    """27 patches a side, pooled 2 x 2: the last window of a line has one column."""
    crops = type(CROPS)(max_crops=1, image_size=378, patch_size=14, overlap_margins=(4, 4))
    made = []

    class Model:
        """Patches are told by their numbers."""

        class llm:
            embed_tokens = torch.nn.Embedding(1, 1)

        class config:
            class connector:
                vit_layers = (-1,)

        class vision_encoder:
            @staticmethod
            def features(pixels: torch.Tensor, layers: Any) -> torch.Tensor:
                return torch.arange(pixels.shape[1]).float()[None, :, None]

        @staticmethod
        def connector(features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
            made.append(windows)
            return windows.float()

    model: Any = Model
    seen = finding.see(model, crops, np.zeros((378, 378, 3), np.uint8))
    assert seen.view == View(0, 27, 27, 2) and len(seen.tokens) == 14 * 14
    assert seen.features[:, 0].tolist() == list(range(27 * 27))
    assert seen.rows.tolist() == [r // 2 * 14 + c // 2 for r in range(27) for c in range(27)]
    for number, row in enumerate(seen.rows.tolist()):
        assert number in made[0][row].tolist()


# ---- what is made of it ----


def test_points_come_in_the_order_of_the_models_lists(vlm: VLM, picture, finds: Finds) -> None:
    """By window, then patch, then third of a patch, column by column; they are found the likeliest
    first.
    """
    finds([thing(10, 200), thing(200, 10, 0.8), thing(11, 2, 0.7), thing(6, 10, 0.6)])
    answer = vlm.find(picture, [(10, 200)])
    assert places(answer) == [(6, 10), (11, 2), (200, 10), (10, 200)]
    assert [point.id for point in answer.points] == [1, 2, 3, 4]
    assert [point.confidence for point in answer.points] == [0.6, 0.7, 0.8, 1.0]
    assert {(p.label, p.image, p.size, p.time) for p in answer.points} == {("thing", 1, 20, None)}
    assert (answer.count, answer.problems) == (4, ())
    assert answer.image_sizes == (SIZE,)
    assert answer.confidence == pytest.approx((0.8 * 0.7 * 0.6) ** 0.25)
    assert answer.input_tokens == answer.usage.prompt_tokens == 16 * 11
    assert answer.usage.completion_tokens == 0
    assert set(answer.timings) == {"prepare", "first_token", "generate"}


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
    finds([thing(200, 60, 0.2)])
    with pytest.warns(UserWarning, match="nothing seems to be there"):
        none = vlm.find(picture, [(200, 60)])
    assert (none.text, none.count, none.points) == ("There are none.", 0, ())
    assert none.confidence == pytest.approx(0.8)


def test_an_example_is_one_of_the_things(vlm: VLM, picture, finds: Finds) -> None:
    """That it is meant was told, so it counts however sure the model is, if something is there."""
    finds([thing(100, 30, 0.8), thing(200, 60, 0.35), thing(300, 30, 0.45)])
    answer = vlm.find(picture, [(203, 58)], min_confidence=0.5)
    assert [(p.x, p.y, p.confidence) for p in answer.points] == [(100, 30, 0.8), (200, 60, 1.0)]
    assert answer.count == 2 and answer.problems == ()
    assert places(vlm.find(picture, [(203, 58)], min_confidence=1)) == [(200, 60)]
    # What is not meant is not listed, though it be an example as well, a few pixels off.
    assert places(vlm.find(picture, [(203, 58)], unlike=[(198, 60)])) == [(100, 30)]
    # In a reference it says nothing about the picture that is asked about.
    finds([thing(200, 60, 0.35)], [thing(100, 30, 0.8), thing(200, 60, 0.35)])
    assert places(vlm.find(picture, [(203, 58)], reference=picture)) == [(100, 30)]


def test_a_middle_beside_the_picture_is_on_its_edge(vlm: VLM, picture, finds: Finds) -> None:
    finds([thing(-4, 20), thing(398, 303)])
    assert places(vlm.find(picture, [(2, 20)])) == [(0, 20), (398, 300)]


def test_with_a_reference_the_second_picture_is_asked_about(vlm: VLM, finds: Finds) -> None:
    reference, picture = Image.new("RGB", (64, 48)), Image.new("RGB", SIZE)
    looks = finds([thing(30, 20, 0.8)], [thing(150, 150)])
    answer = vlm.find(picture, [(30, 20)], reference=reference)
    assert [(p.x, p.y, p.image) for p in answer.points] == [(150, 150, 2)]
    assert answer.image_sizes == tuple(one.size for one in looks[0].pictures) == ((64, 48), SIZE)
    assert looks[0].like == [Point(30, 20, 1)] and not looks[0].unlike
    assert answer.input_tokens == 6 * 6 + 16 * 11
    assert answer.problems == ()
    first, second = answer.draw()  # type: ignore[misc]
    assert first.size == (64, 48) and not np.asarray(first).any()
    assert second.size == SIZE and np.asarray(second)[150, 150].any()
    text = '<points coords="2 1 375 500">thing</points>'
    assert answer.text == f"Counting the {text} shows a total of 1."


def test_examples_may_lie_in_both_pictures(vlm: VLM, picture, finds: Finds) -> None:
    looks = finds([thing(30, 20)], [thing(390, 250), thing(100, 100)])
    reference = Image.new("RGB", (64, 48))
    answer = vlm.find(picture, [(30, 20, 1), Point(390, 250, 2)], [(100, 100, 2)], reference)
    assert places(answer) == [(390, 250)]
    assert looks[0].like == [Point(30, 20, 1), Point(390, 250, 2)]
    assert looks[0].unlike == [Point(100, 100, 2)]


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
    assert answer.problems == (
        "61 things were listed, more than the 60 of a kind that the model learned to find in a "
        "picture: check them, or ask about parts of the picture",
    )


def test_more_than_are_judged_together_is_said(vlm: VLM, picture, finds: Finds) -> None:
    many = [thing(5 + 20 * (i % 19), 5 + 20 * (i // 19), 0.9, 10) for i in range(129)]
    finds(many[:128])
    assert "judged" not in vlm.find(picture, [(5, 5)]).problems[0]
    finds(many)
    answer = vlm.find(picture, [(5, 5)])
    assert answer.count == 129
    assert "and only the 128 likeliest were judged beside each other" in answer.problems[0]


def test_max_crops_are_those_of_one_call(vlm: VLM, finds: Finds) -> None:
    """Tiles show 160 pixels each, 10 patches, and 2 patches are margins: 2 x 5 of them keep the
    size of the picture.
    """
    looks = finds([thing(10, 10)])
    processor, wide = vlm.processor, Image.new("RGB", (800, 200))
    for max_crops in (None, 1, np.int64(2)):
        vlm.find(wide, [(10, 10)], max_crops=max_crops)
    assert vlm.processor is processor
    views = [look.pictures[0].view[1:3] for look in looks]
    assert views == [(22, 52), (12, 12), (12, 22)]


# ---- forms of pictures, threads, loops ----


def test_a_picture_may_have_any_form(vlm: VLM, finds: Finds, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    looks = finds([thing(10, 10)], [thing(10, 10)])
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms: list[Any] = [str(tmp_path / "a.png"), tmp_path / "a.png", data, io.BytesIO(data)]
    forms += [Image.fromarray(pixels), pixels, pixels[None], pixels / 255, tensor, [pixels]]
    for form in forms:
        vlm.find(form, [(10, 10)])
        vlm.find(pixels, [(10, 10)], reference=form)
    assert all(
        torch.equal(one.pictures[0].features, looks[0].pictures[0].features) for one in looks
    )
    vlm.find(255 - pixels, [(10, 10)])
    assert not torch.equal(looks[-1].pictures[0].features, looks[0].pictures[0].features)


def test_places_may_be_of_numpy_and_torch(vlm: VLM, picture, finds: Finds) -> None:
    looks = finds([thing(30, 40)])
    forms: list[Any] = [[(30, 40)], np.array([[30, 40]]), torch.tensor([[30.0, 40.0]])]
    forms += [[[np.float32(30), np.int64(40)]], [Point(30, 40)], ((30, 40, 1),), iter([(30, 40)])]
    for form in forms:
        assert vlm.find(picture, form).count == 1
    assert [look.like for look in looks] == [[Point(30, 40)]] * len(forms)


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
        ({"max_crops": 10**6}, "max_crops times the pixels of a crop"),
        ({"image": None}, "image holds no picture, expected one"),
        ({"image": []}, "image holds no picture"),
        ({"image": "none-such.png"}, "there is no file none-such.png"),
        ({"reference": []}, "reference holds no picture"),
    ],
)
def test_bad_input_is_refused(
    vlm: VLM, picture, finds: Finds, arguments: dict[str, Any], message: str
) -> None:
    looks = finds([thing(30, 40)])
    with (
        counted(vlm) as seen,
        pytest.raises((ValueError, FileNotFoundError), match=message),
    ):
        vlm.find(**{"image": picture, "like": INSIDE, **arguments})
    assert not looks and not seen


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


def test_a_model_that_reads_pictures_as_a_whole_finds_in_crops(vlm: VLM, picture) -> None:
    """The crops that the finder learned on, though its processor has none."""
    vision = vlm.model.config.vision_config
    _, whole = load("tiny", device="cpu")
    assert whole.config.image_size == vision.image_size
    assert whole.config.multicrop is None and vlm.processor.config.multicrop == CROPS
    for max_crops in (None, 2, 7):
        cut = [
            crops_of(vlm.model, processor, max_crops, [picture.size])
            for processor in (whole, vlm.processor)
        ]
        assert cut[0] == cut[1]
    with pytest.raises(ValueError, match="expected a whole number from 1 on"):
        crops_of(vlm.model, whole, 0, [picture.size])
    with pytest.raises(ValueError, match="max_crops"):
        crops_of(vlm.model, whole, 10**6, [picture.size])


@pytest.mark.several_looks
def test_the_bundled_model_finds_the_coins_of_a_photograph() -> None:
    """A photograph that it has never seen; a click on one coin, and on the bare ground."""
    vlm = VLM("tiny")
    coins = ASSETS / "photos" / "coins.png"
    answer = vlm.find(coins, like=[(157, 52)])
    assert 22 <= answer.count == len(answer.points) <= 26
    assert all(point.confidence is not None and point.confidence > 0.5 for point in answer.points)
    with pytest.warns(UserWarning, match="nothing seems to be there"):
        assert vlm.find(coins, like=[(75, 86)]).problems


# ---- with a net ----


# ---- several looks ----


def test_looks_are_smaller_as_large_and_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = replace(CROPS, max_crops=16)
    expected = {
        (512, 512): [(2, 2), (3, 3), (4, 4)],
        (192, 192): [(1, 1), (2, 2), (3, 3)],  # no smaller than one tile
        (672, 192): [(1, 3), (1, 4), (1, 5)],
        (352, 672): [(3, 2), (4, 2), (5, 2)],
    }
    monkeypatch.setattr(finding, "LOOKS", 3)
    assert {size: finding.looks_at(crops, size) for size in expected} == expected
    monkeypatch.setattr(finding, "LOOKS", 1)
    assert finding.looks_at(crops, (352, 672)) == [crops.tiling(352, 672)]


def test_a_look_is_the_enlarged_picture(vlm: VLM) -> None:
    """As if it had been given in that size; its places are those of the picture."""
    pixels = np.random.default_rng(5).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    look = finding.see(vlm.model, CROPS, Image.fromarray(pixels), tiling=(2, 3))
    (canvas,) = resize(pixels, (2 * 160 + 32, 3 * 160 + 32))
    plain = finding.see(vlm.model, replace(CROPS, max_crops=6), canvas)
    assert (look.size, look.view) == ((200, 150), View(0, 22, 32, 2)) and look.view == plain.view
    assert torch.equal(look.features, plain.features) and torch.equal(look.tokens, plain.tokens)


def test_looks_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean, of those that missed it 0, where the surest saw it; each names a thing once."""
    first = [thing(100, 100, 0.9), thing(108, 100, 0.3), thing(10, 10, 0.6)]
    second = [thing(103, 101, 0.95), thing(300, 50, 0.05)]  # a third of that is next to nothing
    third = [thing(105, 100, 0.4), thing(12, 10, 0.9, size=4)]
    found = finding.vote([first, second, third], least=5)
    assert [(one.x, one.y) for one in found] == [(103, 101), (12, 10), (108, 100)]
    means = [0.75, 0.5, 0.1]
    assert [one.confidence for one in found] == pytest.approx(means)
    # Half of the smaller one's size is near, or so many pixels.
    far = [[thing(0, 0, size=40)], [thing(20, 0, size=40)], [thing(60, 0, size=4)]]
    assert [one.x for one in finding.vote(far, least=5)] == [0, 60]
    assert finding.vote([[], [], []], least=5) == []
    # Probabilities stay what they are but for a little, in their order.
    raised = [raise_a_little(p) for p in (0.0, 0.1, 0.43, 0.5, 0.9, 1.0)]
    assert raised == pytest.approx([0.0, 0.130, 0.505, 0.574, 0.924, 1.0], abs=1e-3)


@pytest.mark.several_looks
def test_what_is_found_is_what_the_looks_found_together(vlm: VLM, picture, monkeypatch) -> None:
    grids: list[tuple[int, int]] = []
    said = iter([[thing(200, 60, 0.9), thing(90, 90, 0.9)], [thing(202, 60, 0.6)], []])

    def look_for(model: object, pictures: Sequence[Any], *_: Any) -> list[list[Found]]:
        grids.extend((seen.view.rows, seen.view.cols) for seen in pictures)
        return [next(said)]

    monkeypatch.setattr(finding, "look_for", look_for)
    answer = vlm.find(picture, [(10, 200)], min_confidence=0.1)
    assert grids == [(12, 22), (22, 32), (32, 42)]  # 1 x 2 tiles, 2 x 3 and 3 x 4
    assert places(answer) == [(200, 60), (90, 90)]
    means = [0.5, 0.3]
    assert [p.confidence for p in answer.points] == pytest.approx([*map(raise_a_little, means)])
    assert answer.usage.prompt_tokens == 6 * 11 + 11 * 16 + 16 * 21


@pytest.mark.several_looks
def test_what_is_sure_is_an_example_of_a_second_search(
    vlm: VLM, picture, finds: Finds, monkeypatch
) -> None:
    """The surest five of the picture of the examples, but for these and what is not meant; their
    confidence stays what it was.
    """
    monkeypatch.setattr(finding, "calibrated", lambda one, _: one)
    sure = [thing(20 + 40 * i, 60, 0.98 - 0.01 * i) for i in range(7)]
    doubted = [thing(20, 200, 0.89), thing(90, 200, 0.6)]
    looks = finds([*sure, *doubted])
    answer = vlm.find(picture, [(21, 61)], [(62, 59)])
    assert [(p.x, p.y) for p in looks[0].like] == [(21, 61)]
    again = [(21, 61), (100, 60), (140, 60), (180, 60), (220, 60), (260, 60)]
    assert [[(p.x, p.y) for p in look.like] for look in looks[3:]] == [again] * 3
    assert {look.candidates for look in looks} == {CANDIDATES}
    assert all([(p.x, p.y) for p in look.unlike] == [(62, 59)] for look in looks)
    assert answer.count == 8
    # Of a second search that is surer, and of one that sees nothing.
    for second in (0.99, 0.0):
        said = iter([0.95] * 3 + [second] * 3)
        monkeypatch.setattr(
            finding, "look_for", lambda *_, said=said: [[thing(9, 9), thing(50, 50, next(said))]]
        )
        answer = vlm.find(picture, [(9, 9)], min_confidence=0)
        assert [(p.x, p.confidence) for p in answer.points] == [(9, 1), (50, pytest.approx(0.95))]


@pytest.mark.several_looks
@pytest.mark.parametrize(
    ("number", "confidence", "are_many", "count"),
    [
        (12, 0.8, False, 12),
        (13, 0.8, True, 13),
        (12, 0.4, False, 1),
        (13, 0.4, True, 1),
        (13, 0.25, True, 1),
        (13, 0.22, False, 1),
    ],
)
def test_many_are_looked_at_in_a_larger_picture(
    vlm: VLM, picture, finds: Finds, number: int, confidence: float, are_many: bool, count: int
) -> None:
    """In place of the smallest look, with more of them judged beside each other; so, too, where
    the model is sure of none: .25, the mean of several looks, is a confidence of .31."""
    places = [(20 + 30 * (i % 12), 40 + 40 * (i // 12)) for i in range(number)]
    looks = finds([thing(*at, confidence if i else 0.8) for i, at in enumerate(places)])
    answer = vlm.find(picture, [(20, 40)])
    assert answer.count == count
    grids = [look.pictures[0].view[1:3] for look in looks]
    first = [(12, 22), (22, 32), (32, 42)]
    larger = [(22, 32), (32, 42), (32, 52)]  # 2 x 3 tiles, 3 x 4 and 3 x 5
    assert grids == (first + larger if are_many else first)
    assert [look.candidates for look in looks[3:]] == [2 * CANDIDATES] * (len(looks) - 3)
    looks.clear()
    assert vlm.find(picture, [(20, 40)], max_crops=6).count == (number if confidence > 0.5 else 1)
    assert len(looks) == 1


@pytest.mark.several_looks
@pytest.mark.parametrize(("number", "count"), [(11, 11), (13, 14)])
def test_of_many_things_each_look_misses_more(
    vlm: VLM, picture, finds: Finds, number: int, count: int
) -> None:
    """So the mean of .4 is a confidence of .57 there, and of .47 where there are few."""
    places = [(20 + 30 * (i % 12), 40 + 40 * (i // 12)) for i in range(number)]
    finds([*(thing(*at, 0.8) for at in places), thing(200, 200, 0.4)])
    answer = vlm.find(picture, [(20, 40)], min_confidence=0)
    least = min(point.confidence for point in answer.points)
    assert least == pytest.approx(0.573 if count > number else 0.474, abs=1e-3)
    assert vlm.find(picture, [(20, 40)]).count == count


@pytest.mark.several_looks
def test_a_second_search_knows_the_reference(vlm: VLM, picture, finds: Finds) -> None:
    """What is sure there is an example, what is sure in the other picture is not, and nothing is
    where the place that was clicked is bare.
    """
    looks = finds([thing(30, 30), thing(90, 30, 0.95)], [thing(200, 200, 0.95)])
    assert vlm.find(picture, [(30, 30)], reference=picture).count == 1
    assert [look.like for look in looks[3:]] == [[Point(30, 30), Point(90, 30)]] * 3
    looks.clear()
    with pytest.warns(UserWarning, match="nothing seems to be there"):
        vlm.find(picture, [(300, 290)], reference=picture)
    assert len(looks) == 3


@pytest.mark.several_looks
@pytest.mark.filterwarnings("ignore:nothing seems to be there")
def test_all_looks_are_kept_for_the_next_click(scene: Image.Image) -> None:
    vlm = find_vlm()
    with counted(vlm) as seen:
        vlm.find(scene, [(50, 60)], min_confidence=0)
        assert len(seen) == 4  # such a net finds many everywhere
        vlm.find(scene, [(120, 99)], min_confidence=0)
        assert len(seen) == 4
        vlm.find(scene, [(50, 60)], min_confidence=0, max_crops=1)  # the smallest look alone
        assert len(seen) == 4


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


@contextmanager
def counted(vlm: VLM) -> Iterator[list[torch.Tensor]]:
    """What the encoder is shown meanwhile."""
    seen: list[torch.Tensor] = []
    encoder = vlm.model.vision_encoder
    features = encoder.features

    def remembered(images: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(images)
        return features(images, *rest)

    encoder.features = remembered  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del encoder.features


@pytest.mark.filterwarnings("ignore:nothing seems to be there")
def test_a_second_click_does_not_see_the_picture_again(scene: Image.Image) -> None:
    vlm = find_vlm()
    with counted(vlm) as seen:
        for place in ((50, 60), (51, 60), (120, 99)):
            vlm.find(scene, [place], min_confidence=0)
        assert len(seen) == 1
        vlm.find(np.asarray(scene), [(50, 60)], max_crops=9)  # more than it needs
        assert len(seen) == 1
        vlm.find(scene, [(50, 60)], min_confidence=0, max_crops=1)  # another cut of it
        assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:nothing seems to be there")
def test_the_reference_of_many_photos_is_seen_once(scene: Image.Image, finds: Finds) -> None:
    """Though no more than it and one of them are kept."""
    finds([], [])
    photos = [Image.new("RGB", (60 + i, 40), (40 * i, 90, 9)) for i in range(4)]
    vlm = find_vlm()
    vlm.find(photos[0], [(50, 60)], reference=scene)
    few = find_vlm(reuse_bytes=vlm.prefix_cache.nbytes)
    with counted(few) as seen:
        for photo in photos:
            few.find(photo, [(50, 60)], reference=scene)
        assert len(seen) == 1 + 4
        few.find(photos[0], [(5, 6)])  # forgotten
        assert len(seen) == 1 + 5


def test_a_known_picture_waits_for_no_encoder(scene: Image.Image, finds: Finds) -> None:
    """And what is new waits for its turn, and holds it only while the encoder sees."""
    vlm = find_vlm()
    finds([thing(50, 60)], [thing(50, 60)])
    vlm.find(scene, [(50, 60)])
    seeing = vlm.scheduler.seeing
    other = Image.new("RGB", (64, 48))
    answers: list[Answer] = []
    with counted(vlm) as seen:
        with seeing:
            assert vlm.find(scene, [(50, 60)]).count == 1
            waiting = [
                threading.Thread(target=lambda: answers.append(vlm.find(other, [(50, 48)])))
                for _ in range(2)
            ]
            for one in waiting:
                one.start()
            waiting[0].join(0.2)
            assert not seen and not answers
        for one in waiting:
            one.join(60)
    assert len(seen) == 1 and len(answers) == 2  # both wanted the same


def test_the_encoder_is_free_while_it_is_looked_for(scene: Image.Image, monkeypatch) -> None:
    vlm = find_vlm()
    held: list[bool] = []
    see = vlm.model.vision_encoder.features

    def features(*given: Any) -> torch.Tensor:
        held.append(vlm.scheduler.seeing.locked())
        return see(*given)

    def look_for(*_: object) -> list[list[Found]]:
        held.append(vlm.scheduler.seeing.locked())
        return [[thing(50, 60)], []]

    monkeypatch.setattr(vlm.model.vision_encoder, "features", features)
    monkeypatch.setattr(finding, "look_for", look_for)
    vlm.find(scene.rotate(90), [(50, 60)], reference=scene)
    assert held == [True, True, False]


def test_a_model_that_has_not_learned_it_says_so(scene: Image.Image) -> None:
    vlm = VLM(small_model(), small_processor())
    with counted(vlm) as seen:
        for options in ({}, {"max_crops": 2}, {"reference": scene}):
            with pytest.raises(
                ValueError, match=r"cannot find by example .* such as .nanomolmo2 train find"
            ):
                vlm.find(scene, [(50, 60)], **options)  # type: ignore[arg-type]
    assert not seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finds") / "model"
    find_net().save_pretrained(path, processor=find_vlm().processor)
    return path


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_shorter_numbers_find_about_the_same(
    scene: Image.Image, folder: Path, options: dict[str, Any], monkeypatch
) -> None:
    short = VLM(folder, device="cpu", **options)
    scores: list[np.ndarray] = []
    things_of = finding.things_of

    def remembered(chances: Any, *rest: Any) -> list[Found]:
        scores.append(chances)
        return things_of(chances, *rest)

    monkeypatch.setattr(finding, "things_of", remembered)
    for vlm in (find_vlm(), short):
        for _ in range(2):  # the second time from the cache
            answer = vlm.find(scene, [(50, 60)], [(120, 99)], min_confidence=0, reference=scene)
        assert answer.count and answer.points[0].confidence is not None
    whole, again = np.array(scores[:4]), np.array(scores[4:])
    np.testing.assert_allclose(again, whole, atol=0.05)
    np.testing.assert_array_equal(again[:2], again[2:])
    assert 0 < abs(again - whole).max() < whole.std()
