"""Threads: eight ask one Pipeline at once; every answer is that of asking one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from tests.robustness.judge import Case, Surroundings
from tests.robustness.pictures import drawn

THREADS = 8
QUESTIONS = ("What is this?", "How many cats are there?", "Point to the dog.", "Is it red?", "Why?")


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    from nanomolmo2.generation.pipeline import Pipeline
    from tests.small_model import small_model, small_processor

    model, processor = small_model(rng.randrange(100)), small_processor()
    images = [drawn("RGB", (40 + seed, 30), seed) for seed in range(4)]
    asked = [
        (rng.sample(images, rng.choice((0, 1, 1, 2))), rng.choice(QUESTIONS), rng.choice((3, 12)))
        for _ in range(6 * THREADS)
    ]
    # Small enough that entries are put and dropped all the time, or large enough for all of them.
    pipeline = Pipeline(model, processor, reuse_bytes=rng.choice((30_000, 200_000, 1 << 30)))
    alone = Pipeline(model, processor, reuse_bytes=0)

    def ask(pipeline: Any, question: tuple[Sequence[Image.Image], str, int]) -> Any:
        some, text, length = question
        answer = pipeline.ask(list(some), text, max_new_tokens=length)
        return answer.text, answer.points, answer.count, answer.finish_reason, answer.image_sizes

    def call() -> Any:
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(lambda question: ask(pipeline, question), asked))
        return together, [ask(alone, question) for question in asked]

    def check(found: Any) -> str | None:
        together, one_by_one = found
        wrong = [
            i for i, pair in enumerate(zip(together, one_by_one, strict=True)) if pair[0] != pair[1]
        ]
        if wrong:
            i = wrong[0]
            return f"{len(wrong)} answers differ, such as {together[i]!r} for {one_by_one[i]!r}"[
                :400
            ]
        cache = pipeline.prefix_cache
        counted = recount(cache)
        if cache.nbytes != counted or counted > cache.max_bytes:
            return f"the prefix cache counts {cache.nbytes}, holds {counted}, may {cache.max_bytes}"
        return None

    return Case("8 threads", call, check, watched=False, seconds=120)


def recount(cache: Any) -> int:
    """Bytes of everything that a prefix cache holds."""
    from nanomolmo2.generation.prefix_cache import Prefix

    values = [value for value, _ in cache._entries.values()]
    return sum(value.row.nbytes if isinstance(value, Prefix) else value.nbytes for value in values)


FOUND: dict[str, Any] = {}
