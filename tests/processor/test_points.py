"""Points: the text format of Molmo2, both ways."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.processor.points import Point, format_points, parse_count, parse_points

SIZES = [(640, 480), (1000, 300), (33, 1777)]

sizes = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=4)


@st.composite
def scenes(draw):
    """(points, image_sizes) with every point inside of its picture, edges included."""
    image_sizes = draw(sizes)
    points = []
    for image in draw(st.lists(st.integers(1, len(image_sizes)), min_size=1, max_size=8)):
        width, height = image_sizes[image - 1]
        x = draw(st.floats(0, width) | st.sampled_from([0.0, float(width)]))
        y = draw(st.floats(0, height) | st.sampled_from([0.0, float(height)]))
        points.append(Point(x, y, image))
    return points, image_sizes


@pytest.mark.parametrize(
    ("points", "label", "image_sizes", "text"),
    [
        (
            [Point(640, 480), Point(210, 455)],
            "dogs",
            [(1000, 1000)],
            '<points coords="1 1 210 455 2 640 480">dogs</points>',
        ),
        (
            [Point(709, 162, 2), Point(555, 169, 1), Point(100, 42, 2)],
            "boats",
            [(1000, 1000)] * 3,
            '<points coords="1 1 555 169;2 2 100 042 3 709 162">boats</points>',
        ),
        (
            [Point(0, 0.7), Point(640, 480)],
            "corners",
            [(640, 480)],
            '<points coords="1 1 000 001 2 1000 1000">corners</points>',
        ),
    ],
)
def test_text_of_the_reference_examples(points, label, image_sizes, text):
    assert format_points(points, label, image_sizes) == text


def test_modes():
    cups = [Point(900, 400), Point(911, 800)]
    tag = '<points coords="1 1 900 400 2 911 800">cups</points>'
    size = [(1000, 1000)]
    assert format_points(cups, "cups", size) == tag
    assert (
        format_points(cups, "cups", size, mode="point_count")
        == f"Counting the {tag} shows a total of 2."
    )
    assert format_points(cups, "cups", size, mode="count_point") == f"There are 2 {tag}."
    assert format_points([], "cups", size, mode="point_count") == "There are none."
    with pytest.raises(ValueError, match="unknown mode 'xml'"):
        format_points(cups, "cups", size, mode="xml")


def test_order_is_by_x_then_y_after_rounding():
    """200.2 and 199.9 of 1000 both round to 200, so y decides, although x says otherwise."""
    text = format_points([Point(199.9, 700), Point(200.2, 300)], "a", [(1000, 1000)])
    assert text == '<points coords="1 1 200 300 2 200 700">a</points>'


@given(scenes())
@settings(deadline=None)
def test_round_trip(scene):
    points, image_sizes = scene
    read = parse_points(format_points(points, "things", image_sizes), image_sizes)
    assert [p.id for p in read] == list(range(1, len(points) + 1))
    assert all(p.label == "things" for p in read)
    # Each point comes back within half a thousandth of its picture's side.
    remaining = list(points)
    for point in read:
        width, height = image_sizes[point.image - 1]
        near = [
            p
            for p in remaining
            if p.image == point.image
            and abs(p.x - point.x) <= width / 2000 + 1e-6
            and abs(p.y - point.y) <= height / 2000 + 1e-6
        ]
        assert near
        remaining.remove(near[0])
    # What was read is on the grid of thousandths: writing it again changes nothing.
    assert format_points(read, "things", image_sizes) == format_points(
        points, "things", image_sizes
    )
    keys = [(p.image, p.x, p.y) for p in read]
    assert keys == sorted(keys)


@given(scenes(), st.sampled_from(["point", "point_count", "count_point"]))
@settings(deadline=None)
def test_count_agrees_with_points_in_every_mode(scene, mode):
    points, image_sizes = scene
    assert parse_count(format_points(points, "things", image_sizes, mode=mode)) == len(points)


@given(scenes(), st.data())
@settings(deadline=None)
def test_points_of_a_broken_off_answer_are_the_first_of_the_whole_one(scene, data):
    """A cut-off "1000" once read as 100."""
    points, image_sizes = scene
    text = format_points(points, "things", image_sizes, mode="point_count")
    whole = [(p.image, p.id, p.x, p.y) for p in parse_points(text, image_sizes)]
    cut = data.draw(st.integers(0, len(text)))
    part = [(p.image, p.id, p.x, p.y) for p in parse_points(text[:cut], image_sizes)]
    assert part == whole[: len(part)]


@given(st.text(alphabet='<points cords="123 ;\t/>.', max_size=80))
@settings(deadline=None)
def test_any_text_gives_points_or_a_clear_error(text):
    try:
        points = parse_points(text, SIZES)
    except ValueError as error:
        assert "names picture" in str(error)
    else:
        assert all(0 <= p.x <= 1777 and 0 <= p.y <= 1777 for p in points)
    assert parse_count(text) is None or parse_count(text) >= 0


def test_both_separators_and_other_attributes():
    new = '<points coords="1 1 555 169;2 2 100 042 3 709 162">boats</points>'
    old = new.replace(";", "\t")
    alt = new.replace("<points ", '<points alt="the boats" ')
    expected = [
        Point(355.2, 81.12, 1, 1, "boats"),
        Point(100.0, 12.6, 2, 2, "boats"),
        Point(709.0, 48.6, 2, 3, "boats"),
    ]
    for text in (new, old, alt):
        read = parse_points(text, SIZES)
        assert [(p.image, p.id, p.label) for p in read] == [
            (p.image, p.id, p.label) for p in expected
        ]
        assert [c for p in read for c in (p.x, p.y)] == pytest.approx(
            [c for p in expected for c in (p.x, p.y)]
        )


@pytest.mark.parametrize(
    ("coords", "ids"),
    [
        ("1 1 210 455 2 640 480", [1, 2]),
        ("1 1 210 455 2 640", [1]),  # y is missing
        ("1 1 210 455 2 64 480", [1]),  # two digits are no coordinate
        ("1 1 210 455 2 1001 480", [1]),  # over 1000
        ("1 1 1000 1000", [1]),
        ("1 1 210 455 2 12345 480", [1]),
        ("1 1 210 455;", [1]),
        ("1 1 21 455 2 640 480", [2]),  # finds its way back
        ("1 1 210 455, and so on", [1]),
        ("", []),
        ("1", []),
        ("1;2;3", []),
        ("0.5 1 210 455", []),  # a time: a video's group
    ],
)
def test_malformed_parts_are_left_out(coords, ids):
    text = f'Here: <points coords="{coords}">dogs</points> and <points coords="2 9 100 100">c'
    assert [p.id for p in parse_points(text, SIZES)] == [*ids, 9]


def test_label_of_each_tag():
    text = (
        '<points coords="1 1 100 100">hot dog</points>, <points coords="1 1 200 200">'
        '<points coords="2 1 300 300">a < b\nc</points> <points coords="1 1 400 400">'
    )
    assert [p.label for p in parse_points(text, SIZES)] == ["hot dog", None, "a < b\nc", None]


def test_a_point_in_a_picture_that_is_not_there():
    with pytest.raises(ValueError, match="names picture 4, but the prompt has 3"):
        parse_points('<points coords="4 1 100 100">dogs</points>', SIZES)
    with pytest.raises(ValueError, match="names picture 0"):
        parse_points('<points coords="0 1 100 100">dogs</points>', SIZES)
    with pytest.raises(ValueError, match="names picture 2, but the prompt has 1"):
        format_points([Point(1, 1, 2)], "dogs", [(10, 10)])


@pytest.mark.parametrize("x, y", [(-1, 5), (5, -1), (11, 5), (5, 21), (float("nan"), 5)])
def test_points_outside_of_the_picture(x, y):
    with pytest.raises(ValueError, match="outside of picture 1, which is 10 x 20"):
        format_points([Point(x, y)], "dogs", [(10, 20)])


@pytest.mark.parametrize("label", ["</points>", '<points coords="1 1 100 100">'])
def test_labels_that_would_break_the_tag(label):
    with pytest.raises(ValueError, match="points tag"):
        format_points([Point(1, 1)], label, [(10, 20)])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Counting the <points ...>cups</points> shows a total of 12.", 12),
        ('Counting the <points coords="1 1 100 100">cups</points> shows a total of 2.', 2),
        ("There are 3 dogs.", 3),
        ("There is 1 dog.", 1),
        ("There are none.", 0),
        ("There are no dogs.", 0),
        (" 7\n", 7),
        ("7.", 7),
        ('<points coords="1 1 100 100 2 200 200;2 3 300 300">cups</points>', 3),
        ("I see the year 1999.", None),
        ("yes", None),
        ("", None),
        ("²", None),
    ],
)
def test_parse_count(text, count):
    assert parse_count(text) == count
