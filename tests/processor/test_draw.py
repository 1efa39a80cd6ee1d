"""Drawn points: at their place, visible on any background, sized with the picture."""

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.processor import Point
from nanomolmo2.processor.draw import draw_points


def difference(size, points, colour="white", **options):
    """(bool map of changed pixels, drawn picture) on a background of one colour."""
    background = Image.new("RGB", size, colour)
    drawn = draw_points(background, points, **options)
    assert drawn.size == size and drawn.mode == "RGB"
    before = np.asarray(Image.new("RGB", size, colour))
    assert (np.asarray(background) == before).all()
    return (np.asarray(drawn) != before).any(-1), drawn


@pytest.mark.parametrize("colour", ["white", "black", "#d6006c", "gray"])
def test_a_disc_around_the_point_on_any_background(colour):
    changed, drawn = difference((400, 300), [Point(100, 200, id=1)], colour)
    rows, columns = np.nonzero(changed)
    assert abs(columns.mean() - 100) < 0.5 and abs(rows.mean() - 200) < 0.5
    disc = np.asarray(drawn)[188:213, 88:113].reshape(-1, 3).astype(int)
    # Black and white rings: something stands out from any colour.
    assert (disc.sum(1) < 90).any() and (disc.sum(1) > 700).any()


def test_discs_grow_with_the_picture():
    small, _ = difference((200, 200), [Point(100, 100)])
    large, _ = difference((2000, 2000), [Point(1000, 1000)])
    assert 150 < small.sum() < 700
    assert 15 < large.sum() / small.sum() < 60


def test_nothing_to_draw():
    assert not difference((50, 40), [])[0].any()


def test_label_stays_inside_the_picture():
    """At the right border the box moves to the left of the disc."""
    for x in (5, 150, 395):
        without, _ = difference((400, 300), [Point(x, 150)])
        changed, _ = difference((400, 300), [Point(x, 150, label="teddy bear")])
        _, columns = np.nonzero(changed & ~without)
        assert 50 < np.ptp(columns) < 140  # the whole box, not cut off
    changed, _ = difference((30, 20), [Point(15, 10, label="a label larger than the picture")])
    assert changed.any()


def test_label_once_and_one_colour_for_it():
    points = [Point(60, 60, id=1, label="dog"), Point(60, 240, id=2, label="dog")]
    changed, drawn = difference((400, 300), points)
    assert changed[50:70].any(0).sum() > changed[230:250].any(0).sum() + 20
    fill = {tuple(np.asarray(drawn)[y, 55]) for y in (60, 240)}
    assert len(fill) == 1
    other = [points[0], Point(60, 240, id=2, label="cat")]
    _, drawn = difference((400, 300), other)
    assert len({tuple(np.asarray(drawn)[y, 55]) for y in (60, 240)}) == 2


def test_points_of_the_asked_picture_only():
    points = [Point(50, 50, image=1), Point(150, 50, image=2)]
    first, _ = difference((200, 100), points)
    second, _ = difference((200, 100), points, number=2)
    assert first[:, :100].any() and not first[:, 100:].any()
    assert second[:, 100:].any() and not second[:, :100].any()


def test_points_on_the_edges_and_large_ids():
    points = [Point(0, 0, id=1), Point(200, 100, id=1234), Point(0, 100), Point(200, 0)]
    changed, _ = difference((200, 100), points)
    assert changed[0, 0] and changed[99, 199] and changed[99, 0] and changed[0, 199]
