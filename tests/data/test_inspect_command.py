"""`nanomolmo2 inspect`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanomolmo2 import cli
from nanomolmo2.data import sources
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.recipes import finetune
from tests.data.sources import Listed, picture, talk


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``opens(example, ...)``: every name of a source means these examples."""
    monkeypatch.chdir(tmp_path)

    def install(*examples: Example | BadExample) -> None:
        monkeypatch.setattr(
            sources, "open_source", lambda config: Listed(*examples, name=config.path)
        )

    return install


def good(seed: int) -> Example:
    return Example([picture(seed)], [talk(f"Is this {seed}?", "Yes.")])


def test_examples_are_shown(opens, capsys: pytest.CaptureFixture[str]) -> None:
    opens(*(good(seed) for seed in range(5)))
    assert cli.main(["inspect", "my.jsonl", "--start", "1", "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert [n for n in range(5) if f"record {n}:" in out] == [1, 2]


def test_examples_as_json(opens, capsys: pytest.CaptureFixture[str]) -> None:
    opens(good(0), BadExample("no answer", "nobody"))
    assert cli.main(["inspect", "my.jsonl", "--json", "--loss-weighting", "sqrt"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], report["model"]) == ("my.jsonl", "tiny")
    shown, fault = report["examples"]
    (branch,) = shown["branches"]
    assert branch["weight"] == pytest.approx(branch["learned"] ** 0.5)
    assert branch["tokens"][0]["text"] == "<|im_start|>user\n"
    assert fault == {"record": 1, "cause": "no answer", "detail": "nobody"}


def test_the_page_is_written(opens, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opens(good(0))
    assert cli.main(["inspect", "my.jsonl", "--html", "page.html"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "wrote page.html\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>record 0: " in page
    assert "Audit" not in page


def test_an_audit_without_fatal_findings(opens, capsys: pytest.CaptureFixture[str]) -> None:
    opens(good(0), good(0), good(1))
    assert cli.main(["inspect", "my.jsonl", "--audit"]) == 0
    out, err = capsys.readouterr()
    assert "looked at 3 of 3 records" in out
    assert "duplicate picture" in out
    assert "record 0:" not in out
    assert "not fit" not in err


def test_a_fatal_finding_makes_the_exit_code_1(
    opens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opens(good(0), good(1), BadExample("bad record", "no JSON"))
    assert cli.main(["inspect", "my.jsonl", "--audit", "--json", "--html", "page.html"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["fatal"] is True
    assert report["findings"][0]["records"] == [2]
    assert err.splitlines()[-1] == (
        "nanomolmo2: my.jsonl is not fit for training: bad record (1); correct or remove these "
        "records"
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>record 2</h2>" in page  # the record that the finding names, and no other
    assert "<h2>record 0" not in page
    assert cli.main(["inspect", "my.jsonl", "--audit", "--limit", "2"]) == 0


def test_rows_are_those_of_training_or_what_is_said(
    opens, capsys: pytest.CaptureFixture[str]
) -> None:
    opens(good(0))
    assert cli.main(["inspect", "my.jsonl", "--audit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = finetune(("my.jsonl",), "tiny")  # as nanomolmo2 train --data my.jsonl does
    assert found["max_tokens"] == chosen.sequence_length
    assert found["max_crops"] == chosen.max_crops
    arguments = ["inspect", "my.jsonl", "--audit", "--json", "--sequence-length", "45"]
    assert cli.main(arguments) == 1
    causes = [found["cause"] for found in json.loads(capsys.readouterr().out)["findings"]]
    assert "answer longer than the sequence" in causes


def test_the_share_of_broken_pictures_is_an_option(opens) -> None:
    opens(good(0), Example(["absent.png"], [talk("?", "!")]))
    assert cli.main(["inspect", "my.jsonl", "--audit"]) == 1
    assert cli.main(["inspect", "my.jsonl", "--audit", "--max-bad-share", "0.5"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--count", "0"], 2, "--count must be 1 or more, found 0"),
        (["--start", "-1"], 2, "--start must be 0 or more"),
        (["--audit", "--max-bad-share", "2"], 2, "--max-bad-share must be 0 to 1"),
        (["--audit", "--sequence-length", "5000"], 1, "has 2048 positions"),
        (["--limit", "3"], 2, "--limit is for --audit"),
        (["--html", "page.txt"], 2, "expected one of .html"),
        (["--start", "9"], 1, "has 1 records, numbered from 0"),
        (["--model", "tinny"], 1, "there is no model 'tinny'"),
    ],
)
def test_what_is_refused(
    opens, options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opens(good(0))
    assert cli.main(["inspect", "my.jsonl", *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_file_with_something_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real reader: what it calls bad is a finding of that name."""
    (tmp_path / "pictures").mkdir()
    picture(1).save(tmp_path / "pictures" / "a.png")
    point = {"image": "a.png", "question": "Where?", "label": "dog"}
    records = [
        {"image": "a.png", "question": "How many?", "answer": "Two."},
        {**point, "points": [{"x": 10, "y": 10}]},
        {**point, "points": [{"x": 41, "y": 10}]},  # the picture is 40 x 30
        {"image": "b.png", "question": "How many?", "answer": "Two."},
        {"image": "a.png", "question": "How many?"},
        {"image": "a.png", "question": "", "answer": '<points coords="1 1 9999 100">a</points>'},
    ]
    lines = [*(json.dumps(record) for record in records), "{"]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ["--pictures", str(tmp_path / "pictures")]
    assert cli.main(["inspect", str(path), *options, "--audit", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {f["cause"]: (f["fatal"], f["records"]) for f in report["findings"]} == {
        "bad points": (True, [2]),
        "missing picture": (True, [3]),
        "no answer": (True, [4]),
        "points outside the picture": (True, [5]),
        "bad record": (True, [6]),
        "duplicate picture": (False, [1, 5]),
        "empty question": (False, [5]),
    }
    assert cli.main(["inspect", str(path), *options, "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert '<points coords="1' in out
    assert "pictures: 40 x 30" in out


def write(path: Path, *records: dict) -> Path:
    picture(1).save(path.parent / "a.png")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def audit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, str]]:
    """Exit code, and cause -> detail."""
    code = cli.main(["inspect", *map(str, arguments), "--audit", "--json"])
    report = json.loads(capsys.readouterr().out)
    return code, {found["cause"]: found["detail"] for found in report["findings"]}


ASKED = {"question": "?", "answer": "!"}


def test_records_that_training_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thirteen = {"frames": ["a.png"] * 13, "times": list(range(13))}
    for record, reason in (
        ({"images": ["a.png"] * 9, **ASKED}, "9 pictures are at least 9 crops"),
        ({"video": thirteen, **ASKED}, "13 frames are at least 13 crops"),
        ({"question": "a" * 200_000, "answer": "!"}, "its texts have 200,001 characters"),
    ):
        path = write(tmp_path / "a.jsonl", record)
        code, causes = audit(capsys, path)
        assert (code, [*causes]) == (1, ["too long"])
        assert reason in causes["too long"]
    for record in ({"images": ["a.png"] * 9, **ASKED}, {"video": thirteen, **ASKED}):
        path = write(tmp_path / "a.jsonl", record)
        assert audit(capsys, path, "--max-crops", 13)[0] == 0


def test_frames_of_a_video_are_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [picture(seed) for seed in range(30)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    path = write(tmp_path / "a.jsonl", {"video": "a.gif", **ASKED})
    code, causes = audit(capsys, path)
    assert (code, causes) == (1, {"more crops than a row holds": "16 crops, 8 fit"})
    assert audit(capsys, path, "--max-frames", 8) == (0, {})


def test_pictures_that_nobody_reads_and_points_in_a_corner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.125}]
    pointing = {"image": "a.png", "question": "Where?", "label": "dog", "points": points}
    path = write(tmp_path / "a.jsonl", pointing, {"image_path": "a.png", **ASKED})
    code, causes = audit(capsys, path)
    assert code == 0
    assert causes.keys() == {"points in a corner", "picture field that is not read"}
    assert "'points_scale': 'unit'" in causes["points in a corner"]
    code, causes = audit(capsys, path, "--points-scale", "unit")
    assert causes.keys() == {"picture field that is not read"}


def test_fields_and_files_outside_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    picture(2).save(tmp_path / "b.png")
    records = [{"image": "../b.png", "source": "web\x1b[2J", **ASKED}, {"sou\x1b[2J": 1, **ASKED}]
    path = write(tmp_path / "data" / "a.jsonl", *records)
    assert cli.main(["inspect", str(path), "--audit"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "1 files outside the folder of the data (the first: record 0: ../b.png)" in out
    assert "fields that are not read: sou\\x1b[2J (1), source (1)" in out
    assert "nothing found" in out


def test_nothing_new_is_said_of_shipped_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Path(__file__).parents[2] / "docs" / "example.jsonl"
    assert audit(capsys, shipped)[1].keys() == {"duplicate picture"}
    assert audit(capsys, "emoji", "--limit", 20)[1].keys() == {"duplicate question on a picture"}
    assert cli.main(["data", "emoji", "--out", str(tmp_path / "scenes"), "--count", "20"]) == 0
    capsys.readouterr()
    assert audit(capsys, tmp_path / "scenes")[1].keys() == {"duplicate question on a picture"}
