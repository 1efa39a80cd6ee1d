"""Drawn points: at their place, visible on any background, sized with the picture."""

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.processor import Point
from nanomolmo2.processor.draw import draw_frames, draw_points, label_marks, save_gif


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


# ---- videos ----


def frames(count, size=(200, 100), colour="gray"):
    return [np.asarray(Image.new("RGB", size, colour)) for _ in range(count)]


def changed_frames(times, points, **options):
    """Numbers of the frames that have something drawn on them."""
    plain = frames(len(times), **options)
    drawn = draw_frames(plain, times, points)
    assert all(image.mode == "RGB" for image in drawn)
    assert (plain[0] == frames(1, **options)[0]).all()
    return [
        number
        for number, (before, after) in enumerate(zip(plain, drawn, strict=True))
        if (np.asarray(after) != before).any()
    ]


def test_a_point_is_drawn_on_the_nearest_frame():
    times = (0.0, 0.5, 1.0, 1.3)  # the last frame of a video comes when it ends
    for time, number in ((0.0, 0), (0.2, 0), (0.3, 1), (1.0, 2), (1.2, 3), (1.3, 3), (1.55, 3)):
        assert changed_frames(times, [Point(100, 50, id=1, time=time)]) == [number], time
    assert changed_frames(times, [Point(100, 50, id=1, time=2.0)]) == []
    assert changed_frames((5.0, 5.5), [Point(100, 50, id=1, time=4.0)]) == []


def test_the_time_of_a_frame_as_it_is_written_finds_the_frame():
    """One decimal: 7.38 s is written 7.4, after the last frame."""
    assert changed_frames((7.34, 7.38), [Point(100, 50, id=1, time=7.4)]) == [1]
    assert changed_frames((0.04,), [Point(100, 50, id=1, time=0.0)]) == [0]


def test_points_of_pictures_and_of_videos_are_kept_apart():
    assert changed_frames((0.0, 0.5), [Point(100, 50, id=1)]) == []
    assert not difference((200, 100), [Point(100, 50, id=1, time=0.0)])[0].any()


def fill(image, x, y):
    """Colour of a disc, beside its number."""
    return tuple(np.asarray(image)[y, x - 6])


def test_a_track_keeps_the_colour_of_its_id():
    first = [Point(40, 50, id=1, label="cat", time=0.0), Point(150, 50, id=2, label="cat", time=0)]
    second = [Point(30, 50, id=2, label="cat", time=0.5), Point(160, 50, id=1, label="cat", time=1)]
    a, b, c = draw_frames(frames(3), (0.0, 0.5, 1.0), [*first, *second])
    assert fill(a, 40, 50) == fill(c, 160, 50)
    assert fill(a, 150, 50) == fill(b, 30, 50)
    assert fill(a, 40, 50) != fill(a, 150, 50)


def test_points_of_one_label_share_a_colour_at_all_times():
    points = [
        Point(40, 50, id=1, label="goal", time=0.0),
        Point(150, 50, id=2, label="goal", time=1),
    ]
    a, b = draw_frames(frames(2), (0.0, 1.0), points)
    assert fill(a, 40, 50) == fill(b, 150, 50)


def test_one_time_for_each_frame(tmp_path):
    with pytest.raises(ValueError, match="found 1 times for 2 frames"):
        draw_frames(frames(2), (0.0,), [])
    with pytest.raises(ValueError, match="found 0 frames"):
        save_gif([], [], tmp_path / "a.gif")
    assert draw_frames([], [], [Point(1, 1, time=0.0)]) == []


def test_the_gif_runs_as_fast_as_the_video(tmp_path):
    times = (0.0, 0.5, 1.0, 1.3)
    points = [Point(100 + 300 * t, 300, id=1, label="ball", time=t) for t in times]
    drawn = draw_frames(frames(4, (800, 600)), times, points)
    save_gif(drawn, times, tmp_path / "out.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.size == (640, 480)
        assert gif.n_frames == 4
        durations = []
        for number in range(4):
            gif.seek(number)
            durations.append(gif.info["duration"])
            expected = drawn[number].resize((640, 480))
            error = np.abs(np.asarray(gif.convert("RGB")).astype(int) - np.asarray(expected))
            assert error.mean() < 3
    assert durations == [500, 500, 300, 300]


def test_a_gif_of_one_frame(tmp_path):
    save_gif(draw_frames(frames(1), (0.0,), []), (0.0,), tmp_path / "out.gif")
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.size == (200, 100)


def test_a_gif_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    (tmp_path / "out.gif").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        save_gif(draw_frames(frames(1), (0.0,), []), (0.0,), tmp_path / "out.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]
    assert (tmp_path / "out.gif").read_bytes() == b"old"


# ---- labels that the font lacks ----


@pytest.mark.parametrize("label", ["猫", "قطة", "😀", "cat 猫", "кошка", "→", "cat\udce9"])
def test_a_label_that_the_font_lacks_becomes_a_mark(label):
    """Each of its characters was an empty box."""
    points = [Point(60, 60, id=1, label=label), Point(60, 240, id=2, label="dog")]
    assert label_marks(points) == {label: "label A"}
    named = [Point(60, 60, id=1, label="label A"), points[1]]
    assert (np.asarray(difference((400, 300), points)[1]) == difference((400, 300), named)[1]).all()


def test_marks_are_the_same_in_all_pictures_of_an_answer():
    points = [Point(60, 60, 1, label="猫"), Point(60, 60, 2, label="犬"), Point(9, 9, 2, label="a")]
    assert label_marks(points) == {"猫": "label A", "犬": "label B"}
    expected = [Point(60, 60, 2, label="label B"), Point(9, 9, 2, label="a")]
    drawn = difference((400, 300), points, number=2)[1]
    assert (np.asarray(drawn) == difference((400, 300), expected, number=2)[1]).all()
    many = label_marks(Point(1, 1, label=chr(0x4E00 + number)) for number in range(28))
    assert list(many.values())[25:] == ["label Z", "label A2", "label B2"]
    timed = [Point(60, 60, label="猫", time=0.0), Point(60, 60, label="犬", time=1.0)]
    plain = [Point(60, 60, label=f"label {x}", time=t) for x, t in (("A", 0.0), ("B", 1.0))]
    for a, b in zip(
        draw_frames(frames(2), (0.0, 1.0), timed),
        draw_frames(frames(2), (0.0, 1.0), plain),
        strict=True,
    ):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize(("label", "drawn"), [("café", "cafe"), ("año", "ano"), ("a\nb", "a b")])
def test_accents_are_left_out(label, drawn):
    assert label_marks([Point(1, 1, label=label)]) == {}
    points = [[Point(60, 60, id=1, label=text)] for text in (label, drawn)]
    first, second = (difference((400, 300), each)[1] for each in points)
    assert (np.asarray(first) == np.asarray(second)).all()
