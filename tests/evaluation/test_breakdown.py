"""Numbers of answers in all and in parts, against values worked out by hand."""

from __future__ import annotations

import pytest

from nanomolmo2.evaluation.breakdown import Tally, by_count, by_size, figures

# Four answers about three pictures: 3 of 4 found and one point too many; all of 2; nothing of 5,
# silently; and of no thing nothing.
TALLIES = [
    Tally(0, true=4, said=4, points=4, hits=3, px=20.0),
    Tally(0, true=2, said=2, points=2, hits=2, px=40.0),
    Tally(1, true=5, said=0, points=0, hits=0, px=31.9),
    Tally(2, true=0, said=0, points=0, hits=0),
]


def test_figures_by_hand() -> None:
    found = figures(TALLIES)
    assert found["questions"] == 4
    assert found["f1"] == pytest.approx((0.75 + 1 + 0 + 1) / 4)
    assert found["exact"] == pytest.approx(3 / 4)
    assert found["mae"] == pytest.approx(5 / 4)
    assert found["relative"] == pytest.approx((0 + 0 + 1 + 0) / 4)
    assert found["precision"] == pytest.approx(5 / 6)
    assert found["recall"] == pytest.approx(5 / 11)
    low, high = found["f1_interval"]
    assert 0 <= low < found["f1"] < high <= 1
    assert figures(TALLIES[:2])["f1_interval"] == [0.875, 0.875]  # one picture cannot be exchanged


def test_relative_error_is_by_the_true_number_and_by_one_of_none() -> None:
    assert Tally(0, true=50, said=46).relative_error == pytest.approx(0.08)
    assert Tally(0, true=0, said=3).relative_error == 3
    assert Tally(0, true=2, said=None).error is None


def test_numbers_alone_have_no_points() -> None:
    found = figures([Tally(0, true=3, said=4), Tally(1, true=3, said=None)])
    assert found["exact"] == 0 and found["mae"] == 1  # of the one that gives a number
    assert not {"f1", "precision", "recall"} & set(found)


def test_groups_by_count() -> None:
    found = by_count(TALLIES + [Tally(3, true=n, said=n) for n in (1, 10, 11, 20, 40, 41, 60)])
    assert {name: part["questions"] for name, part in found.items()} == {
        "0": 1,
        "1": 1,
        "2 to 5": 3,
        "6 to 10": 1,
        "11 to 20": 2,
        "21 to 40": 1,
        "41 or more": 2,
    }
    assert found["2 to 5"]["f1"] == pytest.approx(1.75 / 3)


def test_groups_by_size_leave_out_what_has_none() -> None:
    found = by_size(TALLIES)
    assert {name: part["questions"] for name, part in found.items()} == {
        "16 to 31 px": 2,  # 20 and 31.9
        "32 to 63 px": 1,
    }
    assert found["32 to 63 px"]["f1"] == 1
