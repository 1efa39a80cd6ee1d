"""What several of the processor's tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
)


def small_backend(special: tuple[str, ...] = SPECIAL) -> tokenizers.Tokenizer:
    """Fewest pieces win; whole-turn special tokens as the bundled model has them."""
    words = ["dog", " dog", "s", " there", " the ", "yes", " yes", '<points coords="1', '">']
    pieces = ["<unk>", *map(chr, range(32, 127)), *(w for w in words if len(w) > 1)]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return backend


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def golden():
    """Values made with transformers' Molmo2 processors; see tests/data/README.md."""
    return json.loads((Path(__file__).parents[1] / "data" / "molmo2_golden.json").read_text())


def golden_picture(width, height):
    """The picture of that size that the golden values belong to: (H, W, 3) uint8."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((37 * (c + 1) * x + 91 * y + ((c + 2) * x * y) // 7) % 256).astype(np.uint8)


def runs(pairs):
    """[value, repeats] pairs -> the values."""
    return [value for value, repeats in pairs for _ in range(repeats)]
