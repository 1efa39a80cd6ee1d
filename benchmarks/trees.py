"""Learning every question about some emoji scenes: message trees, packed, against a row a question.

Both sides learn the same answers of the same pictures with `tiny`. Ours encodes a picture once and
puts its questions behind it, several pictures a row; the other repeats the picture for each
question and pads the rows of a batch to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import Row, Sizes, gain, main, take_turns
from nanomolmo2.batch import Batch
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.packing import join
from nanomolmo2.emoji.source import EmojiConfig, EmojiScenes
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, collate

PICTURES = 24
PICTURES_A_ROW = 4  # about 320 tokens each
QUESTIONS_A_BATCH = 32


def learn(model: NanoMolmo2, batches: Sequence[Batch]) -> Callable[[], None]:
    """Forward and backward of all batches, gradients summed."""

    @torch.enable_grad()
    def step() -> None:
        model.zero_grad()
        for batch in batches:
            inputs: dict[str, Any] = dict(batch.tensors())
            model.loss(**inputs, reduction="sum").backward()

    return step


def measure(sizes: Sizes) -> list[Row]:
    model, processor = load("tiny", dtype=torch.float32, device="cpu")
    model.train().requires_grad_(True)
    pictures = 4 if sizes.short else PICTURES
    scenes = EmojiScenes(EmojiConfig(length=pictures))

    def batches(rows: Sequence[Encoded], size: int) -> list[Batch]:
        starts = range(0, len(rows), size)
        return [collate(rows[i : i + size], processor.pad_token_id) for i in starts]

    examples = [scenes[i] for i in range(pictures)]
    branches = [[branch.messages for branch in example.branches] for example in examples]
    trees = [
        processor.encode_tree(example.images, own)
        for example, own in zip(examples, branches, strict=True)
    ]
    packed = [join(trees[i : i + PICTURES_A_ROW]) for i in range(0, pictures, PICTURES_A_ROW)]
    single = [
        processor.encode_tree(example.images, [branch])
        for example, own in zip(examples, branches, strict=True)
        for branch in own
    ]
    sides = {"trees": learn(model, batches(packed, 2))}
    sides["single"] = learn(model, batches(single, QUESTIONS_A_BATCH))
    times = take_turns(sides, sizes.rounds)
    rates = {side: [pictures / s for s in seconds] for side, seconds in times.items()}
    name = "training of tiny, packed message trees"
    return [
        gain(
            name,
            rates,
            "trees",
            "single",
            target=3.0,
            unit="pictures/s",
            peer_name="ours, a row a question",
        )
    ]


if __name__ == "__main__":
    main("trees", measure)
