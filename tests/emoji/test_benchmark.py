"""The benchmark: the questions of `nanomolmo2 eval emoji`, right answers score 1, chance little."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nanomolmo2.emoji.benchmark import (
    BENCHMARK_ROWS,
    BENCHMARK_SETTINGS,
    SHOWN_ROWS,
    Prior,
    answer_by_chance,
    leaderboard_head,
    leaderboard_row,
    make_benchmark,
    overall,
)
from nanomolmo2.emoji.exam import ROWS, make_exam
from nanomolmo2.emoji.scenes import TEST_GROUPS
from nanomolmo2.evaluation.exam import Scores, score

PAGE = Path(__file__).parents[2] / "docs" / "emoji-data.md"


@pytest.mark.parametrize("group", TEST_GROUPS)
def test_easy_is_what_the_evaluation_asks(group) -> None:
    exam, known = make_benchmark("easy", group, scenes=6), make_exam(group, 6)
    assert [(a.example, a.branch) for a in exam.asked] == [
        (a.example, a.branch) for a in known.asked if not a.probe
    ]
    for ours, theirs in zip(exam.examples, known.examples, strict=True):
        np.testing.assert_array_equal(ours.images[0], theirs.images[0])


@pytest.mark.parametrize("name", BENCHMARK_SETTINGS)
def test_right_answers_score_one(name) -> None:
    exam = make_benchmark(name, "seen", scenes=25)
    for one in exam.asked:
        one.answer = one.branch.truth["answer"]
    scores = score(exam)
    assert overall(scores) == 1
    assert all(scores.means[row] == 1 for row in SHOWN_ROWS)


def test_chance_is_the_same_each_time_and_like_training() -> None:
    prior = Prior("easy", scenes=40)
    exams = [make_benchmark("easy", "seen", scenes=40) for _ in range(3)]
    for exam, seed in zip(exams, (0, 0, 1), strict=True):
        answer_by_chance(exam, prior, seed)
    first, again, other = ([one.answer for one in exam.asked] for exam in exams)
    assert first == again != other
    for one in exams[0].asked:  # points are at what was asked for
        labels = set(re.findall(r'">([^<]*)</points>', one.answer))
        if one.branch.task in ("count", "point"):
            assert labels <= {one.branch.truth["noun"]}
        elif one.branch.task == "points":
            assert labels <= set(one.branch.truth["nouns"])
        elif one.branch.task == "size":
            assert one.answer.removeprefix("The ")[:-1] in one.branch.truth["nouns"]
    assert {one.answer for one in exams[0].asked if one.branch.task == "presence"} == {
        "Yes.",
        "No.",
    }


@pytest.mark.parametrize(("name", "group"), [("easy", "seen"), ("crowded", "openmoji")])
def test_the_page_shows_what_chance_scores(name, group) -> None:
    exam = make_benchmark(name, group, scenes=120)
    answer_by_chance(exam, Prior(name, scenes=150))
    scores = score(exam)
    table = PAGE.read_text(encoding="utf-8").split(f"<!-- leaderboard {name}")[1].split("\n\n")[0]
    assert leaderboard_head() in table
    row = next(line for line in table.splitlines() if line.startswith(f"| chance | {group} |"))
    number, *shown = (float(cell) for cell in row.strip("| ").split(" | ")[2:])
    assert number == pytest.approx(overall(scores), abs=0.03)
    few = [scores.means[title] for title in SHOWN_ROWS]
    assert shown == pytest.approx(few, abs=0.09)  # four standard errors of the smallest row


def test_a_line_has_the_columns_of_its_head() -> None:
    scores = Scores("mild", dict.fromkeys(ROWS, 0.5))
    row = leaderboard_row("mine", scores)
    assert row.startswith("| mine | mild | 0.500 |")
    assert row.count("|") == leaderboard_head().splitlines()[0].count("|")
    assert row.count("|") == leaderboard_head().splitlines()[1].count("|")


def test_few_scenes_have_no_overall_score() -> None:
    scores = Scores("seen", dict.fromkeys(BENCHMARK_ROWS[1:], 1.0))
    with pytest.raises(ValueError, match=f"rows {BENCHMARK_ROWS[0]}: ask about more scenes"):
        overall(scores)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"'hard'.*easy, crowded"):
        make_benchmark("hard")
