from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from nanomolmo2.training.plot import PANELS, plot_runs, read_curves, smooth


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


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("loss", "loss"),
        ("val_loss", "loss"),
        ("loss_count", "loss by task"),
        ("val_count", "scores of the validation data"),
        ("val_point_f1", "scores of the validation data"),
        ("lr_llm", "learning rate by part"),
        ("evaluation/count", "evaluation"),
    ],
)
def test_every_number_is_in_one_panel(name: str, title: str) -> None:
    assert [panel for panel, wanted in PANELS.items() if wanted(name)] == [title]


def test_the_picture_has_what_was_measured(tmp_path: Path) -> None:
    """Before the first step too, beside the losses of the steps."""
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    with open(run / "log.jsonl", "a") as stream:
        for step in (0, 2):
            line = {"stage": "one", "step": step, "val_loss": 2.0 - step, "val_count": 0.5}
            stream.write(json.dumps(line) + "\n")
    curves = read_curves(run)
    assert curves["val_loss"] == ([0, 2], [2.0, 0.0])
    plot_runs([run], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


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


@pytest.mark.parametrize("half", ['{"stage": "one", "st', '{"stage": "one", "step": 9}', "\u00e9"])
def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, half: str) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    before = read_curves(run)
    with open(run / "log.jsonl", "ab") as stream:
        stream.write(half.encode()[:-1] if not half.isascii() else half.encode())
    assert read_curves(run) == before
    plot_runs([run], tmp_path / "curves.png")
    (run / "log.jsonl").write_text(half)  # the very first line
    with pytest.raises(ValueError, match="wait for its first line"):
        plot_runs([run], tmp_path / "curves.png")


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": "x"}', '{"step": null}', '{"step": 1, "evaluation": 5}', "[" * 10**5, "\udcff"),
        *(f'{{"step": {10**400}}}', f'{{"step": 6, "loss": -{10**400}}}'),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "log.jsonl", "ab") as stream:
        stream.write(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match="line 6 is not an object with a step: remove the line"):
        read_curves(run)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no such files")
@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "pipe"])
def test_a_log_that_is_no_file_is_not_read(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="expected a regular file"):
        read_curves(tmp_path)


def test_names_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name) for name in ("a$\\frac$", "b\x1b[2J")]
    plot_runs(runs, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_an_empty_log_has_no_curves(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step in the log"):
        plot_runs([tmp_path], tmp_path / "curves.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"nanomolmo2\[plot\]"):
        plot_runs([write_run(tmp_path / "a")], tmp_path / "curves.png")
