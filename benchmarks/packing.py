"""Packing: how full the rows are, and how long it takes to choose one.

Emoji scenes are encoded as training does it. Of larger pictures, text and videos only the sizes are
made up, after the kinds of data that Molmo2 learns from; nothing is encoded. The peer fills rows in
order of arrival, as far as the next example fits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.harness import Row, Sizes, main
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.packing import PACKING_BUFFER, Packer, choose
from nanomolmo2.emoji.model import tiny_processor
from nanomolmo2.emoji.questions import BranchMix
from nanomolmo2.emoji.source import EmojiConfig, EmojiScenes
from nanomolmo2.processor import MultiCrop

TARGET = 0.97  # of a row is real tokens
TARGET_MS = 5.0
CUT = MultiCrop(8)
FRAME_TOKENS = 81 + 2 + 7  # windows of 3 x 3 patches, start and end, the time


@dataclass(frozen=True)
class Size:
    """An example, as far as packing is concerned."""

    tokens: int
    crops: int


@dataclass(frozen=True)
class Limits:
    """What a row holds."""

    max_tokens: int
    max_crops: int
    crop_weight: float = 1.0
    rows: int = 500  # that are packed


@dataclass(frozen=True, kw_only=True)
class Stage(Limits):
    """Rows of a stage of Molmo2's training, and shares of what is in them."""

    name: str
    captions: float = 0.1
    points: float = 0.2
    questions: float = 0.3
    text: float = 0.1
    videos: float = 0.3
    max_frames: int = 0


STAGES = (
    Stage(2560, 16, name="pictures", captions=0.6, points=0.3, questions=0, videos=0),
    Stage(2 * 2560, 32, name="pictures", captions=0.6, points=0.3, questions=0, videos=0),
    Stage(16_384, 128, 30, name="pictures and videos", max_frames=128),
    Stage(36_864, 384, 30, name="pictures and long videos", max_frames=384),
)


def draw(rng: np.random.Generator, stage: Stage) -> Size:
    """A made-up example. Text lengths and seconds are log-normal: many short, some very long."""

    def about(median: float, spread: float) -> int:
        return 1 + int(median * np.exp(spread * rng.standard_normal()))

    shares = [stage.captions, stage.points, stage.questions, stage.text, stage.videos]
    kind = rng.choice(len(shares), p=shares)
    if kind == 3:
        return Size(about(450, 0.9), 0)
    if kind == 4:
        frames = min(2 * about(25, 1.0), stage.max_frames)  # two a second
        return Size(20 + frames * FRAME_TOKENS + about(120, 1.0), frames)
    width = about(900, 0.5)
    height = max(1, int(width * np.exp(0.3 * rng.standard_normal())))
    low_rows, low_cols, rows, cols = CUT.image_grid(width, height)
    tiles = CUT.tiling(width, height)
    picture = 10 + low_rows * low_cols + rows * (cols + 1)
    text = (about(500, 0.5), about(180, 1.0), about(200, 0.8))[kind]
    return Size(picture + text, 1 + tiles[0] * tiles[1])


def choosing(sizes: Sizes, stage: Limits) -> Row:
    """CPU time to choose a row of a full pool; the slowest: tokens and crops are both scarce."""
    rng = np.random.default_rng(0)
    milliseconds = []
    for _ in range(5 if sizes.short else 40):
        crops = rng.integers(1, max(2, stage.max_crops // 4), PACKING_BUFFER)
        tokens = rng.integers(1, stage.max_tokens // 4, PACKING_BUFFER)
        start = time.process_time()
        choose(tokens.tolist(), crops.tolist(), stage.max_tokens, stage.max_crops, 30)
        milliseconds.append((time.process_time() - start) * 1000)
    return Row(
        f"choose a row of {stage.max_tokens} tokens and {stage.max_crops} crops, "
        f"pool of {PACKING_BUFFER}",
        statistics.median(milliseconds),
        "ms",
        low=min(milliseconds),
        high=max(milliseconds),
        target=TARGET_MS,
    )


def fill(name: str, rows: Sequence[Sequence[Size]], arrived: Sequence[Size], stage: Limits) -> Row:
    """How much of what the rows could hold are real tokens."""
    packed = [example for row in rows for example in row]
    crops = sum(example.crops for example in packed) / (len(rows) * stage.max_crops)
    return Row(
        f"{name}, {stage.max_tokens} tokens: {len(packed) / len(rows):.1f} examples a row, "
        f"{crops:.0%} of {stage.max_crops} crops",
        sum(example.tokens for example in packed) / (len(rows) * stage.max_tokens),
        "of a row",
        "in order of arrival",
        in_order_of_arrival(arrived, stage),
        target=TARGET,
        at_least=True,
    )


def in_order_of_arrival(examples: Sequence[Size], limits: Limits) -> float:
    """Share of real tokens without a choice."""
    rows, tokens, crops = 1, 0, 0
    for example in examples:
        tokens, crops = tokens + example.tokens, crops + example.crops
        if tokens > limits.max_tokens or crops > limits.max_crops:
            rows, tokens, crops = rows + 1, example.tokens, example.crops
    return sum(example.tokens for example in examples) / (rows * limits.max_tokens)


def pack(name: str, examples: Iterator[Size], limits: Limits, sizes: Sizes) -> Row:
    packer: Packer[Size] = Packer(
        limits.max_tokens,
        limits.max_crops,
        8 if sizes.short else PACKING_BUFFER,
        limits.crop_weight,
    )
    arrived: list[Size] = []
    rows: list[list[Size]] = []
    while len(rows) < (5 if sizes.short else limits.rows):
        while not packer.full:
            example = next(examples)
            try:
                packer.add(example)
            except BadExample:  # longer than a row
                continue
            arrived.append(example)
        rows.append(packer.take())
    return fill(name, rows, arrived, limits)


def made_up(stage: Stage) -> Iterator[Size]:
    rng = np.random.default_rng(0)
    while True:
        yield draw(rng, stage)


def emoji(*mixes: BranchMix) -> Iterator[Size]:
    """Scenes, in equal shares of these kinds of questions, as `tiny`'s processor encodes them."""
    processor = tiny_processor()
    mixture = Mixture([EmojiScenes(EmojiConfig(mix=mix)) for mix in mixes])
    stream = mixture.slot(0, 1)
    while True:
        source, index = stream.next()
        example = mixture.sources[source][index]
        branches = [branch.messages for branch in example.branches]
        yield Size(len(processor.encode_tree(example.images, branches).input_ids), 1)


NOTHING = BranchMix(presence=0, count=0, number=0, point=0, caption=0, spatial=0)
KINDS = (BranchMix(), replace(NOTHING, caption=1), replace(NOTHING, count=2, point=3))


def measure(sizes: Sizes) -> list[Row]:
    rows = []
    for max_tokens in (1024, 2048):
        limits = Limits(max_tokens, max_crops=64, rows=100)
        rows.append(pack("emoji scenes, three kinds", emoji(*KINDS), limits, sizes))
        one = pack("emoji scenes, one kind", emoji(BranchMix()), limits, sizes)
        rows.append(replace(one, target=None))  # about 320 tokens each: three fill 94 % of 1024
    rows += [pack(stage.name, made_up(stage), stage, sizes) for stage in STAGES]
    return rows + [choosing(sizes, stage) for stage in STAGES]


if __name__ == "__main__":
    main("packing", measure)
