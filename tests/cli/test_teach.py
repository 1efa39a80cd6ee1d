"""``nanomolmo2 teach``: a word from examples, without training; what it writes and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.cli.teach import Shown, read_reference
from nanomolmo2.convert.pretrained import load
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.words import read_words
from nanomolmo2.processor import Processor
from tests.generation.test_words import Finds, found
from tests.small_model import small_model, small_processor


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights whose card says that it knows emoji."""
    folder = tmp_path_factory.mktemp("start") / "model"
    processor = small_processor()
    settings = dataclasses.replace(processor.config, trained_on=("emoji",))
    small_model().save_pretrained(folder, processor=Processor(settings, processor.tokenizer))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), "green").save("ref.png")
    Image.new("RGB", (60, 40), "blue").save("me@10,20.jpg")
    Image.new("RGB", (80, 80), "red").save("photo.png")
    return tmp_path


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finds]:
    """``finds(answer, ...)``: every model finds these, one after the other."""

    def install(*answers: Any) -> Finds:
        made = Finds(*answers)
        monkeypatch.setattr(Pipeline, "find", lambda vlm, image, **asked: made(image, **asked))
        return made

    return install


def run(*arguments: str | Path) -> int:
    return cli.main([str(one) for one in arguments])


def test_a_word_is_known_from_then_on(
    folder: Path, start: Path, finds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = finds(found([(1, 2, 0.9), (3, 4, 0.8)]), found([(5, 5, 0.7)]))
    shown = ["ref.png@10,20", "me@10,20.jpg@33,5.5", "ref.png@30,40", "ref.png@10,20"]
    assert run("teach", "walnut", *shown, "--model", start, "--out", "taught") == 0
    out, err = capsys.readouterr()
    assert "wrote taught, which knows walnut (walnuts)" in out
    assert '"How many walnuts are there?" --model taught' in out
    assert "ref.png: 3 examples; walnuts found in it, with what was shown: 2" in err
    assert [call["like"] for call in seen.calls] == [[(10, 20), (30, 40), (10, 20)], [(33, 5.5)]]
    # The files of the model, byte by byte, the words, and the pictures as they were given.
    for path in start.iterdir():
        assert (Path("taught") / path.name).read_bytes() == path.read_bytes()
    known = read_words(Path("taught"))
    (word,) = known.words.values()
    assert [(s.x, s.y) for s in word.samples] == [(10, 20), (33, 5.5), (30, 40)]
    assert set(known.files.values()) == {
        Path("ref.png").read_bytes(),
        Path("me@10,20.jpg").read_bytes(),
    }
    assert {"dog", "dogs"} <= set(known.others)

    # All that loads the folder knows the word; weights load as before.
    finds(*[found([(10, 5, 0.9)], (80, 80)) for _ in range(4)])
    question = "How many walnuts are there?"
    assert run("ask", "photo.png", question, "--model", "taught", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["count"] == 1 and answer["points"][0]["label"] == "walnut"
    Path("ask.jsonl").write_text(json.dumps({"image": "photo.png", "question": question}) + "\n")
    assert run("ask", "--batch", "ask.jsonl", "--model", "taught", "--out", "said.jsonl") == 0
    assert json.loads(Path("said.jsonl").read_text())["count"] == 1
    capsys.readouterr()
    assert run("info", "taught") == 0
    assert "words: walnut, taught by 3 examples" in capsys.readouterr().out
    model, processor = load("taught")
    assert model.config == small_model().config and processor.config.trained_on == ("emoji",)


def test_words_add_up_and_can_be_replaced(
    folder: Path, start: Path, finds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    finds(*[found([])] * 4)
    teach = ["--model", start, "--out"]
    assert run("teach", "walnut", "ref.png@1,2", *teach, "one") == 0
    more = ["--model", "one", "--out"]
    assert run("teach", "hex nut", "photo.png@3,4", "--plural", "hexen", *more, "two") == 0
    known = read_words(Path("two"))
    assert [(w.name, w.plural) for w in known.words.values()] == [
        ("walnut", "walnuts"),
        ("hex nut", "hexen"),
    ]
    assert len(known.files) == 2
    capsys.readouterr()
    again = ["teach", "Walnuts", "photo.png@5,6", "--model", "two", "--out", "three"]
    assert run(*again) == 1
    assert "two was taught walnut before, by 1 example: --replace takes" in capsys.readouterr().err
    assert not Path("three").exists()
    assert run(*again, "--replace") == 0
    known = read_words(Path("three"))
    assert list(known.words) == ["hex nut", "Walnuts"] and len(known.files) == 1
    # A folder that was taught may be written anew, one of other things not.
    assert run("teach", "pecan", "ref.png@1,2", *teach, "three") == 0
    assert list(read_words(Path("three")).words) == ["pecan"]


@pytest.mark.parametrize("name", ["dog", "Dogs", "DOG", "picture"])
def test_a_word_that_the_model_knows_is_refused(
    folder: Path, start: Path, finds: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finds()
    assert run("teach", name, "ref.png@1,2", "--model", start, "--out", "taught") == 1
    err = capsys.readouterr().err
    assert f"{name} is a word that {start} knows already" in err and err.count("\n") == 1
    assert run("teach", name, "ref.png@1,2", "--model", start, "--out", "t", "--replace") == 1
    assert sorted(p.name for p in folder.iterdir()) == ["me@10,20.jpg", "photo.png", "ref.png"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["walnut", "ref.png@100.5,20", "--out", "t"], "outside of its picture, which is 100 x 50"),
        (["walnut", "ref.png@-1,20", "--out", "t"], "lies outside of its picture"),
        (["walnut", "ref.png@10", "--out", "t"], "expected a picture and a place in it"),
        (["walnut", "ref.png", "--out", "t"], "expected a picture and a place in it"),
        (["walnut", "--out", "t"], "nothing is shown: say where walnuts are"),
        (["walnut", "ref.png@1,2"], "expected --out DIR"),
        (["ref.png@1,2", "ref.png@1,2", "--out", "t"], "where the word was expected"),
        (["nut7", "ref.png@1,2", "--out", "t"], "expected one or several words of letters"),
        (["nut", "ref.png@1,2", "--plural", "n8s", "--out", "t"], "the name is 'n8s'"),
        (["nut", "ref.png@1,2", "--minutes", "5", "--out", "t"], "--minutes is for --data"),
        (["nut", "ref.png@1,2", "--images", ".", "--out", "t"], "--images is for --data"),
        (["nut", "ref.png@1,2", "--out", "."], "would be replaced"),
        (["nut", "ref.png@1,2", "--out", "ref.png"], "is a file: name a folder"),
    ],
)
def test_what_cannot_be_taught(
    folder: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("teach", *arguments) == 2
    err = capsys.readouterr().err
    assert problem in err and err.count("\n") == 1
    assert len(list(folder.iterdir())) == 3


def test_a_picture_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("teach", "walnut", "none.png@1,2", "--out", "t") == 1
    assert "none.png" in capsys.readouterr().err


def test_a_model_that_cannot_find_learns_no_word(
    folder: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("teach", "walnut", "ref.png@1,2", "--model", start, "--out", "t") == 1
    assert "cannot find by example" in capsys.readouterr().err
    assert not Path("t").exists()


def test_the_model_itself_is_never_written_over(
    folder: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(start, "model")
    assert run("teach", "walnut", "ref.png@1,2", "--model", "model", "--out", "model") == 2
    assert "model would be written over model, which is read" in capsys.readouterr().err


def test_damaged_words_are_one_line(
    folder: Path, start: Path, finds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    finds(found([]))
    assert run("teach", "walnut", "ref.png@1,2", "--model", start, "--out", "t") == 0
    (picture,) = Path("t").glob("word-*")
    picture.write_bytes(b"other")
    capsys.readouterr()
    assert run("ask", "photo.png", "How many walnuts?", "--model", "t") == 1
    err = capsys.readouterr().err
    assert "the taught words in t/words.json cannot be read" in err and err.count("\n") == 1


def test_an_at_sign_may_be_part_of_a_path() -> None:
    assert read_reference("me@10,20.jpg@5,6.5") == Shown("me@10,20.jpg", 5, 6.5)
    assert read_reference("a@b/c@1,2@3,4") == Shown("a@b/c@1,2", 3, 4)


def test_copies_of_a_taught_model_say_what_becomes_of_its_words(
    folder: Path, start: Path, finds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    finds(found([]))
    assert run("teach", "walnut", "ref.png@1,2", "--model", start, "--out", "t") == 0
    assert run("quantize", "t", "int8", "--rows", "0") == 0
    assert list(read_words(Path("int8")).words) == ["walnut"]
    capsys.readouterr()
    assert run("export", "t", "exported") == 0
    assert (
        "walnut, taught beside the language model, is not part of what is exported"
        in capsys.readouterr().err
    )
    assert not (Path("exported") / "words.json").exists()
