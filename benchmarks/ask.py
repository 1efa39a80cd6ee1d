"""`nanomolmo2 ask` with `tiny`: a new process, and further questions in one that is there."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from PIL import Image

from benchmarks.harness import Row, Sizes, main, take_turns
from nanomolmo2.demo import DEMO
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.generation.pipeline import Pipeline

QUESTION = "Point to everything."
WARM_ROUNDS = 5  # times as many as of what takes seconds


def measure(sizes: Sizes) -> list[Row]:
    """Cold: from the start of the command to its end; its files were read before."""
    command = [sys.executable, "-m", "nanomolmo2", "ask", str(DEMO / "scene.png"), QUESTION]

    def cold() -> None:
        subprocess.run(command, capture_output=True, check=True)

    pipeline = Pipeline.from_pretrained("tiny", device="cpu")
    seen = Image.open(DEMO / "scene.png")
    number = iter(range(10**6))

    def answer(picture: Callable[[], Image.Image]) -> Callable[[], float]:
        def work() -> float:
            image = picture()
            start = time.perf_counter()
            pipeline.ask(image, QUESTION)
            return time.perf_counter() - start

        return work

    def another() -> Image.Image:
        return Image.fromarray(render_test_scene(next(number), "seen", seed=1).image)

    times = take_turns({"a new process": cold}, sizes.rounds)
    rounds = 1 if sizes.short else WARM_ROUNDS * sizes.rounds
    times |= take_turns(
        {"the next picture": answer(another), "the same question again": answer(lambda: seen)},
        rounds,
    )
    return [
        Row(f"ask, {name}", statistics.median(t), "s", low=min(t), high=max(t))
        for name, t in times.items()
    ]


if __name__ == "__main__":
    main("ask", measure)
