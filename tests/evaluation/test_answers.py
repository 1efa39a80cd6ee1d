"""Scores of short answers, against cases worked out by hand from the definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomolmo2.evaluation.answers import (
    anls,
    chosen_option,
    edit_distance,
    exact_match,
    multiple_choice,
    normalize_vqa,
    relaxed_accuracy,
    short_answer,
    vqa_accuracy,
    with_options,
)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("A  Snail.", ["a snail"], 1),
        ("snail", ["a snail"], 0),
        ("3.", ["3"], 1),
        ("", [""], 1),
        ("b", ["a", "b"], 1),
    ],
)
def test_exact(answer: str, references: list[str], score: float) -> None:
    assert exact_match(answer, references) == score


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Red, car!", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("3.5 U.S.", "3.5 us"),
        ("half-open", "half open"),
        ("half -open", "half open"),  # the mark goes, the space was there
        ("it's", "it 's"),
        ("a\nb", "b"),
    ],
)
def test_answers_as_vqa_compares_them(text: str, plain: str) -> None:
    assert normalize_vqa(text) == plain


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 1)])
def test_three_people_are_enough_for_vqa(matches: int, score: float) -> None:
    references = ["two"] * matches + [f"word{i}" for i in range(10 - matches)]
    assert vqa_accuracy("2", references) == pytest.approx(score)


def test_one_reference_is_everyone() -> None:
    assert vqa_accuracy("the cat", ["cat"]) == 1
    assert vqa_accuracy("dog", ["cat"]) == 0


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("hello world", ["Hello  World"], 1),
        ("hallo", ["hello"], 0.8),
        ("abcd", ["abxy"], 0),  # half of the letters is not enough
        ("abcde", ["abcxy"], 0.6),
        ("abcd", ["axyz"], 0),
        ("cat", ["dog", "cats"], 0.75),  # the nearest
        ("", [""], 1),
        ("", ["x"], 0),
    ],
)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert anls(answer, references) == pytest.approx(score)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edits_are_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_edits_of_known_words() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-10", "10", 0),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("about 100", "100", 0),
        ("nan", "100", 0),
        ("5", "inf", 0),
    ],
)
def test_relaxed_accuracy(answer: str, right: str, score: float) -> None:
    assert relaxed_accuracy(answer, [right]) == score


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B: 12", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("green", "B"),
        ("It is green.", "B"),
        ("I think (B) rather than that", "B"),
        ("red or green", None),
        ("(A) or (B)", None),
        ("D", None),  # there are three
        ("", None),
        ("A green one", "B"),  # an article is no choice
        ("greenish", None),
    ],
)
def test_chosen_option(answer: str, letter: str | None) -> None:
    options = ["red", "green", "blue"]
    assert chosen_option(answer, options) == letter
    assert multiple_choice(answer, "B", options) == (letter == "B")


def test_a_question_with_its_options() -> None:
    assert with_options("Which?", ["red", "green"]) == "Which?\nA. red\nB. green"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Reasoning blah. Answer: 42", "42"),
        ("cat\ndog\ncat", "cat"),
        ("dog\ncat", "dog"),
        ("  a   b  ", "a b"),
        ("Answer: 1 Answer: 2", "1"),
        ("", ""),
    ],
)
def test_the_part_of_a_text_that_is_its_answer(text: str, answer: str) -> None:
    """The first four are test cases of AI2's olmo-eval."""
    assert short_answer(text) == answer
