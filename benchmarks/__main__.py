"""Run benchmarks, each in a process of its own, and render what was measured.

python -m benchmarks [--short] [--rows vision decode] [--threads 1 2] [--profile]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness import SHORT, Sizes

ROOT = Path(__file__).parents[1]
GROUPS = [g for g in report.ORDER if (ROOT / "benchmarks" / f"{g}.py").exists()]

ROWS_HELP = f"of {', '.join(GROUPS)}; all by default"
PAGE_HELP = "also put the table between the marks of this page, the chart into images/ beside it"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=ROWS_HELP)
    add("--threads", type=int, nargs="+", default=[1], metavar="N", help="one run for each number")
    add("--rounds", type=int, metavar="N", help="of what takes seconds (default: 3)")
    add("--short", action="store_true", help="small models: do the scripts work?")
    add("--profile", action="store_true", help="only show where the time goes")
    add("--out", type=Path, metavar="DIR", help="results (default: runs/bench, runs/bench-short)")
    add("--page", type=Path, metavar="FILE", help=PAGE_HELP)
    arguments = parser.parse_args()
    if arguments.profile:
        from benchmarks.step_profile import profile

        torch.set_grad_enabled(False)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            print(f"ms, {threads} thread(s):\n\n{profile(SHORT if arguments.short else Sizes())}\n")
        return 0
    out = arguments.out or Path("runs") / ("bench-short" if arguments.short else "bench")
    failed = []
    for threads in arguments.threads:
        for group in arguments.rows:
            target = out.absolute() / f"{group}-{threads}.json"
            command = [sys.executable, "-m", f"benchmarks.{group}", "--threads", str(threads)]
            command += ["--out", str(target)] + ["--short"] * arguments.short
            if arguments.rounds:
                command += ["--rounds", str(arguments.rounds)]
            print(f"{group}, {threads} thread(s)", file=sys.stderr, flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
            if done.returncode:
                failed.append(f"{group}, {threads} thread(s)")
    reports = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-*.json"))
    ]
    if reports:
        table = report.table(reports)
        print(table)
        (out / "performance.md").write_text(table + "\n", encoding="utf-8")
        report.chart(reports, out / "performance.png")
        if arguments.page is not None:
            report.put_into(arguments.page, table)
            report.chart(reports, arguments.page.parent / "images" / "performance.png")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
