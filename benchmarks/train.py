"""A training step of the decoder: seconds and the peak of memory, beside transformers' own loss.

Both sides have the same weights, rows, labels and optimiser, and must come to the same losses. Each
runs in a process of its own, since there is room for one alone, and processes take turns. Weights
count as memory on both sides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, Sizes, compare, llm_gflop, main
from benchmarks.train_side import lengths

SIDES = ("ours", "transformers")
ROOT = Path(__file__).parents[1]


def run(side: str, rows: int, steps: int, optimizer: bool, sizes: Sizes) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_side", side, str(rows), str(steps)]
    command += ["--optimizer"] * optimizer + ["--short"] * sizes.short
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def take_turns(
    rounds: int, rows: int, steps: int, optimizer: bool, sizes: Sizes
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step and peaks in bytes, of both sides in every round."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        losses = {}
        for side in SIDES:
            found = run(side, rows, steps, optimizer, sizes)
            seconds[side].append(found["seconds"])
            peaks[side].append(found["peak"])
            losses[side] = found["losses"]
        # AdamW's first update is a sign for every weight: it makes much of a last digit.
        for limit, ours, theirs in zip((1e-3, 1e-2), *losses.values(), strict=False):
            assert abs(ours - theirs) < limit, f"the two sides differ: {losses}"
    return seconds, peaks


def measure(sizes: Sizes) -> list[Row]:
    tokens, labelled = lengths(sizes)
    name = f"training step of {tokens} tokens, {labelled} learned"
    # Moments are there from the second step on.
    seconds, peaks = take_turns(sizes.rounds, 1, 2, True, sizes)
    _, peaks_of_two = take_turns(1, 2, 1, False, sizes)
    gflop = 3 * llm_gflop(sizes.llm, tokens, labelled)
    memory: dict[str, Any] = {"unit": "GB", "scale": 1e-9}
    return [
        compare(f"{name}, AdamW", seconds, *SIDES, target=0.72, gflop=gflop),
        compare(f"{name}, AdamW: peak", peaks, *SIDES, target=0.70, **memory),
        compare("2 rows, no optimiser: peak", peaks_of_two, *SIDES, target=0.55, **memory),
    ]


if __name__ == "__main__":
    main("train", measure)
