"""The published table of finding (docs/find.json): the page shows it, and it can be had again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2 import VLM
from nanomolmo2.evaluation.finding import outcomes, summarize
from nanomolmo2.evaluation.finding_report import cells, from_json
from nanomolmo2.evaluation.report import markdown_table
from nanomolmo2.things.find_sets import (
    COIN_CHOICES,
    COINS,
    FIND_SETS,
    PICTURES,
    SET_NAMES,
    open_set,
)

WIDER = 1.55  # 1 - .05 / 21 of a normal distribution lies within 3.04 deviations, .95 within 1.96
DOCS = Path(__file__).parents[2] / "docs"
TABLE = DOCS / "find.json"


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not TABLE.is_file():
        pytest.skip(
            "docs/find.json is not there: nanomolmo2 eval find --json docs/find.json makes it, "
            "with a model that has learned to find"
        )
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def test_the_published_table_is_whole(published: dict[str, Any]) -> None:
    """The bundled model, as it is called by default, on all pictures of all sets."""
    assert (published["task"], published["model"], published["data"]) == (
        "find",
        "tiny",
        "fixed sets",
    )
    assert (published["clicks"], published["max_crops"]) == (1, None)
    assert published["min_confidence"] == 0.5
    assert set(SET_NAMES) <= set(published["rows"])
    for name in FIND_SETS:
        pictures = COIN_CHOICES if name == COINS else PICTURES
        assert published["rows"][name]["pictures"] == pictures
        assert published["rows"][name]["goals"] == dict(FIND_SETS[name].goals)


def test_the_page_shows_the_published_table(published: dict[str, Any]) -> None:
    head, lines = cells(from_json(published))
    assert markdown_table(head, lines, left=2) in (DOCS / "find.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("few", 16),
        *(pytest.param(name, 100, marks=pytest.mark.slow) for name in SET_NAMES),
    ],
)
def test_the_first_pictures_agree_with_the_published_table(
    published: dict[str, Any], name: str, pictures: int
) -> None:
    """The published mean lies within the interval of the first pictures' mean: of 21 intervals of
    95 % one leaves the mean out, so those here are wider, for 95 % of all of them together.

    Where all of these are equal, resampling knows nothing: then up to 3 in so many may be others.
    """
    cases = open_set(name, pictures)
    with VLM("tiny") as vlm:
        row = summarize(name, "", list(outcomes(vlm, cases)))
    for figure in ("f1", "exact", "mae"):
        mean = row.figures[figure]
        low, high = (mean + WIDER * (end - mean) for end in row.figures[f"{figure}_interval"])
        if low == high:
            low, high = low - 3 / pictures, high + 3 / pictures
        whole = published["rows"][name][figure]
        assert low - 1e-4 <= whole <= high + 1e-4, (figure, row.figures[figure], (low, high), whole)
