"""What is said of data before a run is spent on it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanomolmo2.data import preflight as module
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.preflight import preflight
from nanomolmo2.data.sources import Source, SourceConfig, open_source

ROOT = Path(__file__).parents[2]
LIMITS = RowLimits(max_tokens=100, max_crops=8)
ASKED = {"question": "?", "answer": "!"}


def source(folder: Path, *values: object) -> Source:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return open_source(path)


def test_data_as_documented_gets_no_word(tmp_path: Path) -> None:
    shipped = open_source(ROOT / "docs" / "example.jsonl")
    assert preflight([shipped, open_source("emoji")], LIMITS) == []
    long_ago = {"id": 3, "image": "none.png", "conversations": [{"from": "human", "value": "?"}]}
    assert preflight([source(tmp_path, long_ago, ASKED)], LIMITS) == []


def test_fields_that_are_not_read(tmp_path: Path) -> None:
    values = [{**ASKED, "img": "a.png", "licence": "CC0", "by\x1b[2J": 1}, ASKED]
    first, second = preflight([source(tmp_path, *values)], LIMITS)
    assert first.startswith("mine: its field 'img' looks like a picture and is not read: name it")
    assert first.endswith("(1 of 2 records looked at)")
    assert second == (
        "mine: fields that are not read, of 2 records looked at: licence (1), by\\x1b[2J (1)"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"images": ["a.png"] * 9}, "9 pictures are at least 9 crops, and a row holds 8"),
        ({"video": {"frames": ["a"] * 13, "times": []}}, "13 frames are at least 13 crops"),
        ({"caption": "x" * 100_001}, "its texts have 100,003 characters, more than the 100 tokens"),
    ],
)
def test_records_that_never_fit(values: dict, reason: str, tmp_path: Path) -> None:
    found = source(tmp_path, ASKED, {**ASKED, **values}, ASKED, {**ASKED, **values})
    [sentence] = preflight([found], LIMITS)
    assert "mine.jsonl, line 2, can never be learned from" in sentence
    assert reason in sentence
    assert sentence.endswith("(2 such of 4 records looked at)")


def test_records_that_cannot_be_read_are_left_to_the_training(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{\n[]\n{"question": "?", "answer": "!"}\n')
    assert preflight([open_source(tmp_path / "mine.jsonl")], LIMITS) == []


def test_of_large_sources_some_records_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKED_AT", 10)
    monkeypatch.setattr(module, "WITH_PICTURES", 4)
    [said] = preflight([source(tmp_path, *[{**ASKED, "img": "a"}] * 95)], LIMITS)
    assert said.endswith("(10 of 10 records looked at)")
    table = pyarrow.Table.from_pylist([{**ASKED, "img": "a"}] * 95)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    [said] = preflight([open_source(SourceConfig(str(tmp_path / "a.parquet")))], LIMITS)
    assert said.endswith("(4 of 4 records looked at)")
