"""Cutting a picture into crops: ours beside transformers' Molmo2 image processor, in one run.

    python benchmarks/preprocessing.py [--size 1920 1080] [--max-crops 8] [--threads 2]

Needs transformers and torchvision. Both get the same RGB picture in memory; the two take turns, and
the best time of each counts. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from nanomolmo2.processor import MultiCrop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1080), metavar=("W", "H"))
    parser.add_argument("--max-crops", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    try:
        from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

        reference: Any = Molmo2ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    except Exception as error:  # a torchvision that does not fit torch fails in many ways
        print(f"this needs transformers and torchvision ({error})", file=sys.stderr)
        return 1

    torch.set_num_threads(arguments.threads)
    width, height = arguments.size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    crops = MultiCrop(max_crops=arguments.max_crops)

    def theirs() -> Any:
        return reference(picture, max_crops=arguments.max_crops, return_tensors="pt")

    def ours() -> Any:
        return crops(picture)

    _check_equal(ours(), theirs())
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(arguments.repeats):
        times["ours"].append(_seconds(ours))
        times["transformers"].append(_seconds(theirs))
    best = {f"{name}_ms": round(min(values) * 1000, 1) for name, values in times.items()}
    median = {
        f"{name}_median_ms": round(float(np.median(v)) * 1000, 1) for name, v in times.items()
    }
    ratio = round(best["ours_ms"] / best["transformers_ms"], 2)
    settings = {"size": [width, height], "max_crops": arguments.max_crops}
    print(json.dumps({**settings, "threads": arguments.threads, **best, **median, "ratio": ratio}))
    return 0


def _check_equal(ours: dict[str, Any], theirs: Any) -> None:
    """A fast wrong answer is no result; rounded halves may differ by 1 on one thread."""
    assert (ours["image_token_pooling"] == theirs["image_token_pooling"].numpy()).all()
    difference = np.abs(ours["pixel_values"] - theirs["pixel_values"].numpy())
    assert difference.max() < 1.01 / 127.5 and (difference > 1e-6).mean() < 1e-4


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
