from __future__ import annotations

import pytest

from nanomolmo2.evaluation.scorers import caption_f1, count_matches, nouns_in, point_f1


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
    assert nouns_in("A dog, two cats and three butterflies.") == {"dog", "cat", "butterfly"}
    assert nouns_in("Nothing.") == set()
    assert nouns_in("A dogma and a category.") == set()


def test_caption_f1_compares_sets_of_nouns():
    assert caption_f1("A dog and two cats.", {"dog", "cat"}) == 1
    assert caption_f1("A dog and a bee.", {"dog", "cat"}) == 0.5
    assert caption_f1("A dog.", {"dog", "cat"}) == pytest.approx(2 / 3)
