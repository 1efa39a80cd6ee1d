"""config.json of other people's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.config import read_json_object
from nanomolmo2.convert.reference_config import (
    llm_config_from_reference,
    llm_config_to_reference,
    vision_config_from_reference,
    vision_config_to_reference,
)
from nanomolmo2.models import LLMConfig, VisionConfig
from tests.convert.checkpoints import LLM, VISION, make_qwen3, make_siglip

# As published, in the spelling of transformers 4: vision fields that equal the defaults left out.
SIGLIP2_JSON: dict[str, Any] = {
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {"model_type": "siglip_text_model", "anything": "is not read"},
    "torch_dtype": "float32",
    "transformers_version": "4.49.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
QWEN3_JSON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configs_are_our_defaults() -> None:
    assert vision_config_from_reference(SIGLIP2_JSON) == VisionConfig()
    assert llm_config_from_reference(QWEN3_JSON) == LLMConfig()


def test_transformers_5_spelling(tmp_path: Path) -> None:
    """What the installed transformers writes."""
    make_siglip(tmp_path / "whole", whole=True)
    make_siglip(tmp_path / "tower", whole=False)
    make_qwen3(tmp_path / "qwen3")
    for name in ("whole", "tower"):
        assert (
            vision_config_from_reference(read_json_object(tmp_path / name / "config.json"))
            == VISION
        )
    values = read_json_object(tmp_path / "qwen3" / "config.json")
    assert "rope_theta" not in values  # it is in rope_parameters now
    assert llm_config_from_reference(values) == LLM


def test_the_way_back_is_read_by_transformers_and_by_us() -> None:
    from transformers import Qwen3Config, SiglipVisionConfig

    llm = llm_config_to_reference(LLM)
    assert llm_config_from_reference(llm) == LLM
    theirs = Qwen3Config(**llm)
    assert theirs.rope_parameters["rope_theta"] == LLM.rope_theta
    assert theirs.tie_word_embeddings and theirs.head_dim == LLM.head_dim

    vision = vision_config_to_reference(VISION)
    assert vision_config_from_reference(vision) == VISION
    assert SiglipVisionConfig(**vision).num_hidden_layers == VISION.num_hidden_layers


def test_left_out_fields_have_the_reference_defaults() -> None:
    from transformers import Qwen3Config, SiglipVisionConfig

    assert vision_config_from_reference({"model_type": "siglip"}) == vision_config_from_reference(
        SiglipVisionConfig().to_dict()
    )
    assert llm_config_from_reference({"model_type": "qwen3"}) == llm_config_from_reference(
        Qwen3Config().to_dict()
    )


def test_additional_rows_have_no_place_in_qwen3() -> None:
    with pytest.raises(ValueError, match="additional_vocab_size is 16"):
        llm_config_to_reference(LLMConfig(additional_vocab_size=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "'qwen2' is not a dense Qwen3"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "given more than once"),
        ({"rope_parameters": [1]}, "expected an object or null"),
        ({"quantization_config": {"bits": 4}}, "unknown field.*quantization_config"),
        ({"hidden_size": "1024"}, "hidden_size: expected int, found '1024'"),
        ({"num_key_value_heads": 5}, "must be a multiple"),
    ],
)
def test_qwen3_settings_that_are_not_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm_config_from_reference({**QWEN3_JSON, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip_vision_model"}, "not a vision encoder"),
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"vision_config": 3}, "expected an object"),
        ({"vision_config": {"hidden_act": "relu"}}, "relu"),
        ({"vision_config": {"image_size": [384, 256]}}, "only squares"),
        ({"vision_config": {"attention_dropout": 0.5}}, "attention_dropout"),
        ({"vision_config": {"num_registers": 4}}, "unknown field.*num_registers"),
        ({"vision_config": {"patch_size": None}}, "patch_size: expected int, found None"),
    ],
)
def test_siglip_settings_that_are_not_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision_config_from_reference({**SIGLIP2_JSON, **changes})


def test_harmless_spellings() -> None:
    newer = {k: v for k, v in QWEN3_JSON.items() if k not in ("rope_theta", "torch_dtype")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    newer["dtype"] = "bfloat16"
    newer["layer_types"] = ["full_attention"] * 28
    newer["_name_or_path"] = "somewhere"
    assert llm_config_from_reference(newer) == LLMConfig()
    listed = {**SIGLIP2_JSON["vision_config"], "image_size": [384, 384], "vision_use_head": False}
    assert vision_config_from_reference(listed) == VisionConfig()
