"""What a run remembers of its losses and measurements: whether it diverges, which step was the
best, when to stop, and what to say of it at the end.

All of it is part of a checkpoint: a run that was stopped and resumed decides as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomolmo2.files import atomic_path
from nanomolmo2.training.recipe import LAST, VAL_LOSS

# A loss diverges that stays so far above that of the first step for so many steps in a row: the
# factor, what is added to it (a model that knew the answers has a loss near 0), the steps; of
# short runs a quarter of all steps is enough.
BOUNDS = ((10.0, 10.0, 3), (2.0, 2.0, 20))
LEAST_STEPS = 4
TIE = 1e-7  # less than scores of a million answers can differ by
NOTABLE = 0.01  # a smaller change of the loss, as a share of it, is noise


class Divergence:
    """Notices a loss that explodes, not one that is merely noisy."""

    def __init__(self, steps: int) -> None:
        """
        Args:
            steps: of the whole run.
        """
        self.short = max(LEAST_STEPS, steps // 4)
        self.first: float | None = None
        self.above = [0] * len(BOUNDS)  # steps in a row above each bound

    def add(self, loss: float) -> str:
        """Count the loss of a step; returns what is wrong, or ""."""
        if self.first is None:
            self.first = loss
        for k, (factor, more, steps) in enumerate(BOUNDS):
            steps = min(steps, self.short)
            bound = factor * max(self.first, 0.0) + more
            self.above[k] = self.above[k] + 1 if loss > bound else 0
            if self.above[k] >= steps:
                return (
                    f"the loss diverges: it was {self.first:.3g} at the first step, and above "
                    f"{bound:.3g} in each of the last {steps}"
                )
        return ""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, plain JSON types."""
        return {"first": self.first, "above": list(self.above)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.first, self.above = state["first"], list(state["above"])


@dataclass(frozen=True)
class Measurement:
    """What one measurement found.

    Attributes:
        step: steps done.
        scores: ``val_loss``, and ``val_`` and the name of each task.
        loss: mean training loss of the steps since the measurement before; None before the first.
    """

    step: int
    scores: dict[str, float]
    loss: float | None = None


class History:
    """All measurements of a run.

    Attributes:
        best: what chooses: ``val_loss``, the name of a task, or ``last``.
        of: what the measurements are of; values of other data are not compared with theirs.
    """

    def __init__(self, best: str = VAL_LOSS, patience: int = 0, of: str = "") -> None:
        self.choice, self.patience, self.of = best, patience, of
        self.measured: list[Measurement] = []
        self._sum, self._steps = 0.0, 0  # of the training loss since the last measurement

    @property
    def key(self) -> str:
        """The metric that chooses, as it is called in the log."""
        return VAL_LOSS if self.choice in (VAL_LOSS, LAST) else f"val_{self.choice}"

    def add_loss(self, loss: float) -> None:
        """Count the training loss of a step."""
        self._sum, self._steps = self._sum + loss, self._steps + 1

    def add(self, step: int, scores: Mapping[str, float]) -> None:
        """Note a measurement.

        Raises: ValueError if the metric that chooses is not among the scores.
        """
        if self.key not in scores:
            tasks = [name.removeprefix("val_") for name in scores if name != VAL_LOSS]
            raise ValueError(
                f"the best checkpoint is to be that of the highest {self.choice!r}, but the "
                f"validation data have {', '.join(tasks) or 'no task with a score'}: choose "
                f"(--best) {', '.join([VAL_LOSS, *tasks, LAST])}"
            )
        mean = self._sum / self._steps if self._steps else None
        self.measured.append(Measurement(step, dict(scores), mean))
        self._sum, self._steps = 0.0, 0

    def cost(self, scores: Mapping[str, float]) -> float:
        """What the best has least of; of equal scores that of the lesser loss."""
        loss = scores[VAL_LOSS]
        return loss if self.key == VAL_LOSS else TIE * loss / (1 + loss) - scores[self.key]

    @property
    def trained(self) -> list[Measurement]:
        """All but the one before the first step."""
        return [one for one in self.measured if one.step]

    @property
    def best(self) -> Measurement | None:
        """The measurement that chooses the model; of equal ones the first."""
        if self.choice == LAST or not self.trained:
            return self.trained[-1] if self.trained else None
        return min(self.trained, key=lambda one: self.cost(one.scores))

    @property
    def is_best(self) -> bool:
        """Whether the newest measurement is the best."""
        return bool(self.trained) and self.best is self.trained[-1]

    @property
    def is_over(self) -> bool:
        """Whether patience has ended."""
        if not self.patience or self.best is None:
            return False
        return len(self.trained) - 1 - self.trained.index(self.best) >= self.patience

    def line(self) -> str:
        """The newest measurement, for people."""
        newest = self.measured[-1]
        when = f"step {newest.step}" if newest.step else "before the first step"
        values = ", ".join(f"{name} {value:.4g}" for name, value in newest.scores.items())
        best = " (the best so far)" if self.is_best and self.choice != LAST else ""
        return f"{when}: {values}{best}"

    def save(self, path: Path, steps: int, said: Sequence[str]) -> None:
        """Write which step is the best, and why, as JSON for people and programs."""
        assert self.best is not None
        values = {
            "chosen_by": self.choice,
            "step": self.best.step,
            "steps": steps,
            "value": self.best.scores[self.key],
            "said": list(said),
            "measurements": [
                {"step": one.step, **one.scores, "loss": one.loss} for one in self.measured
            ],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """For a checkpoint, plain JSON types."""
        measured = [[one.step, one.scores, one.loss] for one in self.measured]
        return {"of": self.of, "measured": measured, "sum": self._sum, "steps": self._steps}

    def load(self, state: Mapping[str, Any]) -> bool:
        """Go on where `state` was taken; returns False where that was of other data or measures,
        of which nothing is kept.
        """
        if state["of"] != self.of:
            return False
        self.measured = [
            Measurement(step, dict(scores), loss) for step, scores, loss in state["measured"]
        ]
        self._sum, self._steps = state["sum"], state["steps"]
        return True


class Watch:
    """Both for one stage; ``history`` is None where nothing is measured."""

    def __init__(self, steps: int, history: History | None = None) -> None:
        self.history, self.divergence = history, Divergence(steps)

    def add_loss(self, loss: float) -> str:
        """Count the loss of a step; returns what is wrong, or ""."""
        if self.history is not None:
            self.history.add_loss(loss)
        return self.divergence.add(loss)

    @property
    def is_over(self) -> bool:
        """Whether the stage ends before its last step."""
        return self.history is not None and self.history.is_over

    def state(self) -> dict[str, Any]:
        """Both for a checkpoint."""
        history = None if self.history is None else self.history.state()
        return {"divergence": self.divergence.state(), "history": history}

    def load(self, state: Mapping[str, Any]) -> str:
        """Go on where `state` was taken; returns what people should know, or ""."""
        self.divergence.load(state["divergence"])
        if self.history is None or state["history"] is None or self.history.load(state["history"]):
            return ""
        return (
            "the run is measured otherwise, or on other data, than before it was stopped: the best "
            "step is looked for anew"
        )


# ---- words ----


def summary(history: History, steps: int) -> list[str]:
    """What to say at the end of a run of so many steps: which step was chosen, and what its curves
    advise.
    """
    if history.best is None:
        return []
    best, last, name = history.best, history.trained[-1], history.key
    values = [f"{best.scores[name]:.4g}"]
    if not history.measured[0].step:
        values.append(f"{history.measured[0].scores[name]:.4g} before the first step")
    if last is not best:
        values.append(f"{last.scores[name]:.4g} at the end")
    by = "as --best last says" if history.choice == LAST else "the best"
    said = [f"the model is that of step {best.step} of {steps}, {by}: {name} {', '.join(values)}"]
    if history.is_over:
        said.append(
            f"stopped early, at step {last.step} of {steps}: {history.patience} measurements "
            f"without a better {name}"
        )
    return said + advice(history.measured, history.is_over)


def advice(measured: Sequence[Measurement], stopped: bool = False) -> list[str]:
    """What the curves of the losses mean, and what to do."""
    values = [one.scores[VAL_LOSS] for one in measured]
    trained = [one for one in measured if one.step]
    if not trained:
        return []
    least = min(trained, key=lambda one: one.scores[VAL_LOSS])
    last = trained[-1]
    low, end = least.scores[VAL_LOSS], last.scores[VAL_LOSS]
    if measured[0].step == 0 and low > values[0] * (1 + NOTABLE):
        return [
            f"the validation loss was never below that of the start ({values[0]:.4g}): lower the "
            f"rate (--lr, --find-lr finds one), or see that the validation data are answered as "
            f"the training data are"
        ]
    then, now = _losses_around(trained, least)
    if end > low * (1 + NOTABLE) and then is not None and now < then:
        more = "" if stopped else "; --patience 3 stops by itself"
        return [
            f"it overfits: after step {least.step} the validation loss rose from {low:.4g} to "
            f"{end:.4g} while the training loss fell from {then:.4g} to {now:.4g}: more pictures "
            f"help most, else fewer steps (--steps {least.step}) or a lower rate{more}"
        ]
    before = values[-2] if len(values) > 1 else math.nan
    if last is least and end < before * (1 - NOTABLE):
        return [
            f"the validation loss was still falling at the end (from {before:.4g} to {end:.4g}): "
            f"train longer (--steps {2 * last.step})"
        ]
    return []


def _losses_around(
    trained: Sequence[Measurement], least: Measurement
) -> tuple[float | None, float]:
    """Training loss up to the least validation loss, and at the end."""
    now = trained[-1].loss
    return least.loss, math.inf if now is None else now
