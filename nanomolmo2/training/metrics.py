"""What a run reports: one JSON object a line, a progress bar for people, and trackers of others."""

from __future__ import annotations

import errno
import importlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanomolmo2.files import open_regular
from nanomolmo2.terminal import visible

FILE = "log.jsonl"
TIMED = 3  # steps after which the time that the others will take is told
# Of models that point, see `point_terms`.
LOSSES_OF_TERMS = ("loss_text", "loss_row", "loss_slot", "loss_cell")
EXACT = "loss"  # logged with all digits: a resumed run must repeat it bit for bit


class RunLog:
    """Averages the metrics of the steps between two lines and appends them to ``log.jsonl``.

    Metrics with special names: ``tokens`` of a step give ``tokens_per_second``; ``wait_seconds``,
    spent waiting for data, give ``data_wait``, their share of the time.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        quiet: bool = False,
        trackers: Sequence[Tracker] = (),
        writes: bool = True,
    ) -> None:
        """
        Args:
            quiet: nothing for people.
            trackers: get every line too.
            writes: off on all ranks but the first.
        """
        self.path, self.every, self.trackers = folder / FILE, every, trackers
        self.writes = writes
        self.console = Console(quiet=quiet, stderr=True)
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.since = time.monotonic()
        self.newest = ""  # the newest measurement, for the status
        self.total = 0  # steps of the stage
        self.timed: list[float] = []  # seconds of its first steps in this process
        if writes:
            self._cut_half_a_line()

    def progress(self, name: str, total: int, done: int) -> Progress:
        """A bar for one stage; its only task is number 0."""
        self.total, self.timed = total, []
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        bar.add_task(visible(name), total=total, completed=done, status="")
        return bar

    def info(self, text: str) -> None:
        """A line for people, above the bar."""
        _print_line(self.console, text)

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> str | None:
        """Count a step; returns a short status each time a line is written."""
        self._tell_time(step, metrics)
        for name, value in metrics.items():
            self.sums[name] += value
            self.counts[name] += 1
        if step % self.every:
            return None
        steps = self.counts["loss"]
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        seconds = max(time.monotonic() - self.since, 1e-9)
        line = {n: mean if n == EXACT else float(f"{mean:.5g}") for n, mean in means.items()}
        line["seconds_per_step"] = float(f"{seconds / steps:.4g}")
        if "tokens" in self.sums:
            line["tokens_per_second"] = float(f"{self.sums['tokens'] / seconds:.4g}")
        if "wait_seconds" in line:
            line["data_wait"] = float(f"{self.sums['wait_seconds'] / seconds:.3g}")
            del line["wait_seconds"]
        self.write({"stage": stage, "step": step, **line})
        self.restart()
        speed = (
            f", {line['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in line else ""
        )
        terms = [f"{n.removeprefix('loss_')} {means[n]:.2f}" for n in LOSSES_OF_TERMS if n in means]
        apart = f" ({', '.join(terms)})" if "loss_row" in means else ""
        return f"loss {means['loss']:.3f}{apart}{self.newest}{speed}"

    def _tell_time(self, step: int, metrics: dict[str, float]) -> None:
        """After a few steps say how long the others will take."""
        self.timed.append(metrics.get("wait_seconds", 0.0) + metrics.get("compute_seconds", 0.0))
        left = self.total - step
        if len(self.timed) == TIMED and left > 0:
            each = sum(self.timed[1:]) / (TIMED - 1)  # the first waits for processes to start
            self.info(
                f"the other {left:,} step{'s' if left > 1 else ''} will take about "
                f"{seconds_as_text(each * left)} ({each:.2g} s each)"
            )

    def measured(self, text: str, short: str) -> None:
        """A measurement, as a line for people and, ``short``, in the status from now on."""
        self.info(text)
        self.newest = f", {short}"

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, whole or not at all.

        Raises: OSError, naming what to do.
        """
        if not self.writes:
            return
        try:
            self._append((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}); the last checkpoint is "
                f"intact: free some space and resume"
            ) from error
        for tracker in self.trackers:
            tracker.write(line)

    def restart(self, state: dict[str, Any] | None = None) -> None:
        """Begin a new line, or go on with the one of a `state`; the clock starts now."""
        self.sums = defaultdict(float, (state or {}).get("sums", {}))
        self.counts = defaultdict(int, (state or {}).get("counts", {}))
        self.start_clock()

    def start_clock(self) -> None:
        """What took time before now was no step."""
        self.since = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """What took so long was no step."""
        self.since += seconds

    def state(self) -> dict[str, Any]:
        """What the next line has of the steps so far."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def close(self) -> None:
        """Let trackers finish."""
        for tracker in self.trackers:
            tracker.close()

    def _append(self, text: bytes) -> None:
        stream = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(stream).st_size
            if os.write(stream, text) < len(text):
                os.ftruncate(stream, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(stream)

    def _cut_half_a_line(self) -> None:
        """Remove the beginning of a line whose end a power cut took away."""
        if self.path.exists():
            with open_regular(self.path) as stream:
                text = stream.read()
            if text and not text.endswith(b"\n"):
                os.truncate(self.path, text.rfind(b"\n") + 1)


def info_to_people(quiet: bool) -> Callable[[str], None]:
    """What prints a line for people before there is a log."""
    console = Console(quiet=quiet, stderr=True)
    return lambda text: _print_line(console, text)


def _print_line(console: Console, text: str) -> None:
    console.print(visible(text), highlight=False, soft_wrap=True, markup=False)


def seconds_as_text(seconds: float) -> str:
    """``40 seconds``, ``12 minutes``, ``3.5 hours``, ``2.1 days``."""
    for unit, size, limit in (("second", 1, 90), ("minute", 60, 5400), ("hour", 3600, 172_800)):
        if seconds < limit:
            number = seconds / size
            text = f"{number:.1f}" if unit == "hour" and number < 10 else f"{number:.0f}"
            return f"{text} {unit}{'' if text == '1' else 's'}"
    return f"{seconds / 86_400:.1f} days"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; of a step that was repeated after a resume only the last.

    A last line without its end is still being written: it is left out.

    Raises: FileNotFoundError; ValueError for what is no regular file, or naming the line that is no
        JSON object.
    """
    path = folder / FILE if folder.is_dir() else folder
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: expected the folder of a training run")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    with open_regular(path) as stream:
        whole, _, _ = stream.read().rpartition(b"\n")
    for number, text in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            line = json.loads(text)
            found[line.get("stage"), line["step"] + 0, "loss" in line] = line
            for value in (*line.values(), *line.get("evaluation", {}).values()):
                isinstance(value, int) and float(value)  # not one of 400 digits
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            raise ValueError(
                f"{path}, line {number} is not an object with a step: remove the line"
            ) from None
    return list(found.values())


# ---- trackers of others ----


class Tracker(Protocol):
    """Gets every line of the log."""

    def write(self, line: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def open_trackers(names: Sequence[str], folder: Path, recipe: dict[str, Any]) -> list[Tracker]:
    """Open the trackers of some names.

    Args:
        recipe: what is trained, for their overview.
    Raises: ValueError for an unknown name; ImportError naming the extra that is missing.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(_TensorBoard(folder))
        elif name in ("trackio", "wandb"):
            trackers.append(_Wandb(name, folder, recipe))
        else:
            raise ValueError(f"there is no tracker {name!r}: choose {', '.join(TRACKERS)}")
    return trackers


TRACKERS = ("tensorboard", "trackio", "wandb")


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    values = {**line, **line.get("evaluation", {})}
    return {n: v for n, v in values.items() if isinstance(v, int | float) and n != "step"}


def _optional(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"logging to {extra} needs a package that is not installed: pip install "
            f"'nanomolmo2[{extra}]'"
        ) from None


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        _optional("tensorboard", "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.stream = writer(str(folder / "tensorboard"))

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self.stream.add_scalar(f"{line.get('stage', 'run')}/{name}", value, line["step"])
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class _Wandb:
    """Weights & Biases, and trackio, which has its interface and stays on this machine."""

    def __init__(self, name: str, folder: Path, recipe: dict[str, Any]) -> None:
        self.module = _optional(name, name)
        self.module.init(project="nanomolmo2", name=folder.name, config=recipe)

    def write(self, line: dict[str, Any]) -> None:
        self.module.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self.module.finish()
