"""How long `nanomolmo2 ask` with `tiny` takes beside Python's own import of torch.

python -m benchmarks.start [--rounds N]

Each is a process of its own, from its start to its end; they take turns, and a first round, which
reads the files from the disk, does not count. On a machine that does other work too, believe the
least of the times, and the CPU's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCENE = Path(__file__).parents[1] / "nanomolmo2" / "assets" / "demo" / "scene.png"
ASK = [sys.executable, "-m", "nanomolmo2", "ask", str(SCENE)]
TORCH = "import torch"
PROGRAMS = {
    TORCH: [sys.executable, "-c", "import torch"],
    "ask, a count": [*ASK, "How many sunflowers are there?"],
    "ask, a description": [*ASK, "Describe this picture."],
    "ask --help": [*ASK[:-1], "--help"],
}


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds until the end of a process, and seconds of the CPU that it took."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    rounds = parser.parse_args().rounds
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, command in PROGRAMS.items():
            found = measure(command)
            if number:
                times[name].append(found)
    columns = {name: [*zip(*found, strict=True)] for name, found in times.items()}
    print("| program | least, s | median, s | CPU, least, s | least / import torch | CPU / ... |")
    print("|---|---|---|---|---|---|")
    whole, cpu = (min(column) for column in columns[TORCH])
    for name, (seconds, used) in columns.items():
        print(
            f"| {name} | {min(seconds):.2f} | {statistics.median(seconds):.2f} | {min(used):.2f} "
            f"| {min(seconds) / whole:.2f} | {min(used) / cpu:.2f} |"
        )


if __name__ == "__main__":
    main()
