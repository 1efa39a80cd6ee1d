"""Answers of point models: pixels, confidence, text coordinates, pieces, conversations.

What the goldens say was made by the reference; see tests/data/molmo_point/README.md.
"""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanomolmo2.generation.answer import SELECTED, in_coordinates, read_answer
from nanomolmo2.generation.pipeline import Answer, Pipeline, Question, TextStream
from nanomolmo2.processor import Encoded, parse_count, parse_points
from nanomolmo2.processor.chat import Segment
from nanomolmo2.processor.video import Video
from tests.golden_points import (
    GOLDEN,
    V,
    cases,
    consistent_pipeline,
    golden_folder,
    golden_processor,
    picture,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The golden checkpoint; its own rule is the released one."""
    return Pipeline.from_pretrained(golden_folder(tmp_path_factory.mktemp("golden") / "model"))


@pytest.fixture(scope="module")
def consistent(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return consistent_pipeline(golden_folder(tmp_path_factory.mktemp("own") / "model"))


@pytest.fixture
def golden_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as in the golden files: token 1, what is shown, the text; no turns."""

    def render(
        chat_format: str, turns: Any, visual: Any, *rest: Any, **options: Any
    ) -> list[Segment]:
        begin, question = "\x01", turns[-1].text
        return [
            Segment(begin, is_control=False, is_answer=False),
            *visual,
            Segment(question, is_control=False, is_answer=False),
        ]

    monkeypatch.setattr("nanomolmo2.processor.processor.render", render)


def shown(case: str) -> dict[str, Any]:
    """What a golden case shows, as keywords of `Pipeline.ask`."""
    sizes = cases()[case]["picture_sizes"]
    pictures = [picture(k, (width, height)) for k, (width, height) in enumerate(sizes)]
    if case != "video":
        return {"images": pictures}
    return {"images": None, "video": Video(tuple(map(np.asarray, pictures)), (0.0, 0.5, 1.0))}


def ask(pipeline: Pipeline, case: str, **options: Any) -> Answer:
    options = {"max_new_tokens": 22, "eos_token_id": None, **options}
    return pipeline.ask(question=cases()[case]["prompt_text"], **shown(case), **options)


def numbers_of(answer: Answer) -> list[list[float]]:
    """Points as the golden files have them: number, picture from 0 or time, x, y."""
    return [[p.id or 0, p.image - 1 if p.time is None else p.time, p.x, p.y] for p in answer.points]


@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_points_are_those_of_the_reference(case: str, pipeline: Pipeline, golden_prompt) -> None:
    """Trap 25: absolute and relative poolings differ only where there are several pictures."""
    answer = ask(pipeline, case)
    golden = cases()[case]
    assert answer.input_tokens == len(golden["input_ids"])
    assert SELECTED.findall(answer.text) == SELECTED.findall(golden["greedy_text"])
    np.testing.assert_allclose(numbers_of(answer), golden["points"], atol=1e-4)


@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_coordinates_say_the_same_places(case: str, pipeline: Pipeline, golden_prompt) -> None:
    answer = ask(pipeline, case)
    read = parse_points(answer.coordinates, answer.image_sizes, video_size=answer.video_size)
    assert not SELECTED.search(answer.coordinates)
    assert [(p.id, p.image, p.time) for p in read] == [
        (p.id, p.image, p.time) for p in answer.points
    ]
    sides = answer.video_size or max(answer.image_sizes)
    for text, exact in zip(read, answer.points, strict=True):
        assert abs(text.x - exact.x) <= 0.0005 * sides[0] + 1e-9
        assert abs(text.y - exact.y) <= 0.0005 * max(answer.image_sizes or [sides])[1] + 1e-9


@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_confidence_is_the_product_of_three_probabilities(
    case: str, pipeline: Pipeline, golden_prompt
) -> None:
    """Softmax over the reference's logits of rows, of slots and of cells; of two points in one row
    the second has only the slots behind the first one's.
    """
    tensors, bounds = load_file(GOLDEN / "cases.safetensors"), cases()[case]["bounds"]
    logits, rows = tensors[f"{case}.greedy_logits"], tensors[f"{case}.greedy_patch_logits"]
    ids = cases()[case]["greedy_ids"]
    expected: list[list[float]] = []
    before = (-1, -1)
    for step, id in enumerate(ids):
        if bounds["patch_start"] <= id < bounds["no_more_points"] and step + 2 < len(ids):
            slot = logits[step + 1, bounds["subpatch_start"] : bounds["location_start"]]
            cell = logits[step + 2, bounds["location_start"] : bounds["end"]]
            chosen = (id - V, ids[step + 1] - bounds["subpatch_start"])
            if chosen[0] == before[0]:
                slot[: before[1] + 1] = -float("inf")
            before = chosen
            triple = [
                rows[step - 1].softmax(-1)[chosen[0]],
                slot.softmax(-1)[chosen[1]],
                cell.softmax(-1)[ids[step + 2] - bounds["location_start"]],
            ]
            expected.append([float(probability) for probability in triple])
    answer = ask(pipeline, case)
    np.testing.assert_allclose(answer.confidences, expected, rtol=1e-3)
    products = [p.confidence for p in answer.points]
    np.testing.assert_allclose(products, np.prod(expected, axis=1), rtol=1e-3)
    assert all(0 < product < 1 for product in products)  # type: ignore[operator]


def test_no_piece_holds_half_a_selection(pipeline: Pipeline, golden_prompt) -> None:
    pieces: list[str] = []
    answer = ask(pipeline, "one", on_text=pieces.append)
    assert "".join(pieces) == answer.text
    broken = [piece for piece in pieces if re.search("<|>|POINT", SELECTED.sub("", piece))]
    assert not broken
    assert sum(bool(SELECTED.search(piece)) for piece in pieces) == 13


def test_stop_texts_end_an_answer_between_selections(pipeline: Pipeline, golden_prompt) -> None:
    """A text such as "1" is not looked for in the names of what was selected."""
    whole = ask(pipeline, "one").text
    for stop in ("POINT", "1", "<", "16>"):
        assert ask(pipeline, "one", stop=stop).text == whole
    cut = ask(pipeline, "one", stop="7")
    assert cut.text == whole[: whole.index(">7") + 1] == '"<POINT_16><POINT_28><POINT_38>'
    assert cut.finish_reason == "stop"
    assert cut.points == ()  # its number did not come, as the reference reads it
    held = ask(pipeline, "one", stop='"x')  # the quote might have been its beginning
    assert held.text == whole


def test_what_was_held_back_stands_before_the_selection() -> None:
    processor = golden_processor()
    stream = TextStream(processor, stop=["ab", "7<"])
    for id in (97, V + 3, 55, V + 26, 97, 98, 99):
        stream.put(id)
    assert stream.end() == "a<POINT_3>7<POINT_26>"
    assert stream.stopped


def test_many_answers_are_those_of_one_by_one(pipeline: Pipeline) -> None:
    """Rows of other widths, a video, and one without anything to point at, beside each other."""
    asked = [
        Question("lamps?", [picture(0, (150, 100))]),
        Question("no picture"),
        Question("eggs?", video=shown("video")["video"]),
        Question("both?", [picture(0, (146, 112)), picture(1, (183, 60))]),
    ]
    alone = [pipeline.ask(q.images, q.question, video=q.video, max_new_tokens=40) for q in asked]
    questions = [q._replace(max_new_tokens=40) for q in asked]
    questions[1:2] = [tuple(questions[1])]  # a plain tuple is a question too
    found = list(pipeline.ask_many(questions, batch_size=4))
    assert [a.text for a in found if isinstance(a, Answer)] == [a.text for a in alone]
    for one, other in zip(found, alone, strict=True):
        assert isinstance(one, Answer)
        assert one.points == pytest.approx(other.points) or _near(one, other)
    assert any(answer.points for answer in alone)


def _near(one: Answer, other: Answer) -> bool:
    places = [[(p.x, p.y, p.image, p.time, p.id) for p in answer.points] for answer in (one, other)]
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-4)
    return places[0] == places[1]


def test_a_question_without_pictures(pipeline: Pipeline) -> None:
    """AI2's inference code stops on them."""
    answer = pipeline.ask(None, "How are you?", max_new_tokens=12)
    assert (answer.points, answer.coordinates) == ((), answer.text)
    assert answer.output_tokens == 12


# ---- texts written by hand ----


@pytest.fixture(scope="module")
def one_picture() -> Encoded:
    """Picture of 150 x 100 pixels: 9 overview tokens, 16 of 2 x 2 patches; N 25, S 4."""
    return golden_processor().encode([{"role": "user", "content": "?"}], [picture(0, (150, 100))])


# Row 12 is the last of the first line: patches (0, 6), (0, 7), (1, 6), (1, 7) of 8 x 8.
POINT = "<POINT_12><POINT_26><POINT_34>"  # slot 0, cell 4: the middle of patch (0, 6)
X, Y = (6 + 1.5 * 0.33) / 8 * 150, 1.5 * 0.33 / 8 * 100  # 121.78125, 6.1875
OTHER = "<POINT_20><POINT_29><POINT_30>"  # row 20, slot 3, cell 0: patch (5, 7), its corner
NMP = "<POINT_25>"


def test_a_whole_answer_of_points(one_picture: Encoded) -> None:
    text = f'Counting the <points coords="{POINT}1{OTHER}2{NMP}">cups</point> shows a total of 2.'
    read = read_answer(text, one_picture, [(0.5, 0.5, 0.5), (1.0, 0.5, 0.25)])
    first, second = read.points
    assert (first.x, first.y, first.id, first.label) == (
        pytest.approx(X),
        pytest.approx(Y),
        1,
        "cups",
    )
    assert (second.x, second.y) == (
        pytest.approx((7 + 0.165) / 8 * 150), pytest.approx((5 + 0.165) / 8 * 100)
    )  # fmt: skip
    assert [p.confidence for p in read.points] == [0.125, 0.125]
    assert read.confidences == ((0.5, 0.5, 0.5), (1.0, 0.5, 0.25))
    assert (read.count, read.problems) == (2, ())
    assert read.coordinates == (
        'Counting the <points coords="1 1 812 062 2 896 646">cups</points> shows a total of 2.'
    )


def test_several_lists_and_text_beside_them(one_picture: Encoded) -> None:
    text = (
        f'The <points coords="{POINT}1{NMP}">cup</point> and the '
        f'<points coords="{OTHER}1{NMP}">dish</point>, 3 < 4.'
    )
    read = read_answer(text, one_picture)
    assert [(p.label, p.confidence) for p in read.points] == [("cup", None), ("dish", None)]
    assert read.coordinates == (
        'The <points coords="1 1 812 062">cup</points> and the '
        '<points coords="1 1 896 646">dish</points>, 3 < 4.'
    )
    assert read.count == parse_count(read.coordinates) == 2


def test_tracks_keep_their_name(one_picture: Encoded) -> None:
    text = f'<tracks coords="{POINT}3{OTHER}3{NMP}">dancers</point>'
    assert in_coordinates(text, one_picture.point_space) == (
        '<tracks coords="1 3 812 062 3 896 646">dancers</tracks>'
    )


def test_a_list_outside_of_a_tag_gets_one(one_picture: Encoded) -> None:
    """The reference takes points from what was selected, whatever stands around them."""
    read = read_answer(f'"{POINT}7{OTHER}4{NMP}12 cups', one_picture)
    assert read.coordinates == '"<points coords="1 7 812 062 4 896 646"/>12 cups'
    placed = parse_points(read.coordinates, one_picture.image_sizes)
    assert [(p.id, p.label) for p in placed] == [(p.id, p.label) for p in read.points]


def test_lists_outside_of_tags_stay_apart(one_picture: Encoded) -> None:
    text = f"a {POINT}1{NMP}3 or {OTHER}2, {POINT}1{NMP}{OTHER}1"
    assert in_coordinates(text, one_picture.point_space) == (
        'a <points coords="1 1 812 062"/>3 or <points coords="1 2 896 646"/>, '
        '<points coords="1 1 812 062"/><points coords="1 1 896 646"/>'
    )
    junk = f'<points coords="{POINT}1; {OTHER}2{NMP}">cup</point>'
    assert in_coordinates(junk, one_picture.point_space) == (
        '<points coords="1 1 812 062 2 896 646">cup</points>'
    )


@pytest.mark.parametrize(
    ("text", "coordinates", "points"),
    [
        ('<points coords="', '<points coords="', 0),
        (f'<points coords="{POINT}', '<points coords=" ', 0),
        (f'<points coords="{POINT}1', '<points coords="1 1 812 062 ', 1),
        (f'<points coords="{POINT}1<POINT_20><POINT_29>', '<points coords="1 1 812 062 ', 1),
        (f'<points coords="{POINT}1{NMP}">cu', '<points coords="1 1 812 062">cu', 1),
    ],
)
def test_an_answer_that_breaks_off(
    one_picture: Encoded, text: str, coordinates: str, points: int
) -> None:
    """Its whole points are read from both forms, and that it breaks off is said."""
    read = read_answer(text, one_picture, [(1.0, 1.0, 0.5)])
    assert read.coordinates == coordinates
    assert len(read.points) == points
    assert len(parse_points(coordinates, one_picture.image_sizes)) == points
    assert any("breaks off" in line or "not closed" in line for line in read.problems)
    # In the words of the answer, not in those of the coordinates that it was turned into.
    said = [line for line in read.problems if "breaks off after" in line]
    assert all(repr(text[-30:]) in line for line in said if "<POINT_" in text)
    assert read.confidences == ((1.0, 1.0, 0.5),)[:points]


@given(st.data())
def test_coordinates_and_points_agree_on_any_lists(
    one_picture: Encoded, data: st.DataObject
) -> None:
    """However lists are written, cut off and mixed with text."""
    point = st.builds(
        lambda row, slot, cell, id: f"<POINT_{row}><POINT_{26 + slot}><POINT_{30 + cell}>{id}",
        st.integers(0, 24), st.integers(0, 3), st.integers(0, 8), st.sampled_from(["1", "12", ""]),
    )  # fmt: skip
    listed = st.builds(
        lambda before, points, end, after: f"{before}{''.join(points)}{end}{after}",
        st.sampled_from(["", '<points coords="', '<tracks coords="', '"', "There are 2 "]),
        st.lists(point, max_size=3),
        st.sampled_from([NMP, ""]),
        st.sampled_from(['">cups</point>', '">cups</tracks>', '"', " and more", ""]),
    )
    text = "".join(data.draw(st.lists(listed, max_size=3)))
    read = read_answer(text, one_picture, [(0.5, 0.5, 0.5)] * 9)
    assert not SELECTED.search(read.coordinates)
    again = parse_points(read.coordinates, one_picture.image_sizes, problems=[])
    assert [(p.image, p.id) for p in again] == [(p.image, p.id) for p in read.points]
    for text_point, exact in zip(again, read.points, strict=True):
        assert abs(text_point.x - exact.x) <= 0.075 + 1e-9
        assert abs(text_point.y - exact.y) <= 0.05 + 1e-9
    assert len(read.confidences) == len(read.points)


def test_a_long_answer_is_read_at_once(one_picture: Encoded) -> None:
    """2,000 points took 7 s."""
    points = "".join(f"<POINT_{9 + k % 16}><POINT_29><POINT_34>{k}" for k in range(2000))
    begin = time.perf_counter()
    read = read_answer(f'<points coords="{points}{NMP}">cups</point>', one_picture)
    assert time.perf_counter() - begin < 3
    assert read.count == len(read.points) == 2000


def test_a_selection_of_nothing_is_told(one_picture: Encoded) -> None:
    """An overview's token and one without a number are no points; the others keep their own
    confidence.
    """
    overview, unnumbered = "<POINT_3><POINT_26><POINT_34>1", f"{OTHER} "
    text = f'<points coords="{overview}{unnumbered}{POINT}2{NMP}">cup</point>'
    read = read_answer(text, one_picture, [(0.1, 0.1, 0.1), (0.2, 0.2, 0.2), (0.5, 0.5, 1.0)])
    assert [(p.id, p.confidence) for p in read.points] == [(2, 0.25)]
    assert read.confidences == ((0.5, 0.5, 1.0),)
    assert any("row 3" in line for line in read.problems)
    assert read.coordinates == '<points coords="1 2 812 062">cup</points>'


def test_text_coordinates_of_a_point_model_are_read_too(one_picture: Encoded) -> None:
    text = '<points coords="1 1 500 250">cup</points>'
    read = read_answer(text, one_picture)
    assert [(p.x, p.y, p.label) for p in read.points] == [(75, 25, "cup")]
    assert read.coordinates == text


def test_what_is_not_shown_has_no_points() -> None:
    encoded = golden_processor().encode([{"role": "user", "content": "?"}])
    read = read_answer("a <POINT_3> b", encoded)
    assert (read.points, read.coordinates) == ((), "a <POINT_3> b")


# ---- conversations ----


def test_a_conversation_that_has_its_points_is_told(pipeline: Pipeline) -> None:
    """Trap 23: the released rule points once a conversation; AI2's code stops with an error."""
    shot = picture(0, (150, 100))
    tag = f'<points coords="{POINT}1{NMP}">cup</point>'
    for said in (tag, '<points coords="1 1 812 062">cup</points>'):
        messages: Any = [
            {"role": "user", "content": "Point to the cup."},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "And the plate?"},
        ]
        with pytest.warns(UserWarning, match="points once a conversation"):
            answer = pipeline.ask(shot, messages, max_new_tokens=24)
        assert answer.points == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.ask(shot, "Point to the cup.", max_new_tokens=2)


def test_later_answers_point_again_under_the_consistent_rule(
    consistent: Pipeline, recwarn: pytest.WarningsRecorder
) -> None:
    """An earlier answer as its text or as its coordinates is the same prompt."""
    shot = picture(0, (150, 100))
    text = f'<points coords="{POINT}1{OTHER}2{NMP}">cup</point>'
    space = consistent.processor.encode([{"role": "user", "content": "?"}], [shot]).point_space
    found, prompts = [], []
    for said in (text, in_coordinates(text, space)):
        messages: Any = [
            {"role": "user", "content": "Point to the cup."},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Where?"},
        ]
        prompts.append(consistent.processor.encode(messages, [shot]))
        found.append(consistent.ask(shot, messages, max_new_tokens=30))
    assert len(found[0].points) > 2
    assert found[0].text == found[1].text
    for prompt in prompts:
        assert prompt.input_ids.tolist() == prompts[0].input_ids.tolist()
        assert prompt.point_targets is not None
        assert prompt.point_targets.tolist() == [[12, 0, 4], [20, 3, 0], [1_000_000, -1, -1]]
    assert not [one for one in recwarn if "points once" in str(one.message)]


@pytest.mark.parametrize("length", [1, 2])
def test_a_point_that_broke_off_is_not_written_on_in_a_later_answer(
    length: int, consistent: Pipeline, pipeline: Pipeline
) -> None:
    shot = picture(0, (150, 100))
    broken_off = "".join(re.findall("<POINT_[0-9]+>", POINT)[:length])
    messages: Any = [
        {"role": "user", "content": "Point to the cup."},
        {"role": "assistant", "content": f'<points coords="{broken_off}'},
        {"role": "user", "content": "Where?"},
    ]
    for asked in (consistent, pipeline):
        answer = asked.ask(shot, messages, max_new_tokens=30)
        kinds = [(int(k) > 25) + (int(k) > 29) for k in re.findall("<POINT_([0-9]+)>", answer.text)]
        assert kinds[:1] in ([], [0])  # of rows, slots and cells: text, or the row of a new point
        assert all(point.confidence is not None for point in answer.points)


def test_a_question_about_a_place(consistent: Pipeline, pipeline: Pipeline) -> None:
    """What is there is read back: another place, other logits. The released model gets text."""
    shot = picture(0, (150, 100))
    chances = []
    for x, y in ((X, Y), (10.0, 90.0)):
        parts = [{"type": "text", "text": "What is this?"}, {"type": "point", "x": x, "y": y}]
        messages: Any = [{"role": "user", "content": parts}]
        prompt = consistent.processor.encode(messages, [shot])
        assert np.isin([267, 268, 269], prompt.input_ids).all()
        answer = consistent.ask(shot, messages, max_new_tokens=2, logprobs=0)
        chances.append(answer.logprobs[0].logprob)
        as_text = pipeline.processor.encode(messages, [shot])
        assert not np.isin([267, 268, 269], as_text.input_ids).any()
        shown = pipeline.processor.decode(as_text.input_ids)
        assert f'<points coords="1 1 {round(1000 * x / 150):03d} {round(10 * y):03d}">' in shown
    assert chances[0] != pytest.approx(chances[1], abs=1e-3)


def test_a_place_that_is_not_shown_is_refused(consistent: Pipeline, pipeline: Pipeline) -> None:
    shot = picture(0, (150, 100))
    for either in (consistent, pipeline):
        for part, said in (
            ({"x": 151, "y": 5}, "outside of picture 1"),
            ({"x": 5, "y": 5, "image": 2}, "names picture 2"),
            ({"x": 5, "y": 5, "time": 1.0}, "names the time 1.0 s"),
        ):
            content = [{"type": "text", "text": "?"}, {"type": "point", **part}]
            messages: Any = [{"role": "user", "content": content}]
            with pytest.raises(ValueError, match=said):
                either.ask(shot, messages)
        messages = [{"role": "user", "content": [*content[:1], {"type": "point", "x": 1, "y": 1}]}]
        with pytest.raises(ValueError, match="picture"):
            either.ask(None, messages)


def test_a_class_of_another_prompt_is_refused(pipeline: Pipeline) -> None:
    """Trap 24: <POINT_k> means another thing in every prompt."""
    messages: Any = [
        {"role": "user", "content": "Point to the cup."},
        {"role": "assistant", "content": '<points coords="<POINT_400><POINT_401>">cup</point>'},
        {"role": "user", "content": "And the plate?"},
    ]
    with pytest.raises(ValueError, match="class"):
        pipeline.ask(picture(0, (150, 100)), messages)
