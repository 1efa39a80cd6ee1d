"""Pixels <-> (row, slot, cell), against AI2's own code and by properties."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanomolmo2.processor import (
    Point,
    format_points,
    molmo_point_processor,
    points_from_ids,
    points_from_text,
)
from tests.processor.helpers import assistant, user
from tests.processor.point_prompts import (
    BASE,
    V,
    encode_golden,
    golden,
    official,
    one_view,
    picture,
    pictures,
    point_processor,
    sha256,
    small_processor,
)

PICTURES = golden("processor")["images"]
VIDEOS = golden("processor")["videos"]
TARGETS = golden("targets")
CASES = golden("cases")


def name(entry):
    return "+".join(f"{w}x{h}" for w, h in entry["sizes"]) + f"-{entry.get('max_crops', 8)}"


# ---- what a prompt shows ----


@pytest.mark.parametrize("entry", PICTURES, ids=name)
def test_trap_25_both_poolings_and_all_tokens_of_pictures(entry):
    """Decoding counts patches on over the pictures; HF's model counts from 0 in each of them.

    Traps 6 and 32 as well: overviews have rows that no mapping holds, and pictures with a side
    under 112 pixels (here 100 x 100) tile as Hugging Face's code has it.
    """
    encoded = encode_golden(entry)
    space = encoded.point_space
    assert encoded.image_num_crops.tolist() == entry["crops"]
    assert encoded.image_grids.tolist() == entry["grids"]
    assert sha256(space.token_pooling) == entry["token_pooling_sha256"]
    assert space.token_pooling is encoded.image_token_pooling
    assert space.token_pooling[0].tolist() == entry["token_pooling_first"]
    assert space.token_pooling[-1].tolist() == entry["token_pooling_last"]
    assert (space.token_pooling < 0).sum() == entry["empty_slots"]
    assert space.num_rows == entry["tokens"]

    before = np.repeat(
        729 * np.cumsum([0, *entry["crops"][:-1]]),
        [a * b + c * d for a, b, c, d in entry["grids"]],
    )[:, None]
    relative = np.where(space.token_pooling < 0, -1, space.token_pooling - before)
    assert sha256(relative) == entry["relative_pooling_sha256"]

    for grid, expected in zip(space.subpatch_mapping, entry["subpatch_mapping"], strict=True):
        assert list(grid.shape) == expected["shape"]
        assert (grid[0, 0], grid[-1, -1]) == (expected["first"], expected["last"])
        assert sha256(grid) == expected["sha256"]
    selectable = [space.is_selectable(row) for row in range(space.num_rows)]
    assert sum(selectable) == entry["indexable"]
    assert not any(selectable[:196]) and selectable[196]

    visual = official(encoded.input_ids)
    assert len(visual) == entry["token_count"]
    assert sha256(visual) == entry["token_ids_sha256"]


@pytest.mark.parametrize("entry", VIDEOS, ids=["378", "70"])
def test_trap_27_frames_stand_between_frame_start_and_frame_end(entry):
    encoded = encode_golden(entry)
    space = encoded.point_space
    assert encoded.video_grids[0].tolist() == entry["grid"]
    assert sha256(space.token_pooling) == entry["token_pooling_sha256"]
    assert (space.token_pooling < 0).sum() == entry["empty_slots"]
    mapping = np.stack(space.subpatch_mapping)
    assert list(mapping.shape) == entry["subpatch_mapping"]["shape"]
    assert sha256(mapping) == entry["subpatch_mapping"]["sha256"]
    assert space.num_rows == entry["tokens"]
    assert space.num_slots == 9
    assert all(space.is_selectable(row) for row in range(space.num_rows))
    if entry["video_string"] is not None:
        text = point_processor().decode(encoded.input_ids, skip_special_tokens=False)
        assert text.startswith("<|im_end|>" + entry["video_string"] + "<|im_start|>user\n")


@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_prompts_of_the_golden_checkpoint(case):
    """The same rows, classes and image-ish tokens as the prompts that HF's model was given."""
    expected = CASES[case]
    encoded, processor = _case(case)
    arrays = processor.apply([user("x")], **_shown(case))
    visual = np.array(expected["input_ids"])
    visual = visual[visual >= 256]
    assert (official(encoded.input_ids) - 151936).tolist() == (visual - 256).tolist()
    assert arrays["token_type_ids"].sum() == sum(expected["token_type_ids"])
    space = encoded.point_space
    assert space.num_rows == expected["n_patches"]
    assert space.num_slots == expected["n_subpatches"]
    assert 384 + space.num_classes == expected["width"]
    assert space.first_class == V


def _shown(case):
    shown = pictures(CASES[case]["picture_sizes"])
    if case == "video":
        return {"video": (shown, CASES[case]["metadata"]["timestamps"])}
    return {"images": shown}


def _case(case):
    processor = small_processor()
    return processor.encode([user("x")], **_shown(case)), processor


# ---- pixels -> targets -> pixels ----


@pytest.mark.parametrize("entry", TARGETS["images"], ids=name)
def test_trap_15_targets_of_pictures_and_trap_16_pixels_by_a_third_that_is_0_33(entry):
    """Cells are numbered column by column; their centres lie at 0.165, 0.495, 0.825 of a patch."""
    space = encode_golden(entry).point_space
    for point in entry["points"]:
        target = space.target(Point(point["x"], point["y"], point["image"]))
        assert list(target) == point["target"]
        back = space.point(target)
        assert back.image == point["image"]
        assert (back.x, back.y) == pytest.approx((point["x_back"], point["y_back"]), abs=1e-9)


@pytest.mark.parametrize("entry", TARGETS["videos"], ids=["378", "70"])
def test_targets_of_videos_lie_in_the_nearest_frame(entry):
    space = encode_golden(entry).point_space
    for point in entry["points"]:
        target = space.target(Point(point["x"], point["y"], time=point["time"]))
        assert list(target) == point["target"]
        back = space.point(target)
        assert back.time == point["time_back"]
        assert (back.x, back.y) == pytest.approx((point["x_back"], point["y_back"]), abs=1e-9)


def test_traps_6_and_12_overviews_lie_between_selectable_rows_and_rows_count_them():
    """Rows, and with them the class of no more points, count what cannot be selected."""
    space = _case("two")[0].point_space
    selectable = [space.is_selectable(row) for row in range(-1, space.num_rows + 1)]
    assert selectable == [False] * (1 + 9) + [True] * 16 + [False] * 9 + [True] * 21 + [False]
    assert space.target(Point(0, 0, 1))[0] == 9
    assert space.target(Point(0, 0, 2))[0] == 25 + 9
    assert space.point((30, 0, 0)) is None
    assert space.classes((1_000_000, -1, -1)) == (55,)
    positions = np.cumsum(selectable[1:-1]) - 1  # as the rotation counts them
    assert positions[space.target(Point(0, 0, 2))[0]] == 16


@pytest.mark.parametrize("size", [(800, 50), (50, 800), (100, 100), (1, 1)])
def test_trap_32_a_picture_with_a_side_under_112_pixels_is_one_tile(size):
    """As in Hugging Face's code; the training code makes three of 800 x 50, with other rows."""
    space = point_processor().encode([user("x")], [picture(*size)]).point_space
    assert [(view.rows, view.cols) for view in space.views] == [(27, 27)]
    assert space.num_rows == 196 + 196
    middle = Point(size[0] / 2, size[1] / 2)  # patch (13, 13), the last of window (6, 6)
    assert space.target(middle) == (196 + 6 * 14 + 6, 3, 4)


def test_of_two_frames_that_are_equally_near_the_first_is_taken():
    frames = pictures([(90, 60)] * 3)
    space = small_processor().encode([user("x")], video=(frames, [0.0, 0.5, 1.0])).point_space
    assert space.target(Point(0, 0, time=0.25))[0] == 0
    assert space.target(Point(0, 0, time=0.26))[0] == 4
    assert space.target(Point(0, 0, time=0.75))[0] == 4
    assert space.target(Point(0, 0, time=-9.0))[0] == 0
    assert space.target(Point(0, 0, time=99.0))[0] == 8


def test_a_point_by_hand():
    """150 x 100 pixels on 8 x 8 patches behind an overview of 9 rows: patch (3, 5), row 9 + 6."""
    space = small_processor().encode([user("x")], [picture(150, 100)]).point_space
    x, y = (5 + 0.9) / 8 * 150, (3 + 0.4) / 8 * 100  # third column, second row of its cells
    assert space.target(Point(x, y)) == (9 + 1 * 4 + 2, 2 * 1 + 1, 3 * 2 + 1)
    back = space.point((15, 3, 7))
    assert (back.x, back.y) == pytest.approx(((5 + 0.825) / 8 * 150, (3 + 0.495) / 8 * 100))


sides = st.integers(1, 300)
units = st.floats(0, 1)


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_point_comes_back_within_its_cell(sizes, data):
    """Pictures of any size, several in a prompt: the cell is the point's, and its own centre's."""
    images = [Image.new("RGB", size) for size in sizes]
    space = small_processor().encode([user("x")], images).point_space
    number = data.draw(st.integers(1, len(sizes)))
    width, height = sizes[number - 1]
    point = Point(data.draw(units) * width, data.draw(units) * height, number)
    _check_round_trip(space, point, width, height)


@given(u=units, v=units, size=st.tuples(sides, sides), number=st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_a_point_in_a_single_view_comes_back_within_its_cell(u, v, size, number):
    space = one_view().encode([user("x")], [Image.new("RGB", size)] * 2).point_space
    assert space.num_rows == 72
    _check_round_trip(space, Point(u * size[0], v * size[1], number), *size)


@given(u=units, v=units, size=st.tuples(sides, sides), time=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_a_point_in_a_video_comes_back_within_its_cell_and_frame(u, v, size, time):
    video = ([Image.new("RGB", size)] * 3, [0.0, 0.5, 2.0])
    for processor in (small_processor(), one_view()):
        space = processor.encode([user("x")], video=video).point_space
        point = Point(u * size[0], v * size[1], time=time)
        back = _check_round_trip(space, point, *size)
        assert abs(back.time - time) == min(abs(time - t) for t in (0.0, 0.5, 2.0))


def _check_round_trip(space, point, width, height):
    target = space.target(point)
    row, slot, _ = target
    assert space.token_pooling[row, slot] >= 0 and space.is_selectable(row)
    back = space.point(target)
    assert space.target(back) == target
    assert back.image == point.image
    view = space.views[0 if point.time is not None else point.image - 1]
    assert abs(back.x - point.x) <= width / view.cols / 3 + 1e-9
    assert abs(back.y - point.y) <= height / view.rows / 3 + 1e-9
    return back


# ---- classes ----


@pytest.mark.parametrize("kind", ["greedy", "forced"])
@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_points_of_what_the_reference_generated(case, kind):
    expected = CASES[case]
    encoded, _ = _case(case)
    points = expected["points" if kind == "greedy" else "forced_points"]
    ids = [_own_id(id) for id in expected[f"{kind}_ids"]]
    for found in (
        points_from_text(expected[f"{kind}_text"], encoded.point_space),
        points_from_ids(ids, encoded),
        points_from_ids(np.array(ids), encoded.point_space),
    ):
        assert len(found) == len(points)
        for point, (id, place, x, y) in zip(found, points, strict=True):
            assert point.id == id
            assert (point.time if case == "video" else point.image - 1) == place
            assert (point.x, point.y) == pytest.approx((x, y), abs=1e-9)


def _own_id(id):
    """An id of the golden vocabulary (bytes, 128 tokens from 256 on, classes) in the small one."""
    if id >= 384:
        return id - 384 + V
    if id >= 256:
        return id - 256 + BASE
    return small_processor().tokenizer.encode_text(chr(id))[0] if id < 128 else 1


def test_trap_24_the_same_text_means_other_places_in_another_prompt():
    """<POINT_k> is numbered by the rows of its prompt; its classes belong to no other."""
    small, large = (_case(name)[0].point_space for name in ("one", "two"))
    text = CASES["one"]["forced_text"]
    assert len(points_from_text(text, small)) == 4
    problems: list[str] = []
    assert points_from_text(text, large, problems=problems) == []
    assert len(problems) == 4
    assert "selects row 15, slot -30, cell -22" in problems[0]
    assert small.classes((15, 0, 3)) == (15, 26, 33)
    assert large.classes((15, 0, 3)) == (15, 56, 63)
    assert small.classes((1_000_000, -1, -1)) == (25,)
    assert small.classes((15, 2, -1)) == (15, 28)


def test_trap_18_three_classes_without_a_number_behind_them_are_no_point():
    space = _case("one")[0].point_space
    triple = "<POINT_15><POINT_26><POINT_38>"
    assert points_from_text(triple, space) == []
    assert points_from_text(triple + '"', space) == []
    assert points_from_text("1" + triple, space) == []
    assert [p.id for p in points_from_text(triple + "12", space)] == [12]
    assert [p.id for p in points_from_text(triple.replace("><", "> <") + " 3", space)] == [3]
    assert points_from_text(triple.replace("><", ">  <") + "1", space) == []


def test_trap_22_empty_slots_and_overviews_are_dropped_and_said():
    """183 x 60 pixels have 3 x 7 windows on 5 x 14 patches: the last line has empty slots."""
    space = small_processor().encode([user("x")], [picture(183, 60)]).point_space
    assert space.token_pooling[9 + 14].tolist()[2:] == [-1, -1]
    N = space.num_rows
    problems: list[str] = []
    text = f"<POINT_23><POINT_{N + 1 + 2}><POINT_{N + 5}>1<POINT_4><POINT_{N + 1}><POINT_{N + 5}>2"
    text += f"<POINT_23><POINT_{N + 1}><POINT_{N + 5}>3"
    (point,) = points_from_text(text, space, problems=problems)
    assert point.id == 3
    assert ["row 23, slot 2" in problems[0], "row 4, slot 0" in problems[1]] == [True, True]
    assert len(problems) == 2


def test_ids_of_one_row_in_any_form_with_labels():
    torch = pytest.importorskip("torch")
    processor = small_processor()
    encoded = processor.encode([user("x")], [picture(150, 100)])
    encode = processor.tokenizer.encode_text
    triple = [V + 15, V + 26, V + 38]
    ids = [
        *encode('<points coords="'),
        *triple,
        *encode("1"),
        V + 25,
        *encode('">red cups</point>'),
    ]
    for given_ids in (ids, tuple(ids), np.array(ids), torch.tensor(ids), torch.tensor([ids])):
        (point,) = points_from_ids(given_ids, encoded)
        assert (point.id, point.label, point.image) == (1, "red cups", 1)
    (point,) = points_from_ids([*encoded.input_ids, *ids], encoded)
    assert point.label == "red cups"
    with pytest.raises(ValueError, match="found 2 rows of ids"):
        points_from_ids([ids, ids], encoded)
    assert points_from_ids([*triple[:2], V + 38, *encode("1")], encoded)  # the last class
    for other in (V + 39, -100):
        with pytest.raises(ValueError, match=rf"id {other} is neither .* ids end at {V + 38} "):
            points_from_ids([*triple[:2], other, *encode("1")], encoded)
    assert processor.decode(ids).endswith('<POINT_38>1<POINT_25>">red cups</point>')
    assert points_from_ids(ids, processor.encode([user("x")])) == []


def test_labels_of_several_tags_and_tracks():
    space = _case("one")[0].point_space
    triple = "<POINT_15><POINT_26><POINT_38>"
    text = (
        f'<points coords="{triple}1<POINT_25>">a cat</point> and '
        f'<tracks coords="{triple}3{triple}4<POINT_25>">dogs</points>, <points coords="{triple}1'
    )
    found = points_from_text(text, space)
    assert [(p.id, p.label) for p in found] == [
        (1, "a cat"), (3, "dogs"), (4, "dogs"), (1, None)
    ]  # fmt: skip


def test_a_point_space_goes_to_worker_processes_without_the_tokenizer():
    processor = small_processor()
    encoded = processor.encode([user("x")], [picture(150, 100)])
    sent = pickle.dumps(encoded)
    assert len(sent) < encoded.pixel_values.nbytes + 20_000
    space = pickle.loads(sent).point_space
    ids = [V + 15, V + 26, V + 38, *processor.tokenizer.encode_text("12"), V + 25]
    (point,) = points_from_ids(ids, space)
    assert (point.id, point.label) == (12, None)
    assert point == points_from_ids(ids, encoded)[0]


# ---- points that are not there ----


@pytest.mark.parametrize(
    "point, problem",
    [
        (Point(150.5, 3), "lies outside of picture 1, which is 150 x 100 pixels"),
        (Point(3, -0.1), "lies outside of picture 1"),
        (Point(float("nan"), 3), "lies outside of picture 1"),
        (Point(3, 3, 2), "names picture 2, but the prompt shows 1"),
        (Point(3, 3, 0), "names picture 0, but the prompt shows 1"),
        (Point(3, 3, time=1.0), "names the time 1.0 s, but the prompt shows no video"),
    ],
)
def test_a_point_that_is_not_shown_is_one_clear_error(point, problem):
    space = _case("one")[0].point_space
    with pytest.raises(ValueError, match=problem):
        space.target(point)


def test_a_point_of_a_video_needs_a_time():
    space = _case("video")[0].point_space
    with pytest.raises(ValueError, match="give the seconds of a frame"):
        space.target(Point(3, 3))
    with pytest.raises(ValueError, match="outside of the video, which is 90 x 60"):
        space.target(Point(91, 3, time=0.0))


def test_pictures_without_crops_have_square_windows_and_no_overview():
    encoded = one_view().encode([user("x")], [picture(100, 50), picture(192, 192)])
    pooling = encoded.image_token_pooling
    assert pooling.shape == (72, 4)
    assert pooling[0].tolist() == [0, 1, 12, 13]
    assert pooling[7].tolist() == [26, 27, 38, 39]
    assert pooling[36].tolist() == [144, 145, 156, 157]
    space = encoded.point_space
    assert space.target(Point(99.9, 49.9)) == (35, 3, 8)
    assert space.target(Point(0, 0, 2)) == (36, 0, 0)
    # 192 px: a patch of 16 px a side, its cells 5.33 px.
    assert space.target(Point(24, 7, 2)) == (36, 1, 3 * 1 + 1)


def test_answers_of_the_processor_decode_to_what_was_given():
    """Encode exact points, write the classes of their targets, read them: within a cell."""
    processor, sizes = small_processor(), [(150, 100), (183, 60)]
    points = [Point(100.3, 42.1), Point(9, 3.3, 2), Point(140, 99)]
    answer = format_points(points, "cups", sizes)
    encoded = processor.encode([user("x"), assistant(answer)], pictures(sizes))
    space = encoded.point_space
    classes = [space.classes(target) for target in encoded.point_targets]
    text = "".join(
        "".join(f"<POINT_{k}>" for k in group) + f"{n}" for n, group in enumerate(classes, 1)
    )
    found = points_from_text(text, space)
    assert [p.image for p in found] == [1, 1, 2]
    for given_point, point in zip([points[0], points[2], points[1]], found, strict=True):
        assert (point.x, point.y) == pytest.approx((given_point.x, given_point.y), abs=6.5)


def test_the_official_processor(qwen3_folder):
    processor = molmo_point_processor(qwen3_folder)
    assert processor.config.multicrop.max_crops == 24
    encoded = processor.encode([user("x")], [picture(640, 480)])
    assert encoded.point_space.first_class == 152064
    assert encoded.point_space.markers == (151947, 151948, 151949)
    ids = encoded.input_ids
    assert sha256(ids[ids >= 151936]) == PICTURES[0]["token_ids_sha256"]
    seen = "<POINT_276><POINT_727><POINT_731>1<POINT_725>"
    assert processor.decode([152064 + k for k in (276, 727, 731)] + [16, 152064 + 725]) == seen
