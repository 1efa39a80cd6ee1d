"""The command `nanomolmo2 eval DATA`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanomolmo2 import cli
from nanomolmo2.cli import eval as eval_command
from nanomolmo2.cli.eval import began_with
from tests.evaluation.test_run import scripted, tag, write


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch):
    """Makes every model say some texts in turn."""

    def prepare(*answers: str) -> None:
        monkeypatch.setattr(eval_command, "load_pipeline", lambda *_, **__: scripted(*answers))

    return prepare


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    assert cli.main(["eval", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    return err


def test_flat_json_and_a_table_that_names_its_measures(tmp_path: Path, says, capsys) -> None:
    path = write(
        tmp_path,
        {"question": "How many dogs?", "answer": "3"},
        {"question": "Point to it.", "boxes": [[0, 0, 50, 50]]},
        {"question": "Is it red?", "answer": "No.", "task": "colour"},
    )
    says("4", tag((100, 100)), "Yes.")
    target, out = tmp_path / "scores.json", tmp_path / "out"
    options = ["--json", str(target), "--out", str(out), "--batch-size", "1"]
    assert cli.main(["eval", str(path), *options]) == 0
    expected = {"count_within_one": 1, "count_mae": 1, "count": 0, "point": 1, "colour": 0}
    assert json.loads(target.read_text()) == expected
    said = capsys.readouterr().out
    table = [line.split("|")[1:4] for line in said.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line] for line in table] == [
        ["task", "measure", "score [95 %]"],
        ["count", "exact count", ".000 [.000, .000]"],
        ["count", "count within one", "1.000"],
        ["count", "mean absolute error", "1.00"],
        ["point", "F1 of points", "1.000 [1.000, 1.000]"],
        ["colour", "same words", ".000 [.000, .000]"],
    ]
    assert "wrote" in said and (out / "predictions.jsonl").exists()
    text = (out / "report.json").read_text() + target.read_text()
    assert "seconds" not in text and "time" not in text


def test_data_may_be_named_by_an_option(tmp_path: Path, says, capsys) -> None:
    path = write(tmp_path, {"question": "How many dogs?", "answer": "3"})
    target = tmp_path / "scores.json"
    for arguments in (["--data", str(path)], [str(path), "--data", str(path)]):
        says("3", "3")
        assert cli.main(["eval", *arguments, "--model", "tiny", "--json", str(target)]) == 0
        assert json.loads(target.read_text())["count"] == 1
    capsys.readouterr()
    assert "expected data" in refused(capsys, code=2)


def test_scorers_of_tasks(tmp_path: Path, says, capsys) -> None:
    path = write(
        tmp_path,
        {"question": "Name?", "answer": "abcd", "task": "name"},
        {"question": "Value?", "answer": "100", "task": "value"},
    )
    says("abce", "104")
    target = tmp_path / "scores.json"
    scorers = ["--scorer", "name=anls", "--scorer", "value=relaxed"]
    assert cli.main(["eval", str(path), *scorers, "--batch-size", "1", "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == {"name": 0.75, "value": 1}


def test_pictures_in_another_folder_and_points_in_percent(tmp_path: Path, says) -> None:
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "pictures")
    record = {"question": "Where?", "points": [{"x": 50, "y": 50}], "image": "white.png"}
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(record) + "\n")
    target = tmp_path / "scores.json"
    for name in ("--images", "--pictures"):
        says(tag((500, 500)))
        options = [name, str(tmp_path / "pictures"), "--points-scale", "percent"]
        assert cli.main(["eval", str(path), *options, "--json", str(target)]) == 0
        assert json.loads(target.read_text()) == {"point": 1}


def test_a_run_is_compared_with_what_it_began_with(tmp_path: Path, monkeypatch, capsys) -> None:
    path = write(tmp_path, {"question": "Is it?", "answer": "Yes."})
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    assert began_with(str(model)) is None
    (tmp_path / "run" / "recipe.json").write_text('{"model": "tiny"}')
    assert began_with(str(model)) == "tiny"
    assert began_with("tiny") is None
    answers = {str(model): "Yes.", "tiny": "No.", "other": "Yes!"}
    monkeypatch.setattr(
        eval_command, "load_pipeline", lambda name, *_, **__: scripted(answers[name])
    )
    monkeypatch.setattr(eval_command, "files_of", lambda name: [])

    def line(*options: str) -> str:
        assert cli.main(["eval", str(path), "--model", str(model), *options]) == 0
        return next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| text"))

    assert [cell.strip() for cell in line().split("|")[3:6]] == [
        "1.000 [1.000, 1.000]",
        "1.000",
        ".000",
    ]
    (tmp_path / "run" / "recipe.json").write_text('{"model": "owner/name"}')
    assert line("--baseline", "off") == line()
    (tmp_path / "run" / "recipe.json").write_text('{"model": "tiny"}')
    assert line("--baseline", "other").split("|")[5].strip() == ".000"
    assert len(line("--baseline", "off").split("|")) == len(line().split("|")) - 1


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, says, capsys) -> None:
    path = write(tmp_path, {"question": "Is it?", "answer": "Yes."})
    bare = write(tmp_path, {"question": "Is it?"}, name="bare.jsonl")
    (tmp_path / "empty.jsonl").touch()
    says("Yes.")
    capsys.readouterr()
    assert "expected data" in refused(capsys, code=2)
    assert "there is no nowhere.jsonl" in refused(capsys, "nowhere.jsonl")
    assert "or a benchmark (emoji" in refused(capsys, "chartqaa")
    assert "holds no records" in refused(capsys, tmp_path / "empty.jsonl")
    assert "has no answer" in refused(capsys, bare)
    assert "choose from points, count" in refused(capsys, path, "--scorer", "f2", code=2)
    assert "does not fit" in refused(capsys, path, "--scorer", "points")
    several = ("--scorer", "exact", "--scorer", "anls")
    assert "need their tasks" in refused(capsys, path, *several, code=2)
    assert "--radius must be above 0" in refused(capsys, path, "--radius", "-1", code=2)
    assert "--limit must be 1 or more" in refused(capsys, path, "--limit", "0", code=2)
    assert "--scenes is of the benchmark emoji" in refused(capsys, path, "--scenes", "3", code=2)
    assert "--radius is not of the benchmark" in refused(capsys, "emoji", "--radius", "3", code=2)
    assert "by itself" in refused(capsys, "emoji", path, code=2)
    assert "name a folder" in refused(capsys, path, "--out", path, code=2)
    assert "is not empty" in refused(capsys, path, "--out", tmp_path)


def test_no_data_is_written_over(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, {"question": "Is it?", "answer": "Yes."}, name="my.json")
    assert "which is read" in refused(capsys, path, "--json", path, code=2)
    assert "which is read" in refused(capsys, "emoji", path, "--json", path, code=2)
