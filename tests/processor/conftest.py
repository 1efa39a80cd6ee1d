"""Tokenizers for the processor's tests: a small one made on the spot, and Qwen3's real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer
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
def molmo2_tokenizer(qwen3_folder: Path) -> Tokenizer:
    """Qwen3's, filled up to 151,936 and with Molmo2's ten tokens behind, as in its release."""
    backend = tokenizers.Tokenizer.from_file(str(qwen3_folder / "tokenizer.json"))
    fillers = [f"|<EXTRA_TOKENS_{i}>|" for i in range(267)]
    extra = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>"]
    extra += ["<|image|>", "<im_low>", "<frame_start>", "<frame_end>", "<|video|>"]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in fillers + extra])
    return Tokenizer(backend)
