"""Where points are right, and the largest one-to-one matching of points to things."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomolmo2.evaluation.regions import Box, largest_matching, read_box, read_mask


def pixels_of(mask, width: int, height: int) -> set[tuple[int, int]]:
    places = itertools.product(range(width), range(height))
    return {(x, y) for x, y in places if mask.holds(x + 0.5, y + 0.5)}


# Masks that pycocotools 2.0.11 encoded: (size, counts, pixels that are set).
SMALL = {(0, 6)} | {(x, y) for x in (2, 3) for y in (1, 2, 3)}
BLOCK = {(x, y) for x in range(30, 90) for y in range(20, 70)}
HOLE = {(x, y) for x in range(50, 60) for y in range(40, 50)}
HOLED = (
    "\\n2b1b100000000000000000000000000000000000000ROhN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0"
    "X10hN0X10hN0X1n00000000000000000000000000000000000000000000000000000000000Tm2"
)


@pytest.mark.parametrize(
    ("size", "counts", "pixels"),
    [
        ([7, 5], "6182L06", SMALL),
        ([7, 5], [6, 1, 8, 3, 4, 3, 10], SMALL),
        ([100, 120], HOLED, BLOCK - HOLE),
        ([2, 2], [0, 4], {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ([2, 2], [4], set()),
    ],
)
def test_run_lengths_are_those_of_coco(size, counts, pixels) -> None:
    mask = read_mask({"size": size, "counts": counts})
    height, width = size
    assert pixels_of(mask, width, height) == pixels


def test_the_edges_of_a_mask() -> None:
    whole = read_mask({"size": [2, 3], "counts": [0, 6]})
    assert whole.holds(0, 0) and whole.holds(3, 2)
    assert not whole.holds(3.01, 1) and not whole.holds(-0.01, 1)
    assert read_mask({"size": [7, 5], "counts": "6182L06"}).outline == Box(0, 1, 4, 7).outline


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0], [10, 0], [0, 10]],
        [0, 0, 10, 0, 0, 10],
        [[0, 0, 10, 0, 0, 10]],
        [[[0, 0], [10, 0], [0, 10]]],
    ],
)
def test_polygons_in_all_their_spellings(mask) -> None:
    triangle = read_mask(mask)
    assert triangle.holds(2, 2) and triangle.holds(5, 5) and triangle.holds(0, 7)
    assert not triangle.holds(6, 6) and not triangle.holds(-1, 2)


def test_a_polygon_within_another_is_a_hole() -> None:
    ring = read_mask([[[0, 0], [9, 0], [9, 9], [0, 9]], [[3, 3], [6, 3], [6, 6], [3, 6]]])
    assert ring.holds(1, 1) and not ring.holds(4.5, 4.5)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        [],
        "6182L06",
        [[0, 0], [1, 1]],
        [0, 0, 1, 1, 2],
        [[0, 0], [1, float("nan")], [2, 2]],
        {"size": [7, 5], "counts": [35, 1]},
        {"size": [7, 5], "counts": "6182L"},
        {"size": [0, 5], "counts": []},
        {"size": [7, 5], "counts": "ä"},
        {"counts": [35]},
    ],
)
def test_what_is_no_mask(mask) -> None:
    with pytest.raises(ValueError, match=r"mask|polygon"):
        read_mask(mask)


@pytest.mark.parametrize("box", [[0, 0, 1], [2, 0, 1, 1], "0123", None, [0, 0, 1, True]])
def test_what_is_no_box(box) -> None:
    with pytest.raises(ValueError, match="expected \\[x0, y0, x1, y1\\]"):
        read_box(box)


def by_trying_all(reachable: list[list[int]]) -> int:
    things = sorted({thing for reached in reachable for thing in reached})
    best = 0
    for chosen in itertools.permutations([*things, *[None] * len(reachable)], len(reachable)):
        best = max(best, sum(t in r for t, r in zip(chosen, reachable, strict=True)))
    return best


@given(st.lists(st.lists(st.integers(0, 3), unique=True), max_size=4))
def test_the_matching_is_the_largest(reachable: list[list[int]]) -> None:
    assert largest_matching(reachable) == by_trying_all(reachable)


def test_a_long_chain_is_matched_without_recursion() -> None:
    """Every point but the last takes the thing before its own first."""
    n = 3000
    assert largest_matching([[i, i + 1] for i in range(n)] + [[0]]) == n + 1
