"""``nanomolmo2 ask`` with the golden point model: points in pixels, drawn; places in questions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.cli import ask
from nanomolmo2.cli.answering import Printer
from nanomolmo2.cli.ask import read_place
from nanomolmo2.cli.options import UsageError
from nanomolmo2.generation.answer import SELECTED
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.processor.chat import Segment
from nanomolmo2.processor.points import parse_points
from tests.golden_points import V, cases, golden_folder, picture, place_of
from tests.small_model import ScriptedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture
def lamp(tmp_path: Path) -> Path:
    """The picture of the golden case ``one``."""
    path = tmp_path / "lamp.png"
    picture(0, (150, 100)).save(path)
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanomolmo2", "ask", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    return found


def test_the_real_command(model: Path, lamp: Path, tmp_path: Path, capsys) -> None:
    """What it selects is turned into pixels; the drawing has the points; twice the same."""
    question = ("Point to the lamps.", "--model", model, "--max-new-tokens", "60")
    drawn = tmp_path / "drawn.png"
    report = json.loads(run(lamp, *question, "--json", "--draw", drawn).stdout)
    assert report["points"], report
    triples = re.findall(r"<POINT_(\d+)><POINT_(\d+)><POINT_(\d+)>(\d+)", report["text"])
    assert len(triples) == len(report["points"])
    for point, (row, slot, cell, number) in zip(report["points"], triples, strict=True):
        x, y, image = place_of("one", (V + int(row), V + int(slot), V + int(cell)))
        assert (point["x"], point["y"]) == (pytest.approx(x), pytest.approx(y))
        assert (point["image"], point["id"]) == (image, int(number))
        assert point["x_thousandths"] == round(1000 * x / 150)
        assert 0 < point["confidence"] < 1
    with Image.open(drawn) as after:
        changed = np.asarray(after) != np.asarray(picture(0, (150, 100)))
    for point in report["points"]:
        around = changed[int(point["y"]) - 2 : int(point["y"]) + 3, int(point["x"]) - 2 :]
        assert around[:, :5].any()
    assert cli.main(["ask", str(lamp), *map(str, question)]) == 0
    printed = capsys.readouterr().out  # numbers that mean something outside of the prompt
    assert not SELECTED.search(printed)
    found = parse_points(printed, [(150, 100)])
    assert [(p.id, round(p.x), round(p.y)) for p in found] == [
        (p["id"], round(p["x"]), round(p["y"])) for p in report["points"]
    ]


@pytest.mark.parametrize("size", [1, 3, 100])  # characters of a piece
@pytest.mark.parametrize(
    ("text", "coordinates"),
    [
        ("A <P> and 3 <4 <POI", "A <P> and 3 <4 <POI"),
        ("Here: <POINT_1><POINT_5>2 and <POINT_3>.", 'Here: <points coords="1 2"/> and more.'),
    ],
)
def test_an_answer_is_printed_while_it_is_written(capsys, size, text, coordinates) -> None:
    answer = types.SimpleNamespace(text=text, coordinates=coordinates)
    printer, before = Printer(), ""
    for start in range(0, len(text), size):
        printer.piece(text[start : start + size])
        before += capsys.readouterr().out
    assert coordinates.startswith(before) and len(before) > 5
    printer.end(answer)  # type: ignore[arg-type]
    assert before + capsys.readouterr().out == coordinates


def test_a_gif_as_a_video(model: Path, tmp_path: Path) -> None:
    frames = [picture(k, (90, 60)) for k in range(3)]
    clip, drawn = tmp_path / "clip.gif", tmp_path / "drawn.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500, loop=0)
    arguments = (clip, "Point to the eggs.", "--video", "--model", model, "--max-new-tokens", "60")
    report = json.loads(run(*arguments, "--json", "--draw", drawn).stdout)
    times = report["video"]["frame_times"]
    assert times[:3] == [0.0, 0.5, 1.0]
    rows = 4 * len(times)  # 2 x 2 windows of 3 x 3 patches a frame, of which 5 x 5 are there
    triples = re.findall(r"<POINT_(\d+)><POINT_(\d+)><POINT_(\d+)>(\d+)", report["text"])
    assert triples
    assert len(triples) == len(report["points"])
    for point, ids in zip(report["points"], triples, strict=True):
        row, slot, cell, number = map(int, ids)
        (frame, window), slot, cell = divmod(row, 4), slot - rows - 1, cell - rows - 1 - 9
        r, c = 3 * (window // 2) + slot // 3, 3 * (window % 2) + slot % 3
        across, down = divmod(cell, 3)
        x, y = (c + (across + 0.5) * 0.33) / 5 * 90, (r + (down + 0.5) * 0.33) / 5 * 60
        assert (point["x"], point["y"]) == (pytest.approx(x), pytest.approx(y))
        assert (point["time"], point["id"]) == (times[frame], number)
    with Image.open(drawn) as after:
        assert after.format == "GIF"


def test_the_answer_of_the_reference(
    model: Path, lamp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a prompt without turns, as the golden one, the command prints the golden points."""
    golden = cases()["one"]

    def render(chat_format: str, turns: Any, visual: Any, *rest: Any, **more: Any) -> list[Segment]:
        begin, question = (Segment(text, False, False) for text in ("\x01", turns[-1].text))
        return [begin, *visual, question]

    monkeypatch.setattr("nanomolmo2.processor.processor.render", render)
    arguments = [str(lamp), golden["prompt_text"], "--model", str(model), "--json"]
    assert cli.main(["ask", *arguments, "--max-new-tokens", "22"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["input_tokens"] == len(golden["input_ids"])
    assert SELECTED.findall(report["text"]) == SELECTED.findall(golden["greedy_text"])
    found = [[p["id"], p["image"] - 1, p["x"], p["y"]] for p in report["points"]]
    np.testing.assert_allclose(found, golden["points"], atol=1e-4)


def test_well_formed_points_are_always_on(model: Path, lamp: Path, capsys) -> None:
    """The option is of text coordinates: here it changes nothing."""
    arguments = [str(lamp), "Lamps?", "--model", str(model), "--max-new-tokens", "40", "--json"]
    assert cli.main(["ask", *arguments]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main(["ask", *arguments, "--well-formed-points"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == plain["text"]


# ---- places in questions ----


@pytest.mark.parametrize(
    ("text", "images", "is_video", "expected"),
    [
        ("120,80", 1, False, {"x": 120, "y": 80, "image": 1}),
        ("120.5, 80@2", 2, False, {"x": 120.5, "y": 80, "image": 2}),
        ("0,0@1.5s", 0, True, {"x": 0, "y": 0, "time": 1.5}),
        ("7,8@12s", 0, True, {"x": 7, "y": 8, "time": 12}),
    ],
)
def test_places(text: str, images: int, is_video: bool, expected: dict[str, Any]) -> None:
    assert read_place(text, images, is_video) == {"type": "point", **expected}


@pytest.mark.parametrize(
    ("text", "is_video", "said"),
    [
        ("120", False, "expected X,Y in pixels"),
        ("120,", False, "expected X,Y in pixels"),
        ("a,b", False, "expected X,Y in pixels"),
        ("1e3,5", False, "expected X,Y in pixels"),
        ("nan,5", False, "expected X,Y in pixels"),
        ("1,2,3", False, "expected X,Y in pixels"),
        ("1,2@", False, "expected X,Y in pixels"),
        ("1,2@1.5", False, "expected X,Y in pixels"),
        ("1,2@0", False, "names picture 0, but 2 pictures are shown"),
        ("1,2@3", False, "names picture 3, but 2 pictures are shown"),
        ("1,2@3s", False, "names a second, but no video is shown"),
        ("1,2", True, "names no second of the video"),
        ("1,2@1", True, "names no second of the video"),
    ],
)
def test_what_is_no_place(text: str, is_video: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_place(text, 2, is_video)


def test_a_place_outside_of_the_picture_loads_no_model(
    lamp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, where in (("151,5", "150 x 100"), ("5,100.5", "150 x 100"), ("-1,5", "150 x 100")):
        arguments = [str(lamp), "What is this?", f"--at={place}", "--model", str(tmp_path)]
        assert cli.main(["ask", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"nanomolmo2: --at {place} lies outside of picture 1")
        assert where in error
        assert error.count("\n") == 1


def test_a_malformed_place_is_one_line(lamp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", str(lamp), "What is this?", "--at", "here"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanomolmo2: --at is 'here', expected X,Y in pixels")
    assert error.count("\n") == 1


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    """A model of text coordinates."""
    scripted = ScriptedModel("A dog.", "A cat.")
    pipeline = Pipeline(scripted, scripted.processor)
    monkeypatch.setattr(ask, "load_pipeline", lambda name, cache_dir: pipeline)
    return scripted


def prompt_of(scripted: ScriptedModel) -> str:
    ids = scripted.calls[-1]["prompt_ids"][0].tolist()
    return scripted.processor.decode(ids, skip_special_tokens=False)


def test_other_models_get_text_coordinates(says: ScriptedModel, lamp: Path, capsys) -> None:
    assert cli.main(["ask", str(lamp), "What is this?", "--at", "75,20"]) == 0
    assert capsys.readouterr().out == "A dog.\n"
    assert "What is this?" in prompt_of(says)
    assert '<points coords="1 1 500 200">' in prompt_of(says)
    arguments = [str(lamp), str(lamp), "Same?", "--at", "75,20", "--at", "15,80@2", "--json"]
    assert cli.main(["ask", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["question"] == "Same?"
    assert report["at"] == [{"x": 75, "y": 20, "image": 1}, {"x": 15, "y": 80, "image": 2}]
    assert "1 1 500 200" in prompt_of(says)
    assert "2 1 100 800" in prompt_of(says)


def test_a_place_in_a_video(model: Path, tmp_path: Path, capsys) -> None:
    """The released model gets text: the second and thousandths."""
    frames = [picture(k, (90, 60)) for k in range(3)]
    clip = tmp_path / "clip.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500, loop=0)
    asked = ["ask", str(clip), "What is this?", "--video", "--model", str(model), "--json"]
    asked += ["--max-new-tokens", "2", "--at"]
    assert cli.main([*asked, "45,30@0.5s"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["at"] == [{"x": 45, "y": 30, "time": 0.5}]
    assert cli.main([*asked, "45,30@2.4s"]) == 0  # near enough to the last frame
    assert "warning" not in capsys.readouterr().err
    assert cli.main([*asked, "45,30@12.5s"]) == 0
    warning = "warning: --at 45,30@12.5s names a second after the last frame, which is at 1.5 s\n"
    assert warning in capsys.readouterr().err
    assert cli.main([*asked, "95,30@0.5s"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "the point (95.0, 30.0) lies outside of the video, which is 90 x 60 pixels" in error
    assert error.count("\n") == 1
