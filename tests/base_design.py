"""A hub on this machine with small random SigLIP and Qwen3 checkpoints in their released format,
under the names that the base design asks for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert.pretrained import save_pretrained
from nanomolmo2.models import LanguageModel, LLMConfig, VisionConfig, VisionEncoder
from tests.convert.fake_hub import FakeHub
from tests.processor.helpers import small_backend

SIGLIP = "google/siglip2-so400m-patch14-384"
QWEN3 = "Qwen/Qwen3-0.6B-Base"
VISION = VisionConfig(
    image_size=60,  # 4 x 4 patches and a rest, as 384 pixels are 27 x 27
    patch_size=14,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
)
LLM = LLMConfig(
    vocab_size=400,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
)
# As Qwen3's: nothing of Molmo2.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    "<|image_pad|>",
)


def write_parts(folder: Path) -> dict[str, Path]:
    """Folders by the names of their repositories."""
    torch.manual_seed(0)
    folders = {SIGLIP: folder / "siglip", QWEN3: folder / "qwen3"}
    save_pretrained(VisionEncoder(VISION), folders[SIGLIP])
    save_pretrained(LanguageModel(LLM), folders[QWEN3])
    small_backend(SPECIAL).save(str(folders[QWEN3] / "tokenizer.json"))
    return folders


@contextlib.contextmanager
def hub_of(
    repositories: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A running hub that is the only one there is, and an empty cache."""
    from huggingface_hub import constants

    with FakeHub().running() as hub:
        hub.repositories |= repositories
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def write_llava(folder: Path, records: int = 6) -> Path:
    """``llava.json`` as LLaVA has it, and its pictures in ``images/``."""
    import json

    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = []
    for i in range(records):
        Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 90, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.jpg"
        )
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"Noise, number {i}.")]
        values.append(
            {
                "id": str(i),
                "image": f"{i}.jpg",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    path = folder / "llava.json"
    path.write_text(json.dumps(values))
    return path
