"""Kills: what was being written is on disk as it was before or as it should become, bit for bit.

A child saves and is killed (SIGKILL), either at the n-th time that it opens, renames or removes a
file, which is the same at every run, or at some moment. It is forked from the worker, which has
imported everything already.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.robustness.judge import Case, Surroundings

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def toy(step: int) -> nn.Module:
    """A small net; its weights follow from the number."""
    state = torch.random.get_rng_state()
    torch.manual_seed(step)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    torch.random.set_rng_state(state)
    return net


def optimizers(net: nn.Module) -> Any:
    from nanomolmo2.training.optim import OptimConfig, Optimizers

    return Optimizers({"body": (net, OptimConfig())})


def killed(work: Callable[[], Any], rng: random.Random, events: int, seconds: float) -> bool:
    """Run ``work`` in a child and kill it. Returns: whether it had come to its end before.

    Args:
        events: the child dies before one of so many things that it does to files.
        seconds: or within so many, where the draw falls on this.
    """
    at_event = rng.randrange(1, events) if rng.random() < 0.7 else None
    delay = rng.random() * seconds
    child = os.fork()
    if child == 0:
        try:
            if at_event is not None:
                _die_at(at_event)
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if at_event is None and time.monotonic() - begun > delay:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        time.sleep(0.001)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the child failed instead of being killed; its error is above")
    return os.WIFEXITED(status)


def _die_at(count: int) -> None:
    left = count

    def hook(event: str, arguments: Any) -> None:
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    kinds = (_sharded, _sharded, _checkpoint, _training, _atomic_file, _atomic_folder)
    what, call, check = rng.choice(kinds)(rng, here)
    return Case(f"killed, {what}", call, check, watched=False, seconds=120)


# ---- what is saved ----


def _sharded(
    rng: random.Random, here: Path
) -> tuple[str, Callable[[], Any], Callable[[Any], str | None]]:
    """`save_pretrained` over an older save; several files, of the same or another number."""
    from nanomolmo2.convert.pretrained import load
    from tests.robustness.checkpoints import tiny_model

    sizes = [rng.choice((20_000, 30_000, 60_000, "5GB")) for _ in range(2)]
    folder = here / "model"
    old, new = (tiny_model(seed) for seed in (0, 1))

    def call() -> Any:
        old[0].save_pretrained(folder, processor=old[1], max_shard_size=sizes[0])
        finished = killed(
            lambda: new[0].save_pretrained(folder, processor=new[1], max_shard_size=sizes[1]),
            rng,
            events=60,
            seconds=0.1,
        )
        loaded = load(str(folder))[0].state_dict()
        again = killed_not(lambda: new[0].save_pretrained(folder, processor=new[1]))
        return finished, loaded, load(str(folder))[0].state_dict(), again

    def check(found: Any) -> str | None:
        finished, loaded, repaired, _ = found
        states = [model.state_dict() for model, _ in (old, new)]
        if finished and not _equal(loaded, states[1]):
            return "the save had come to its end and is not what loads"
        if not any(_equal(loaded, state) for state in states):
            return "what loads is neither the old model nor the new one"
        if not _equal(repaired, states[1]):
            return "a later save did not mend it"
        left = [path.name for path in here.iterdir() if path.name != "model"]
        left += [path.name for path in folder.iterdir() if "tmp" in path.name or "old" in path.name]
        return f"left behind by the killed save, after the next one: {left}" if left else None

    return f"save_pretrained {sizes}", call, check


def killed_not(work: Callable[[], Any]) -> Any:
    """The same work, to its end."""
    return work()


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _checkpoint(
    rng: random.Random, here: Path
) -> tuple[str, Callable[[], Any], Callable[[Any], str | None]]:
    """Checkpoints of a training, one after the other."""
    from nanomolmo2.training.checkpoint import Checkpoints, Position

    def save() -> None:
        for step in range(1, 6):
            net = toy(step)
            Checkpoints(here).save(Position(0, step, step, score=float(step)), net, optimizers(net))

    def call() -> Any:
        finished = killed(save, rng, events=90, seconds=0.1)
        net = toy(99)
        checkpoints = Checkpoints(here)
        position = checkpoints.newest()
        if position is not None:
            checkpoints.restore(position, net, optimizers(net))
        return finished, position, net

    def check(found: Any) -> str | None:
        finished, position, net = found
        if position is None:
            return (
                "no checkpoint is left" if (here / "checkpoints" / "000000001").exists() else None
            )
        if finished and position.step != 5:
            return f"goes on from step {position.step}, though step 5 was saved"
        if not _equal(net.state_dict(), toy(position.step).state_dict()):
            return f"step {position.step} has other weights than were saved"
        left = [path.name for path in (here / "checkpoints").iterdir() if not path.name.isdigit()]
        return f"left behind: {left}" if left else None

    return "checkpoints", call, check


def _training(
    rng: random.Random, here: Path
) -> tuple[str, Callable[[], Any], Callable[[Any], str | None]]:
    """A training that is killed once or twice and resumed equals one that never was."""

    def call() -> Any:
        train(here / "whole")
        finished = killed(lambda: train(here / "parts"), rng, events=150, seconds=0.4)
        if rng.random() < 0.3:
            killed(lambda: train(here / "parts"), rng, events=150, seconds=0.4)
        return finished, train(here / "parts"), train(here / "whole")

    def check(found: Any) -> str | None:
        _, parts, whole = found
        if not _equal(parts.state_dict(), whole.state_dict()):
            return "the resumed training ends with other weights"
        logs = [losses(here / name / "log.jsonl") for name in ("parts", "whole")]
        if logs[0] != logs[1]:
            return f"the logs differ: {logs[0]} and {logs[1]}"[:400]
        return None

    return "training", call, check


def losses(log: Path) -> dict[str, list[float]]:
    """By step; lines that were written twice must be equal, which sets tell."""
    import json

    found: dict[str, set[float]] = {}
    for line in log.read_text().splitlines():
        values = json.loads(line)
        if "loss" in values:
            found.setdefault(f"{values['stage']} {values['step']}", set()).add(values["loss"])
    return {step: sorted(values) for step, values in found.items()}


def train(folder: Path) -> nn.Module:
    """A toy run of two stages, begun or gone on with; draws from all three generators."""
    import numpy as np

    from nanomolmo2.training.loop import LoopConfig, Stage, run
    from nanomolmo2.training.optim import OptimConfig

    class ToyStage(Stage):
        def __init__(self, learner: nn.Module, name: str, steps: int) -> None:
            self.learner, self.name, self.steps = learner, name, steps

        def batch(self, step: int) -> object:
            generator = torch.Generator().manual_seed(len(self.name) * 100 + step)
            return torch.randn(8, 4, generator=generator)

        def components(self) -> Any:
            return {"body": (self.learner, OptimConfig(lr=1e-2, matrix_lr=1e-2, warmup_steps=2))}

        def loss(self, batch: Any) -> Any:
            loss = (self.learner(batch) - batch[:, :2].sin()).square().mean()
            return loss * (
                1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())
            ), {}

    net = toy(7)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    try:
        config = LoopConfig(log_every=1, save_every=2, workers=0, quiet=True)
        stages = [ToyStage(net, "one", 5), ToyStage(net, "second", 4)]
        run(net, stages, folder, config, resume=(folder / "checkpoints").exists())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
    return net


def _atomic_file(
    rng: random.Random, here: Path
) -> tuple[str, Callable[[], Any], Callable[[Any], str | None]]:
    from nanomolmo2.files import atomic_path

    path = here / "a.json"
    versions = [bytes([number]) * 200_000 for number in range(40)]

    def save() -> None:
        for version in versions:
            with atomic_path(path) as aside, aside.open("wb") as stream:
                for start in range(0, len(version), 10_000):
                    stream.write(version[start : start + 10_000])

    def call() -> Any:
        path.write_bytes(versions[0])
        killed(save, rng, events=100, seconds=0.05)
        return path.read_bytes()

    return "a file", call, lambda found: None if found in versions else "neither old nor new"


def _atomic_folder(
    rng: random.Random, here: Path
) -> tuple[str, Callable[[], Any], Callable[[Any], str | None]]:
    """A folder that replaces another; between two renames it may be gone, but not half there."""
    from nanomolmo2.files import atomic_path

    path = here / "data"

    def save() -> None:
        for version in range(1, 20):
            with atomic_path(path) as aside:
                aside.mkdir()
                for number in range(5):
                    (aside / f"{number}.txt").write_text(f"{version}")

    def call() -> Any:
        killed(save, rng, events=200, seconds=0.05)
        places = [path] if path.exists() else [p for p in here.iterdir() if ".old-" in p.name]
        return [sorted(file.read_text() for file in place.iterdir()) for place in places]

    def check(found: Any) -> str | None:
        for texts in found:
            if len(texts) != 5 or len(set(texts)) != 1:
                return f"a folder of several versions: {texts}"
        return None

    return "a folder", call, check


FOUND: dict[str, Any] = {}
