from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nanomolmo2.training.loop import LoopConfig, Stage, Stopped, run
from nanomolmo2.training.optim import OptimConfig

QUIET = LoopConfig(log_every=1, save_every=3, workers=0, quiet=True)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


class ToyStage(Stage):
    """Draws from all three generators, so that a run is only exact if all of them come back."""

    def __init__(self, learner: Toy, name: str, steps: int, at=lambda step: None) -> None:
        self.learner, self.name, self.steps, self.at = learner, name, steps, at

    def batch(self, step):
        generator = torch.Generator().manual_seed(len(self.name) * 100 + step)
        return step, torch.randn(16, 4, generator=generator)

    def components(self):
        return {"body": (self.learner.body, OptimConfig(lr=1e-2, matrix_lr=1e-2, warmup_steps=2))}

    def loss(self, batch):
        import random

        step, x = batch
        loss = (self.learner.body(x) - x[:, :2].sin()).square().mean()
        loss = loss * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        factor = self.at(step)
        return (loss if factor is None else loss * factor), {"step_seen": float(step)}


class StreamStage(ToyStage):
    """Data with a position of their own: how many numbers were drawn."""

    def batches(self, steps, state, workers):
        drawn = state["drawn"] if state else 0
        for step in steps:
            count = 3 + (drawn % 5)
            x = torch.arange(drawn, drawn + 4 * count).view(count, 4).sin()
            drawn += 4 * count
            yield (step, x), {"drawn": drawn}


def train(folder: Path, *, at=lambda step: None, kind=ToyStage, **options) -> tuple[bool, Toy]:
    toy = Toy()
    torch.manual_seed(5)
    np.random.seed(5)
    __import__("random").seed(5)
    stages = [kind(toy, "one", 7), kind(toy, "second", 5, at)]
    resume = options.pop("resume", False)
    config = LoopConfig(**{**vars(QUIET), **options})
    return run(toy, stages, folder, config, resume=resume), toy


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    found: dict[tuple[str, int], float] = {}
    for line in lines:
        assert found.setdefault((line["stage"], line["step"]), line["loss"]) == line["loss"]
    return found


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", [ToyStage, StreamStage])
@pytest.mark.parametrize("stops", [[1], [6], [7], [8], [3, 5], [2, 2, 2, 2, 2, 1]])
def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path, stops, kind):
    """Weights, moments, rates, random states and data come back, at any step of any stage."""
    finished, whole = train(tmp_path / "whole", kind=kind)
    assert finished
    folder = tmp_path / "parts"
    for count in stops:
        finished, _ = train(folder, stop_after=count, resume=folder.exists(), kind=kind)
        assert not finished
    finished, parts = train(folder, resume=True, kind=kind)
    assert finished
    assert same(whole, parts)
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_finished_run_comes_back_whole(tmp_path):
    _, whole = train(tmp_path)
    finished, again = train(tmp_path, resume=True)
    assert finished and same(whole, again)


def test_a_run_stops_at_a_step_however_often_it_is_resumed(tmp_path):
    for _ in range(2):
        finished, _ = train(tmp_path, stop_at=9, resume=True)
        assert not finished
        assert max(losses(tmp_path)) == ("second", 2)
    assert train(tmp_path, stop_at=12, resume=True)[0]


def test_workers_change_nothing(tmp_path):
    _, inline = train(tmp_path / "a")
    _, worker = train(tmp_path / "b", workers=1)
    assert same(inline, worker)


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    train(tmp_path, stop_after=2)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        train(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert checkpoints(tmp_path) == ["000000002"]


def test_a_loss_that_is_no_number_stops_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"loss is nan in stage second, step 5: the checkpoint of"):
        train(tmp_path, at=lambda step: torch.nan if step == 4 else None)
    assert checkpoints(tmp_path)[-1] == "000000010"
    assert all(np.isfinite(loss) for loss in losses(tmp_path).values())
    finished, resumed = train(tmp_path, resume=True)
    assert finished
    _, whole = train(tmp_path / "whole")
    assert same(whole, resumed)


def test_a_gradient_that_is_no_number_stops_before_the_update(tmp_path):
    """The square root has one at zero, while the loss itself is fine."""
    zero = torch.zeros(()).requires_grad_()

    class Sharp(ToyStage):
        def loss(self, batch):
            loss, metrics = super().loss(batch)
            rows = self.learner.body(batch[1])[0, 0]
            return loss + ((rows * 0) ** 2 + zero).sqrt() * (batch[0] == 1), metrics

    with pytest.raises(ValueError, match=r"gradient of body is (nan|inf) in stage one"):
        train(tmp_path, kind=Sharp)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_behind_its_step(tmp_path, number, code):
    with pytest.raises(Stopped, match="all 9 steps so far are saved") as stopped:
        train(tmp_path, at=lambda step: os.kill(os.getpid(), number) if step == 1 else None)
    assert stopped.value.code == code
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert checkpoints(tmp_path)[-1] == "000000009"
    finished, resumed = train(tmp_path, resume=True)
    assert finished
    _, whole = train(tmp_path / "whole")
    assert same(whole, resumed)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_stopped_process_ends_though_nobody_catches_it(tmp_path):
    """The error on its way out refers to the loop's variables, the workers among them."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.training.test_loop import Toy, ToyStage, run, LoopConfig\n"
        "toy = Toy()\n"
        "stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None\n"
        "stages = [ToyStage(toy, 'one', 1000, stop)]\n"
        "run(toy, stages, Path(sys.argv[1]), LoopConfig(workers=1, quiet=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "Stopped: stopped by a signal; all 3 steps" in done.stderr


def test_the_newest_checkpoints_stay_and_the_best(tmp_path):
    """In the second stage the first checkpoint has by far the least loss."""
    factors = {0: 0.0, 1: 0.0}
    train(tmp_path, save_every=1, at=lambda step: factors.get(step, 5.0))
    assert checkpoints(tmp_path) == ["000000008", "000000011", "000000012"]
    train(tmp_path / "five", save_every=1, keep=5)
    assert checkpoints(tmp_path / "five")[-5:] == [f"{n:09d}" for n in range(8, 13)]


def test_an_evaluation_chooses_the_best(tmp_path):
    class Scored(ToyStage):
        def evaluate(self):
            self.count = getattr(self, "count", 0) + 1
            return {"loss": float(abs(2 - self.count))}

    train(tmp_path, kind=Scored, evaluate_every=1, keep=1)
    assert checkpoints(tmp_path) == ["000000009", "000000012"]
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "evaluation" in x] == [*range(1, 8), *range(1, 6)]


def test_log_lines_are_means_since_the_line_before(tmp_path):
    train(tmp_path, log_every=2)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"]) for x in lines][:3] == [("one", 2), ("one", 4), ("one", 6)]
    assert lines[1]["step_seen"] == pytest.approx(2.5)
    assert {"loss", "grad_norm_body", "seconds_per_step", "data_wait"} <= lines[0].keys()


def test_a_line_that_was_begun_before_a_stop_is_the_same(tmp_path):
    train(tmp_path / "whole", log_every=4)
    train(tmp_path / "parts", log_every=4, stop_after=3)
    train(tmp_path / "parts", log_every=4, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_sentence_it_was(workers: int, tmp_path: Path) -> None:
    class Broken(ToyStage):
        def batch(self, step):
            if step == 1:
                raise ValueError("step 1 has no data: give it some")
            return super().batch(step)

    learner = Toy()
    config = LoopConfig(workers=workers, quiet=True)
    with pytest.raises(ValueError, match=r"^step 1 has no data: give it some$"):
        run(learner, [Broken(learner, "one", 3)], tmp_path, config)
