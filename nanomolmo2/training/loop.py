"""The training loop: stages of steps, resumable at any step.

A run that was stopped, or killed, and resumed computes the same numbers as one that never was:
checkpoints hold weights, moments, random states and the position of the data, and rates follow from
the step number.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nanomolmo2.data.loader import ignore_signals
from nanomolmo2.data.worker import guarded, received
from nanomolmo2.training.checkpoint import Checkpoints, Position, Start, is_sharded
from nanomolmo2.training.distributed import (
    World,
    average_gradients,
    gather_objects,
    sum_over_ranks,
)
from nanomolmo2.training.fingerprint import changed
from nanomolmo2.training.metrics import RunLog, Tracker, info_to_people
from nanomolmo2.training.optim import OptimConfig, Optimizers, Selection
from nanomolmo2.training.recipe import LAST, VAL_LOSS
from nanomolmo2.training.run_folder import Resume, check_space, claimed
from nanomolmo2.training.watch import History, Watch


class Stage(ABC):
    """One stage of a run.

    The plain kind gives `batch` and `loss`. One whose data have a position of their own gives
    `batches`; one that takes a step in several passes gives `gradients`.
    """

    name: str
    steps: int
    watch: Watch | None = None  # stops a run that diverges, or that no longer improves

    @abstractmethod
    def components(self) -> Mapping[str, tuple[nn.Module | Selection, OptimConfig]]:
        """What learns, and how fast."""

    def optimizers(self) -> Optimizers:
        """The optimisers of `components`."""
        return Optimizers(self.components())

    def batch(self, step: int) -> object:
        """The data of a step; runs in a worker process, depends on nothing but the step."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and metrics to log."""
        raise NotImplementedError

    def batches(self, steps: range, state: Any, workers: int) -> Generator[tuple[Any, Any]]:
        """The data of some steps, each with the state that leads on behind it.

        Args:
            state: the one that came with the step before ``steps``; None at the beginning.
            workers: processes that prepare data; 0 = prepare them between steps.
        """
        loader: DataLoader[Any] = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it draws from the one that training draws from
        )
        made: Any = iter(loader)
        try:
            for _ in steps:
                yield received(made), None
        finally:
            if workers:
                # Left to the garbage collector, a worker may not be told and be waited for.
                made._shutdown_workers()

    def sources(self) -> dict[str, str] | None:
        """Fingerprints of the files that the data come from, by path; called on one rank."""
        return None

    def sources_changed(self) -> None:
        """Called on resume where `sources` are not what they were; on every rank."""

    def remarks(self, batch: Any) -> Sequence[str]:
        """What people should hear about a batch, such as what was left out of it."""
        return ()

    def join_ranks(self, state: Any) -> object:
        """The state of the data for a checkpoint, of what every rank has; called on all of them."""
        return state

    def gradients(self, batch: Any) -> dict[str, float | Tensor]:
        """Add up the gradients of a step; returns metrics, ``loss`` among them.

        A metric may be a tensor without dimensions: the loop reads them all at once, so that the
        host waits for a GPU once a step. One that is nan is left out, but for the loss.
        """
        loss, metrics = self.loss(batch)
        loss.backward()
        return {**metrics, "loss": loss.detach()}

    def begin(self) -> None:
        """Called before the first step of a call, also on resume: sets what is frozen."""

    def after_step(self) -> None:
        """Called after every update."""

    def evaluate(self) -> dict[str, float]:
        """Scores to log at the end of the stage and every ``evaluate_every`` steps.

        A ``loss`` among them chooses the best checkpoint; else the loss of the steps does. Where
        there is a `History` that does, and the model is measured before the first step too.
        """
        return {}

    def lower_rate(self) -> str:
        """What to try where the rate is too high."""
        return "lower the learning rate"

    @property
    def history(self) -> History | None:
        """What is remembered of the measurements, if there are any."""
        return None if self.watch is None else self.watch.history


@dataclass(frozen=True)
class LoopConfig:
    """How a run is carried out; none of it changes the numbers, but for ``clip_norm``."""

    log_every: int = 20
    save_every: int = 200  # steps of a stage; its last step is saved always
    keep: int = 2  # newest checkpoints that stay, beside the best
    evaluate_every: int = 0  # 0 = only at the end of a stage
    clip_norm: float = 1.0
    workers: int = 1  # 0 = prepare data between steps
    stop_after: int | None = None  # steps of this call over all stages; the rest can be resumed
    stop_at: int | None = None  # steps of the whole run, likewise
    quiet: bool = False


class Stopped(Exception):
    """A signal ended the run; what was done is saved.

    Attributes:
        code: exit code of the process: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


def run(
    model: nn.Module,
    stages: Sequence[Stage],
    folder: Path,
    config: LoopConfig | None = None,
    *,
    resume: Resume = False,
    world: World | None = None,
    trackers: Sequence[Tracker] = (),
    start: Start | None = None,
) -> bool:
    """Train ``model`` through all stages; ``folder`` gets ``checkpoints`` and ``log.jsonl``.

    Args:
        resume: go on behind the newest checkpoint. Where there is none the run starts anew, and a
            line says so; "required" makes that an error.
        start: weights that stay through all stages, and are left out of checkpoints.
    Returns: whether the last stage was finished.
    Raises: ValueError if the folder already holds a run and ``resume`` is off, or it is in use,
        or the loss is not a number; OSError if a file cannot be written; Stopped
        after SIGTERM or Ctrl-C. The last checkpoint is intact after all of them.
    """
    config = config or LoopConfig()
    info = info_to_people(config.quiet)
    with claimed(folder, resume, world=world, shared=True, info=info):
        return _Run(model, stages, folder, config, world, trackers, start).go(resume)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        folder: Path,
        config: LoopConfig,
        world: World | None,
        trackers: Sequence[Tracker],
        start: Start | None,
    ) -> None:
        self.model, self.stages, self.folder, self.config = model, stages, folder, config
        self.world = world or World()
        main = self.world.is_main
        self.log = RunLog(folder, config.log_every, config.quiet or not main, trackers, main)
        self.checkpoints = Checkpoints(folder, config.keep, self.log.info, self.world, start)
        self.saved = 0  # steps done at the last checkpoint
        self.losses: list[float] = []  # since then
        self.sources: dict[str, str] | None = None  # of the stage

    def go(self, resume: Resume) -> bool:
        found = self.checkpoints.newest() if resume else None
        position = found or Position(stage=0, step=0, done=0)
        if position.stage >= len(self.stages):
            raise ValueError(
                f"the checkpoint in {self.folder} is of stage {position.stage + 1}, but this run "
                f"has {len(self.stages)}: resume with what the run was started with"
            )
        self.saved = position.done
        self._recall(position)
        self.log.restart(position.log)
        last = self._last_step(position.done)
        try:
            with _StopRequest() as stop:
                while True:
                    stage = self.stages[position.stage]
                    is_done = position.step >= stage.steps or _is_over(stage)
                    if is_done and found is not None:
                        self._restore_weights(found)
                        found = None
                    if is_done and position.stage + 1 < len(self.stages):
                        position = Position(position.stage + 1, 0, position.done)
                    elif is_done or position.done >= last:
                        return is_done
                    else:
                        position = self._run_stage(position, found, last, stop)
                        found = None
        finally:
            self.log.close()

    def _restore_weights(self, found: Position) -> None:
        # Shards are read with their moments or not at all.
        optimizers = self.stages[found.stage].optimizers() if is_sharded(self.model) else None
        self.checkpoints.restore(found, self.model, optimizers)

    def _recall(self, position: Position) -> None:
        watch = self.stages[position.stage].watch
        if (
            watch is not None
            and position.watch is not None
            and (text := watch.load(position.watch))
        ):
            self.log.info(text)

    def _last_step(self, done: int) -> float:
        config, last = self.config, math.inf
        if config.stop_after is not None:
            last = done + config.stop_after
        return last if config.stop_at is None else min(last, config.stop_at)

    def _run_stage(
        self, position: Position, found: Position | None, last: float, stop: _StopRequest
    ) -> Position:
        """Run one stage as far as ``last`` allows; return where the run then stands."""
        config, stage = self.config, self.stages[position.stage]
        stage.begin()
        optimizers = stage.optimizers()
        left_out = self.checkpoints.start.names
        check_space(self.folder, checkpoint_bytes(self.model, optimizers, left_out))
        self._note_sources(stage, found)
        if found is not None:
            self.checkpoints.restore(found, self.model, optimizers)
        end = int(min(stage.steps, position.step + last - position.done))
        batches = stage.batches(range(position.step, end), position.data, config.workers)
        self.model.train()
        if stage.history is not None and not position.step:
            self._evaluate(stage, 0)
        self.log.start_clock()
        stopping = False
        # Closed by hand: workers that an error in flight still refers to would outlive the loop,
        # and do not hear the signals by which Python ends its children.
        with closing(batches), self.log.progress(stage.name, stage.steps, position.step) as bar:
            while position.step < end and not stopping and not _is_over(stage):
                started = time.monotonic()
                try:
                    batch, data = next(batches)
                except Exception:  # workers that got the signal too are gone
                    if not stop.number or self.world.size > 1:
                        raise
                    stopping = True
                    break
                waited = time.monotonic() - started
                for text in stage.remarks(batch):
                    self.log.info(text)
                metrics = self._step(stage, optimizers, position.step, batch)
                metrics |= {
                    "wait_seconds": waited,
                    "compute_seconds": time.monotonic() - started - waited,
                }
                step = position.step + 1
                status = self.log.step(stage.name, step, metrics)
                bar.update(TaskID(0), completed=step)
                if status:
                    bar.update(TaskID(0), status=status)
                self._count(stage, step, metrics["loss"])
                scores = {}
                if step == stage.steps or self._is_due(config.evaluate_every, step):
                    scores = self._evaluate(stage, step)
                position = Position(position.stage, step, position.done + 1, data)
                stopping = self._agreed(stop)
                is_due = step == end or self._is_due(config.save_every, step) or _is_over(stage)
                if is_due or _is_worth_keeping(stage, scores) or stopping:
                    self._save(stage, position, optimizers, scores)
        if stopping:
            self._save(stage, position, optimizers, {})
            raise Stopped(
                f"stopped by a signal; all {position.done} steps so far are saved", stop.number
            )
        return position

    def _count(self, stage: Stage, step: int, loss: float) -> None:
        """Remember the loss of a step.

        Raises: ValueError if the losses diverge.
        """
        self.losses.append(loss)
        if stage.watch is not None and (problem := stage.watch.add_loss(loss)):
            raise ValueError(
                f"{problem} in stage {stage.name}, step {step}: {self._saved()}; resuming alone "
                f"would come to the same, so start again and {stage.lower_rate()}"
            )

    def _saved(self) -> str:
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {self.saved} is intact"

    def _note_sources(self, stage: Stage, found: Position | None) -> None:
        """Remember what the data are made of, and say so if they were changed meanwhile."""
        names: list[str] = []
        if self.world.is_main:
            self.sources = stage.sources()
            before = None if found is None else found.sources
            names = changed(before or {}, self.sources or {})
        if self.world.size > 1:
            names = gather_objects(names)[0]
        if names:
            stage.sources_changed()
        for path in names:
            self.log.info(
                f"{path} is not what it was when this run was stopped: it goes on with what the "
                f"data hold now, and may end elsewhere than one that was never stopped"
            )

    def _step(
        self, stage: Stage, optimizers: Optimizers, step: int, batch: Any
    ) -> dict[str, float]:
        """One update; returns its metrics."""
        optimizers.set_rates(step, stage.steps)
        found = stage.gradients(batch)
        if self.world.size > 1 and not is_sharded(self.model):
            average_gradients(self.model, self.world)
        norms = optimizers.clip(self.config.clip_norm)
        metrics = read_metrics({**found, **{f"grad_norm_{name}": n for name, n in norms.items()}})
        metrics |= {f"lr_{name}": rate for name, rate in optimizers.rates().items()}
        self._check("loss", metrics["loss"], stage, step)
        for name in norms:
            self._check(f"gradient of {name}", metrics[f"grad_norm_{name}"], stage, step)
        optimizers.step()
        stage.after_step()
        return metrics

    def _check(self, name: str, value: float, stage: Stage, step: int) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} is {value} in stage {stage.name}, step {step + 1}: {self._saved()}; "
                f"resuming alone would come to the same, so {stage.lower_rate()}, or look at the "
                f"data of this step"
            )

    def _evaluate(self, stage: Stage, step: int) -> dict[str, float]:
        started = time.monotonic()
        scores = stage.evaluate()
        if stage.history is not None:  # which may refuse them: nothing is written then
            self._check(VAL_LOSS, scores[VAL_LOSS], stage, step - 1)
            stage.history.add(step, scores)
            self.log.measured(stage.history.line(), f"{VAL_LOSS} {scores[VAL_LOSS]:.3f}")
        if scores:
            apart = {n: score for n, score in scores.items() if not n.startswith("val_")}
            line: dict[str, Any] = {n: score for n, score in scores.items() if n.startswith("val_")}
            if apart:
                line["evaluation"] = apart
            self.log.write({"stage": stage.name, "step": step, **line})
        self.model.train()
        self.log.leave_out(time.monotonic() - started)
        return scores

    def _save(
        self, stage: Stage, position: Position, optimizers: Optimizers, scores: dict[str, float]
    ) -> None:
        if position.done == self.saved:
            return
        position.data = stage.join_ranks(position.data)
        position.score = scores.get("loss", sum(self.losses) / len(self.losses))
        if (history := stage.history) is not None:  # only where it was measured
            position.score = history.cost(scores) if scores and history.choice != LAST else None
            position.scored_by = history.of
        position.watch = None if stage.watch is None else stage.watch.state()
        position.log, position.sources = self.log.state(), self.sources
        self.checkpoints.save(position, self.model, optimizers)
        self.saved, self.losses = position.done, []

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _agreed(self, stop: _StopRequest) -> bool:
        """Whether any rank was told to stop: one that stopped alone would leave others waiting."""
        if self.world.size > 1:
            number = sum_over_ranks(torch.tensor(stop.number, device=self.world.device))
            stop.number = max(stop.number, int(number > 0) * signal.SIGTERM)
        return stop.number > 0


def _is_over(stage: Stage) -> bool:
    return stage.watch is not None and stage.watch.is_over


def _is_worth_keeping(stage: Stage, scores: Mapping[str, float]) -> bool:
    """Whether these scores call for a checkpoint."""
    if stage.history is None or not scores:
        return bool(scores)
    return stage.history.is_best and stage.history.choice != LAST


def checkpoint_bytes(
    model: nn.Module, optimizers: Optimizers, left_out: Collection[str] = ()
) -> int:
    """Bytes of the weights, less those left out, and of the moments that they will have."""
    moments = {"adamw": 2, "muon": 1}
    weights = sum(
        tensor.numel() * tensor.itemsize
        for name, tensor in model.state_dict().items()
        if name not in left_out
    )
    return weights + sum(
        moments[name] * parameter.numel() * parameter.itemsize
        for name, part in optimizers.parts.items()
        for group in part.param_groups
        for parameter in group["params"]
    )


def read_metrics(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Plain numbers, in the same order; all that are on a device come in one transfer."""
    names = [n for n, value in metrics.items() if isinstance(value, Tensor)]
    scalars = [value.detach() for value in metrics.values() if isinstance(value, Tensor)]
    on_device = [x for x in scalars if x.device.type != "cpu"]
    read = iter(torch.stack([x.float() for x in on_device]).tolist() if on_device else [])
    values = {
        name: next(read) if x.device.type != "cpu" else x.item()
        for name, x in zip(names, scalars, strict=True)
    }
    numbers = {name: values.get(name, value) for name, value in metrics.items()}
    return {name: float(v) for name, v in numbers.items() if not _left_out(name, float(v))}


def _left_out(name: str, value: float) -> bool:
    return math.isnan(value) and name.startswith(("loss_", "accuracy_"))


class _StopRequest:
    """SIGTERM and Ctrl-C ask for an end behind the step; a second one ends the process at once."""

    number = 0  # of the signal that came

    def __enter__(self) -> _StopRequest:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        self.__exit__()


class _Steps(Dataset[Any]):
    """A stage's batches by step number."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> object:
        if get_worker_info() is None:
            return self.stage.batch(step)
        return guarded(lambda: self.stage.batch(step))
