"""Answers with points <-> markers and their targets, against AI2's formatter and by hand."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS
from nanomolmo2.data.layouts import points_text
from nanomolmo2.data.record import Record
from nanomolmo2.processor import (
    Point,
    PointsText,
    Processor,
    ProcessorConfig,
    format_points,
    format_tracks,
    join_points,
    points_from_ids,
    points_from_text,
    points_to_json,
)
from tests.processor.helpers import assistant, user
from tests.processor.point_prompts import (
    BASE,
    V,
    golden,
    one_view,
    picture,
    pictures,
    point_processor,
    point_tokenizer,
    small_processor,
)

FORMAT = golden("format")
P, S, L = "<|token_index|>", "<|vit_index|>", "<|vit_loc|>"
PATCH, SUBPATCH, LOCATION = BASE + 11, BASE + 12, BASE + 13
END = [NO_MORE_POINTS, -1, -1]
SIZE = (150, 100)  # 8 x 8 patches behind an overview of 9 rows


def encode(answer, *, processor=None, sizes=(SIZE,), **shown):
    shown = shown or {"images": pictures(sizes)}
    return (processor or small_processor()).encode([user("x"), assistant(answer)], **shown)


def written(encoded):
    """The learned text, special tokens by name."""
    learned = encoded.labels[encoded.labels != IGNORED_LABEL]
    return point_tokenizer().decode(learned, skip_special_tokens=False).removesuffix("<|im_end|>")


# ---- what is learned ----


@pytest.mark.parametrize("entry", FORMAT["points"], ids=lambda e: f"{e['mode']}-{e['points']}")
def test_trap_17_tags_close_with_point_and_trap_18_the_number_comes_last(entry):
    points = [Point(10.5 * k, 7 * k) for k in range(1, entry["points"] + 1)]
    if entry["mode"] == "track":
        times = [0.0, 0.0, 0.5, 0.5]
        points = [
            Point(10 + 30 * id, 10, id=id, time=time)
            for id, time in zip(entry["track_ids"], times, strict=True)
        ]
        answer = format_tracks(points, entry["label"], (90, 60))
        encoded = encode(answer, video=(pictures([(90, 60)] * 2), [0.0, 0.5]))
    else:
        answer = format_points(points, entry["label"], [SIZE], mode=entry["mode"])
        encoded = encode(answer)
    assert written(encoded) == entry["text"]
    ids = encoded.input_ids
    assert entry["text"].count(P) == (ids == PATCH).sum()
    assert entry["text"].count(S) == (ids == SUBPATCH).sum() == (ids == LOCATION).sum()
    markers = np.isin(ids, (PATCH, SUBPATCH, LOCATION))
    assert (encoded.labels[markers] == ids[markers]).all()  # trap 30: markers are learned


def test_tracks_of_the_reference():
    """Hidden objects are left out, objects are numbered by their first appearance after sorting."""
    tracks = FORMAT["tracks"]
    points = [
        Point(*object["point"], id=int(id), time=frame["time"])
        for frame in tracks["frames"]
        for id, object in frame["points"].items()
        if not object["occluded"]
    ]
    size = tuple(tracks["frame_size"])
    video = (pictures([size] * 4), tracks["timestamps"])
    for answer in (
        format_tracks(points, "dancers", size),
        str(format_tracks(points, "dancers", size)),  # thousandths say the same place here
    ):
        encoded = encode(answer, processor=point_processor(), video=video)
        assert encoded.point_targets.tolist() == tracks["targets"]
        assert written(encoded) == tracks["text"]


def test_targets_are_those_of_the_exact_pixels_and_not_of_the_text():
    """4.7 px of 100 are 047 thousandths, which say 4.7; 4.1669 lies in another cell than 4.2."""
    exact = Point(150 / 8 / 3 * 2 - 0.03, 50)  # just left of the third column of cells
    text = format_points([exact], "cup", [SIZE])
    assert 'coords="1 1 083 500"' in text and exact.x > 0.083 * 150
    exact = Point(150 / 8 / 3 * 2 + 0.03, 50)
    answer = format_points([exact], "cup", [SIZE])
    assert 'coords="1 1 084 500"' in answer
    near = Point(150 / 8 / 3 * 2 + 0.01, 50)  # 12.51 px are 083 thousandths: 12.45 px
    answer = format_points([near], "cup", [SIZE])
    assert 'coords="1 1 083 500"' in answer
    assert encode(answer).point_targets.tolist() == [[17, 0, 6], END]
    assert encode(str(answer)).point_targets.tolist() == [[17, 0, 3], END]


def test_trap_15_points_are_sorted_by_row_slot_and_cell_and_numbered_anew():
    """Two windows side by side come before the one below, whatever x says."""
    points = [Point(5, 90), Point(149, 1), Point(2, 1), Point(1, 5)]
    encoded = encode(format_points(points, "cups", [SIZE]))
    # (1, 5) is in the middle third of its patch, below (2, 1): the same column, cell 1 after 0.
    assert encoded.point_targets.tolist() == [[9, 0, 0], [9, 0, 1], [12, 1, 6], [21, 2, 0], END]
    assert f"{P}{S}{L}1{P}{S}{L}2{P}{S}{L}3{P}{S}{L}4{P}" in written(encoded)


def test_trap_21_two_points_in_one_cell_stay_two():
    encoded = encode(format_points([Point(2, 1), Point(2.1, 1)], "cups", [SIZE]))
    assert encoded.point_targets.tolist() == [[9, 0, 0], [9, 0, 0], END]


def test_trap_23_several_lists_of_one_answer():
    """One tag a label, joined: every list is sorted and numbered for itself."""
    cats = format_points([Point(102, 50), Point(3, 3)], "cats", [SIZE])
    dogs = format_points([Point(52, 3)], "dogs", [SIZE], mode="point_count")
    nothing = format_points([], "birds", [SIZE])
    joined = join_points([cats, dogs, nothing], ", ")
    assert joined == ", ".join([cats, dogs, nothing])
    for answer in (joined, str(joined), pickle.loads(pickle.dumps(joined))):
        encoded = encode(answer)
        assert encoded.point_targets.tolist() == [
            [9, 0, 0], [19, 1, 3], END, [10, 0, 6], END
        ]  # fmt: skip
        assert encoded.point_lists.tolist() == [0, 0, 0, 1, 1]
        assert written(encoded) == (
            f'<points coords="{P}{S}{L}1{P}{S}{L}2{P}">cats</point>, Counting the '
            f'<points coords="{P}{S}{L}1{P}">dogs</point> shows a total of 1., There are none.'
        )


def test_points_text_goes_through_messages_and_pickles():
    answer = format_points([Point(3, 3)], "cats", [SIZE])
    sent = pickle.loads(pickle.dumps(answer))
    assert isinstance(sent, PointsText) and sent.tags == answer.tags
    assert sent.tags[0].points == (Point(3, 3),)
    assert str(answer) == '<points coords="1 1 020 030">cats</points>' == answer
    parts = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    encoded = small_processor().encode([user("x"), parts], [picture(*SIZE)])
    assert encoded.point_targets.tolist() == [[9, 0, 0], END]
    assert join_points(["a", "b"], " ") == "a b"
    assert not isinstance(join_points(["a", "b"]), PointsText)


def test_points_of_a_data_set_keep_their_pixels_through_several_labels():
    record = Record({}, "line 1", SimpleNamespace(), np.random.default_rng(0))
    near = 150 / 8 / 3 * 2 + 0.01
    value = {"points": [{"x": near, "y": 50, "label": "a"}, {"x": 1, "y": 1, "label": "b"}]}
    answer = points_text(record, value, [SimpleNamespace(size=SIZE)], None)
    assert [tag.label for tag in answer.tags] == ["a", "b"]
    assert encode(answer).point_targets.tolist() == [[17, 0, 6], END, [9, 0, 0], END]


@pytest.mark.parametrize(
    "text, targets, shown",
    [
        ('<points coords="1 1 020 030">cup</points>', [[9, 0, 0]], "points"),
        ('<points alt="cup" coords="1 1 020 030">cup</points>', [[9, 0, 0]], "points"),
        ('<point x="2.0" y="3" alt="cup">cup</point>', [[9, 0, 0]], "points"),
        ('<points x1="2" y1="5" x2="1.4" y2="1" alt="cup">cup</points>',
         [[9, 0, 0], [9, 0, 1]], "points"),
        ("A cup at <point x='2.0' y='3'/>", [[9, 0, 0]], "points"),
    ],
)  # fmt: skip
def test_text_coordinates_of_answers_are_grounded(text, targets, shown):
    encoded = encode(text)
    assert encoded.point_targets.tolist() == [*targets, END]
    label = "" if text.endswith("/>") else "cup"
    assert written(encoded).endswith(f'{len(targets)}{P}">{label}</point>')
    assert f'<{shown} coords="{P}' in written(encoded)


@pytest.mark.parametrize(
    "text", ['Write <points> or <points coords="">x</points>.', "There are none.", "A < B.", ""]
)
def test_answers_that_point_at_nothing_stay_as_they_are(text):
    encoded = encode(text)
    assert written(encoded) == text
    assert encoded.point_targets is None and encoded.point_lists is None


@pytest.mark.parametrize(
    "text, problem",
    [
        ('<points coords="1 1 1020 030">cup</points>', "over 1000"),
        ('<points coords="2 1 020 030">cup</points>', "picture 2, but the prompt has 1"),
        ('<points coords="0.5 1 020 030">cup</points>', "0.5 s, but there is no video"),
        ('<points coords="1 1 020 0', "breaks off"),
        ('<point x="102" y="3" alt="cup">cup</point>', "over 100 %"),
        ('<points coords="cup">cup</points>', "expected numbers"),
    ],
)
def test_points_that_cannot_be_learned_are_one_clear_error(text, problem):
    with pytest.raises(ValueError, match=problem) as error:
        encode(text)
    assert "cannot be learned" in str(error.value)


def test_points_outside_of_what_is_shown():
    """The answer was written for other pictures than the prompt shows."""
    answer = format_points([Point(149, 1)], "cup", [SIZE])
    with pytest.raises(ValueError, match=r"outside of picture 1, which is 100 x 100"):
        encode(answer, sizes=[(100, 100)])
    answer = format_points([Point(1, 1, 2)], "cup", [SIZE, SIZE])
    with pytest.raises(ValueError, match="picture 2, but the prompt shows 1"):
        encode(answer)
    with pytest.raises(ValueError, match="shows no picture and no video"):
        small_processor().encode([user("x"), assistant(answer)])
    with pytest.raises(ValueError, match="branch 0: a point names picture 2"):
        small_processor().encode_tree([picture(*SIZE)], [[user("x"), assistant(answer)]])


def test_no_typed_text_becomes_a_marker_or_a_class():
    typed = f'{P}{S}{L} <POINT_3> <|points|> <im_low> <points coords="1 1 020 030">cup</points>'
    encoded = small_processor().encode([user(typed), assistant(f"{P}{S}{L}1")], [picture(*SIZE)])
    special = set(point_tokenizer().special_ids.values())
    visual = 25 + 4 + 4  # rows, ends of lines, and the tokens around both views
    names = [i for i in encoded.input_ids.tolist() if i in special]
    assert len(names) == 1 + visual + 4
    assert encoded.point_targets is None
    assert written(encoded) == f"{P}{S}{L}1"
    assert encoded.input_ids.max() < V


def test_a_model_without_points_is_told_nothing_of_them():
    processor = Processor(
        ProcessorConfig.molmo2(image_size=192, image_tokens=36), point_tokenizer()
    )
    answer = format_points([Point(3, 3)], "cup", [SIZE])
    encoded = processor.encode([user("x"), assistant(answer)], [picture(*SIZE)])
    assert encoded.point_space is encoded.point_targets is encoded.image_token_pooling is None
    assert str(answer) in processor.decode(encoded.input_ids)
    assert processor.decode([V + 3, *point_tokenizer().encode_text("a")]) == "a"


# ---- earlier answers of the same prompt ----


def test_trap_23_an_earlier_answer_becomes_markers_and_targets_again():
    processor = small_processor()
    images = pictures([SIZE, (183, 60)])
    exact = format_points([Point(102, 50), Point(3, 3), Point(9, 9, 2)], "cats", [SIZE, (183, 60)])
    first = processor.encode([user("x"), assistant(exact)], images)
    space, targets = first.point_space, iter(first.point_targets)
    text = written(first)
    while P in text:
        classes = "".join(f"<POINT_{k}>" for k in space.classes(next(targets)))
        marker = f"{P}{S}{L}" if text.index(P) == text.find(f"{P}{S}{L}") else P
        text = text.replace(marker, classes, 1)
    assert len(points_from_text(text, space)) == 3
    again = processor.encode([user("x"), assistant(text), user("and?")], images)
    assert again.point_targets.tolist() == first.point_targets.tolist()
    assert again.point_lists.tolist() == [0, 0, 0, 0]
    length = (again.labels != IGNORED_LABEL).sum()
    assert length == (first.labels != IGNORED_LABEL).sum()
    assert written(again) == written(first)


N = 25  # rows of the prompt of one picture; slots from 26, cells from 30 on


@pytest.mark.parametrize(
    "text, targets, lists",
    [
        ("<POINT_15><POINT_26><POINT_38>", [[15, 0, 8]], [0]),
        ("<POINT_15> <POINT_26> <POINT_38>1<POINT_25>", [[15, 0, 8], END], [0, 0]),
        ("<POINT_15><POINT_26>", [[15, 0, -1]], [0]),
        ('coords="<POINT_15><POINT_26><POINT_38>2<POINT_16>', [[15, 0, 8], [16, -1, -1]], [0, 0]),
        ('coords="<POINT_15><POINT_26><POINT_38>1" coords="<POINT_9><POINT_26><POINT_30>1',
         [[15, 0, 8], [9, 0, 0]], [0, 1]),
        ("<POINT_15><POINT_26><POINT_38>1<POINT_25> <POINT_9><POINT_26><POINT_30>1<POINT_25>",
         [[15, 0, 8], END, [9, 0, 0], END], [0, 0, 1, 1]),
        ("<POINT_25>", [END], [0]),
    ],
)  # fmt: skip
def test_classes_of_an_earlier_answer(text, targets, lists):
    """One that broke off is cut: what it lacks is -1. Every list, and every tag, begins anew."""
    encoded = encode(text)
    assert encoded.point_targets.tolist() == targets
    assert encoded.point_lists.tolist() == lists
    count = (np.array(targets)[:, 1:] >= 0).sum(axis=0)
    assert (encoded.input_ids == SUBPATCH).sum() == count[0]
    assert (encoded.input_ids == LOCATION).sum() == count[1]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<POINT_39>", "this prompt has 39 classes"),
        ("<POINT_31200>", "this prompt has 39 classes"),
        ("<POINT_276><POINT_727><POINT_731>1", "this prompt has 39 classes"),
        ("<POINT_26>", "a row, a slot and a cell, in this order"),
        ("<POINT_15><POINT_30>", "a row, a slot and a cell, in this order"),
        ("<POINT_15><POINT_16>", "a row, a slot and a cell, in this order"),
        ("<POINT_15><POINT_26><POINT_25>", "a row, a slot and a cell, in this order"),
        ("<POINT_3><POINT_26><POINT_38>1", "row 3 of this prompt cannot be selected"),
        ("<POINT_15>1<POINT_26><POINT_38>", "three classes one after the other"),
        ("<POINT_15><POINT_26> and more", "three classes one after the other"),
        ("<POINT_15><POINT_26><POINT_38>1<POINT_14><POINT_26><POINT_38>2", "are sorted by row"),
    ],
)
def test_trap_24_classes_of_another_prompt_are_one_clear_error(text, reason):
    with pytest.raises(ValueError, match="a class of another prompt's width or order") as error:
        encode(text)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_classes_without_a_picture():
    with pytest.raises(ValueError, match="shows nothing to point at"):
        small_processor().encode([user("x"), assistant("<POINT_3>")])


# ---- points of questions ----


def ask(*parts, answer=None):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, assistant(answer)]


HERE = {"type": "point", "x": 102, "y": 50}


def test_points_of_questions_are_three_markers_without_loss():
    processor = small_processor(in_prompt=True)
    there = {"type": "point", "x": 9, "y": 9, "image": 2}
    answer = format_points([Point(3, 3)], "cats", [SIZE])
    images = pictures([SIZE, (183, 60)])
    encoded = processor.encode(ask("Is", HERE, "like", there, answer=answer), images)
    assert encoded.point_targets.tolist() == [[19, 1, 3], [34, 0, 8], [9, 0, 0], END]
    assert encoded.point_lists.tolist() == [0, 1, 2, 2]
    text = processor.decode(encoded.input_ids, skip_special_tokens=False)
    assert f"<|im_start|>user\nIs {P}{S}{L} like {P}{S}{L}<|im_end|>" in text
    markers = np.isin(encoded.input_ids, (PATCH, SUBPATCH, LOCATION))
    assert (encoded.labels[markers] != IGNORED_LABEL).tolist() == [False] * 6 + [True] * 4

    alone = processor.encode(ask(HERE), [picture(*SIZE)])
    assert alone.point_targets.tolist() == [[19, 1, 3]]
    text = processor.decode(alone.input_ids, skip_special_tokens=False)
    assert f"<|im_start|>user\n{P}{S}{L}<|im_end|>\n" in text


def test_points_of_questions_are_text_where_the_model_learned_that():
    """The format of Molmo2's single-point tracking; models without points read it as well."""
    video = (pictures([(90, 60)] * 2), [0.0, 0.5])
    point = {"type": "point", "x": 45, "y": 15, "time": 0.5, "label": "hand"}
    encoded = small_processor().encode(ask("Track this:", point, "."), video=video)
    text = small_processor().decode(encoded.input_ids)
    assert 'Track this: <points coords="0.5 1 500 250">hand</points> .' in text
    assert encoded.point_targets is None
    plain = Processor(ProcessorConfig.molmo2(image_size=192, image_tokens=4), point_tokenizer())
    encoded = plain.encode(ask("What is this? ", HERE), [picture(*SIZE)])
    shown = 'What is this? <points coords="1 1 680 500">point</points>'
    assert shown in plain.decode(encoded.input_ids)


@pytest.mark.parametrize("in_prompt", [False, True])
@pytest.mark.parametrize(
    "point, problem",
    [
        ({"x": 151, "y": 3}, "outside of picture 1, which is 150 x 100"),
        ({"x": 3, "y": 3, "image": 2}, "picture 2, but the prompt (has|shows) 1"),
        ({"x": 3, "y": 3, "time": 1}, "names the time 1"),
        ({"x": "3", "y": 3}, "expected {'type': 'point', 'x': pixels"),
        ({"x": True, "y": 3}, "expected {'type': 'point', 'x': pixels"),
        ({"x": 3}, "expected {'type': 'point', 'x': pixels"),
        ({"x": 3, "y": 3, "image": 1.0}, "expected {'type': 'point', 'x': pixels"),
        ({"x": 3, "y": 3, "image": 1, "time": 0}, "'time' in seconds in place of 'image'"),
    ],
)
def test_a_wrong_point_of_a_question_is_one_clear_error(point, problem, in_prompt):
    processor = small_processor(in_prompt=in_prompt)
    with pytest.raises(ValueError, match=problem):
        processor.encode(ask({"type": "point", **point}), [picture(*SIZE)])


def test_answers_hold_no_parts_that_are_points():
    messages = [user("x"), {"role": "assistant", "content": [HERE]}]
    with pytest.raises(ValueError, match="points only in questions"):
        small_processor().encode(messages, [picture(*SIZE)])


# ---- trees, single views, decoding ----


def test_a_tree_has_its_targets_in_the_order_of_its_tokens():
    processor = small_processor(in_prompt=True)
    cats = format_points([Point(102, 50), Point(3, 3)], "cats", [SIZE])
    dogs = format_points([Point(52, 3)], "dogs", [SIZE])
    branches = [
        [user("cats?"), assistant(cats)],
        ask("what is ", HERE, answer="A cat."),
        [user("dogs?"), assistant(dogs), user("cats?"), assistant(cats)],
    ]
    encoded = processor.encode_tree([picture(*SIZE)], branches, loss_weighting="sqrt")
    assert encoded.point_targets.tolist() == [
        [9, 0, 0], [19, 1, 3], END, [19, 1, 3], [10, 0, 6], END, [9, 0, 0], [19, 1, 3], END
    ]  # fmt: skip
    assert encoded.point_lists.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    places = np.flatnonzero(encoded.input_ids == PATCH)
    assert encoded.subsegment_ids[places].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert (encoded.loss_weights[places] > 0).tolist() == [True] * 3 + [False] + [True] * 5
    alone = processor.encode([user("cats?"), assistant(cats)], [picture(*SIZE)])
    branch = encoded.subsegment_ids == 0
    learned = alone.labels[alone.labels != IGNORED_LABEL]
    kept = encoded.labels[branch]
    assert kept[kept != IGNORED_LABEL].tolist() == learned.tolist()


def test_a_single_view_learns_points_too():
    processor = one_view()
    answer = format_points([Point(24, 7)], "dog", [(192, 192)])
    encoded = processor.encode([user("x"), assistant(answer)], [picture(192, 192)])
    assert encoded.point_targets.tolist() == [[0, 1, 4], END]
    video = processor.encode(
        [
            user("x"),
            assistant(format_points([Point(24, 7, time=0.5)], "dog", video_size=(192, 192))),
        ],
        video=(pictures([(192, 192)] * 2), [0.0, 0.5]),
    )
    assert video.point_targets.tolist() == [[36, 1, 4], END]


units = st.floats(0, 1)


@given(st.lists(st.tuples(units, units, st.integers(1, 2)), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_learned_reads_back_as_what_was_given(places, data):
    """Points -> markers and targets -> generated ids -> points: all there, each within its cell."""
    sizes = [SIZE, (183, 60)]
    points = [Point(u * sizes[k - 1][0], v * sizes[k - 1][1], k) for u, v, k in places]
    encoded = encode(format_points(points, "cups", sizes), sizes=sizes)
    space = encoded.point_space
    targets = encoded.point_targets.tolist()
    assert targets == [*sorted(list(space.target(point)) for point in points), END]

    remaining, ids = iter(targets), []
    for id in encoded.labels[encoded.labels != IGNORED_LABEL].tolist():
        if id == PATCH:
            ids += [V + k for k in space.classes(next(remaining))]
        elif id not in (SUBPATCH, LOCATION):
            ids.append(id)
    found = points_from_ids(ids, encoded)
    assert [point.id for point in found] == list(range(1, len(points) + 1))
    assert {point.label for point in found} == {"cups"}
    assert [list(space.target(point)) for point in found] == targets[:-1]

    text = small_processor().decode(ids, skip_special_tokens=True)
    assert points_from_text(text, space) == found
    turns = [user("x"), assistant(text), user("y")]
    again = small_processor().encode(turns, pictures(sizes))
    assert again.point_targets.tolist() == targets


def test_json_has_the_confidence_where_it_is_known():
    sure, unknown = Point(3, 3, id=1, confidence=0.5), Point(3, 3, id=1)
    assert points_to_json([sure], [SIZE])[0]["confidence"] == 0.5
    assert "confidence" not in points_to_json([unknown], [SIZE])[0]
