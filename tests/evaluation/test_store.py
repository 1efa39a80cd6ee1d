"""The folder of an evaluation: what is in it; and one that was ended and goes on is as if never."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from nanomolmo2.emoji.write import write_scenes
from nanomolmo2.evaluation import evaluate
from nanomolmo2.evaluation.report import TRUE_COLOUR
from nanomolmo2.generation.pipeline import Pipeline
from tests.evaluation.test_run import scripted, tag, write
from tests.small_model import small_model, small_processor

FILES = {
    "evaluation.json",
    "predictions.jsonl",
    "report.json",
    "table.md",
    "index.html",
    "pictures",
}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines(folder: Path) -> list[dict]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_has_every_answer_and_a_page_of_the_worst(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "Is it <b>?", "answer": "Yes.", "task": "is"},
        {"question": "Point to it.", "boxes": [[20, 20, 60, 60]]},
    )
    out = tmp_path / "out"
    report = evaluate(scripted("No.", tag((800, 200))), path, batch_size=1, out=out)
    assert {p.name for p in out.iterdir()} == FILES
    first, second = lines(out)
    assert first["number"] == 0 and first["record"] == "my, record 0"
    white = {"path": str(tmp_path / "white.png"), "width": 200, "height": 100}
    assert first["images"] == second["images"] == [white]
    assert (first["task"], first["question"], first["answer"]) == ("is", "Is it <b>?", "No.")
    assert (first["truth"], first["score"]) == ({"answers": ["Yes."]}, 0)
    assert second["truth"] == {"boxes": [[20, 20, 60, 60]]}
    assert [(p["x"], p["y"]) for p in second["points"]] == [(160, 20)]
    assert json.loads((out / "report.json").read_text())["scores"] == {"is": 0, "point": 0}
    table = (out / "table.md").read_text(encoding="utf-8")
    assert report.table() in table and "F1 of points" in table
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Is it &lt;b&gt;?" in page and "<b>?" not in page
    shown = re.findall(r'src="([^"]+)"', page)
    assert len(shown) == 2
    drawn = Image.open(out / shown[1])
    green = tuple(bytes.fromhex(TRUE_COLOUR[1:]))
    assert drawn.size == (400, 200)
    assert drawn.getpixel((40, 80)) == green  # the left edge of the true box, twice as large
    assert drawn.getpixel((320, 45)) != (255, 255, 255)  # the point of the answer


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    path = write(tmp_path, *({"question": "?", "answer": a} for a in "abc"))
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    model = scripted(*["a", "b", "x"] * 2)
    evaluate(model, path, batch_size=1, out=whole)
    evaluate(model, path, batch_size=1, out=ended)
    answers = ended / "predictions.jsonl"
    text = answers.read_bytes()
    answers.write_bytes(text[: text.index(b"\n") + 20])  # one line, and a piece of the next
    model.model.llm.texts[:] = ["b", "x"]
    evaluate(model, path, batch_size=1, out=ended)
    assert model.model.llm.texts == []
    assert contents(ended) == contents(whole)


def test_answers_of_the_model_beside_it_are_kept_too(tmp_path: Path) -> None:
    path = write(tmp_path, *({"question": "?", "answer": a} for a in "ab"))
    out = tmp_path / "out"
    model, other = scripted("a", "b"), scripted("a", "x")
    first = evaluate(model, path, batch_size=1, baselines=other, out=out)
    before = contents(out)
    again = evaluate(model, path, batch_size=1, baselines=other, out=out)  # nothing is left to say
    assert first.rows[0].baselines["untrained model"] == 0.5
    assert first.to_dict() == again.to_dict() and contents(out) == before
    assert "predictions-untrained.jsonl" in before


def test_a_quantised_model_is_known_again(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "?", "answer": "a"})
    for mode, expected in (("int8", None), ("int8", None), (None, "model digest")):
        pipeline = Pipeline.from_pretrained("tiny", quantize=mode)
        with nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
            evaluate(pipeline, path, out=tmp_path / "out")


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "?", "answer": "a"})
    out = tmp_path / "out"
    pipeline = Pipeline(small_model(), small_processor())
    evaluate(pipeline, path, out=out)
    before = contents(out)
    with pytest.raises(ValueError, match="differs in: scorer"):
        evaluate(pipeline, path, out=out, scorer="anls")
    with pytest.raises(ValueError, match="differs in: model digest"):
        evaluate(Pipeline(small_model(1), small_processor()), path, out=out)
    write(tmp_path, {"question": "?", "answer": "b"})
    with pytest.raises(ValueError, match="answers another question"):
        evaluate(pipeline, path, out=out)
    write(tmp_path, *({"question": "?", "answer": a} for a in "ab"))
    with pytest.raises(ValueError, match="differs in: records, questions"):
        evaluate(pipeline, path, out=out)
    write(tmp_path, {"question": "?", "answer": "a"})
    Image.new("RGB", (200, 100), "red").save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="differs in: pictures digest"):
        evaluate(pipeline, path, out=out)
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        evaluate(pipeline, path, out=tmp_path / "mine")


def test_a_changed_weight_makes_another_model(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "?", "answer": "a"})
    model = small_model()
    evaluate(Pipeline(model, small_processor()), path, out=tmp_path / "out")
    model.llm.norm.weight.data[0] += 1e-3
    with pytest.raises(ValueError, match="differs in: model digest"):
        evaluate(Pipeline(model, small_processor()), path, out=tmp_path / "out")


@pytest.mark.slow
def test_killed_in_the_middle_and_called_again(tmp_path: Path) -> None:
    """SIGKILL, as the memory killer sends it: the same command ends with what one go gives."""
    write_scenes(tmp_path / "scenes", 1, split="test")
    data = tmp_path / "scenes" / "own.jsonl"
    nouns = ("dog", "cat", "snail", "apple", "car", "star") * 3
    records = ({"question": f"How many {noun}s are there?", "answer": "1"} for noun in nouns)
    picture = {"image": "images/000000.png"}
    data.write_text("".join(json.dumps({**picture, **r}) + "\n" for r in records))
    whole, ended = tmp_path / "whole", tmp_path / "ended"

    def command(out: Path) -> list[str]:
        arguments = ["eval", str(data), "--model", "tiny", "--batch-size", "1", "--out", str(out)]
        return [sys.executable, "-m", "nanomolmo2", *arguments]

    answers = ended / "predictions.jsonl"
    with subprocess.Popen(command(ended), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        end = time.monotonic() + 120
        while not (answers.exists() and answers.stat().st_size) and time.monotonic() < end:
            assert run.poll() is None, run.stderr
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
    begun = len(answers.read_bytes().splitlines())
    done = subprocess.run(command(ended), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    about = {"model": "tiny", "untrained": None}
    evaluate(Pipeline.from_pretrained("tiny"), data, batch_size=1, out=whole, about=about)
    assert 0 < begun < len(lines(whole)) == len(lines(ended))
    assert contents(ended) == contents(whole)
