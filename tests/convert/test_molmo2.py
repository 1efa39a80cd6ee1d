"""Official Molmo2 folders: strict reading of tensors and config, and the export's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomolmo2.convert.molmo2 import open_molmo2
from nanomolmo2.convert.molmo2_config import (
    molmo2_config_from_reference,
    molmo2_config_to_reference,
)
from nanomolmo2.convert.tables import MOLMO2_LEGACY, MOLMO2_NATIVE
from nanomolmo2.convert.tensor_files import StackedTensor, open_safetensors
from nanomolmo2.models import ConnectorConfig, NanoMolmo2, VisionEncoder
from nanomolmo2.models.presets import PRESETS
from tests.convert.checkpoints import edit_json
from tests.convert.molmo2_checkpoint import (
    ADDITIONAL,
    EOS,
    IMAGE,
    PAD,
    SPECIAL,
    VOCAB,
    WIDTH,
    legacy_config,
    legacy_tensors,
    write_checkpoint,
)

LLM = "model.transformer"


# ---- tensors ----


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_released_folder(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = write_checkpoint(tmp_path)
    model = NanoMolmo2.from_pretrained(str(tmp_path), dtype=dtype)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    query, key, value = (
        getattr(model.llm.layers[1].self_attn, f"{name}_proj").weight for name in "qkv"
    )
    fused = tensors[f"{LLM}.blocks.1.self_attn.att_proj.weight"].to(query.dtype)
    assert torch.equal(torch.cat([query, key, value]), fused)
    words = torch.cat([tensors[f"{LLM}.wte.{n}embedding"] for n in ("", "new_")])
    assert torch.equal(model.llm.embed_tokens.weight, words.to(query.dtype))


def test_a_patch_vector_runs_row_column_channel(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    stored = tensors["model.vision_backbone.image_vit.patch_embedding.weight"]
    weight = NanoMolmo2.from_pretrained(str(tmp_path)).vision_encoder.patch_embedding.weight
    assert weight.is_contiguous()
    for row, column, channel in ((0, 0, 0), (0, 1, 2), (3, 5, 1), (13, 13, 2)):
        vector = stored[:, (row * 14 + column) * 3 + channel]
        assert torch.equal(weight[:, channel, row, column], vector)


def test_every_wrong_tensor_is_listed_by_its_stored_name(tmp_path: Path) -> None:
    tensors = legacy_tensors()
    fused = f"{LLM}.blocks.0.self_attn.att_proj.weight"
    new = f"{LLM}.wte.new_embedding"
    patches = "model.vision_backbone.image_vit.patch_embedding.weight"
    del tensors[f"{LLM}.blocks.1.mlp.ff_proj.weight"], tensors["lm_head.weight"]
    tensors[fused] = tensors[fused][:-1]
    tensors[new] = tensors[new][:-2]
    tensors[patches] = tensors[patches][:, :-3]
    tensors[f"{LLM}.blocks.2.ff_norm.weight"] = torch.ones(WIDTH)
    tensors["extra"] = torch.ones(1)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        open_molmo2(tmp_path)
    text = str(caught.value)
    assert "2 missing: " in text
    assert f"{LLM}.blocks.1.mlp.ff_proj.weight" in text
    assert "2 not known: " in text
    assert f"extra, {LLM}.blocks.2.ff_norm.weight" in text
    assert "3 of another shape: " in text
    assert f"{fused} is [127, {WIDTH}], expected [128, {WIDTH}]" in text
    assert f"{new} is [{ADDITIONAL - 2}, {WIDTH}], expected [{ADDITIONAL}, {WIDTH}]" in text
    assert f"{patches} is [48, 585], expected [48, 588]" in text


def test_halves_that_are_not_the_embedding(tmp_path: Path) -> None:
    tensors = legacy_tensors()
    half = torch.zeros(100, WIDTH)
    tensors[f"{LLM}.wte.embedding"] = tensors[f"{LLM}.wte.new_embedding"] = half
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"split into two halves of 100 rows.*have 272 .*=False"):
        open_molmo2(tmp_path)


def test_halves_are_joined_in_order(tmp_path: Path) -> None:
    tensors = legacy_tensors()
    names = [f"{LLM}.wte.embedding", f"{LLM}.wte.new_embedding"]
    words = torch.cat([tensors[n] for n in names])
    tensors |= dict(zip(names, words.chunk(2), strict=True))
    write_checkpoint(tmp_path, tensors)
    model = NanoMolmo2.from_pretrained(str(tmp_path))
    assert torch.equal(model.llm.embed_tokens.weight, words)


def test_parts_of_a_stored_tensor_are_read_from_their_place(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    stored = open_safetensors(tmp_path)[f"{LLM}.wte.embedding"]
    expected = tensors[f"{LLM}.wte.embedding"]
    for start, stop in ((0, VOCAB), (0, 3), (7, 19), (VOCAB - 1, VOCAB)):
        part = stored.rows(start, stop)
        assert part.shape == (stop - start, WIDTH)
        assert torch.equal(part.read(), expected[start:stop])
        assert torch.equal(part.read(dtype=torch.bfloat16), expected[start:stop].bfloat16())
    joined = StackedTensor((stored.rows(5, 9), stored.rows(0, 2)))
    assert joined.shape == (6, WIDTH)
    assert torch.equal(joined.read(), torch.cat([expected[5:9], expected[:2]]))
    assert torch.equal(
        joined.read(dtype=torch.float16), torch.cat([expected[5:9], expected[:2]]).half()
    )


@pytest.mark.parametrize("table", [MOLMO2_LEGACY, MOLMO2_NATIVE], ids=["legacy", "native"])
@pytest.mark.parametrize("name", ["molmo2-4b", "molmo2-8b", "nanomolmo2-pooling"])
def test_the_tables_know_every_tensor_of_the_presets(table: Any, name: str) -> None:
    with torch.device("meta"):
        model = NanoMolmo2(replace(PRESETS[name]))
    ours = [name for rule in table for name in rule.ours]
    assert len(ours) == len(set(ours))
    theirs = [name for rule in table for name in rule.theirs]
    assert len(theirs) == len(set(theirs))
    patterns = {_pattern(n) for n in model.state_dict()} | {"llm.lm_head.weight"}
    assert patterns == set(ours)


def test_the_released_4b_has_706_tensors() -> None:
    """And 4,850,869,200 parameters, by its index."""
    from nanomolmo2.convert.molmo2 import molmo2_tensors

    config = PRESETS["molmo2-4b"]
    with torch.device("meta"):
        model = NanoMolmo2(config)
    stacked = molmo2_tensors(model.state_dict(), config)
    assert len(stacked) == 706
    assert sum(t.numel() for pieces in stacked.values() for t in pieces) == 4_850_869_200
    shapes = {
        name: (sum(p.shape[0] for p in pieces), *pieces[0].shape[1:])
        for name, pieces in stacked.items()
    }
    assert shapes[f"{LLM}.wte.embedding"] == (151936, 2560)
    assert shapes[f"{LLM}.wte.new_embedding"] == (128, 2560)
    assert shapes[f"{LLM}.blocks.35.self_attn.att_proj.weight"] == (6144, 2560)
    assert shapes[f"{LLM}.blocks.35.mlp.ff_proj.weight"] == (19456, 2560)
    vision = "model.vision_backbone"
    assert shapes[f"{vision}.image_vit.patch_embedding.weight"] == (1152, 588)
    assert shapes[f"{vision}.image_vit.transformer.resblocks.24.feed_forward.w1.weight"] == (
        4304,
        1152,
    )
    assert shapes[f"{vision}.image_pooling_2d.wq.weight"] == (1152, 2304)
    assert shapes[f"{vision}.image_projector.w2.weight"] == (2560, 9728)


def test_the_vision_encoder_of_a_released_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    vision = VisionEncoder.from_pretrained(tmp_path)
    assert len(vision.layers) == 10
    assert vision.config.image_size == 56


# ---- config ----


def test_a_released_config() -> None:
    generation = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = molmo2_config_from_reference(legacy_config(), generation=generation)
    assert config.image_token_id == IMAGE
    assert config.image_special_token_ids == SPECIAL
    assert config.bidirectional_image_attention
    assert not config.freeze_vision
    assert (config.eos_token_id, config.pad_token_id) == (EOS, PAD)
    assert config.connector.vit_layers == (-3, -9)
    assert config.connector.pooling_size == 2
    assert config.llm_config.rope_theta == 5_000_000
    assert not config.llm_config.tie_word_embeddings
    assert config.llm_config.num_embeddings == VOCAB + ADDITIONAL


@pytest.mark.parametrize("name", ["molmo2-4b", "molmo2-8b"])
def test_presets_there_and_back(name: str) -> None:
    config = PRESETS[name]
    written = json.loads(json.dumps(molmo2_config_to_reference(config)))
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    assert molmo2_config_from_reference(written, generation=generation) == config


def test_the_released_config_is_the_preset() -> None:
    """The very file of allenai/Molmo2-4B, with its remote code and its unused fields."""
    values = json.loads((Path(__file__).parents[1] / "data" / "molmo2_4b_config.json").read_text())
    generation = {"bos_token_id": 151645, "eos_token_id": 151645, "pad_token_id": 151643}
    config = molmo2_config_from_reference(values, generation=generation)
    assert config == PRESETS["molmo2-4b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text__norm_after": True}, "norm_after is True"),
        ({"text__qk_norm_type": "olmo"}, "qk_norm_type is 'olmo'"),
    ],
)
def test_trap_23_the_layout_that_sglang_expects_is_another_network(
    changes: dict[str, Any], message: str
) -> None:
    """Norms behind the blocks, query and key normalised over the full width: refused, not run."""
    with pytest.raises(ValueError, match=message):
        molmo2_config_from_reference(legacy_config(**changes))


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoConfig

    values = molmo2_config_to_reference(PRESETS["molmo2-4b"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.vision_config.num_hidden_layers == 25
    assert config.adapter_config.vision_feature_layer == [24, 18]
    assert config.text_config.rope_parameters["rope_theta"] == 5_000_000
    assert config.text_config.rms_norm_eps == 1e-6
    assert config.image_token_id == 151938
    assert config.vision_config.image_size == [378, 378]
    # And back from its own spelling: the same tensors, counted without the unused blocks.
    config.save_pretrained(tmp_path / "native")
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    assert "vit_config" not in native
    ours = molmo2_config_from_reference(native)
    assert ours.vision_config.num_hidden_layers == 25
    assert ours.connector.vit_layers == (24, 18)
    assert ours.llm_config == PRESETS["molmo2-4b"].llm_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text__qk_norm_type": "olmo"}, "text_config: qk_norm_type is 'olmo', expected 'qwen3'"),
        ({"text__norm_after": True}, "norm_after is True"),
        ({"text__use_qk_norm": False}, "use_qk_norm is False"),
        ({"text__qkv_bias": True}, "attention_bias is True"),
        ({"text__hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"text__attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"text__rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "only plain rotary"),
        ({"text__rope_scaling_layers": [0]}, r"rope_scaling_layers is \[0\]"),
        ({"text__rope_theta": None}, "lacks rope_theta"),
        ({"text__hidden_size": None}, "text_config lacks hidden_size"),
        ({"text__experts": 4}, "text_config: unknown field.*experts"),
        ({"vit__hidden_act": "quick_gelu"}, "vision_config: hidden_act is 'quick_gelu'"),
        ({"vit__num_key_value_heads": 2}, "vision_config has 4 heads of 12 and 2 key/value"),
        ({"vit__image_num_pos": 17}, "17 positions do not fit"),
        ({"vit__image_default_input_size": [56, 42]}, "only squares"),
        ({"adapter__pooling_attention_mask": False}, "pooling_attention_mask is False"),
        ({"adapter__image_feature_dropout": 0.1}, "image_feature_dropout is 0.1"),
        ({"adapter__hidden_size": 96, "adapter__head_dim": 24}, "adapter_config.hidden_size is 96"),
        ({"adapter__text_hidden_size": 32}, "llm_dim is 32"),
        ({"adapter__vit_layers": [-3, -13]}, "vit_layers is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"image_patch_id": None}, "image_patch_id is missing"),
        ({"image_high_res_id": 3}, "image_high_res_id is 3"),
        ({"model_type": "molmo_point"}, "model_type 'molmo_point' is not Molmo2"),
    ],
)
def test_what_is_not_built_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        molmo2_config_from_reference(legacy_config(**changes))


def test_errors_name_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, text__norm_after=True)
    with pytest.raises(ValueError, match=r"config\.json: text_config: norm_after is True"):
        NanoMolmo2.from_pretrained(str(tmp_path))


def test_a_folder_without_a_generation_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, eos_token_id=EOS)
    (tmp_path / "generation_config.json").unlink()
    config = NanoMolmo2.from_pretrained(str(tmp_path)).config
    assert (config.eos_token_id, config.pad_token_id) == (EOS, 0)


def test_the_window_of_pictures_is_in_the_processors_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"pooling_size": [3, 3]}))
    assert open_molmo2(tmp_path)[0].config.connector.pooling_size == 3
    edit_json(path, pooling_size=[3, 2])
    with pytest.raises(ValueError, match="only squares are built"):
        open_molmo2(tmp_path)


CANNOT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "linear": (
        lambda c: replace(
            c, connector_config=ConnectorConfig(vision_dim=1152, llm_dim=c.llm_config.hidden_size)
        ),
        r"only express the attention-pooling connector.*'linear'.*save_pretrained.*pooling",
    ),
    "final features": (
        lambda c: replace(c, connector_config=replace(c.connector, vit_layers=None)),
        "final features behind its last norm",
    ),
    "no rows": (
        lambda c: replace(
            c, llm_config=replace(c.llm_config, additional_vocab_size=0), image_token_id=151655
        ),
        "rows behind the vocabulary",
    ),
    "a head of more rows": (
        lambda c: replace(c, llm_config=replace(c.llm_config, predict_additional_vocab=True)),
        "head of vocab_size rows",
    ),
    "points": (lambda _: PRESETS["molmo-point-8b"], "selecting visual tokens.*molmo-point-hf"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_the_format_can_not_say(case: str) -> None:
    change, message = CANNOT[case]
    with pytest.raises(ValueError, match=message):
        molmo2_config_to_reference(change(PRESETS["nanomolmo2-pooling"]))


def _pattern(name: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))
