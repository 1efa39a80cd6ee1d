from __future__ import annotations

import typing

import pytest

from nanomolmo2.emoji.questions import NOTHING_ANSWER, UNKNOWN_ANSWER
from nanomolmo2.emoji.scorers import DECLINED, NOTHING, NOUNS, SCORERS, score_task
from nanomolmo2.emoji.wordings import Task
from nanomolmo2.evaluation.scorers import Shown, count_matches, point_f1, track_f1
from nanomolmo2.processor.points import Point

ONE = Shown(((1000, 1000),))
VIDEO = Shown((), (1000, 1000))
DOG, CAT = [0, 0, 100, 100], [500, 500, 600, 600]


def test_a_point_needs_a_box_of_its_own():
    boxes = [(0, 0, 10, 10), (20, 20, 30, 30)]
    assert point_f1([(5, 5), (25, 25)], boxes) == 1
    assert point_f1([(5, 5), (6, 6)], boxes) == 0.5
    assert point_f1([(5, 5)], boxes) == pytest.approx(2 / 3)
    assert point_f1([(15, 15)], boxes) == 0
    assert point_f1([], boxes) == 0
    assert point_f1([], []) == 1
    assert point_f1([(1, 1)], []) == 0


def test_matching_gives_up_a_box_for_a_point_that_has_no_other():
    """The first point lies in both boxes; taking the first one would leave the second point out."""
    boxes = [(0, 0, 10, 10), (5, 5, 15, 15)]
    assert count_matches([(7, 7), (2, 2)], boxes) == 2


def test_nouns_are_read_in_singular_and_plural():
    assert NOUNS.named_in("A dog, two cats and three butterflies.") == {"dog", "cat", "butterfly"}
    assert NOUNS.named_in("Nothing.") == set()
    assert NOUNS.named_in("A dogma and a category.") == set()


def test_caption_f1_compares_sets_of_nouns():
    assert NOUNS.f1("A dog and two cats.", {"dog", "cat"}) == 1
    assert NOUNS.f1("A dog and a bee.", {"dog", "cat"}) == 0.5
    assert NOUNS.f1("A dog.", {"dog", "cat"}) == pytest.approx(2 / 3)


def test_there_is_a_score_for_every_question_of_the_data():
    assert set(SCORERS) == set(typing.get_args(Task))
    assert NOTHING == NOTHING_ANSWER
    assert UNKNOWN_ANSWER.startswith(DECLINED)
    with pytest.raises(ValueError, match="no score for the task 'guess': choose from presence"):
        score_task("guess", {}, "", ONE)


def test_points_of_several_nouns_hit_only_their_own_boxes():
    truth = {
        "nouns": ["dog", "cat", "bee"],
        "groups": [{"noun": "dog", "boxes": [DOG]}, {"noun": "cat", "boxes": [CAT]}],
    }

    def scored(answer):
        return score_task("points", truth, answer, ONE)

    dog, cat = '<points coords="1 1 050 050">', '<points coords="1 1 550 550">'
    assert scored(f"{dog}dog</points> {cat}cat</points>") == 1
    assert scored(f"{cat}cats</points> {dog}Dog</points>") == 1
    assert scored(f"{dog}cat</points> {cat}dog</points>") == 0
    assert scored(f"{dog}dog</points>") == pytest.approx(2 / 3)
    assert scored(f"{dog}dog</points> {cat}cat</points> {cat}bee</points>") == pytest.approx(4 / 5)
    assert scored("") == scored("There are none.") == 0


def test_everything_is_a_noun_of_its_own():
    truth = {"nouns": ["everything"], "groups": [{"noun": "everything", "boxes": [DOG, CAT]}]}
    answer = '<points coords="1 1 050 050 2 550 550">everything</points>'
    assert score_task("points", truth, answer, ONE) == 1


@pytest.mark.parametrize(
    ("task", "truth", "right", "wrong", "shown"),
    [
        ("point", {"boxes": []}, "There are none.", "", ONE),
        ("points", {"nouns": ["bee"], "groups": []}, "There are none.", "", ONE),
        ("difference", {"counts": {}}, "Nothing.", "", ONE),
        ("track", {"frames": [{"time": 0.0, "boxes": [None]}]}, "No tracks available.", "", VIDEO),
        ("track", {"frames": [{"time": 0.0, "boxes": []}]}, "No tracks available.", "", VIDEO),
        ("video_point", {"time": 0.0, "boxes": []}, "There are none.", "", VIDEO),
        ("difference", {"counts": {"dog": 1}}, "Two dogs.", "Nothing.", ONE),
        ("unknown", {"noun": "zebra"}, "I do not know that one.", "There are none.", ONE),
        ("at", {"answer": "A dog."}, " A dog.\n", "a dog", ONE),
    ],
)
def test_nothing_must_be_said(task, truth, right, wrong, shown):
    assert score_task(task, truth, right, shown) == 1
    assert score_task(task, truth, wrong, shown) == 0


def test_a_track_is_scored_over_frames_and_objects():
    frames = [
        {"time": 0.0, "boxes": [DOG, CAT]},
        {"time": 0.5, "boxes": [CAT, None]},
    ]
    first = [Point(50, 50, id=1, time=0.0), Point(550, 550, id=2, time=0.0)]
    second = [Point(550, 550, id=1, time=0.5)]
    assert track_f1(first + second, frames) == 1
    assert track_f1(first, frames) == pytest.approx(4 / 5)
    assert track_f1([*first, *second, *second], frames) == pytest.approx(6 / 7)
    assert track_f1([], frames) == 0
    answer = '<tracks coords="0.0 1 050 050 2 550 550;0.5 1 550 550">dog</tracks>'
    assert score_task("track", {"frames": frames}, answer, VIDEO) == 1


@pytest.mark.parametrize(("time", "expected"), [(0.7, 1), (0.3, 1), (0.8, 0), (0.2, 0)])
def test_a_point_belongs_to_the_frame_near_in_time(time, expected):
    """Further than about a quarter second from the frame it misses."""
    truth = {"time": 0.5, "boxes": [DOG]}
    answer = f'<points coords="{time} 1 050 050">dog</points>'
    assert score_task("video_point", truth, answer, VIDEO) == expected


def test_points_at_pictures_that_were_not_shown_do_not_stop_the_evaluation():
    answer = '<points coords="1 1 050 050;2 2 550 550">dog</points>'
    assert score_task("point", {"boxes": [DOG]}, answer, ONE) == 1
