"""A model and its processor come together: saved, loaded, and checked against each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import nanomolmo2
from nanomolmo2.convert import pretrained
from nanomolmo2.convert.pretrained import load
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer
from tests.convert.checkpoints import LLM, make_nanomolmo2
from tests.convert.fake_hub import FakeHub
from tests.convert.test_pretrained import assert_same_bits
from tests.processor.helpers import small_backend


def make_processor(**changes: Any) -> Processor:
    config = ProcessorConfig.molmo2(**{"image_size": 42, "image_tokens": 4, **changes})
    return Processor(config, Tokenizer(small_backend()))


def make_model(processor: Processor, **changes: Any) -> NanoMolmo2:
    vocabulary = processor.tokenizer.vocab_size
    values = {"image_token_id": processor.image_token_id, **changes}
    return make_nanomolmo2(llm_config=dataclasses.replace(LLM, vocab_size=vocabulary), **values)


def test_what_was_saved_together_loads_together(tmp_path: Path) -> None:
    processor = make_processor()
    model = make_model(processor)
    model.save_pretrained(tmp_path, processor=processor)
    loaded, loaded_processor = nanomolmo2.load(tmp_path, dtype=torch.float32)
    assert_same_bits(loaded, model)
    assert loaded_processor.config == processor.config
    encoded = loaded_processor.encode([{"role": "user", "content": "dogs there"}])
    expected = processor.encode([{"role": "user", "content": "dogs there"}])
    assert encoded.input_ids.tolist() == expected.input_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 56}, "patches a side: 4, the model expects 3"),
        ({"image_tokens": 9}, "image_tokens: 9, the model expects 4"),
        ({"image_token": "<im_col>"}, "the id of its image token"),
    ],
)
def test_a_processor_of_another_model(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    make_model(make_processor()).save_pretrained(tmp_path)
    make_processor(**settings).save(tmp_path)
    with pytest.raises(ValueError, match=f"does not belong to the model: {message}"):
        load(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    processor = make_processor()
    model = make_nanomolmo2(
        llm_config=dataclasses.replace(LLM, vocab_size=processor.tokenizer.vocab_size - 1),
        image_token_id=processor.image_token_id,
    )
    model.save_pretrained(tmp_path, processor=processor)
    with pytest.raises(ValueError, match="does not belong to the model: tokens"):
        load(tmp_path)


def test_a_model_saved_without_a_processor(tmp_path: Path) -> None:
    make_model(make_processor()).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"there is no .*processor_config\.json"):
        load(tmp_path)


def test_tiny_is_the_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name where one happens to work changes nothing."""
    processor = make_processor()
    model = make_model(processor)
    model.save_pretrained(tmp_path / "bundled", processor=processor)
    monkeypatch.setattr(pretrained, "TINY", tmp_path / "bundled")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_same_bits(load("tiny")[0], model)
    assert_same_bits(NanoMolmo2.from_pretrained("tiny"), model)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load("./tiny")


def test_base_design_takes_the_tokenizer_of_its_decoder(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "Qwen"
    folder.mkdir()
    Tokenizer(small_backend()).save(folder / "tokenizer.json")
    fake_hub.repositories["Qwen/Qwen3-0.6B-Base"] = folder
    processor = pretrained.load_processor()
    assert processor.config == ProcessorConfig()
    assert processor.tokenizer.vocab_size == make_processor().tokenizer.vocab_size
