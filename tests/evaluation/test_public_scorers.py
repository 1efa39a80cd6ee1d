"""Scorers of single benchmarks, by hand and by the test cases of AI2's olmo-eval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomolmo2.data.labels.shapes import runs_of
from nanomolmo2.evaluation import SCORERS
from nanomolmo2.evaluation.public.scorers import named_option, statements
from nanomolmo2.evaluation.scorers import Shown

SHOWN = Shown(((200, 100),))


def points(*places: tuple[int, int]) -> str:
    """An answer with points in pixels of `SHOWN`."""
    triples = (f"{i} {x * 5:03d} {y * 10:03d}" for i, (x, y) in enumerate(places, start=1))
    return f'<points coords="1 {" ".join(triples)}">it</points>'


def score(name: str, truth: dict[str, Any], answer: str) -> float:
    SCORERS[name].check(truth, SHOWN)
    return SCORERS[name](truth, answer, SHOWN)


# ---- clicks ----


@pytest.mark.parametrize(
    ("places", "right"),
    [
        ([(50, 30)], 1),
        ([(20, 10)], 1),  # the corners belong to it
        ([(80, 40)], 1),
        ([(81, 40)], 0),
        ([(50, 41)], 0),
        ([(50, 30), (0, 0)], 1),  # the first one is the click
        ([(0, 0), (50, 30)], 0),
        ([], 0),
    ],
)
def test_the_first_point_is_the_click(places: list[tuple[int, int]], right: int) -> None:
    answer = points(*places) if places else "There are none."
    assert score("click", {"boxes": [[20, 10, 80, 40]]}, answer) == right


# ---- masks ----

MASK = np.zeros((100, 200), bool)
MASK[10:20, 30:50] = True


@pytest.mark.parametrize(
    ("places", "right"),
    [
        ([(30, 10)], 1),
        ([(49, 19)], 1),
        ([(50, 19)], 0),
        ([(49, 20)], 0),
        ([(30, 10), (49, 19)], 1),  # as many as one likes,
        ([(30, 10), (0, 0)], 0),  # but all of them inside
        ([], 0),
    ],
)
def test_all_points_must_lie_in_the_mask(places: list[tuple[int, int]], right: int) -> None:
    answer = points(*places) if places else "I see none."
    assert score("in_mask", {"masks": [runs_of(MASK)]}, answer) == right


def test_coordinates_are_cut_to_pixels() -> None:
    """x = 49.8 of 200 is the pixel 49, y = 19.9 of 100 the pixel 19."""
    truth = {"masks": [runs_of(MASK)]}
    assert score("in_mask", truth, '<points coords="1 1 249 199">it</points>') == 1
    assert score("in_mask", truth, '<points coords="1 1 250 199">it</points>') == 0


def test_outside_of_a_mask_that_is_smaller_than_its_picture() -> None:
    truth = {"masks": [runs_of(np.ones((50, 100), bool))]}
    assert score("in_mask", truth, points((99, 49))) == 1
    assert score("in_mask", truth, points((100, 49))) == 0
    assert score("in_mask", truth, points((99, 50))) == 0
    assert score("in_mask", truth, points((200, 100))) == 0


@given(st.integers(0, 2**24 - 1))
def test_run_lengths_hold_the_same_pixels(bits: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(24)], bool).reshape(4, 6)
    runs = runs_of(mask)
    values, inside = [], False
    for length in runs["counts"]:
        values += [inside] * length
        inside = not inside
    assert runs["size"] == [4, 6]
    assert np.array_equal(np.array(values, bool).reshape(6, 4).T, mask)


# ---- counts ----


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (f"Counting the {points((1, 1), (2, 2))} shows a total of 5.", 2),  # points are counted
        (points((1, 1)), 1),
        ("There are 7", 7),  # without points, what is said
        ("three", 3),
        ("There are none.", 0),
        ("I cannot tell", None),
    ],
)
def test_points_are_counted(answer: str, number: int | None) -> None:
    for count in range(9):
        assert score("point_count", {"count": count}, answer) == (count == number)
    readable = SCORERS["point_count"].is_readable({"count": 1}, answer, SHOWN)
    assert readable == (number is not None)


# ---- options or words ----


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ({"choices": ["left", "right"], "answer": "B"}, "B", 1),
        ({"choices": ["left", "right"], "answer": "B"}, "B. right", 1),
        ({"choices": ["left", "right"], "answer": "B"}, "right", 1),
        ({"choices": ["left", "right"], "answer": "B"}, "A", 0),
        ({"choices": ["left", "right"], "answer": "B"}, "neither", 0),
        ({"answers": ["2"]}, "two", 1),  # olmo-eval: two and 2 are the same
        ({"answers": ["Downhill"]}, "the downhill.", 1),
        ({"answers": ["A"]}, "a", 1),  # a letter in a diagram is no article
        ({"answers": ["A"]}, "The", 0),
        ({"answers": ["A"]}, "", 0),
    ],
)
def test_an_option_or_words(truth: dict[str, Any], answer: str, right: int) -> None:
    assert score("option", truth, answer) == right


# ---- MMMU ----

PLACES = ["moon", "sun", "earth", "mars"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # Test cases of olmo-eval:
        ("The answer is (B)", "B"),
        ("B. sun", "B"),
        ("B", "B"),
        ("I believe from the diagram that it must be the sun shining", "B"),
        ("(A) is wrong, the answer is (C)", "C"),
        # And by hand:
        ("?!", None),
        ("the sun", None),  # too short to be looked through for an option
        ("A B", "B"),
        ("it is A or B, but not that one", "A"),  # "B," is no letter with a space
        ("D.", "D"),
    ],
)
def test_the_option_that_an_answer_names(answer: str, letter: str | None) -> None:
    assert named_option(answer, PLACES) == letter
    for right in "ABCD":
        truth = {"choices": PLACES, "answer": right}
        assert score("mmmu", truth, answer) == (right == letter)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The answer is 14", "14", 1),  # olmo-eval
        ("The answer is 15", "14", 0),  # olmo-eval
        ("The total is 1,234", "1234", 1),
        ("So x = 0.333", "0.33", 1),  # two places
        ("about 3e2", "300", 1),
        ("It is the Red Sea", "red sea", 1),  # within what is said
        ("red", "the red sea", 0),
        ("x is b", "b", 1),
        ("crab", "b", 0),  # a single letter stands alone
        ("it is b then", "b", 1),
    ],
)
def test_open_questions(answer: str, reference: str, right: int) -> None:
    assert score("mmmu", {"answers": [reference]}, answer) == right


def test_what_an_answer_states() -> None:
    assert 14.0 in statements("So the result is 14.")  # olmo-eval
    assert statements("yes") == ["yes"]


# ---- truths that do not fit ----


@pytest.mark.parametrize(
    ("name", "truth", "wrong"),
    [
        ("click", {}, "expected boxes"),
        ("in_mask", {"boxes": [[0, 0, 1, 1]]}, "expected masks"),
        ("in_mask", {"masks": [[[0, 0], [1, 0], [1, 1]]]}, "expected masks as run lengths"),
        ("point_count", {"count": "3"}, "expected a whole number"),
        ("option", {"choices": ["a", "b"], "answer": "C"}, "is none of the choices"),
        ("mmmu", {}, "nothing tells the right answer, expected 'answers', or 'answer'"),
    ],
)
def test_a_truth_that_does_not_fit(name: str, truth: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        SCORERS[name].check(truth, SHOWN)
