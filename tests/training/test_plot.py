from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nanomolmo2.training.plot import plot_runs, read_curves, smooth


def write_run(folder: Path, stages: tuple[str, ...] = ("one",)) -> Path:
    folder.mkdir()
    with open(folder / "log.jsonl", "w") as stream:
        for stage in stages:
            for step in range(1, 5):
                line = {"stage": stage, "step": step, "loss": 1 / step, "grad_norm_llm": 0.5}
                stream.write(json.dumps(line) + "\n")
            stream.write(json.dumps({"stage": stage, "step": 4, "evaluation": {"f1": 0.5}}) + "\n")
    return folder


def test_stages_follow_each_other(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "run", ("one", "two")))
    assert curves["loss"] == ([*range(1, 9)], [1, 1 / 2, 1 / 3, 1 / 4] * 2)
    assert curves["evaluation/f1"] == ([4, 8], [0.5, 0.5])


def test_smooth_is_a_mean_of_what_came_before() -> None:
    assert smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert smooth([1, 3], 1) == [1, 3]


def test_the_picture_has_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    plot_runs(runs, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png").convert("RGB")
    assert picture.format is None and picture.width > 1000
    colours = {colour for _, colour in picture.getcolors(2**20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two


def test_an_empty_log_has_no_curves(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step in the log"):
        plot_runs([tmp_path], tmp_path / "curves.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"nanomolmo2\[plot\]"):
        plot_runs([write_run(tmp_path / "a")], tmp_path / "curves.png")
