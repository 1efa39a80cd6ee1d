"""Questions with points for a model that writes coordinates: how they are read and answered."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nanomolmo2.generation.pipeline import Pipeline, Question
from nanomolmo2.generation.shown import MARK, Told, read_names, read_wish
from nanomolmo2.processor import Point
from nanomolmo2.things.photos import PHOTOS
from nanomolmo2.things.wordings import PLACES, QUESTIONS, UNLIKE

COINS = str(PHOTOS / "coins.png")
FIRST, SECOND, OTHER = Point(1, 1), Point(2, 2), Point(9, 9)


def told(text: str, **points: Point) -> Told:
    """``Like {like}, not {unlike}`` as a turn."""
    names = re.findall(r"\{(\w+)\}", text)
    return Told(" ".join(re.sub(r"\{\w+\}", f" {MARK} ", text).split()), [points[n] for n in names])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("but", ["", *UNLIKE])
@pytest.mark.parametrize("task", ["like", "count_like"])
def test_wordings_of_the_training_are_read(task: Any, but: str, place: str) -> None:
    for wording in QUESTIONS[task]:
        text = wording.replace("{but}", but).replace("{place}", place)
        wish = read_wish(told(text, like=FIRST, unlike=OTHER), {}, 2 if place else 1)
        assert wish is not None, text
        assert wish.task == ("point" if task == "like" else "count"), text
        (meant,) = wish.wanted
        assert meant.like == [FIRST] and meant.unlike == ([OTHER] if but else []), text
        assert wish.image == (2 if place else 1), text


@pytest.mark.parametrize("wording", QUESTIONS["same"])
def test_whether_two_are_alike(wording: str) -> None:
    wish = read_wish(told(wording, first=FIRST, second=SECOND), {}, 1)
    assert wish is not None and wish.same == SECOND and wish.wanted[0].like == [FIRST]


@pytest.mark.parametrize("wording", QUESTIONS["name"])
def test_names_that_are_given(wording: str) -> None:
    names, asked = read_names([told(wording.replace("{a}", "a hex nut"), like=FIRST)])
    assert not asked.text and list(names) == ["hex nut"]
    assert names["hex nut"].name.plural == "hex nuts" and names["hex nut"].like == [FIRST]


@pytest.mark.parametrize("task", ["named", "count_named"])
def test_questions_about_a_name(task: Any) -> None:
    given = told("This {like} is a walnut. That {other} is an almond.", like=FIRST, other=OTHER)
    names, _ = read_names([given])
    for wording in QUESTIONS[task]:
        for place in PLACES:
            text = wording.replace("{place}", place).format(many="walnuts", one="walnut")
            wish = read_wish(Told(text, []), names, 2 if place else 1)
            assert wish is not None, text
            assert wish.task == ("point" if task == "named" else "count"), text
            assert wish.image == (2 if place else 1), text
            (meant,) = wish.wanted
            assert meant.like == [FIRST] and meant.unlike == [OTHER]  # no walnut


def test_a_name_and_its_question_in_one_turn_and_several_examples() -> None:
    turn = told("These {a} and {b} are pecans. How many pecans are there?", a=FIRST, b=SECOND)
    names, asked = read_names([turn])
    assert names["pecan"].like == [FIRST, SECOND] and asked.text == "How many pecans are there?"
    wish = read_wish(told("Find all like {a} and {b}.", a=FIRST, b=SECOND), {}, 1)
    assert wish is not None and wish.wanted[0].like == [FIRST, SECOND]


@pytest.mark.parametrize(
    "text",
    [
        "What is {a}?",
        "Point to the dog left of {a}.",
        "Is {a} larger than {b}?",
        "Point to the dog at {a}.",
        "Describe {a}.",
        "How many legs does this {a} have?",
        "Is this one damaged? {a}",
        "Is {a} the same size as {b}?",
        "Count the windows of this {a}.",
        "Point to the nose of that dog {a}.",
        "How many people are sitting on that {a}?",
        "Find everything other than {a}.",
        "Find everything not like {a}.",
        "How many red things like {a} are there?",
        "Find all like {a} in both pictures.",
    ],
)
def test_what_is_no_search(text: str) -> None:
    assert read_wish(told(text, a=FIRST, b=SECOND), {}, 1) is None


@pytest.mark.parametrize(
    "but",
    [
        "ignoring {b}",
        "rather than {b}",
        "instead of {b}",
        "leave out {b}",
        "and don't include {b}",
        "exclude {b}",
        "and no {b}",
        "except {b}",
        "but without {b}",
        "other than {b}",
        "but not things like {b}",
    ],
)
def test_what_is_not_meant(but: str) -> None:
    for text in (f"Count all like {{a}}, {but}.", f"Find everything like {{a}} {but}"):
        wish = read_wish(told(text, a=FIRST, b=OTHER), {}, 1)
        assert wish is not None, text
        assert (wish.wanted[0].like, wish.wanted[0].unlike) == ([FIRST], [OTHER]), text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("This {a} is a drachma, that {b} is a stone.", {"drachma": [FIRST], "stone": [SECOND]}),
        (
            "This {a} is a walnut and this {b} is an almond.",
            {"walnut": [FIRST], "almond": [SECOND]},
        ),
        ("This {a} is a walnut. That {b} is a Walnut.", {"walnut": [FIRST, SECOND]}),
        ("{a} and {b} are boxes.", {"box": [FIRST, SECOND]}),
        ("These {a} and {b} are berries.", {"berry": [FIRST, SECOND]}),
        ("These {a}, {b} are geese.", {"goose": [FIRST, SECOND]}),
        ("We call these {a} and {b} hex nuts.", {"hex nut": [FIRST, SECOND]}),
        ("This {a} is not a drachma.", {}),
        ("The dog at {a} is big.", {}),
        ("This {a} is a walnut, too.", {}),
        ("This {a} is a picture.", {}),
    ],
)
def test_who_is_called_what(text: str, names: dict[str, list[Point]]) -> None:
    found, asked = read_names([told(text, a=FIRST, b=SECOND)])
    assert {meant.name.name: meant.like for meant in found.values()} == names
    assert bool(asked.text) == (not names)


def test_a_question_behind_a_name() -> None:
    names, asked = read_names([told("This {a} is a walnut; how many walnuts are there?", a=FIRST)])
    assert list(names) == ["walnut"] and asked.text == "how many walnuts are there?"
    for text in (
        "How many dogs and walnuts are there?",
        "Are walnuts made of gold?",
        "Where do walnuts come from?",
        "How many walnuts are red?",
    ):
        assert read_wish(Told(text, []), names, 1) is None, text


@pytest.mark.parametrize("name", ["drachma", "Drachma"])
def test_a_question_about_a_name_that_is_not_read_gets_a_warning(vlm: Pipeline, name: str) -> None:
    asked = turn(f"This * is a {name}. Are {name}s made of gold?", (157, 52, 1))
    with pytest.warns(UserWarning, match="reads those that show what is meant"):
        vlm.ask(None, [asked], max_new_tokens=2)


@pytest.mark.parametrize("which", ["2nd picture", "second image", "picture two", "image #2"])
def test_a_picture_has_many_names(which: str) -> None:
    the = "" if which[-1] in "o2" else "the "
    wish = read_wish(told(f"Find all like {{a}} in {the}{which}.", a=FIRST), {}, 3)
    assert wish is not None and wish.image == 2


def test_pictures_by_their_numbers() -> None:
    near = told("Find all like {a} in picture 3.", a=FIRST)
    wish = read_wish(near, {}, 3)
    assert wish is not None and wish.image == 3
    with pytest.raises(ValueError, match="names picture 3, but 2 are shown"):
        read_wish(near, {}, 2)


# ---- answers ----


@pytest.fixture(scope="module")
def vlm() -> Pipeline:
    return Pipeline.from_pretrained("tiny")


def turn(text: str, *points: tuple[float, float, int], images: int = 1) -> dict[str, Any]:
    """A turn of the user, a ``*`` for each point, images first."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": COINS}] * images
    pieces = text.split("*")
    for piece, point in zip(pieces, (*points, None), strict=True):
        parts.append({"type": "text", "text": piece})
        if point is not None:
            parts.append(dict(zip(("type", "x", "y", "image"), ("point", *point), strict=True)))
    return {"role": "user", "content": parts}


def test_points_in_a_question_are_examples(vlm: Pipeline) -> None:
    found = vlm.find(COINS, [(157, 52)], [(10, 150)])
    asked = turn("Point to everything like *, not like *.", (157, 52, 1), (10, 150, 1))
    answer = vlm.ask(None, [asked])
    places = [(point.x, point.y, point.confidence) for point in found.points]
    assert [(p.x, p.y, p.confidence) for p in answer.points] == places and len(places) > 20
    assert answer.text.startswith('<points coords="1 1 ') and answer.text.endswith(
        ">thing</points>"
    )
    assert answer.draw() is not None
    counted = vlm.ask(None, [turn("How many like * are there?", (157, 52, 1))])
    assert counted.text.endswith(f"shows a total of {counted.count}.") and counted.count == 24
    streamed = "".join(item for item in vlm.stream(None, [asked]) if isinstance(item, str))
    assert streamed == answer.text
    assert [a.text for a in vlm.ask_batch([{"messages": [asked]}])] == [answer.text]


def test_a_conversation_that_names(vlm: Pipeline) -> None:
    given = turn("This * is a drachma.", (157, 52, 1))
    said = vlm.ask(None, [given])
    assert (said.text, said.points, said.count) == ("A drachma.", (), None)
    history = [given, {"role": "assistant", "content": said.text}]
    answer = vlm.ask(None, [*history, {"role": "user", "content": "How many drachmas are there?"}])
    assert answer.count == 24 and answer.points[0].label == "drachma"
    yes = vlm.ask(None, [*history, {"role": "user", "content": "Is there a drachma?"}])
    assert yes.text == "Yes."


def test_an_example_in_another_picture(vlm: Pipeline) -> None:
    asked = turn("Find all like * in the second picture.", (157, 52, 1), images=2)
    answer = vlm.ask(None, [asked])
    reference = vlm.find(COINS, [(157, 52)], reference=COINS)
    assert [(p.x, p.y) for p in answer.points] == [(p.x, p.y) for p in reference.points]
    assert {point.image for point in answer.points} == {2} and len(answer.image_sizes) == 2
    assert answer.text.startswith('<points coords="2 1 ')


@pytest.mark.parametrize(("place", "text"), [((334, 39, 1), "Yes."), ((10, 150, 1), "No.")])
def test_whether_something_is_one_of_them(
    vlm: Pipeline, place: tuple[int, int, int], text: str
) -> None:
    assert vlm.ask(None, [turn("Is * like *?", (157, 52, 1), place)]).text == text


def test_bare_ground_is_told(vlm: Pipeline) -> None:
    with pytest.warns(UserWarning, match="nothing seems to be there"):
        answer = vlm.ask(None, [turn("This * is a drachma.", (10, 150, 1))])
    assert answer.problems[0].startswith("nothing seems to be there")


def test_points_that_the_model_cannot_read_get_a_warning(vlm: Pipeline) -> None:
    with pytest.warns(UserWarning, match="reads those that show what is meant"):
        vlm.ask(None, [turn("What is *?", (157, 52, 1))], max_new_tokens=2)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(5000, 52, 1)], "lies outside of the picture, which is 384 x 303 pixels"),
        ([(157, 52, 3)], "is in picture 3, but 1 is shown"),
        ([(157, 52, 0)], "picture"),
        ([(None, 52, 1)], "holds"),
        ([(10**400, 52, 1)], "holds"),
    ],
)
def test_bad_places_are_refused(vlm: Pipeline, points: Any, said: str) -> None:
    asked = turn("Find all like *.", *points)
    with pytest.raises(ValueError, match=said) as raised:
        vlm.ask(None, [asked])
    (found,) = vlm.ask_many([Question([asked])])
    assert str(found) == str(raised.value)


def test_a_counterexample_in_a_picture_without_example(vlm: Pipeline) -> None:
    text = "Find all like *, not like * in the third image."
    with pytest.raises(ValueError, match="lies in picture 2, where no example is"):
        vlm.ask(None, [turn(text, (157, 52, 1), (10, 150, 2), images=3)])


def test_a_conversation_that_ends_with_an_answer_is_refused(vlm: Pipeline) -> None:
    asked = turn("Find all like *.", (157, 52, 1))
    with pytest.raises(ValueError, match="ends with an answer"):
        vlm.ask(None, [asked, {"role": "assistant", "content": "Yes."}])
