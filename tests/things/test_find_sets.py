"""The fixed sets that finding is measured on: always the same, and as they say they are."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nanomolmo2.evaluation.measures import Thing
from nanomolmo2.evaluation.regions import Box
from nanomolmo2.things.drawings import HELD_OUT_SETS
from nanomolmo2.things.find_sets import COINS, FIND_SETS, SET_NAMES, open_set, set_of
from nanomolmo2.things.photos import (
    PHOTOS,
    coin_cell,
    coins,
    photo_grounds,
    photo_index,
    photo_looks,
    photo_scene,
)
from nanomolmo2.things.procedural import HELD_OUT_FAMILIES


@pytest.mark.parametrize("name", SET_NAMES)
def test_a_case_holds_its_example_and_is_always_the_same(name: str) -> None:
    cases, again = open_set(name, 4), open_set(name, 4)
    assert len(cases) == 4
    for number in (3, 0, 1):  # in any order
        case, other = cases[number], again[number]
        assert (np.asarray(case.image) == np.asarray(other.image)).all()
        assert case.like == other.like and repr(case.things) == repr(other.things)
        assert len(case.like) == (3 if name == COINS else 1) and not case.unlike
        if case.reference is None:  # the example is one of the things
            assert all(any(t.region.holds(x, y) for t in case.things) for x, y in case.like)
    with pytest.raises(IndexError):
        cases[4]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("few", 2, 10), ("alike", 2, 10), ("made", 2, 10), ("photos", 2, 10)],
)
def test_how_many_things_there_are(name: str, least: int, most: int) -> None:
    cases = open_set(name, 12)
    counts = [len(cases[i].things) for i in range(12)]
    assert least <= min(counts) and max(counts) <= most and len(set(counts)) > 3


def test_crowded_pictures_are_crowded() -> None:
    cases = open_set("crowded", 3)
    assert all(20 <= len(cases[i].things) <= 60 for i in range(3))


def test_a_pair_shows_the_example_in_another_picture() -> None:
    cases = open_set("pair", 12)
    found = [cases[i] for i in range(12)]
    assert all(case.reference is not None for case in found)
    assert all((case.reference != case.image).any() for case in found)
    assert any(not case.things for case in found)  # some pictures have none of the kind
    assert sum(len(case.things) for case in found) > 12


def test_only_what_is_held_out_is_asked_for() -> None:
    for name, of in FIND_SETS.items():
        if of.draw is None:
            continue
        first = {of.draw(i)[0].kinds[0].look.origin for i in range(3)}
        allowed = {"made": set(HELD_OUT_FAMILIES), "photos": {g["group"] for g in things()}}
        assert first <= allowed.get(name, set(HELD_OUT_SETS)) | {"coins"}, name


def things() -> list[dict[str, str]]:
    found: list[dict[str, str]] = photo_index()["things"]
    return found


def test_each_click_is_on_another_thing() -> None:
    cases = open_set("few", 6, clicks=3)
    assert len(cases) == 18
    for picture in range(6):
        clicks = [cases[3 * picture + click] for click in range(3)]
        assert {case.picture for case in clicks} == {picture}
        assert len({case.like for case in clicks}) == min(3, len(clicks[0].things))
    assert cases[0].like == open_set("few", 1)[0].like  # the first click is the only one


def test_goals_are_those_of_the_project() -> None:
    assert set_of("few").goals == {"f1": 0.95, "exact": 0.80, "mae": 0.3}
    assert set_of("crowded").goals == {"f1": 0.88, "relative": 0.08}
    assert set_of("photos").goals == {"f1": 0.90, "exact": 0.70, "mae": 0.5}
    assert set_of("pair").goals == {"f1": 0.90, "exact": 0.70, "mae": 0.5}
    assert set_of("alike").goals == {"f1": 0.88, "exact": 0.60, "mae": 0.8}
    assert set_of(COINS).goals == {"mae": 2.0}
    with pytest.raises(ValueError, match=r"unknown set 'many'; choose from few, crowded"):
        open_set("many")


# ---- photographs ----


def test_coins_are_where_the_photograph_has_them() -> None:
    """Bright discs on a dark ground: inside of the boxes it is brighter than between them."""
    image, boxes = coins()
    assert image.size == (384, 303) and len(boxes) == 24
    pixels = np.asarray(image.convert("L"), float)
    is_coin = np.zeros(pixels.shape, bool)
    for x0, y0, x1, y1 in boxes:
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        inside = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2
        inside = inside < 0.2  # 0.25 at the edge
        around = pixels[max(y0 - 5, 0) : y1 + 5, max(x0 - 5, 0) : x1 + 5]
        edge = np.concatenate([around[0], around[-1], around[:, 0], around[:, -1]])
        assert pixels[y0:y1, x0:x1][inside].mean() > edge.mean() + 25
        assert not is_coin[y0:y1, x0:x1].any()  # none overlaps another
        is_coin[y0:y1, x0:x1] = True
    assert boxes == sorted(boxes, key=lambda box: (box[3] // 72, box[0]))  # four rows of six


def test_coins_are_those_of_scikit_image() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    assert (np.asarray(coins()[0].convert("L")) == data.coins()).all()


def test_the_photograph_of_coins_is_the_one_that_was_measured() -> None:
    digest = hashlib.sha256((PHOTOS / "coins.png").read_bytes()).hexdigest()
    assert digest == photo_index()["coins"]["sha256"]


def test_a_coin_is_cut_out_round() -> None:
    image, boxes = coins()
    cell = coin_cell(image, boxes[0], 72)
    alpha = cell[..., 3]
    assert alpha[36, 36] == 255 and alpha[3, 3] == alpha[-4, -4] == 0
    box = boxes[0]
    wanted = np.pi / 4 * 70 * 70 * (box[3] - box[1]) / (box[2] - box[0])
    wanted = min(wanted, np.pi / 4 * 70 * 70 * (box[2] - box[0]) / (box[3] - box[1]))
    assert (alpha > 127).sum() == pytest.approx(wanted, rel=0.1)


def test_every_photograph_says_who_made_it() -> None:
    text = (PHOTOS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    listed = [thing["author"] for thing in things()]
    for author in set(listed):
        assert (
            f"| {listed.count(author)} | stamps of Tux Paint | {author} | GPL-2.0-or-later" in text
        )
    for ground in photo_index()["grounds"]:
        assert f"| {ground['name']} |" in text
    assert "Brooklyn Museum" in text and (PHOTOS / "licenses" / "GPL-2.0.txt").is_file()
    notice = (PHOTOS.parents[2] / "NOTICE").read_text(encoding="utf-8")
    assert "nanomolmo2/assets/photos/ATTRIBUTION.md" in notice
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 1_000_000


def test_every_kind_has_a_name_of_its_own() -> None:
    looks = photo_looks()
    assert len(looks) == len(things()) + 1 == 64 == len({look.id for look in looks})
    assert [ground["name"] for ground in photo_index()["grounds"]] == list(photo_grounds())


def test_the_truth_of_a_photo_scene_is_what_is_drawn() -> None:
    scene = photo_scene(4)
    assert scene.ground.startswith("photo/") and scene.image.shape == (384, 384, 3)
    for number, thing in enumerate(scene.things):
        rows, columns = np.nonzero(scene.instance_map == number)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert tuple(map(int, thing.box)) == box
        assert Thing(Box(*thing.box)).region.holds(*thing.center)
        assert thing.visible >= 0.4
