"""The named sizes, counted without memory for their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nanomolmo2
from nanomolmo2.convert.parts import build_on_meta
from nanomolmo2.emoji.model import tiny_processor
from nanomolmo2.emoji.vocabulary import build_tokenizer, vocab_size
from nanomolmo2.models import PRESETS, NanoMolmo2, NanoMolmo2Config, preset


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nanomolmo2", 1_010_217_840),
        ("nanomolmo2-pooling", 998_204_880),
        ("molmo2-4b", 4_850_869_200),
        ("molmo2-8b", 8_661_703_120),
        ("tiny", 7_979_497),
    ],
)
def test_parameters(name: str, parameters: int) -> None:
    model = build_on_meta(NanoMolmo2, preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parts_of_the_4b() -> None:
    model = build_on_meta(NanoMolmo2, preset("molmo2-4b"))
    assert isinstance(model, NanoMolmo2)
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert counts == {
        "vision_encoder": 382_505_936,
        "connector": 9_294_336 + 47_316_992,
        "llm": 4_022_795_776 + 388_956_160,
    }


def test_trap_11_rope_theta_is_not_the_same_for_all_sizes() -> None:
    thetas = {name: PRESETS[name].llm_config.rope_theta for name in PRESETS}
    assert thetas["molmo2-4b"] == 5e6
    assert thetas["molmo2-8b"] == thetas["nanomolmo2-pooling"] == thetas["nanomolmo2"] == 1e6


def test_trap_04_two_blocks_are_never_built() -> None:
    model = build_on_meta(NanoMolmo2, preset("molmo2-4b"))
    assert isinstance(model, NanoMolmo2)
    assert model.config.vision_config.num_hidden_layers == 27
    assert len(model.vision_encoder.layers) == 25
    assert model.vision_encoder.post_layernorm is None


def test_trap_10_molmo2_ends_with_im_end() -> None:
    assert PRESETS["molmo2-4b"].eos_token_id == 151645
    assert PRESETS["nanomolmo2"].eos_token_id == 151643


def test_ids_of_the_molmo2_design() -> None:
    config = preset("molmo2-8b")
    assert config.image_token_id == 151938
    assert config.image_special_token_ids == (
        *(151936, 151937, 151939, 151940, 151942),
        *(151943, 151944),
    )


def test_tiny_is_the_bundled_model_and_fits_its_tokenizer() -> None:
    folder = Path(nanomolmo2.__file__).parent / "assets" / "tiny"
    stored = json.loads((folder / "config.json").read_text())
    assert stored.pop("model_type") == "nanomolmo2"
    # The file may be older than a field, which then has its default.
    assert NanoMolmo2Config.from_dict(stored).to_dict() == preset("tiny").to_dict()
    config, processor = preset("tiny"), tiny_processor()
    assert config.llm_config.vocab_size == vocab_size(build_tokenizer())
    assert config.image_token_id == processor.image_token_id
    assert config.eos_token_ids == processor.stop_token_ids
    assert config.pad_token_id == processor.pad_token_id
    names = ("<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>")
    assert config.image_special_token_ids == tuple(map(processor.tokenizer.special_id, names))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no preset 'molmo2-7b': choose one of nanomolmo2, "):
        preset("molmo2-7b")
