"""What is learned from and what is measured on: no picture on both sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.data.sources import SourceConfig, open_source
from nanomolmo2.recipes import smoke
from nanomolmo2.training.recipe import Recipe, ValidationConfig
from nanomolmo2.training.split import SPLIT_FILE, open_split, overlap_warning, read_split
from tests.data.sources import picture
from tests.training.recipes import SCENES, toy


def write(path: Path, pictures: range, questions: int = 2) -> SourceConfig:
    """Some questions about each picture, of its number."""
    path.parent.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in pictures:
        picture(number).save(path.parent / f"{number}.png")
        for k in range(questions):
            question = f"Which number is this, please? {k}"
            lines.append({"image": f"{number}.png", "question": question, "answer": str(number)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig(str(path))


def recipe(*data: SourceConfig, **validation: Any) -> Recipe:
    return replace(toy(smoke(), data=data), validation=ValidationConfig(**validation))


def answers(source: Any) -> list[str]:
    """What the records say: the numbers of their pictures."""
    return [source[i].branches[0].messages[1]["content"] for i in range(len(source))]


def test_a_picture_is_on_one_side_with_all_records_about_it(tmp_path: Path) -> None:
    """Also where two files show it, under two names."""
    first = write(tmp_path / "a" / "a.jsonl", range(10))
    second = write(tmp_path / "b" / "b.jsonl", range(8, 14), questions=1)
    split = open_split(recipe(first, second, share=0.3))
    learned = [answer for source in split.mixture.sources for answer in answers(source)]
    measured = [answer for source in split.validation for answer in answers(source)]
    assert sorted(learned + measured) == sorted(
        [str(n) for n in range(10)] * 2 + [str(n) for n in range(8, 14)]
    )
    assert not set(learned) & set(measured)
    assert 6 <= len(measured) <= 10  # 0.3 of 26 records
    again = open_split(recipe(first, second, share=0.3))
    assert again.held_out == split.held_out
    other = open_split(replace(recipe(first, second, share=0.3), seed=1))
    assert other.held_out != split.held_out


def test_what_is_left_out_reads_as_a_file_without_it(tmp_path: Path) -> None:
    data = write(tmp_path / "my.jsonl", range(10))
    split = open_split(recipe(data, share=0.2))
    lines = (tmp_path / "my.jsonl").read_text().splitlines()
    assert split.held_out is not None
    held = set(split.held_out["sources"][0]["held_out"])
    (tmp_path / "rest.jsonl").write_text(
        "".join(line + "\n" for i, line in enumerate(lines) if i not in held)
    )
    (rest,) = split.mixture.sources
    by_hand = open_source(tmp_path / "rest.jsonl")
    assert [rest[i].branches for i in range(len(rest))] == [
        by_hand[i].branches for i in range(len(by_hand))
    ]


def test_a_split_is_written_down_and_kept(tmp_path: Path) -> None:
    data = write(tmp_path / "my.jsonl", range(10))
    wanted = recipe(data, share=0.2)
    split = open_split(wanted)
    split.save(tmp_path)
    stored = read_split(tmp_path, wanted)
    assert stored is not None and stored["share"] == 0.2
    assert open_split(wanted, stored).held_out == split.held_out
    assert read_split(tmp_path, recipe(data, share=0.3)) is None  # of another run
    write(tmp_path / "my.jsonl", range(14))  # new pictures are learned from
    longer = open_split(wanted, stored)
    assert [answers(one) for one in longer.validation] == [answers(one) for one in split.validation]
    assert len(longer.mixture.sources[0]) == len(split.mixture.sources[0]) + 8
    assert "are not those that split.json was made of" in longer.notes[0]
    text = (tmp_path / SPLIT_FILE).read_text()
    (tmp_path / SPLIT_FILE).write_text(text.replace('"records": 20', '"records": 21'))
    with pytest.raises(ValueError, match="says what this run does not learn from: bring back"):
        read_split(tmp_path, wanted)


@pytest.mark.parametrize(("pictures", "share"), [(3, 0.1), (1, 0.5), (1, 0.9), (0, 0.5)])
def test_an_empty_split_is_one_sentence(tmp_path: Path, pictures: int, share: float) -> None:
    data = write(tmp_path / "my.jsonl", range(pictures), questions=1)
    if not pictures:
        (tmp_path / "my.jsonl").write_text('{"question": "Why?", "answer": "So."}\n' * 3)
    records = pictures or 3
    with pytest.raises(ValueError) as error:
        open_split(recipe(data, share=share))
    assert str(error.value) == (
        f"--val-share {share:g} of {records} records about {pictures or 1} different pictures "
        f"leaves an empty split: give a larger or smaller share, more pictures, or --val FILE"
    )


def test_made_up_scenes_are_not_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="emoji is no file that could be split"):
        open_split(recipe(SCENES, share=0.5))
    both = open_split(recipe(write(tmp_path / "my.jsonl", range(4)), SCENES, share=0.5))
    assert len(both.mixture.sources[1]) == 50
    assert [source.name for source in both.validation] == ["my"]
    with pytest.raises(ValueError, match="has 1,000,000 examples and is no file"):
        open_split(recipe(SCENES, data=(SourceConfig("emoji"),)))


def test_overlap_is_told_with_its_share(tmp_path: Path) -> None:
    """A copy under another name is the same picture; of text alone the record."""
    training = open_source(write(tmp_path / "a" / "a.jsonl", range(10)))
    config = write(tmp_path / "b" / "b.jsonl", range(8, 14))
    assert overlap_warning([open_source(config)], [training]).startswith(
        "4 of 12 validation records (33%) show pictures that are in the training data too (the "
        "same bytes)"
    )
    apart = open_source(write(tmp_path / "c" / "c.jsonl", range(20, 24)))
    assert overlap_warning([apart], [training]) == ""
    split = open_split(recipe(config, data=(config,)))
    assert "12 of 12 validation records (100%)" in overlap_warning(
        split.validation, split.mixture.sources
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither of data and share"),
        ({"share": 0.1, "data": (SCENES,)}, "both of data and share"),
        ({"share": 1.0}, "share is 1.0, expected a share of the data"),
        ({"share": 0.1, "best": "last", "patience": 2}, "best is 'last'"),
        ({"share": 0.1, "best": "count", "limit": 0}, "no answer is scored"),
        ({"share": 0.1, "every": -1}, "every is -1, expected 0 or more"),
    ],
)
def test_validations_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)


def test_a_validation_goes_to_json_and_back_and_only_its_share_is_another_run() -> None:
    plain = toy(smoke())
    measured = replace(plain, validation=ValidationConfig(data=(SCENES,), every=5, patience=2))
    assert Recipe.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert plain.differences(measured) == []
    shared = replace(plain, validation=ValidationConfig(share=0.1))
    assert shared.differences(plain) == ["validation.share"]
    assert [ValidationConfig(share=0.1).steps_between(n) for n in (3, 40, 10_000)] == [1, 5, 500]
