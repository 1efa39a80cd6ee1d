"""The golden checkpoint of MolmoPoint (tests/data/molmo_point) with a processor.

Its text tokens are bytes. The files have no tokenizer; the one here has the special tokens at 256 +
their official offsets, and those of the chat format at the end, where fillers are.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nanomolmo2.convert.molmo2_processor import OWN_NAME
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer
from nanomolmo2.processor.config import PointTokens, VideoConfig
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.processor import TOKENIZER_FILE

GOLDEN = Path(__file__).parent / "data" / "molmo_point"
V = 384  # 256 bytes and 128 further tokens
SPECIAL = (
    *("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>"),
    *("<im_low>", "<frame_start>", "<frame_end>", "<|video|>", "<|points|>"),
    *("<|token_index|>", "<|vit_index|>", "<|vit_loc|>"),
)
CHAT = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b."""
    bytes_shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 shows them
    shown = {byte: chr(byte) for byte in bytes_shown}
    others = (byte for byte in range(256) if byte not in shown)
    shown |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={shown[byte]: byte for byte in range(256)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fillers = [f"<EXTRA_TOKENS_POINT_{k}>" for k in range(128 - len(SPECIAL) - len(CHAT))]
    names = [*SPECIAL, *fillers, *CHAT]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend)


def golden_processor(**points: Any) -> Processor:
    """Crops of 70 x 70 pixels, 5 x 5 patches; ``points`` are fields of its `PointTokens`."""
    config = ProcessorConfig.molmo2(
        multicrop=MultiCrop(
            max_crops=4, image_size=70, patch_size=14, overlap_margins=(1, 1), pooling_size=2
        ),
        video=VideoConfig(use_frame_special_tokens=True),
        points=PointTokens(**points),
    )
    return Processor(config, byte_tokenizer())


def golden_folder(folder: Path, **points: Any) -> Path:
    """A copy of the checkpoint, with a processor."""
    folder.mkdir(parents=True)
    for file in (GOLDEN / "checkpoint").iterdir():
        shutil.copyfile(file, folder / file.name)
    processor = golden_processor(**points)
    processor.tokenizer.save(folder / TOKENIZER_FILE)
    processor.config.save(folder / OWN_NAME)
    return folder


def consistent_pipeline(folder: Path) -> Pipeline:
    """The same weights under the rule of our own training; points may stand in questions.

    Args:
        folder: see `golden_folder`.
    """
    released = NanoMolmo2.from_pretrained(folder)
    rule = released.config.point_config
    assert rule is not None
    ids = {name: value for name, value in vars(rule).items() if name.endswith("_id")}
    sizes = {"patch_embed_dim": rule.patch_embed_dim}
    rule = PointConfig.consistent(**ids, **sizes)
    model = NanoMolmo2(dataclasses.replace(released.config, point_config=rule))
    model.load_state_dict(released.state_dict())
    return Pipeline(model, golden_processor(points_in_prompt=True))


@cache
def cases() -> dict[str, Any]:
    """What the reference answers: see the README of the golden files."""
    found: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
    return found


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Picture ``number`` (from 0) of the golden files, ``size`` is (width, height)."""
    y, x, c = np.meshgrid(np.arange(size[1]), np.arange(size[0]), np.arange(3), indexing="ij")
    k = number
    values = 37 * (c + 1) * x + 91 * y + ((c + 2) * x * y) // 7 + 53 * k * (c + 1) + 11 * k * x
    return Image.fromarray((values % 256).astype(np.uint8))


def place_of(case: str, ids: tuple[int, int, int]) -> tuple[float, float, int]:
    """(x, y, picture from 1) of the ids of a row, a slot and a cell, looked up by hand."""
    from safetensors.numpy import load_file

    tensors, about = load_file(GOLDEN / "cases.safetensors"), cases()[case]
    row, slot, cell = (
        id - about["bounds"][first]
        for id, first in zip(ids, ("patch_start", "subpatch_start", "location_start"), strict=True)
    )
    patch = tensors[f"{case}.token_pooling"][row, slot]
    for k, (width, height) in enumerate(about["picture_sizes"]):
        grid = tensors[f"{case}.subpatch_mapping.{k}"]
        found = np.argwhere(grid == patch)
        if len(found):
            r, c = found[0].tolist()
            x = (c + (cell // 3 + 0.5) * 0.33) / grid.shape[1] * width
            y = (r + (cell % 3 + 0.5) * 0.33) / grid.shape[0] * height
            return x, y, k + 1
    raise ValueError(f"nothing is shown at {ids}")
