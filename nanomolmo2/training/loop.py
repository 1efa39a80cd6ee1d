"""The training loop: stages of steps, resumable at any step.

A stage is a loss over batches that depend on the step number alone, so a run that was stopped and
resumed computes the same numbers as one that never was.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanomolmo2.training.checkpoint import Checkpoint
from nanomolmo2.training.metrics import RunLog
from nanomolmo2.training.optim import OptimConfig, Optimizers


class Stage(ABC):
    """One stage of a run."""

    name: str
    steps: int

    @abstractmethod
    def batch(self, step: int) -> Any:
        """The data of a step; runs in a worker process, depends on nothing but the step."""

    @abstractmethod
    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        """What learns, and how fast."""

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and metrics to log."""

    def begin(self) -> None:
        """Called before the first step of a call, also on resume: sets what is frozen."""

    def after_step(self) -> None:
        """Called after every update."""

    def evaluate(self) -> dict[str, float]:
        """Scores to log at the end of the stage and every ``evaluate_every`` steps."""
        return {}


@dataclass(frozen=True)
class LoopConfig:
    """How a run is carried out; none of it changes the numbers, but for ``clip_norm``."""

    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 0  # 0 = only at the end of a stage
    clip_norm: float = 1.0
    workers: int = 1  # 0 = prepare data between steps
    stop_after: int | None = None  # steps of this call over all stages; the rest can be resumed
    quiet: bool = False


class _Steps(Dataset[Any]):
    """A stage's batches by step number."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> Any:
        return self.stage.batch(step)


def run(
    learner: nn.Module,
    stages: Sequence[Stage],
    folder: Path,
    config: LoopConfig | None = None,
    *,
    resume: bool = False,
) -> bool:
    """Train ``learner`` through all stages; ``folder`` gets ``checkpoint.pt`` and ``log.jsonl``.

    Returns: whether the last stage was finished.
    Raises: ValueError if the folder already holds a run and ``resume`` is off, or the loss is not
        a number.
    """
    config = config or LoopConfig()
    folder.mkdir(parents=True, exist_ok=True)
    found = Checkpoint.load(folder)
    if found is not None and not resume:
        raise ValueError(
            f"{folder} already holds a run (stage {found.stage}, step {found.step}): resume it, or "
            f"choose another folder"
        )
    if found is not None:
        learner.load_state_dict(found.weights)
    log = RunLog(folder, config.log_every, config.quiet)
    left = config.stop_after
    for number in range(found.stage if found else 0, len(stages)):
        start = found if found is not None and found.stage == number and found.optimizer else None
        done = _run_stage(learner, stages[number], number, folder, config, log, start, left)
        if left is not None:
            left -= done
        if left == 0:
            return (
                number == len(stages) - 1
                and (start.step if start else 0) + done >= stages[number].steps
            )
    return True


def _run_stage(
    learner: nn.Module,
    stage: Stage,
    number: int,
    folder: Path,
    config: LoopConfig,
    log: RunLog,
    found: Checkpoint | None,
    left: int | None,
) -> int:
    """Run one stage from where ``found`` left it; return the steps done."""
    first = 0
    stage.begin()
    optimizers = Optimizers(stage.components())
    if found is not None:
        first = found.step
        optimizers.load_state_dict(found.optimizer)
    last = stage.steps if left is None else min(stage.steps, first + left)
    loader: DataLoader[Any] = DataLoader(
        _Steps(stage),
        batch_size=None,
        sampler=range(first, last),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    learner.train()
    with log.progress(stage.name, stage.steps, first) as bar:
        for step, batch in enumerate(loader, first):
            started = time.monotonic()
            optimizers.set_rates(step, stage.steps)
            loss, metrics = stage.loss(batch)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss of stage {stage.name}, step {step} is {loss.item()}: the last "
                    f"checkpoint is intact; lower the learning rate and resume"
                )
            loss.backward()
            norms = optimizers.clip(config.clip_norm)
            optimizers.step()
            stage.after_step()
            metrics["loss"] = loss.item()
            metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
            metrics["compute_seconds"] = time.monotonic() - started
            status = log.step(stage.name, step + 1, metrics)
            bar.advance(0)  # type: ignore[arg-type]
            if status:
                bar.update(0, status=status)  # type: ignore[arg-type]
            at_end = step + 1 == last
            if at_end or (step + 1) % config.save_every == 0:
                finished = step + 1 == stage.steps
                Checkpoint(
                    number + finished,
                    0 if finished else step + 1,
                    learner.state_dict(),
                    {} if finished else optimizers.state_dict(),
                ).save(folder)
            due = config.evaluate_every and (step + 1) % config.evaluate_every == 0
            if due or step + 1 == stage.steps:
                scores = stage.evaluate()
                if scores:
                    log.write({"stage": stage.name, "step": step + 1, "evaluation": scores})
                learner.train()
    return last - first
