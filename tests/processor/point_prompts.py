"""Processors of models that point, and the pictures of MolmoPoint's golden values."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np

from nanomolmo2.processor import (
    MultiCrop,
    PointTokens,
    Processor,
    ProcessorConfig,
    Tokenizer,
    VideoConfig,
)
from nanomolmo2.processor.tokenizer import MOLMO_POINT_TOKENS
from tests.processor.helpers import small_backend, user

GOLDEN = Path(__file__).parents[1] / "data" / "molmo_point"
BASE = 512  # first id of MolmoPoint's tokens in the small tokenizer; officially 151936
V = BASE + 128  # the first class


@cache
def point_tokenizer() -> Tokenizer:
    """A small vocabulary, filled up to 512 ids, then MolmoPoint's 128 as the releases have them."""
    backend = small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    used = backend.get_vocab_size()
    backend.add_special_tokens([f"<|filler_{k}|>" for k in range(BASE - used)])
    fillers = [f"<EXTRA_TOKENS_POINT_{k}>" for k in range(128 - len(MOLMO_POINT_TOKENS))]
    backend.add_special_tokens([*MOLMO_POINT_TOKENS, *fillers])
    return Tokenizer(backend)


def point_processor(
    *, max_crops: int = 8, side: int = 378, in_prompt: bool = False, margins: int = 4
) -> Processor:
    """MolmoPoint's processor with the small tokenizer; ``side`` of a crop in pixels."""
    return Processor(
        ProcessorConfig.molmo2(
            multicrop=MultiCrop(max_crops, image_size=side, overlap_margins=(margins, margins)),
            video=VideoConfig(use_frame_special_tokens=True),
            points=PointTokens(points_in_prompt=in_prompt),
        ),
        point_tokenizer(),
    )


def small_processor(*, max_crops: int = 4, in_prompt: bool = False) -> Processor:
    """Crops of 5 x 5 patches, so that windows with empty slots occur; as the golden checkpoint."""
    return point_processor(max_crops=max_crops, side=70, margins=1, in_prompt=in_prompt)


def one_view(*, in_prompt: bool = True) -> Processor:
    """As `tiny`: a picture is one view of 192 pixels, 36 visual tokens of 2 x 2 patches."""
    return Processor(
        ProcessorConfig.molmo2(
            image_size=192,
            image_tokens=36,
            video=VideoConfig(max_frames=8),
            points=PointTokens(overview_token=None, patch_size=16, points_in_prompt=in_prompt),
        ),
        point_tokenizer(),
    )


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def picture(width: int, height: int, number: int = 0) -> np.ndarray:
    """Picture ``number`` of a golden prompt: (H, W, 3) uint8, as the README beside it says."""
    y, x, c = np.ogrid[:height, :width, :3]
    values = 37 * (c + 1) * x + 91 * y + ((c + 2) * x * y) // 7
    return ((values + 53 * number * (c + 1) + 11 * number * x) % 256).astype(np.uint8)


def pictures(sizes) -> list[np.ndarray]:
    return [picture(width, height, number) for number, (width, height) in enumerate(sizes)]


def encode_golden(entry: dict):
    """The prompt of an entry of processor.json or targets.json."""
    if "frame_size" in entry:
        side = entry.get("size", {"width": 378})["width"]
        frames = pictures([entry["frame_size"]] * entry["frames"])
        processor = point_processor(side=side, margins=1)
        return processor.encode([user("x")], video=(frames, entry["timestamps"]))
    processor = point_processor(max_crops=entry.get("max_crops", 8))
    return processor.encode([user("x")], pictures(entry["sizes"]))


def official(ids) -> np.ndarray:
    """Visual tokens of the small vocabulary by their official ids."""
    ids = np.asarray(ids)
    return ids[ids >= BASE] - BASE + 151936


def sha256(values) -> str:
    """As the golden values have it: of int32."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.int32).tobytes()).hexdigest()
