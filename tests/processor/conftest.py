"""Tokenizers for the processor's tests: a small one made on the spot, and Qwen3's real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.processor import (
    MultiCrop,
    Processor,
    ProcessorConfig,
    Tokenizer,
    VideoConfig,
    molmo2_processor,
)
from nanomolmo2.processor.tokenizer import molmo2_tokenizer as molmo2_tokenizer_from
from tests.processor.helpers import small_backend


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(small_backend())


@pytest.fixture(scope="session")
def molmo2(tokenizer: Tokenizer) -> Processor:
    """Molmo2's format with small pictures of four visual tokens."""
    return Processor(ProcessorConfig.molmo2(image_size=32, image_tokens=4), tokenizer)


@pytest.fixture(scope="session")
def qwen3(tokenizer: Tokenizer) -> Processor:
    """Qwen3's format with the small tokenizer; one image token a picture."""
    return Processor(ProcessorConfig(image_size=32), tokenizer)


def qwen3_tokenizer_folder() -> Path:
    """Qwen3's tokenizer is too large for the repository: skip where it is not at hand."""
    candidates = [
        os.environ.get("NANOMOLMO2_TEST_TOKENIZER"),
        Path(__file__).parents[3] / "shared" / "fixtures" / "qwen3_tokenizer",
    ]
    for folder in candidates:
        if folder and (Path(folder) / "tokenizer.json").is_file():
            return Path(folder)
    pytest.skip("Qwen3's tokenizer.json is not here: set NANOMOLMO2_TEST_TOKENIZER to its folder")


@pytest.fixture(scope="session")
def qwen3_folder() -> Path:
    return qwen3_tokenizer_folder()


@pytest.fixture(scope="session")
def qwen3_tokenizer(qwen3_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen3_folder)


@pytest.fixture(scope="session")
def qwen3_reference(qwen3_folder: Path) -> Any:
    """transformers' tokenizer with Qwen3's own chat template."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(qwen3_folder)


@pytest.fixture(scope="session")
def released(qwen3_folder: Path) -> Processor:
    """The processor of Molmo2 4B and 8B."""
    return molmo2_processor(qwen3_folder)


@pytest.fixture(scope="session")
def molmo2_tokenizer(released: Processor) -> Tokenizer:
    return released.tokenizer


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """The Molmo2 design in small: crops of 4 x 4 patches, a vocabulary of 512."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")).save(str(path))
    return Processor(
        ProcessorConfig.molmo2(
            multicrop=MultiCrop(4, image_size=56, overlap_margins=(1, 1)),
            video=VideoConfig(max_frames=8, pooling_size=2),
        ),
        molmo2_tokenizer_from(path, vocab_size=512),
    )
