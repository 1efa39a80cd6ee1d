"""Small random models, exported, and what they answer: the questions of scripts/interop.py.

Two models of one kind: in ``plain`` frames have an image's start and end tokens, as in the released
models, in ``marked`` tokens of their own. Each answers as it is, and as its causal twin, in which
image tokens see only what came before.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.convert import export_molmo2
from nanomolmo2.emoji.vocabulary import ADDITIONAL_VOCAB_SIZE, build_tokenizer, vocab_size
from nanomolmo2.models import (
    ConnectorConfig,
    LLMConfig,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
)
from nanomolmo2.processor import (
    Encoded,
    MultiCrop,
    Processor,
    ProcessorConfig,
    Tokenizer,
    VideoConfig,
)
from nanomolmo2.processor.video import Video

NEW_TOKENS = 16
FPS = 2.0
EXPORTS = {"plain": False, "marked": True}  # whether frames have tokens of their own

Message = dict[str, Any]


def _user(*content: str) -> Message:
    """A turn: "image" and "video" stand for what is shown, all else is text."""
    items = [
        {"type": item} if item in ("image", "video") else {"type": "text", "text": item}
        for item in content
    ]
    return {"role": "user", "content": items}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# name -> exports, messages, pictures, whether there is a video
CASES: dict[str, tuple[tuple[str, ...], list[Message], list[str], bool]] = {
    "text": (("plain",), [_user("Describe this picture.")], [], False),
    "one picture": (("plain",), [_user("image", "Describe this picture.")], ["a.png"], False),
    "two pictures": (
        ("plain",),
        [_user("image", "image", "Point to the dog.")],
        ["a.png", "b.png"],
        False,
    ),
    "several turns": (
        ("plain",),
        [
            _user("image", "How many dogs?"),
            _assistant("There are 2."),
            _user("Point to the cat."),
        ],
        ["a.png"],
        False,
    ),
    "video": (("plain",), [_user("video", "Describe this picture.")], [], True),
    "video, frame tokens": (("marked",), [_user("video", "Describe this picture.")], [], True),
}


def make(folder: Path) -> list[dict[str, Any]]:
    """Write pictures, exports and ``cases.json`` into ``folder``; returns the cases."""
    frames = _write_pictures(folder)
    cases = []
    for export, marked in EXPORTS.items():
        processor = _processor(marked)
        model = _model(processor)
        twin = NanoMolmo2(replace(model.config, bidirectional_image_attention=False)).eval()
        twin.load_state_dict(model.state_dict())
        export_molmo2(model, folder / export, processor)
        for name, (exports, messages, pictures, video) in CASES.items():
            if export not in exports:
                continue
            times = tuple(number / FPS for number in range(len(frames)))
            encoded = processor.encode(
                messages,  # type: ignore[arg-type]
                [folder / picture for picture in pictures],
                video=Video(tuple(frames), times) if video else None,
            )
            pixels = f"pixels-{len(cases)}.npy"
            if encoded.pixel_values is not None:
                np.save(folder / pixels, encoded.pixel_values)
            cases.append(
                {
                    "name": name,
                    "export": export,
                    "messages": messages,
                    "images": pictures,
                    "video": {"frames": "frames.npy", "fps": FPS} if video else None,
                    "pixels": pixels if encoded.pixel_values is not None else None,
                    "max_new_tokens": NEW_TOKENS,
                    "ids": encoded.input_ids.tolist(),
                    "ours": _answer(model, encoded),
                    "causal": _answer(twin, encoded),
                }
            )
    (folder / "cases.json").write_text(json.dumps({"cases": cases}), encoding="utf-8")
    return cases


@torch.no_grad()
def _answer(model: NanoMolmo2, encoded: Encoded) -> dict[str, Any]:
    """Greedy tokens and the log-probabilities of all tokens at each, without any cache."""
    ids = torch.from_numpy(encoded.input_ids)[None]
    shown = {}
    if encoded.pixel_values is not None and encoded.image_token_pooling is not None:
        shown = {
            "pixel_values": torch.from_numpy(encoded.pixel_values),
            "image_token_pooling": torch.from_numpy(encoded.image_token_pooling),
        }
    tokens, logprobs = [], []
    for _ in range(NEW_TOKENS):
        row = model(ids, **shown)[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(row.tolist())
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
    return {"tokens": tokens, "logprobs": logprobs}


def _write_pictures(folder: Path) -> NDArray[np.uint8]:
    """Two smooth random pictures; returns the frames of a video (T, H, W, 3), written too."""
    random = np.random.default_rng(0)

    def smooth(width: int, height: int) -> Image.Image:
        coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    for name, size in (("a.png", (150, 90)), ("b.png", (70, 64))):
        smooth(*size).save(folder / name)
    frames = np.stack([np.asarray(smooth(96, 80)) for _ in range(4)])
    np.save(folder / "frames.npy", frames)
    return frames


def _processor(marked: bool) -> Processor:
    """Crops of 64 pixels with 4 x 4 patches, `tiny`'s vocabulary."""
    crops = MultiCrop(max_crops=3, image_size=64, patch_size=16, overlap_margins=(1, 1))
    video = VideoConfig(max_frames=20, max_fps=FPS, use_frame_special_tokens=marked)
    config = ProcessorConfig.molmo2(multicrop=crops, video=video)
    return Processor(config, Tokenizer(build_tokenizer()))


def _model(processor: Processor) -> NanoMolmo2:
    """Random weights, large enough that the pictures and the mask decide the answer."""
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    connector = ConnectorConfig(
        vision_dim=32,
        llm_dim=64,
        connector_type="pooling",
        num_attention_heads=2,
        intermediate_size=64,
        vit_layers=(-1, -2),
    )
    llm = LLMConfig(
        vocab_size=vocab_size(build_tokenizer()),
        additional_vocab_size=ADDITIONAL_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the least that vLLM has kernels for
        max_position_embeddings=512,
    )
    config = NanoMolmo2Config(
        vision_config=vision,
        connector_config=connector,
        llm_config=llm,
        image_token_id=processor.image_token_id,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
        bidirectional_image_attention=True,
        image_special_token_ids=tuple(llm.vocab_size + offset for offset in (0, 1, 3, 4, 6, 7, 8)),
    )
    model = NanoMolmo2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
        model.llm.embed_tokens.weight.normal_(std=0.5)
        model.llm.embed_tokens.weight[config.image_token_id] = 0  # else adding is not replacing
    return model
