from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nanomolmo2.training.checkpoint import FILE, Checkpoint
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.optim import OptimConfig

QUIET = LoopConfig(log_every=1, save_every=3, workers=0, quiet=True)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class ToyStage(Stage):
    def __init__(self, learner: Toy, name: str, steps: int, broken_at: int | None = None) -> None:
        self.learner, self.name, self.steps, self.broken_at = learner, name, steps, broken_at

    def batch(self, step):
        generator = torch.Generator().manual_seed(hash((len(self.name), step)))
        return step, torch.randn(16, 4, generator=generator)

    def components(self):
        return {"body": (self.learner.body, OptimConfig(lr=1e-2, matrix_lr=1e-2, warmup_steps=2))}

    def loss(self, batch):
        step, x = batch
        loss = (self.learner.body(x) - x[:, :2].sin()).square().mean()
        return (loss * torch.nan if step == self.broken_at else loss), {"step_seen": float(step)}


def train(folder: Path, *, broken_at: int | None = None, **options) -> tuple[bool, Toy]:
    toy = Toy()
    stages = [ToyStage(toy, "one", 7), ToyStage(toy, "second", 5, broken_at)]
    resume = options.pop("resume", False)
    config = LoopConfig(**{**vars(QUIET), **options})
    return run(toy, stages, folder, config, resume=resume), toy


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


@pytest.mark.parametrize("stops", [[1], [6], [7], [8], [3, 5], [2, 2, 2, 2, 2, 1]])
def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path, stops):
    """Weights, moments, schedule and data position come back, at any step of any stage."""
    finished, whole = train(tmp_path / "whole")
    assert finished
    folder = tmp_path / "parts"
    for count in stops:
        finished, _ = train(folder, stop_after=count, resume=folder.exists())
        assert not finished
    finished, parts = train(folder, resume=True)
    assert finished
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses(folder) == losses(tmp_path / "whole")


def test_workers_change_nothing(tmp_path):
    _, inline = train(tmp_path / "a")
    _, worker = train(tmp_path / "b", workers=1)
    for a, b in zip(inline.parameters(), worker.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    train(tmp_path, stop_after=2)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        train(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_loss_that_is_no_number_stops_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="stage second, step 4"):
        train(tmp_path, broken_at=4)
    found = Checkpoint.load(tmp_path)
    assert found is not None and (found.stage, found.step) == (1, 3)
    finished, _ = train(tmp_path, resume=True)
    assert finished


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="no readable training checkpoint"):
        train(tmp_path, resume=True)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save(Payload(), tmp_path / FILE)
    with pytest.raises(ValueError, match="no readable training checkpoint"):
        Checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_log_lines_are_means_since_the_line_before(tmp_path):
    train(tmp_path, log_every=2)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"]) for x in lines][:3] == [("one", 2), ("one", 4), ("one", 6)]
    assert lines[1]["step_seen"] == pytest.approx(2.5)
    assert {"loss", "grad_norm_body", "seconds_per_step"} <= lines[0].keys()
