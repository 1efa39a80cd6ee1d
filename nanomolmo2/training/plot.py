"""Curves of training runs as one picture: loss, validation, rates, gradient norms, speed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanomolmo2.checks import written
from nanomolmo2.terminal import visible
from nanomolmo2.training.metrics import LOSSES_OF_TERMS, read_log

PANELS = {
    "loss": lambda name: name in ("loss", "val_loss"),
    "loss by term": lambda name: name in LOSSES_OF_TERMS,
    "loss by task": lambda name: (
        name not in LOSSES_OF_TERMS
        and (name.startswith("loss_") or (name.endswith("_loss") and name != "val_loss"))
    ),
    "share that is right": lambda name: (
        not name.startswith(("evaluation/", "val_"))
        and ("accuracy" in name or name.endswith("_f1"))
    ),
    "scores of the validation data": lambda name: name.startswith("val_") and name != "val_loss",
    "learning rate by part": lambda name: name.startswith("lr_"),
    "gradient norm by part": lambda name: name.startswith("grad_norm_"),
    "tokens a second": lambda name: name == "tokens_per_second",
    "share of padding, and of time waiting for data": lambda name: name in ("padding", "data_wait"),
    "evaluation": lambda name: name.startswith("evaluation/"),
}
MOST_LABELS = 16  # in a legend; with more it would hide the curves


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Draw the logs of some runs into a PNG; a panel for whatever there is.

    Raises: as `read_log`; ValueError for logs without a step; ImportError naming the extra.
    """
    curves = {folder: read_curves(folder) for folder in folders}
    panels = {
        title: wanted
        for title, wanted in PANELS.items()
        if any(wanted(name) for found in curves.values() for name in found)
    }
    if not panels:
        raise ValueError(
            f"there is no step in the log of {folders[0]} yet: wait for its first line"
        )
    figure, axes = _figure(len(panels))
    for (title, wanted), axis in zip(panels.items(), axes, strict=True):
        for folder, found in curves.items():
            for name, (steps, values) in found.items():
                if wanted(name):
                    label = name if len(folders) == 1 else f"{folder.name} {name}"
                    _draw(axis, steps, values, visible(label).replace("$", r"\$"))  # no formula
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[0]) <= MOST_LABELS:
            axis.legend(fontsize=7)
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_rates(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggested: float | None,
    path: Path,
) -> None:
    """Draw the losses at growing rates, see `training.find_lr`, into a PNG.

    Raises: ImportError naming the extra.
    """
    figure, (axis,) = _figure(1)
    axis.plot(rates, losses, alpha=0.3, linewidth=0.8, label="loss")
    axis.plot(rates, smoothed, linewidth=1.4, label="smoothed")
    if suggested is not None:
        axis.axvline(suggested, color="black", linewidth=0.8, label=f"suggested: {suggested:.2g}")
    axis.set_xscale("log")
    axis.set_title("loss by learning rate", fontsize=10)
    axis.set_xlabel("learning rate", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def read_curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """name -> (steps, values) of every number in a log. Steps of several stages are added up."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    stage, before, last = None, 0, 0
    for line in read_log(folder):
        if line.get("stage") != stage:
            stage, before = line.get("stage"), last
        last = before + line["step"]
        evaluation = {f"evaluation/{n}": v for n, v in line.get("evaluation", {}).items()}
        for name, value in {**line, **evaluation}.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(last)
                values.append(float(value))
    return curves


def smooth(values: Sequence[float], span: int) -> list[float]:
    """The mean of each value and up to ``span - 1`` before it."""
    return [
        sum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span) for i in range(len(values))
    ]


def _draw(axis: Any, steps: list[int], values: list[float], label: str) -> None:
    measured = label.split()[-1].startswith("val_")  # now and then, each over the same data
    span = 1 if measured else max(1, len(values) // 50)
    marker = "o" if measured else ""
    (line,) = axis.plot(
        steps, smooth(values, span), label=label, linewidth=1.4, marker=marker, markersize=3
    )
    if span > 1:
        axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises: ImportError naming the extra.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError(
            "plotting needs matplotlib, which is not installed: pip install 'nanomolmo2[plot]'"
        ) from None
    # Without pyplot there is no window system to ask for.
    return figures.Figure(figsize=(width, height), layout="constrained")


def _figure(panels: int) -> tuple[Any, list[Any]]:
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = new_figure(7 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]
