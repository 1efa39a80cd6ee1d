"""Splits by picture: nothing is lost, no picture is on both sides, labels are spread."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.data.example import Example
from nanomolmo2.data.sources import open_source
from nanomolmo2.data.split import Group, group_by_picture, split_groups
from tests.data.sources import Listed, picture, talk, write_records


def asked(image: Any, **more: Any) -> dict[str, Any]:
    return {
        "image": image,
        "question": "What is this?",
        "answer": "A thing of many colours, as all.",
    } | more


def test_copies_of_a_picture_are_one_picture(tmp_path: Path) -> None:
    """By content under whatever name, and linked by records that show two of them."""
    for name, seed in (("a.png", 0), ("copy.png", 0), ("b.png", 1), ("c.png", 2), ("d.png", 3)):
        picture(seed).save(tmp_path / name)
    records = [asked("a.png"), asked("b.png"), asked("copy.png"), asked("c.png")]
    records += [{**asked(None), "images": ["d.png", "./c.png"]}, asked({"path": "d.png"})]
    groups = group_by_picture(open_source(write_records(tmp_path / "my.jsonl", *records)))
    assert [group.records for group in groups] == [[0, 2], [1], [3, 4, 5]]


def test_records_without_pictures_and_with_missing_ones(tmp_path: Path) -> None:
    text = {"question": "What is 2 + 2?", "answer": "4"}
    lines = [
        text,
        asked("gone.png"),
        text,
        asked("gone.png"),
        asked("other.png"),
        {**text, "answer": "5"},
    ]
    path = write_records(tmp_path / "my.jsonl", *lines)
    with path.open("a") as stream:
        stream.write("{broken\n")
    groups = group_by_picture(open_source(path))
    assert [group.records for group in groups] == [[0, 2], [1, 3], [4], [5], [6]]


def test_pictures_inside_a_parquet_file(tmp_path: Path) -> None:
    """Their bytes are those of the file beside: both are the same picture."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for seed in (0, 1):
        picture(seed).save(tmp_path / f"{seed}.png")
    images = [
        {"bytes": (tmp_path / f"{seed}.png").read_bytes(), "path": None} for seed in (1, 0, 1)
    ]
    table = pyarrow.table({"image": images, "question": ["?"] * 3, "answer": ["x"] * 3})
    parquet.write_table(table, tmp_path / "my.parquet")
    inside = open_source(tmp_path / "my.parquet")
    assert [group.records for group in group_by_picture(inside)] == [[0, 2], [1]]
    beside = open_source(write_records(tmp_path / "my.jsonl", asked("0.png"), asked("2.png")))
    together = group_by_picture(inside, beside)
    assert [group.records for group in together] == [[0, 2], [1, 3], [4]]


def test_sources_that_are_no_records_are_compared_by_their_pixels() -> None:
    examples = [Example([picture(seed)], [talk("?", "!")]) for seed in (4, 5, 4)]
    groups = group_by_picture(Listed(*examples, Example([], [talk("?", "!")])))
    assert [group.records for group in groups] == [[0, 2], [1], [3]]


def test_nothing_is_lost_and_the_seed_decides() -> None:
    groups = [Group([3 * i, 3 * i + 1, 3 * i + 2]) for i in range(50)]
    parts = split_groups(groups, (0.2, 0.1), seed=1)
    assert [len(part) for part in parts] == [105, 30, 15]
    assert sorted(i for part in parts for i in part) == list(range(150))
    assert all(part == sorted(part) for part in parts)
    assert all(len({i // 3 for i in part}) * 3 == len(part) for part in parts)  # groups stay whole
    assert split_groups(groups, (0.2, 0.1), seed=1) == parts
    assert split_groups(groups, (0.2, 0.1), seed=2) != parts


@pytest.mark.parametrize("seed", range(5))
def test_every_part_gets_its_share_of_every_label(seed: int) -> None:
    """40 dogs, 20 cats and 10 foxes, half of the foxes with a dog beside them."""
    labels = ["dog"] * 40 + ["cat"] * 20 + ["fox"] * 5 + ["fox dog"] * 5
    groups = [Group([i], frozenset(label.split())) for i, label in enumerate(labels)]
    _, held = split_groups(groups, 0.2, seed)
    assert len(held) == 14
    found = Counter(labels[i].split()[0] for i in held)
    assert abs(found["dog"] - 8) <= 1
    assert abs(found["cat"] - 4) <= 1
    assert abs(found["fox"] - 2) <= 1


def test_labels_are_those_of_points_and_short_answers(tmp_path: Path) -> None:
    records = [
        {"question": "?", "points": [{"x": 1, "y": 1}], "label": "dog"},
        {
            "branches": [
                {"question": "?", "answer": {"points": [{"x": 1, "y": 1}], "label": "cat"}},
                {"question": "?", "answer": {"points": [], "label": "fox"}},
                {"question": "?", "answer": "ripe"},
            ]
        },
        {"question": "?", "answer": "A long answer, which no other record will ever have again."},
    ]
    groups = group_by_picture(open_source(write_records(tmp_path / "my.jsonl", *records)))
    assert [set(group.labels) for group in groups] == [{"dog"}, {"cat", "ripe"}, set()]


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (4, 0.1), (1, 0.9), (20, 0.01)])
def test_an_empty_part_is_refused(count: int, share: float) -> None:
    with pytest.raises(
        ValueError, match="is an empty split: give a larger share, or more pictures"
    ):
        split_groups([Group([i]) for i in range(count)], share)


@pytest.mark.parametrize("shares", [0.0, 1.0, -0.1, (0.5, 0.5), (0.1, 0.0), (), float("nan")])
def test_shares_that_are_none(shares: Any) -> None:
    with pytest.raises(ValueError, match="expected each above 0 and their sum below 1"):
        split_groups([Group([0]), Group([1])], shares)
