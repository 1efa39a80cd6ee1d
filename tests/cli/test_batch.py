"""``nanomolmo2 ask --batch``, which answers the questions of a file, and ``ask -``."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nanomolmo2 import VLM, cli
from nanomolmo2.cli import ask
from nanomolmo2.demo import DEMO
from nanomolmo2.generation.pipeline import Pipeline
from tests.small_model import ScriptedModel, small_model, small_processor

ROOT = Path(__file__).parents[2]
SCENE = DEMO / "scene.png"
TAG = '<points coords="1 1 210 455 2 640 480">dog</points>'
CAPTION, COUNT = "Describe this picture.", "How many sunflowers are there?"


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return VLM("tiny", device="cpu")


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedModel]:
    """``says(text, ...)``: every model answers with these texts, one call after the other, and all
    are the same model.
    """

    def install(*texts: str) -> ScriptedModel:
        torch.manual_seed(0)
        scripted = ScriptedModel(*texts)
        pipeline = Pipeline(scripted, scripted.processor)
        monkeypatch.setattr(ask, "load_pipeline", lambda name, cache_dir: pipeline)
        return scripted

    return install  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), "green").save("a.png")
    return tmp_path


def write(path: Path, *records: object) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: str | Path) -> int:
    return cli.main(["ask", "--batch", *map(str, arguments)])


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "nanomolmo2", "ask", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **options)


def without_times(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    left_out = ("timings", "reused_tokens", "confidence")
    return [{k: v for k, v in one.items() if k not in left_out} for one in results]


# ---- answers ----


def test_answers_are_those_of_single_questions_in_order(tiny: VLM, folder: Path, capfd) -> None:
    """Bad lines leave a line each, and the others are answered."""
    shutil.copy(SCENE, "scene.png")
    questions = write(
        folder / "q.jsonl",
        {"image": "scene.png", "question": CAPTION, "id": "first"},
        {"images": ["scene.png"], "messages": [{"role": "user", "content": COUNT}]},
        {"image": "none.png", "question": CAPTION},
        "",
        '{"image": ',
        {"image": "scene.png", "question": "Point to the snail.", "answer": "Never asked about."},
        {"image": "scene.png", "question": "  "},
    )
    assert run(questions, "--out", "out.jsonl", "--device", "cpu") == 1
    found = read(folder / "out.jsonl")
    assert [one["line"] for one in found] == [1, 2, 3, 5, 6, 7]  # the fourth is blank
    for number, question in ((0, CAPTION), (1, COUNT), (4, "Point to the snail.")):
        expected, one = tiny.ask(SCENE, question), found[number]
        assert (one["text"], one["count"]) == (expected.text, expected.count)
        assert one["question"] == question
        assert one["images"] == [{"path": "scene.png", "width": 192, "height": 192}]
        assert len(one["points"]) == len(expected.points)
    assert [one.get("id") for one in found[:2]] == ["first", None]
    assert found[2]["error"] == f"{questions}, line 3: there is no {folder}/none.png"
    assert f"{questions}, line 5 is not valid JSON" in found[3]["error"]
    assert found[5]["error"] == f"{questions}, line 7: the question is empty: expected a text"
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if "line 3" in line] == [found[2]["error"]]
    assert err.splitlines()[-1] == (
        "nanomolmo2: 3 answered, 3 failed in out.jsonl: lines with 'error' say why; the same "
        "command asks them again"
    )


def test_layouts_of_records(says, folder: Path, capsys) -> None:
    """Those that training reads; only what comes before the last answer is shown to the model."""
    turns = [
        {"role": "user", "content": "A dog?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "A cat?"},
        {"role": "assistant", "content": "Unseen."},
    ]
    branches = [{"question": "One?"}, {"question": "Two?", "answer": "Unseen."}]
    write(
        folder / "q.jsonl",
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhy?"}]},
        {"images": ["a.png", "a.png"], "messages": turns},
        {"image": "a.png", "branches": branches},
        {"question": "No picture?"},
    )
    scripted = says("1.", "2.", "3.", "4.", "5.")
    assert run("q.jsonl", "--batch-size", "1") == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["line"], one.get("branch"), one["question"], one["text"]) for one in found] == [
        (1, None, "Why?", "1."),
        (2, None, "A cat?", "2."),
        (3, 1, "One?", "3."),
        (3, 2, "Two?", "4."),
        (4, None, "No picture?", "5."),
    ]
    assert [len(one["images"]) for one in found] == [1, 2, 1, 1, 0]
    asked = scripted.processor.decode(scripted.calls[1]["prompt_ids"][0].tolist())
    assert "A dog?" in asked and "No." in asked and "Unseen." not in asked
    assert err.splitlines()[-1] == "5 answered, 0 failed"


def test_points_are_in_pixels_and_options_reach_the_model(says, folder: Path, capsys) -> None:
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    scripted = says(f"There are 2 {TAG}.")
    assert run("q.jsonl", "--max-new-tokens", "60", "--top-p", "0.9", "--temperature", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(p["x"], p["y"], p["label"]) for p in found["points"]] == [
        (pytest.approx(21.0), pytest.approx(22.75), "dog"),
        (pytest.approx(64.0), pytest.approx(24.0), "dog"),
    ]
    assert scripted.calls[0]["max_new_tokens"] == 60
    assert scripted.calls[0]["sampling"].top_p == 0.9


def test_well_formed_points(says, folder: Path, capsys) -> None:
    """Each question gets the grammar of its own pictures."""
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"}, {"question": "  "})
    scripted = says("Yes.")
    assert run("q.jsonl", "--well-formed-points") == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (found[0]["text"], found[1]["line"]) == ("Yes.", 2)
    assert "the question is empty" in found[1]["error"]
    assert scripted.calls[0]["sampling"].constraint is not None


def test_pictures_in_another_folder(says, folder: Path, capsys) -> None:
    (folder / "data").mkdir()
    write(folder / "data" / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    says("Yes.")
    assert run("data/q.jsonl") == 1
    assert "there is no data/a.png" in capsys.readouterr().out
    says("Yes.")
    assert run("data/q.jsonl", "--images", ".") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Yes."


def test_a_picture_under_a_name_that_nobody_reads_is_said(says, folder: Path, capsys) -> None:
    write(folder / "q.jsonl", *[{"img": "a.png", "question": "Dogs?"}] * 2)
    says("Yes.", "Yes.")
    assert run("q.jsonl", "--batch-size", "1") == 0
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert "line 1: its field 'img' looks like a picture and is not read" in err


# ---- an earlier call ----


def interrupted(results: Path, whole: int) -> bytes:
    """Cut a file of results after some lines and a part of the next."""
    lines = results.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:whole])
    results.write_bytes(kept + lines[whole][:40])
    return kept


def test_a_call_goes_on_behind_its_last_whole_line(says, folder: Path, capsys) -> None:
    write(folder / "q.jsonl", *[{"image": "a.png", "question": f"{n}?"} for n in range(5)])
    arguments = ("q.jsonl", "--out", "out.jsonl", "--batch-size", "1")
    says(*[f"{n}." for n in range(5)])
    assert run(*arguments) == 0
    whole = read(folder / "out.jsonl")
    kept = interrupted(folder / "out.jsonl", 2)
    scripted = says("2.", "3.", "4.")
    assert run(*arguments) == 0
    assert len(scripted.calls) == 3
    assert (folder / "out.jsonl").read_bytes().startswith(kept)
    assert without_times(read(folder / "out.jsonl")) == without_times(whole)
    err = capsys.readouterr().err
    assert "out.jsonl has answers to 2 of 5 lines: going on behind them" in err
    assert err.splitlines()[-1] == "3 answered, 0 failed in out.jsonl"
    scripted = says()
    assert run(*arguments) == 0
    assert scripted.calls == []


@pytest.mark.parametrize("part", [b"", b"{", b'{"line": 1, "fing'])
def test_a_first_line_that_was_being_written(says, folder: Path, part: bytes) -> None:
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    (folder / "out.jsonl").write_bytes(part)
    says("Yes.")
    assert run("q.jsonl", "--out", "out.jsonl") == 0
    assert [one["text"] for one in read(folder / "out.jsonl")] == ["Yes."]


def test_a_record_of_several_questions_is_asked_as_a_whole_again(says, folder: Path) -> None:
    branches = [{"question": f"{n}?"} for n in range(3)]
    write(
        folder / "q.jsonl",
        {"image": "a.png", "question": "First?"},
        {"image": "a.png", "branches": branches},
    )
    arguments = ("q.jsonl", "--out", "out.jsonl", "--batch-size", "1")
    says("a", "b", "c", "d")
    assert run(*arguments) == 0
    interrupted(folder / "out.jsonl", 3)
    scripted = says("b", "c", "d")
    assert run(*arguments) == 0
    assert len(scripted.calls) == 3
    assert [one["text"] for one in read(folder / "out.jsonl")] == ["a", "b", "c", "d"]


def test_what_failed_is_asked_again_in_its_place(says, folder: Path, capsys) -> None:
    write(
        folder / "q.jsonl",
        {"image": "a.png", "question": "One?"},
        {"image": "b.png", "question": "Two?"},
        {"image": "a.png", "question": "Three?"},
        {"image": "c.png", "question": "Four?"},
    )
    arguments = ("q.jsonl", "--out", "out.jsonl", "--batch-size", "1")
    says("1.", "3.")
    assert run(*arguments) == 1
    before = (folder / "out.jsonl").read_bytes().splitlines()
    Image.new("RGB", (30, 40)).save("b.png")
    says("2.")
    assert run(*arguments) == 1
    after = (folder / "out.jsonl").read_bytes().splitlines()
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert [one.get("text") for one in read(folder / "out.jsonl")] == ["1.", "2.", "3.", None]
    assert "1 answered, 1 failed in out.jsonl" in capsys.readouterr().err
    Image.new("RGB", (30, 40)).save("c.png")
    says("4.")
    assert run(*arguments) == 0
    assert [one["text"] for one in read(folder / "out.jsonl")] == ["1.", "2.", "3.", "4."]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["a.png", "b.png", "c.png", "out.jsonl", "q.jsonl"]
    )


def _edit_a_question(folder: Path) -> None:
    text = (folder / "q.jsonl").read_text(encoding="utf-8")
    (folder / "q.jsonl").write_text(text.replace("Two?", "Too?"), encoding="utf-8")


def _swap_the_picture(folder: Path) -> None:
    Image.new("RGB", (100, 50), "red").save(folder / "a.png")


def _take_lines_away(folder: Path) -> None:
    write(folder / "q.jsonl", {"image": "a.png", "question": "One?"})


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (_edit_a_question, (), "out.jsonl, line 2 answers another question than q.jsonl, line 2"),
        (_swap_the_picture, (), "out.jsonl, line 1 answers another question"),
        (_take_lines_away, (), "out.jsonl, line 2 answers no question of q.jsonl"),
        (None, ("--max-new-tokens", "3"), "out.jsonl, line 1 is by another model or with other"),
    ],
)
def test_answers_to_something_else_are_not_gone_on_with(
    says, folder: Path, capsys, change, more: tuple[str, ...], said: str
) -> None:
    asked = [{"image": "a.png", "question": name} for name in ("One?", "Two?")]
    write(folder / "q.jsonl", *asked)
    arguments = ("q.jsonl", "--out", "out.jsonl", "--batch-size", "1")
    says("1.", "2.")
    assert run(*arguments) == 0
    before = (folder / "out.jsonl").read_bytes()
    if change is not None:
        change(folder)
    capsys.readouterr()
    scripted = says("1.", "2.")
    assert run(*arguments, *more) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "name another --out to answer all of them" in err
    assert (folder / "out.jsonl").read_bytes() == before
    assert scripted.calls == []


def test_another_model_does_not_go_on(babbler: Path, folder: Path, capsys) -> None:
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    arguments = ("q.jsonl", "--out", "out.jsonl", "--max-new-tokens", "2", "--model")
    assert run(*arguments, babbler) == 0
    other = folder / "other"
    small_model(seed=1).save_pretrained(other, processor=small_processor())
    assert run(*arguments, other) == 1
    assert "is by another model" in capsys.readouterr().err
    assert run(*arguments, shutil.copytree(babbler, folder / "copy")) == 0


@pytest.mark.parametrize("content", ["my notes", '{"a": 1}\n', "[1]\n", '{"line": 1}\n'])
def test_other_files_are_left_alone(says, folder: Path, capsys, content: str) -> None:
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    (folder / "notes.jsonl").write_text(content, encoding="utf-8")
    says("Yes.")
    assert run("q.jsonl", "--out", "notes.jsonl") == 1
    assert (
        "notes.jsonl holds something else than answers of this command" in capsys.readouterr().err
    )
    assert (folder / "notes.jsonl").read_text(encoding="utf-8") == content


# ---- refusals, before a model is loaded ----


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--batch", "q.jsonl", "--out", "q.jsonl"), 2, "written over"),
        (("--batch", "q.jsonl", "--out", "link.jsonl"), 2, "written over"),
        (("--batch", "q.jsonl", "--out", "out.json"), 2, "expected one of .jsonl"),
        (("--batch", "q.jsonl", "--out", "none/out.jsonl"), 2, "nothing can be written"),
        (("--batch", "q.jsonl", "--images", "none"), 2, "--images none is no folder"),
        (("--batch", "q.jsonl", "a.png", "?"), 2, "has pictures and questions of its own"),
        (("--batch", "q.jsonl", "--draw", "d.png"), 2, "--draw is of one question"),
        (("--batch", "q.jsonl", "--at", "1,2"), 2, "--at is of one question"),
        (("--batch", "q.jsonl", "--video"), 2, "--video is of one question"),
        (("--batch", "q.jsonl", "--batch-size", "0"), 2, "--batch-size must be 1 or more"),
        (("--batch", "q.jsonl", "--top-p", "2"), 2, "--top-p must be above 0"),
        (("--batch", "none.jsonl"), 1, "none.jsonl: No such file"),
        (("--batch", "empty.jsonl"), 1, "empty.jsonl holds no questions"),
        (("--batch", "."), 1, "is a folder"),
        (("a.png", "?", "--out", "out.jsonl"), 2, "--out is for --batch"),
        (("a.png", "?", "--images", "."), 2, "--images is for --batch"),
        (("a.png", "?", "--batch-size", "2"), 2, "--batch-size is for --batch"),
        (("-", "-", "?"), 2, "- is one picture, or one video, from standard input"),
        (("a.png", "-"), 2, "the question comes last"),
    ],
)
def test_refusals(folder: Path, monkeypatch, capsys, arguments, code: int, said: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ask, "load_pipeline", fail)
    write(folder / "q.jsonl", {"image": "a.png", "question": "Dogs?"})
    write(folder / "empty.jsonl", "", " ")
    os.link("q.jsonl", "link.jsonl")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["ask", *arguments]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ---- processes ----


def test_the_bar_leaves_standard_output_alone(folder: Path) -> None:
    """A bar in the terminal led what was printed to a file into the terminal."""
    write(folder / "q.jsonl", {"image": str(SCENE), "question": CAPTION})
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "nanomolmo2", "ask", "--batch", "q.jsonl", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        timeout=120,
        check=False,
    )
    os.close(theirs)
    said = os.read(ours, 1 << 16)
    os.close(ours)
    assert done.returncode == 0, said
    assert json.loads(done.stdout)["line"] == 1
    assert b"questions" in said
    assert b'"line"' not in said


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_process_that_is_ended_in_the_middle(folder: Path, babbler: Path, how) -> None:
    asked = [{"image": "a.png", "question": f"{n}?"} for n in range(20)]
    write(folder / "q.jsonl", *asked)
    common = ["--model", str(babbler), "--max-new-tokens", "20", "--batch-size", "1"]
    arguments = ["ask", "--batch", "q.jsonl", "--out", "out.jsonl", *common]
    begun = subprocess.Popen(
        [sys.executable, "-m", "nanomolmo2", *arguments], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while not (Path("out.jsonl").exists() and Path("out.jsonl").stat().st_size):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    begun.send_signal(how)
    _, err = begun.communicate(timeout=60)
    if how == signal.SIGINT:
        assert begun.returncode == 130
        assert b"out.jsonl has what was answered: the same command goes on behind it" in err
    known = len(Path("out.jsonl").read_bytes().splitlines())
    assert 0 < known < 20, "it was over before it was ended"
    assert cli.main(arguments) == 0
    assert cli.main([*arguments[:4], "whole.jsonl", *common]) == 0
    found, whole = read(Path("out.jsonl")), read(Path("whole.jsonl"))
    assert without_times(found) == without_times(whole)


# ---- a picture from standard input ----


def test_a_picture_from_standard_input(tiny: VLM) -> None:
    with SCENE.open("rb") as stream:
        done = process("-", CAPTION, "--json", "--device", "cpu", stdin=stream)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["text"] == tiny.ask(SCENE, CAPTION).text
    assert report["images"] == [{"path": "-", "width": 192, "height": 192}]


def test_it_is_one_of_several_and_can_be_drawn_on(says, folder: Path, monkeypatch) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 20), "blue").save(picture, "PNG")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture.getvalue())))
    says('<points coords="2 1 500 500">sea</points>')
    assert cli.main(["ask", "a.png", "-", "Where?", "--draw", "d.png"]) == 0
    with Image.open("d-1.png") as first, Image.open("d-2.png") as second:
        assert (first.size, second.size) == ((100, 50), (40, 20))
        assert len(set(first.get_flattened_data())) == 1  # nothing is drawn on it
        assert len(set(second.get_flattened_data())) > 1


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", b"standard input is empty"), (b"not a picture", b"the given bytes")],
)
def test_nothing_and_something_else_from_standard_input(data: bytes, said: bytes) -> None:
    done = process("-", "What?", input=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"nanomolmo2: ")
    assert said in done.stderr


def test_nobody_types_a_picture() -> None:
    ours, theirs = pty.openpty()
    done = process("-", "What?", stdin=theirs)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert b"nothing is sent there" in done.stderr
