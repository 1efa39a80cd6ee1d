from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from nanomolmo2.training.metrics import RunLog, open_trackers, read_log


def step(log: RunLog, number: int, **metrics: float) -> None:
    log.step("one", number, {"loss": 1 / 3, **metrics})


def test_the_loss_keeps_all_digits(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, quiet=True)
    step(log, 1, other=1 / 3)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["loss"], line["other"]) == (1 / 3, 0.33333)


def test_means_are_over_the_steps_that_had_the_metric(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, quiet=True)
    step(log, 1, loss_count=4.0, tokens=100)
    step(log, 2, tokens=300, wait_seconds=0.0)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["loss_count"] == 4.0
    assert line["tokens"] == 200
    assert line["tokens_per_second"] > 0 and line["data_wait"] == 0


def test_half_a_line_is_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    step(RunLog(tmp_path, 1, quiet=True), 2)
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, quiet=True)
    step(log, 1)
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"log.jsonl could not be written .* is intact"):
            step(log, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    step(RunLog(tmp_path, 1, quiet=True, writes=False), 1)
    assert os.listdir(tmp_path) == []


def test_of_a_repeated_step_the_last_line_counts(tmp_path: Path) -> None:
    lines = [("a", 1, 5.0), ("a", 2, 4.0), ("a", 2, 3.0), ("b", 1, 2.0)]
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"stage": s, "step": n, "loss": x}) + "\n" for s, n, x in lines)
    )
    assert [line["loss"] for line in read_log(tmp_path)] == [5.0, 3.0, 2.0]


def test_logs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a training run"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match="line 2 is not an object with a step"):
        read_log(tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_names_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=rf"nanomolmo2\[{name}\]"):
        open_trackers([name], tmp_path, {})


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_get_every_line(name: str, tmp_path: Path, monkeypatch) -> None:
    calls: list[tuple[str, object]] = []

    class Module:
        init = staticmethod(lambda **options: calls.append(("init", options["name"])))
        log = staticmethod(lambda values, step: calls.append(("log", (step, values["loss"]))))
        finish = staticmethod(lambda: calls.append(("finish", None)))

    monkeypatch.setitem(__import__("sys").modules, name, Module)
    log = RunLog(tmp_path, 1, quiet=True, trackers=open_trackers([name], tmp_path, {}))
    step(log, 1)
    log.close()
    assert calls == [("init", tmp_path.name), ("log", (1, 1 / 3)), ("finish", None)]
