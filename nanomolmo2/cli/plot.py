"""``nanomolmo2 plot``: curves of training runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nanomolmo2.cli.options import Debug, UsageError
from nanomolmo2.cli.output import check_writable, say


@dataclass(frozen=True)
class Plot:
    """Draw the curves of training runs: loss, validation, rates, gradient norms, speed."""

    runs: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="RUN...", help="folders of runs, or log.jsonl files; several are overlaid"),
    ]
    out: Annotated[Path, arg(metavar="FILE", help="the picture, a .png")] = Path("curves.png")
    debug: Debug = False

    def run(self) -> None:
        if not self.runs:
            raise UsageError("expected the folder of a run, as in: nanomolmo2 plot runs/smoke")
        logs = [run / "log.jsonl" if run.is_dir() else run for run in self.runs]
        check_writable(self.out, (".png",), logs)
        from nanomolmo2.training.plot import plot_runs

        plot_runs(self.runs, self.out)
        say(f"wrote {self.out}")
