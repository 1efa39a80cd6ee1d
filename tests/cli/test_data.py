"""``nanomolmo2 data``: its commands, what they print and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from nanomolmo2 import cli
from nanomolmo2.cli.data import Emoji, Export, Import, Split
from tests.data.sources import picture


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """labels.csv about 0.png to 9.png, two bolts in each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    lines = ["image,label,x,y"]
    for i in range(10):
        picture(i, 80, 60).save(tmp_path / f"{i}.png")
        lines += [f"{i}.png,hex_bolt,{10 + i},20", f"{i}.png,hex_bolt,50,{30 + i}"]
    (tmp_path / "labels.csv").write_text("\n".join([*lines, "gone.png,hex_bolt,1,1"]) + "\n")
    return tmp_path


def test_from_labels_to_corrections(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import, audit, split, export, and the corrected points back."""
    run = ["data", "import", "--from", "csv", "labels.csv", "my.jsonl", "--report", "report.json"]
    assert cli.main(run) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote 10 records to my.jsonl: 10 point, 10 count",
        "labels: hex bolt 20",
        "dropped: 1 x missing picture, first gone.png",
    ]
    report = json.loads((labels / "report.json").read_text())
    assert (report["records"], report["labels"]) == (10, {"hex bolt": 20})
    assert report["dropped"] == {"missing picture": {"count": 1, "first": "gone.png"}}

    assert cli.main(["inspect", "my.jsonl", "--audit", "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert (audit["good"], audit["findings"], audit["branches"]) == (10, [], 20)

    assert cli.main(["data", "split", "my.jsonl", "--share", "0.2", "0.1", "--out", "parts"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote 7 records about 7 pictures to parts/train.jsonl",
        "wrote 2 records about 2 pictures to parts/val.jsonl",
        "wrote 1 records about 1 pictures to parts/test.jsonl",
    ]
    assert cli.main(["inspect", "parts/val.jsonl", "--audit"]) == 0

    image = {"path": "3.png", "width": 80, "height": 60}
    answer = '<points coords="1 1 100 100">hex bolt</points>'
    (labels / "predictions.jsonl").write_text(
        json.dumps({"scorer": "points", "answer": answer, "images": [image]}) + "\n"
    )
    capsys.readouterr()
    assert cli.main(["data", "export", "predictions.jsonl", "--to", "coco", "coco.json"]) == 0
    assert capsys.readouterr().out == "wrote 1 points in 1 pictures to coco.json\n"
    assert cli.main(["data", "import", "--from", "coco", "coco.json", "again.jsonl"]) == 0
    record = json.loads((labels / "again.jsonl").read_text())
    assert record["branches"][0]["truth"] == {"points": [[8, 6]]}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("import", "labels.csv", "my.jsonl"), 2, "--from"),
        (("import", "--from", "voc", "labels.csv", "my.jsonl"), 2, "voc"),
        (("import", "--from", "csv", "labels.csv", "my.txt"), 2, "expected one of .jsonl"),
        (("import", "--from", "csv", "labels.csv", "my.jsonl", "--part", "a"), 2, "has no parts"),
        (
            ("import", "--from", "coco", "labels.csv", "my.jsonl", "--points-scale", "unit"),
            2,
            "--points-scale is for csv",
        ),
        (("import", "--from", "coco", "labels.csv", "my.jsonl"), 1, "is not valid JSON"),
        (("import", "--from", "csv", "gone.csv", "my.jsonl"), 1, "there is no gone.csv"),
        (
            ("import", "--from", "csv", "labels.csv", "my.jsonl", "--images", "no"),
            1,
            "no folder no",
        ),
        (
            ("import", "--from", "csv", "labels.csv", "my.jsonl", "--negatives", "-1"),
            2,
            "0 or more",
        ),
        (("split", "labels.csv", "--out", "parts"), 1, "is no .jsonl or .json file"),
        (("split", "my.jsonl", "--out", "parts", "--share", "2"), 1, "there is no my.jsonl"),
        (("export", "labels.csv", "out.txt", "--to", "coco"), 2, "expected one of .json"),
        (("emoji",), 2, "--out"),
        ((), 2, "expected one of"),
    ],
)
def test_refusals(
    labels: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    before = sorted(path.name for path in labels.iterdir())
    assert cli.main(["data", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said.lower() in err.lower()
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in labels.iterdir()) == before


def test_pictures_that_are_missing(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(10):
        (labels / f"{i}.png").unlink()
    assert cli.main(["data", "import", "--from", "csv", "labels.csv", "my.jsonl"]) == 1
    assert capsys.readouterr().err == (
        "nanomolmo2: none of the 11 pictures that labels.csv names can be read (first: 0.png); "
        "they were looked for around the labels: name their folder by --images; "
        "nothing was written\n"
    )
    assert not (labels / "my.jsonl").exists()


@pytest.mark.parametrize("command", [Emoji, Import, Split, Export])
def test_every_option_is_explained(command: type) -> None:
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        texts = [getattr(entry, "help", None) for entry in hints[field.name].__metadata__]
        assert any(text and len(text) > 10 for text in texts), field.name
