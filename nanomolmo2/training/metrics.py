"""What a run reports: one JSON object a line, and a progress bar for people."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """Averages the metrics of the steps between two lines and appends them to ``log.jsonl``."""

    def __init__(self, folder: Path, every: int, quiet: bool = False) -> None:
        self.path = folder / "log.jsonl"
        self.every = every
        self.console = Console(quiet=quiet, stderr=True)
        self.sums: dict[str, float] = defaultdict(float)
        self.steps = 0
        self.since = time.monotonic()

    def progress(self, name: str, total: int, done: int) -> Progress:
        """A bar for one stage; its only task is number 0."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        bar.add_task(name, total=total, completed=done, status="")
        return bar

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> str | None:
        """Count a step; returns a short status each time a line is written."""
        for name, value in metrics.items():
            self.sums[name] += value
        self.steps += 1
        if step % self.every:
            return None
        means = {name: round(total / self.steps, 4) for name, total in self.sums.items()}
        seconds = (time.monotonic() - self.since) / self.steps
        self.write({"stage": stage, "step": step, **means, "seconds_per_step": round(seconds, 3)})
        self.sums.clear()
        self.steps, self.since = 0, time.monotonic()
        return f"loss {means['loss']:.3f}"

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
