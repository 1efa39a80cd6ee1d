"""A second question about the same picture: time to its first token against that of the first."""

from __future__ import annotations

import time

import torch

from benchmarks.harness import Row, Sizes, compare, main, random_weights
from nanomolmo2.convert.parts import build_on_meta
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config

QUESTION = 20  # tokens, behind the picture


def measure(sizes: Sizes) -> list[Row]:
    image = sizes.llm.vocab_size - 1
    config = NanoMolmo2Config(
        vision_config=sizes.vision, llm_config=sizes.llm, image_token_id=image
    )
    model = random_weights(build_on_meta(NanoMolmo2, config))
    assert isinstance(model, NanoMolmo2)
    side = sizes.vision.image_size
    times: dict[str, list[float]] = {"first question": [], "second question": []}
    for _ in range(sizes.rounds + 1):
        picture, cache = torch.randn(1, 3, side, side), PrefixCache()
        for name in times:
            question = torch.randint(image, (1, QUESTION))
            ids = torch.cat([torch.tensor([[image]]), question], dim=1)
            start = time.perf_counter()
            model.generate(ids, picture, max_new_tokens=1, eos_token_id=None, prefix_cache=cache)
            times[name].append(time.perf_counter() - start)
    times = {name: seconds[1:] for name, seconds in times.items()}
    name = "first token about a picture seen before, float32"
    return [compare(name, times, "second question", "first question", target=0.15)]


if __name__ == "__main__":
    main("prefix", measure)
