"""``nanomolmo2 bench``: the benchmarks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nanomolmo2.cli.options import AtLeast, Debug, UsageError


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory beside other programs; needs a checkout and the extra dev.

    All of it is on the CPU; python scripts/gpu_check.py is for a GPU. Models of full size with
    random weights take turns with their peers. What was measured before is in docs/performance.md.
    """

    rows: Annotated[
        tuple[str, ...],
        arg(
            metavar="GROUP...",
            help="what to measure: floor, vision, prefill, decode, batch, prefix, lookup, llama, "
            "load; none = all",
        ),
    ] = ()
    threads: Annotated[
        tuple[int, ...],
        arg(metavar="N...", help="threads of torch, one run for each number"),
        AtLeast(1),
    ] = (1,)
    short: Annotated[
        bool, arg(help="small models, a minute: shows that the benchmarks work, not how fast it is")
    ] = False
    profile: Annotated[
        bool,
        arg(
            help="instead show where the time of a decode step and of a prefill goes: linears, "
            "attention, norms, head, the rest"
        ),
    ] = False
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder of the results; none = runs/bench or runs/bench-short"),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        root = Path(__file__).parents[2]
        known = sorted(path.stem for path in (root / "benchmarks").glob("*.py"))
        if not known:
            raise ValueError(
                f"there is no folder benchmarks in {root}: it is in the repository, not in the "
                f"installed package; run this in a checkout, with .[dev] installed"
            )
        for row in self.rows:
            if row not in known:
                raise UsageError(
                    f"--rows: there is no benchmark {row}; see nanomolmo2 bench --help"
                )
        command = [sys.executable, "-m", "benchmarks", "--threads", *map(str, self.threads)]
        command += ["--rows", *self.rows] if self.rows else []
        command += ["--short"] * self.short + ["--profile"] * self.profile
        command += [] if self.out is None else ["--out", str(self.out)]
        # The folder stays the caller's, so that relative paths mean what they say.
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
        if done.returncode:
            raise ValueError("a benchmark failed: its own message stands above")
