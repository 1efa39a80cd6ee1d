"""Photos: records about one picture together, and other looks of it with the points along."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data import photos
from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.photos import Photos, points_of, texts_of, varied, with_photos
from nanomolmo2.data.sources import RecordSource, SourceConfig, open_source
from nanomolmo2.processor import Point, format_points
from nanomolmo2.processor.points import NOTHING_THERE

SIZE = (120, 80)
PLACES = ((20.0, 10.0), (100.0, 60.0))


def picture() -> Image.Image:
    """Grey, a small square of its own colour at each of `PLACES`."""
    image = Image.new("RGB", SIZE, (120, 120, 120))
    for (x, y), colour in zip(PLACES, ((255, 0, 0), (0, 0, 255)), strict=True):
        image.paste(colour, (int(x) - 3, int(y) - 3, int(x) + 3, int(y) + 3))
    return image


def exchange(question: Any, answer: str) -> Branch:
    messages: Any = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Branch(messages, "point")


def example(*extra: Branch, question: str = "Point to the nuts.") -> Example:
    answer = format_points([Point(*place) for place in PLACES], "nut", [SIZE])
    return Example([picture()], [exchange(question, answer), *extra])


def colour_at(image: Image.Image, point: Point) -> str:
    """Which channel leads around a point."""
    x, y = int(min(point.x, image.width - 1)), int(min(point.y, image.height - 1))
    red, _, blue = np.asarray(image)[y, x].astype(int)
    return "red" if red > blue + 40 else "blue" if blue > red + 40 else "grey"


@pytest.mark.parametrize("seed", range(40))
def test_points_stay_on_their_things(seed: int) -> None:
    content = [{"type": "text", "text": "Like"}, {"type": "point", "x": 20.0, "y": 10.0}]
    like = exchange(content, NOTHING_THERE)
    look = varied(example(like), np.random.default_rng(seed))
    (image,) = look.images
    first, second, asked = points_of(look.branches)
    assert [colour_at(image, p) for p in (first, second, asked)] == ["red", "blue", "red"]
    for point in (first, second):
        assert 0 < point.x < image.width and 0 < point.y < image.height
    assert str(look.branches[0].messages[1]["content"]).endswith("nut</points>")


def test_looks_differ_in_turn_size_and_light() -> None:
    looks = [varied(example(), np.random.default_rng(seed)) for seed in range(30)]
    sizes = {look.images[0].size for look in looks}
    assert len(sizes) > 20
    assert any(w > h for w, h in sizes) and any(h > w for w, h in sizes)
    firsts = [next(points_of(look.branches)) for look in looks]
    sides = {(p.x > look.images[0].width / 2) for p, look in zip(firsts, looks, strict=True)}
    assert sides == {True, False}
    light = {int(np.asarray(look.images[0]).mean()) for look in looks}
    assert len(light) > 10


@pytest.mark.parametrize("word", ["left", "at the top", "What does it say"])
def test_what_speaks_of_directions_is_not_turned(word: str) -> None:
    for seed in range(12):
        look = varied(example(question=f"Point to the {word}."), np.random.default_rng(seed))
        first, second = points_of(look.branches)
        assert first.x < second.x and first.y < second.y


def test_what_is_not_all_about_places_is_not_cut() -> None:
    """A thing without a point could be cut off, and the caption would be a lie."""
    for seed in range(12):
        caption = exchange("What is there?", "Two nuts and a dog.")
        look = varied(example(caption), np.random.default_rng(seed))
        width, height = sorted(look.images[0].size, reverse=True)
        assert width >= 120 / 1.16 and height >= 80 / 1.16


def test_coordinates_in_a_text_stay_true() -> None:
    """Nobody knows where they are in a picture that is turned: only its light changes."""
    text = '<points coords="1 1 200 300">nut</points>'
    look = varied(Example([picture()], [exchange("Where?", text)]), np.random.default_rng(3))
    assert look.images[0].size == SIZE
    assert look.branches[0].messages[1]["content"] == text


# ---- sources ----


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    for name in ("a", "b"):
        picture().save(tmp_path / f"{name}.png")
    points = [{"x": x, "y": y} for x, y in PLACES]
    asks = {"question": "Point to the nuts.", "points": points, "label": "nut", "task": "point"}
    lines = [
        {"image": "a.png", **asks},
        {"image": "b.png", **asks},
        {"image": "a.png", "question": "Any dog?", "answer": "No.", "task": "presence"},
        {"question": "What is a nut?", "answer": "A seed.", "task": "talk"},
        {"image": ["a.png", "b.png"], "question": "Same?", "answer": "Yes.", "task": "same"},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_source(str(path))
    assert isinstance(opened, RecordSource)
    return opened


def test_records_about_one_picture_are_one_example(source: RecordSource) -> None:
    grouped = Photos(source)
    assert grouped.groups == [[0, 2], [1], [3], [4]] and len(grouped) == 4
    whole = grouped[0]
    assert [branch.task for branch in whole.branches] == ["point", "presence"]
    assert list(texts_of(whole.branches[1].messages)) == ["Any dog?", "No."]
    assert whole.images[0].size == SIZE
    assert [row.values.get("image") for row in grouped.rows] == (
        ["a.png", "b.png", None, ["a.png", "b.png"]]
    )


def test_looks_are_always_the_same_and_the_first_is_the_photo(source: RecordSource) -> None:
    looks = Photos(source, variants=5, seed=7)
    assert len(looks) == 20
    assert np.array_equal(np.asarray(looks[0].images[0]), np.asarray(picture()))
    again = pickle.loads(pickle.dumps(looks))
    for i in (4, 8, 13):
        one, other = looks[i], again[i]
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
        assert list(points_of(one.branches)) == list(points_of(other.branches))
    assert list(points_of(looks[4].branches)) != list(points_of(looks[0].branches))
    assert looks[6].branches[0].messages == source[3].branches[0].messages  # without a picture
    with pytest.raises(IndexError, match="has no example 20, only 20"):
        looks.read(20)


def test_a_large_photo_is_made_smaller_once(
    source: RecordSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "LARGEST_SIDE", 60)
    small = Photos(source, variants=2)[0]
    assert small.images[0].size == (60, 40)
    assert [(p.x, p.y) for p in points_of(small.branches)] == [(10.0, 5.0), (50.0, 30.0)]
    assert Photos(source)[0].images[0].size == SIZE  # to be measured as it is


def test_a_bad_record_is_told(source: RecordSource, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    grouped = Photos(source, variants=3)
    with pytest.raises(BadExample, match="broken picture"):
        grouped.read(1 + len(grouped.groups))


def test_a_mixture_keeps_its_weights(source: RecordSource) -> None:
    emoji = open_source(SourceConfig("emoji", options={"length": 10}))
    mixture = with_photos(Mixture([source, emoji], [0.7, 0.3], 5), variants=8)
    assert mixture.weights == pytest.approx([0.7, 0.3]) and mixture.seed == 5
    assert mixture.sizes == [32, 10] and mixture.sources[1] is emoji
    assert isinstance(mixture.sources[0], Photos) and not Photos.suits(emoji)
