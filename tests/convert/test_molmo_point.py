"""MolmoPoint folders: strict reading of tensors and config, and the way back.

Traps are those of the reference code, by their number in its description.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanomolmo2.convert import export_molmo2, export_molmo_point
from nanomolmo2.convert.molmo_point import molmo_point_tensors, open_molmo_point
from nanomolmo2.convert.molmo_point_config import (
    molmo_point_config_from_reference,
    molmo_point_config_to_reference,
)
from nanomolmo2.convert.pretrained import load_nanomolmo2
from nanomolmo2.convert.tables import MOLMO_POINT, MOLMO_POINT_TRAINING
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.presets import PRESETS
from tests.convert.checkpoints import edit_json
from tests.convert.molmo_point_checkpoint import (
    ABSENT,
    ADDITIONAL,
    CHECKPOINT,
    EMBED,
    EOS,
    GOLDEN,
    HEAD,
    NUM_EMBEDDINGS,
    PAD,
    ROWS,
    VOCAB,
    WIDTH,
    point_config,
    point_tensors,
    released_shapes,
    tied_tensors,
    write_point_checkpoint,
)

MARKERS = (267, 268, 269)  # of the golden checkpoint


def golden_case(name: str) -> dict[str, Tensor]:
    """Inputs of a golden prompt, and the logits of its last positions."""
    case = json.loads((GOLDEN / "cases.json").read_text())[name]
    tensors = load_file(GOLDEN / "cases.safetensors")
    return {
        "input_ids": torch.tensor(case["input_ids"])[None],
        "pixel_values": (tensors[f"{name}.pixel_values_u8"].float() / 255 - 0.5) / 0.5,
        "image_token_pooling": tensors[f"{name}.image_token_pooling"],
        "logits": tensors[f"{name}.prefill_logits"],
    }


def logits_of(model: NanoMolmo2) -> Tensor:
    """(T, V) of a golden picture and prompt, without the columns that AI2's code overwrites."""
    inputs = golden_case("one")
    del inputs["logits"]
    with torch.no_grad():
        logits: Tensor = model(**inputs)[0]
    return without_markers(logits)


def without_markers(logits: Tensor) -> Tensor:
    """AI2's code overwrites the three columns with -1e5."""
    return logits[:, [i for i in range(NUM_EMBEDDINGS) if i not in MARKERS]]


def same_weights(model: NanoMolmo2, other: NanoMolmo2) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# ---- tensors ----


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_released_folder_gives_the_golden_logits(tmp_path: Path, shards: int) -> None:
    """A file of its own, and several with an index: the same bits."""
    tensors = write_point_checkpoint(tmp_path, shards=shards)
    model = NanoMolmo2.from_pretrained(str(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == 401_369
    assert sum(t.numel() for t in tensors.values()) == 401_369
    expected = without_markers(golden_case("one")["logits"])
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=2e-5)
    assert same_weights(model, NanoMolmo2.from_pretrained(str(CHECKPOINT)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtypes(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None) -> None:
    tensors = write_point_checkpoint(tmp_path, dtype=stored)
    model = NanoMolmo2.from_pretrained(str(tmp_path), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or stored}
    head = torch.cat([tensors[name] for name in HEAD]).to(dtype or stored)
    assert model.llm.lm_head is not None
    assert torch.equal(model.llm.lm_head.weight, head)
    if stored is torch.bfloat16:  # nothing is lost on the way to float32
        words = torch.cat([tensors[name] for name in ROWS]).float()
        assert torch.equal(model.llm.embed_tokens.weight.float(), words)


def test_trap_1_the_prefixes_differ_from_those_of_molmo2(tmp_path: Path) -> None:
    """Every wrong tensor is listed by its stored name: Molmo2's names are not known here."""
    tensors = point_tensors()
    tensors["lm_head.weight"] = tensors.pop(HEAD[0])
    query = "model.connector.image_pooling_2d.wq.weight"
    tensors["model.vision_backbone.image_pooling_2d.wq.weight"] = tensors.pop(query)
    vector = "model.point_predictor.add_no_point_class_embed.vector"
    tensors[vector] = tensors[vector][:-1]
    cells = "model.point_predictor.subpatch_loc_k.bias"
    tensors[cells] = torch.zeros(4)
    write_point_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        open_molmo_point(tmp_path)
    text = str(caught.value)
    assert "2 missing: " in text
    assert HEAD[0] in text
    assert query in text
    assert "2 not known: lm_head.weight" in text
    assert "2 of another shape: " in text
    assert f"{vector} is [31], expected [32]" in text
    assert f"{cells} is [4], expected [9]" in text


@pytest.mark.parametrize("name", sorted(point_tensors())[::24])
def test_no_tensor_may_be_missing(tmp_path: Path, name: str) -> None:
    tensors = point_tensors()
    del tensors[name]
    write_point_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"1 missing: {name}"):
        open_molmo_point(tmp_path)


def test_trap_2_the_pooling_has_no_output_projection(tmp_path: Path) -> None:
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT))
    assert not any("o_proj" in n for n in model.state_dict() if n.startswith("connector."))
    tensors = point_tensors()
    wo = "model.connector.image_pooling_2d.wo.weight"
    tensors[wo] = torch.zeros(48, 48)
    write_point_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"1 not known: {wo}"):
        open_molmo_point(tmp_path)
    # One that says that it has the layer is read with it.
    tensors[wo.replace("weight", "bias")] = torch.zeros(48)
    write_point_checkpoint(tmp_path, tensors, adapter__attention_pooling_out_layer=True)
    with_layer = NanoMolmo2.from_pretrained(str(tmp_path)).state_dict()
    place = "connector.layers.image_pooling_2d.o_proj"
    assert with_layer.keys() - model.state_dict().keys() == {f"{place}.weight", f"{place}.bias"}


def test_trap_3_the_pooling_masks_empty_slots_whatever_the_file_says(tmp_path: Path) -> None:
    """AI2's code leaves the mask out where a file says ``eager``, or nothing; no model learned so.
    What we write says ``sdpa``, as the released files do.
    """
    for value in ("eager", ABSENT):
        write_point_checkpoint(tmp_path, adapter__attn_implementation=value)
        model = NanoMolmo2.from_pretrained(str(tmp_path))
        expected = without_markers(golden_case("one")["logits"])
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=2e-5)
    written = molmo_point_config_to_reference(model.config)
    parts = ("text_config", "vit_config", "adapter_config")
    assert {written[part]["attn_implementation"] for part in parts} == {"sdpa"}


@pytest.mark.parametrize("name", [ROWS[1], HEAD[1]])
def test_trap_26_additional_rows_that_are_not_those_of_the_config(
    tmp_path: Path, name: str
) -> None:
    """Classes of points are numbered behind them: one row more and every point is another."""
    tensors = point_tensors()
    tensors[name] = tensors[name][:64]
    write_point_checkpoint(tmp_path, tensors)
    message = f"{name} has 64 rows, but additional_vocab_size is {ADDITIONAL}"
    with pytest.raises(ValueError, match=message):
        NanoMolmo2.from_pretrained(str(tmp_path))


def test_trap_26_a_config_with_other_additional_rows(tmp_path: Path) -> None:
    write_point_checkpoint(tmp_path, text__additional_vocab_size=64)
    with pytest.raises(ValueError, match=r"has 128 rows, but additional_vocab_size is 64"):
        NanoMolmo2.from_pretrained(str(tmp_path))
    write_point_checkpoint(tmp_path, text__additional_vocab_size=12)  # 256 + 12 < 269
    with pytest.raises(ValueError, match=r"config\.json: .*markers.*below 268"):
        NanoMolmo2.from_pretrained(str(tmp_path))


def test_trap_29_the_rotary_table_is_in_no_file_and_there_after_a_load() -> None:
    """transformers 5 leaves it uninitialised; here nothing is kept that a load could forget."""
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT))  # built on the meta device
    points = model.point_predictor
    assert points is not None
    assert not list(points.named_buffers())
    torch.manual_seed(0)
    states, positions = torch.randn(5, WIDTH), torch.tensor([0, 1, 2, 40, 3000])
    with torch.no_grad():
        keys = points.row_keys(states, positions)
        plain = points.patch_k(points.x_norm(states))
    half = EMBED // 2
    for key, x, position in zip(keys, plain, positions.tolist(), strict=False):
        for i in (0, 1, half - 1):
            angle = position * 50_000.0 ** (-i / half)
            turned = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            assert float(key[i]) == pytest.approx(float(turned), abs=2e-3)
    assert torch.equal(keys[5], points.add_no_point_class_embed.vector)


def test_trap_30_the_head_writes_the_markers(tmp_path: Path) -> None:
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT))
    assert model.llm.lm_head is not None
    assert model.llm.lm_head.weight.shape == (NUM_EMBEDDINGS, WIDTH)
    tensors = point_tensors()
    marker = model.llm.lm_head.weight[MARKERS[0]]
    assert torch.equal(marker, tensors[HEAD[1]][MARKERS[0] - VOCAB])
    del tensors[HEAD[1]]  # a head of Molmo2
    write_point_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"missing: .*{HEAD[1]}"):
        NanoMolmo2.from_pretrained(str(tmp_path))
    config = model.config
    with pytest.raises(ValueError, match="predict_additional_vocab"):
        replace(config, llm_config=replace(config.llm_config, predict_additional_vocab=False))


def test_trap_31_masked_rows_stay_finite_in_float16() -> None:
    """-1e8 is infinite in float16; scores are float32 whatever the weights are."""
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT), dtype=torch.float16)
    points = model.point_predictor
    assert points is not None
    torch.manual_seed(0)
    states = torch.randn(3, WIDTH).half()
    with torch.no_grad():
        keys = points.row_keys(states, torch.arange(3))
        selectable = torch.tensor([True, False, True, True])
        scores = points.row_logits(states[:1], keys, torch.zeros(1).long(), selectable)
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())
    assert float(scores[0, 1]) == -1e8


def test_a_tied_folder_has_no_head(tmp_path: Path) -> None:
    """As AI2's code saves a tied model: 717 of 719 names in the 4B."""
    tensors = tied_tensors()
    write_point_checkpoint(tmp_path / "tied", tensors, text__tie_word_embeddings=True)
    tied = NanoMolmo2.from_pretrained(str(tmp_path / "tied"))
    assert tied.config.llm_config.tie_word_embeddings
    assert tied.llm.lm_head is None
    # The same as one whose head is a copy of the embedding.
    untied = tensors | {head: tensors[rows] for head, rows in zip(HEAD, ROWS, strict=True)}
    write_point_checkpoint(tmp_path / "untied", untied)
    other = NanoMolmo2.from_pretrained(str(tmp_path / "untied"))
    torch.testing.assert_close(logits_of(tied), logits_of(other), rtol=0, atol=1e-5)
    # Copies in the files of a tied model are dropped, another head is a mistake.
    write_point_checkpoint(tmp_path / "copies", untied, text__tie_word_embeddings=True)
    assert same_weights(tied, NanoMolmo2.from_pretrained(str(tmp_path / "copies")))
    write_point_checkpoint(tmp_path / "wrong", point_tensors(), text__tie_word_embeddings=True)
    with pytest.raises(ValueError, match=rf"tie_word_embeddings, but {HEAD[0]} is not a copy"):
        NanoMolmo2.from_pretrained(str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match=rf"2 missing: {HEAD[0]}, {HEAD[1]}"):
        write_point_checkpoint(tmp_path / "lacking", tensors)
        NanoMolmo2.from_pretrained(str(tmp_path / "lacking"))


@pytest.mark.parametrize("connector", ["connector", "connectors.0"])
def test_the_names_of_the_training_code(tmp_path: Path, connector: str) -> None:
    def name_there(name: str) -> str:
        name = name.removeprefix("model.").replace("point_predictor.", "")
        name = name.replace("self_attn.", "").replace("mlp.", "")
        name = name.replace(HEAD[0], "transformer.ff_out.weight")
        name = name.replace(HEAD[1], "transformer.ff_out.new_weight")
        return f"{connector}.{name[10:]}" if name.startswith("connector.") else name

    tensors = {name_there(name): tensor for name, tensor in point_tensors().items()}
    write_point_checkpoint(tmp_path, tensors)
    model = NanoMolmo2.from_pretrained(str(tmp_path))
    assert same_weights(model, NanoMolmo2.from_pretrained(str(CHECKPOINT)))


def test_the_names_of_the_training_code_are_those_of_its_gradients() -> None:
    """Golden gradient norms are listed by them."""
    training = json.loads((GOLDEN / "training.json").read_text())
    known = {name for rule in MOLMO_POINT_TRAINING for name in rule.theirs}
    assert set(training["single"]["gradient_norms"]) <= known


def test_parts_of_a_released_folder() -> None:
    vision = VisionEncoder.from_pretrained(str(CHECKPOINT))
    assert (len(vision.layers), vision.config.image_size) == (10, 70)
    llm = LanguageModel.from_pretrained(str(CHECKPOINT))
    assert llm.lm_head is not None
    assert llm.lm_head.weight.shape == (NUM_EMBEDDINGS, WIDTH)


# ---- the large ones ----


@pytest.mark.parametrize(
    ("name", "width", "mlp", "tied", "count", "tensors"),
    [
        ("molmo-point-8b", 4096, 12288, False, 8_677_855_065, 719),
        ("molmo-point-vid-4b", 2560, 9728, True, 4_471_625_561, 717),
    ],
)
def test_names_and_shapes_of_the_released_models(
    name: str, width: int, mlp: int, tied: bool, count: int, tensors: int
) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = NanoMolmo2(config)
    assert sum(p.numel() for p in model.parameters()) == count
    stacked = molmo_point_tensors(model.state_dict(), config)
    found = {
        theirs: (sum(p.shape[0] for p in pieces), *pieces[0].shape[1:])
        for theirs, pieces in stacked.items()
    }
    assert found == released_shapes(width, mlp, tied)
    assert len(found) == tensors


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "molmo-point-8b",
            {
                "vision_encoder": 382_505_936,
                "connector": 86_609_280,
                "llm": 7_568_929_792 + 622_329_856 + 524_288,
                "point_predictor": 9_441_280 + 7_514_633,
            },
        ),
        (
            "molmo-point-vid-4b",
            {
                "vision_encoder": 382_505_936,
                "connector": 55_283_072,
                "llm": 4_022_795_776,
                "point_predictor": 5_900_800 + 5_139_977,
            },
        ),
    ],
)
def test_parameters_of_the_parts_of_the_released_models(name: str, parts: dict[str, int]) -> None:
    with torch.device("meta"):
        model = NanoMolmo2(PRESETS[name])
    counts = {n: sum(p.numel() for p in part.parameters()) for n, part in model.named_children()}
    assert counts == parts


@pytest.mark.parametrize("table", [MOLMO_POINT, MOLMO_POINT_TRAINING], ids=["files", "training"])
def test_the_tables_know_every_tensor(table: Any) -> None:
    with torch.device("meta"):
        model = NanoMolmo2(PRESETS["molmo-point-8b"])
    ours = [name for rule in table for name in rule.ours]
    theirs = [name for rule in table for name in rule.theirs]
    assert len(ours) == len(set(ours))
    assert len(theirs) == len(set(theirs))
    patterns = {
        ".".join("{}" if part.isdigit() else part for part in name.split("."))
        for name in model.state_dict()
    }
    layer = "connector.layers.image_pooling_2d.o_proj"
    assert set(ours) == patterns | {f"{layer}.weight", f"{layer}.bias"}


# ---- config ----


def test_a_released_config() -> None:
    generation = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = molmo_point_config_from_reference(point_config(), generation=generation)
    point = config.point_config
    assert point == PointConfig(*MARKERS, image_non_indexable_patch_id=262, patch_embed_dim=EMBED)
    assert point.rule == "released"
    assert point.token_prediction_rotary_theta == 50_000
    assert (config.eos_token_id, config.pad_token_id) == (EOS, PAD)
    assert config.image_token_id == 258
    assert config.bidirectional_image_attention
    assert not config.freeze_vision
    connector, llm = config.connector, config.llm_config
    assert (connector.vit_layers, connector.pooling_size) == ((-3, -9), 2)
    assert not connector.attention_pooling_out_layer
    assert (llm.num_logits, llm.num_embeddings) == (NUM_EMBEDDINGS, NUM_EMBEDDINGS)
    assert (llm.max_position_embeddings, llm.rope_theta) == (1024, 1_000_000)
    assert not llm.tie_word_embeddings


@pytest.mark.parametrize("case", ["one", "two", "video"])
def test_the_tokens_of_the_mask_are_those_of_the_golden_prompts(case: str) -> None:
    """``<im_low>`` counts as an image's token, and so does the overview's start (260), which the
    released config.json has as null: the converter forgot it.
    """
    config = molmo_point_config_from_reference(point_config(low_res_image_start_token_id=None))
    assert config.image_special_token_ids == (256, 257, 259, 260, 262, 263, 264)
    golden = json.loads((GOLDEN / "cases.json").read_text())[case]
    types = golden["token_type_ids"]
    seen = {config.image_token_id, *config.image_special_token_ids}
    assert [int(i in seen) for i in golden["input_ids"]] == types
    assert {0, 1} <= set(types)


@pytest.mark.parametrize("name", ["molmo-point-8b", "molmo-point-vid-4b"])
def test_presets_there_and_back(name: str) -> None:
    config = PRESETS[name]
    written = json.loads(json.dumps(molmo_point_config_to_reference(config)))
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    assert molmo_point_config_from_reference(written, generation=generation) == config


def test_the_released_8b_is_the_preset() -> None:
    """The values of config.json as they are known of it: ids, pointing, the parts that differ."""
    values = molmo_point_config_to_reference(PRESETS["molmo-point-8b"])
    expected = {
        "patch_token_id": 151947,
        "subpatch_token_id": 151948,
        "location_token_id": 151949,
        "image_patch_id": 151938,
        "image_high_res_id": 151938,
        "image_col_id": 151939,
        "image_non_indexable_patch_id": 151942,
        "image_start_token_id": 151936,
        "image_end_token_id": 151937,
        "frame_start_token_id": 151943,
        "frame_end_token_id": 151944,
        "use_frame_special_tokens": True,
        "patch_embed_dim": 512,
        "patch_embedding_kind": "image_feature0",
        "embed_selected_vit_patch": "linear",
        "embed_location": False,
        "patch_location": "3x3",
        "no_more_points_class": True,
        "layer_norm_x": True,
        "norm_logits": True,
        "mask_patches": "always",
        "mask_subpatches": "inference",
        "mask_repeats": "inference",
        "token_prediction_rotary": "one_d",
        "token_prediction_rotary_theta": 50000,
        "tie_word_embeddings": False,
    }
    assert {name: values[name] for name in expected} == expected
    adapter, text = values["adapter_config"], values["text_config"]
    assert (adapter["intermediate_size"], adapter["text_hidden_size"]) == (12288, 4096)
    assert adapter["attention_pooling_out_layer"] is False
    assert adapter["positional_embeddings"] is None
    assert adapter["pooling_attention_mask"] is True
    assert adapter["model_type"] == values["model_type"] == "molmo_point"
    assert (text["max_position_embeddings"], text["tie_word_embeddings"]) == (37376, False)
    vid = molmo_point_config_to_reference(PRESETS["molmo-point-vid-4b"])
    assert (vid["text_config"]["rope_theta"], vid["text_config"]["hidden_size"]) == (5e6, 2560)
    assert vid["text_config"]["tie_word_embeddings"] is True
    assert vid["tie_word_embeddings"] is False


TRAP_28 = {
    "no_more_points_class": False,
    "patch_embedding_kind": "linear",
    "token_prediction_rotary": True,
    "adapter__pooling_attention_mask": False,
    "adapter__positional_embeddings": 16,
}


@pytest.mark.parametrize("name", TRAP_28)
def test_trap_28_what_is_left_out_has_the_default_of_its_class(tmp_path: Path, name: str) -> None:
    """Which is none of the released values, and not built here: one sentence either way."""
    field, default = name.rpartition("__")[2], TRAP_28[name]
    write_point_checkpoint(tmp_path, **{name: ABSENT})
    with pytest.raises(ValueError, match=rf"config\.json: .*{field} is {default!r}.*mean") as left:
        NanoMolmo2.from_pretrained(str(tmp_path))
    write_point_checkpoint(tmp_path, **{name: default})
    with pytest.raises(ValueError, match=rf"config\.json: .*{field} is {default!r}") as given:
        NanoMolmo2.from_pretrained(str(tmp_path))
    assert all("\n" not in str(error.value) for error in (left, given))


def test_trap_28_the_width_of_keys_that_a_file_leaves_out(tmp_path: Path) -> None:
    """256 in the class: built, so the tensors say that they are others."""
    write_point_checkpoint(tmp_path, patch_embed_dim=ABSENT)
    with pytest.raises(ValueError, match=r"patch_q.bias is \[32\], expected \[256\]"):
        NanoMolmo2.from_pretrained(str(tmp_path))


MAY_BE_ABSENT = (
    *("patch_location", "embed_selected_vit_patch", "embed_location", "layer_norm_x"),
    *("norm_logits", "mask_patches", "mask_subpatches", "mask_repeats", "image_high_res_id"),
    *("token_prediction_rotary_theta", "use_frame_special_tokens", "tie_word_embeddings"),
    *("image_start_token_id", "frame_end_token_id", "low_res_image_start_token_id"),
    *("adapter__attention_pooling_out_layer", "text__tie_word_embeddings", "auto_map", "dtype"),
)


@pytest.mark.parametrize("name", MAY_BE_ABSENT)
def test_what_may_be_left_out(name: str) -> None:
    """The class's default is what was released, or follows from the rest."""
    expected = molmo_point_config_from_reference(point_config())
    assert molmo_point_config_from_reference(point_config(**{name: ABSENT})) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "molmo2"}, "model_type 'molmo2' is not MolmoPoint"),
        ({"patch_location": None}, "patch_location is None"),
        ({"patch_location": "4x4"}, "patch_location is '4x4'.*3 x 3"),
        ({"no_more_points_class": 1}, "no_more_points_class is 1"),
        ({"patch_embedding_kind": "image_feature1"}, "patch_embedding_kind is 'image_feature1'"),
        ({"embed_selected_vit_patch": None}, "embed_selected_vit_patch is None"),
        ({"embed_location": True}, "embed_location is True"),
        ({"layer_norm_x": False}, "layer_norm_x is False"),
        ({"norm_logits": False}, "norm_logits is False"),
        ({"mask_patches": "inference"}, "mask_patches is 'inference'"),
        ({"mask_subpatches": None}, "mask_subpatches is None"),
        ({"mask_repeats": "all"}, "mask_repeats is 'all'"),
        ({"token_prediction_rotary": "two_d"}, "token_prediction_rotary is 'two_d'"),
        ({"token_prediction_rotary_dims": [3]}, "unknown field.*token_prediction_rotary_dims"),
        ({"patch_token_id": ABSENT}, "patch_token_id missing"),
        ({"location_token_id": ABSENT, "image_patch_id": ABSENT}, "image_patch_id, location_token"),
        ({"location_token_id": 384}, "markers .267, 268, 384. below 384"),
        ({"subpatch_token_id": 267}, "markers .267, 267, 269. different"),
        ({"image_non_indexable_patch_id": 384}, "outside the vocabulary"),
        ({"image_high_res_id": 3}, "image_high_res_id is 3"),
        ({"patch_embed_dim": 33}, "patch_embed_dim .33. must be even"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True.*text_config says"),
        ({"text__qk_norm_type": "olmo"}, "text_config: qk_norm_type is 'olmo'"),
        ({"text__experts": 4}, "text_config: unknown field.*experts"),
        ({"adapter__text_hidden_size": 32}, "llm_dim is 32"),
        ({"adapter__vit_layers": [-3, -13]}, "vit_layers is"),
        ({"vit__image_num_pos": 17}, "17 positions do not fit"),
    ],
)
def test_what_is_not_built_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        molmo_point_config_from_reference(point_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_token_id": "267"}, "patch_token_id: expected int, at least 0, found '267'"),
        ({"location_token_id": None}, "location_token_id: expected int, at least 0, found None"),
        ({"patch_embed_dim": 0}, "patch_embed_dim: expected int, at least 1, found 0"),
        ({"token_prediction_rotary_theta": -1}, "token_prediction_rotary_theta: expected float"),
        ({"image_non_indexable_patch_id": -1}, "image_non_indexable_patch_id: expected int"),
    ],
)
def test_wrong_types_name_the_file_and_the_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_point_checkpoint(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        NanoMolmo2.from_pretrained(str(tmp_path))


def test_the_norms_have_the_epsilon_of_the_file() -> None:
    values = point_config(text__layer_norm_eps=1e-3, vit__layer_norm_eps=1e-4)
    with torch.device("meta"):
        model = NanoMolmo2(molmo_point_config_from_reference(values))
    assert model.point_predictor is not None
    assert (model.point_predictor.x_norm.eps, model.llm.norm.eps) == (1e-3, 1e-3)
    assert model.vision_encoder.layers[0].layer_norm1.eps == 1e-4


def test_values_that_a_file_leaves_open() -> None:
    """Null is the decoder's theta, and an overview that can be selected like everything else."""
    values = point_config(token_prediction_rotary_theta=None, image_non_indexable_patch_id=None)
    config = molmo_point_config_from_reference(values)
    assert config.point_config is not None
    assert config.point_config.token_prediction_rotary_theta == 1_000_000
    assert config.point_config.image_non_indexable_patch_id is None
    assert 262 in config.image_special_token_ids


def test_a_folder_without_a_generation_config(tmp_path: Path) -> None:
    write_point_checkpoint(tmp_path, eos_token_id=EOS)
    (tmp_path / "generation_config.json").unlink()
    config = NanoMolmo2.from_pretrained(str(tmp_path)).config
    assert (config.eos_token_id, config.pad_token_id) == (EOS, 0)


# ---- export ----


def export_quietly(model: NanoMolmo2, folder: Path, *arguments: Any, **options: Any) -> list[str]:
    """What an export says beside its work."""
    with pytest.warns(UserWarning) as caught:
        export_molmo_point(model, folder, *arguments, **options)
    return [str(warning.message) for warning in caught]


def test_an_export_is_the_checkpoint_that_was_read(tmp_path: Path) -> None:
    """Names, shapes and bits of AI2's file, and every field of its config.json."""
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT))
    (note,) = export_quietly(model, tmp_path)
    assert "no processor was given" in note
    expected, found = point_tensors(), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    written, golden = json.loads((tmp_path / "config.json").read_text()), point_config()
    for part in ("text_config", "vit_config", "adapter_config"):
        theirs = golden.pop(part)
        assert {key: written[part][key] for key in theirs} == theirs
    assert golden.pop("low_res_image_start_token_id") is None  # forgotten there
    assert written["low_res_image_start_token_id"] == 260
    assert {key: written[key] for key in golden} == golden
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert same_weights(again, model)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_in_several_files(tmp_path: Path, dtype: torch.dtype) -> None:
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT), dtype=dtype)
    export_quietly(model, tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert same_weights(NanoMolmo2.from_pretrained(str(tmp_path)), model)


def test_an_export_leaves_a_tied_head_out(tmp_path: Path) -> None:
    write_point_checkpoint(tmp_path / "in", tied_tensors(), text__tie_word_embeddings=True)
    model = NanoMolmo2.from_pretrained(str(tmp_path / "in"))
    export_quietly(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tied_tensors().keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is True
    assert config["tie_word_embeddings"] is False
    again = NanoMolmo2.from_pretrained(str(tmp_path / "out"))
    assert again.config == model.config
    assert torch.equal(logits_of(again), logits_of(model))


def with_rule(model: NanoMolmo2, **changes: Any) -> NanoMolmo2:
    """The same weights under other settings."""
    config = model.config
    assert config.point_config is not None
    other = NanoMolmo2(replace(config, point_config=replace(config.point_config, **changes)))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_a_rule_that_the_format_can_not_say_stands_beside_it(tmp_path: Path) -> None:
    """AI2's code would read it by its own rule: one visible note; we read it back exactly."""
    released = NanoMolmo2.from_pretrained(str(CHECKPOINT))
    point = PointConfig.consistent(**dict(zip(_IDS, MARKERS, strict=True)), patch_embed_dim=EMBED)
    model = NanoMolmo2(replace(released.config, point_config=point))
    model.load_state_dict(released.state_dict())
    notes = export_quietly(model, tmp_path)
    (note,) = [n for n in notes if "rule" in n]
    assert "'consistent'" in note
    assert "the rule 'consistent'" in (tmp_path / "README.md").read_text().replace("\n", " ")
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert again.config.point_config is not None
    assert again.config.point_config.rule == "consistent"
    # Without our own file it is what AI2's code would read.
    (tmp_path / "nanomolmo2_config.json").unlink()
    without = NanoMolmo2.from_pretrained(str(tmp_path)).config.point_config
    assert without is not None
    assert without.rule == "released"
    assert same_weights(NanoMolmo2.from_pretrained(str(tmp_path)), model)


_IDS = ("patch_token_id", "subpatch_token_id", "location_token_id")


def test_an_export_does_not_keep_the_rule_of_an_earlier_one(tmp_path: Path) -> None:
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT))
    export_quietly(with_rule(model, mask_before_argmax=True), tmp_path)
    assert NanoMolmo2.from_pretrained(str(tmp_path)).config.point_config.rule == "own"  # type: ignore[union-attr]
    export_quietly(model, tmp_path)
    assert NanoMolmo2.from_pretrained(str(tmp_path)).config == model.config


def test_our_own_file_of_another_model(tmp_path: Path) -> None:
    export_quietly(NanoMolmo2.from_pretrained(str(CHECKPOINT)), tmp_path)
    edit_json(tmp_path / "config.json", patch_embed_dim=64)
    with pytest.raises(ValueError, match=r"nanomolmo2_config\.json: .*patch_embed_dim differs"):
        NanoMolmo2.from_pretrained(str(tmp_path))


def test_trap_26_additional_tokens_that_the_reference_would_not_load(tmp_path: Path) -> None:
    """128 rows are fixed in its head; of a tied model any number is."""
    torch.manual_seed(0)
    tiny = PRESETS["tiny-point"]
    assert not any("additional tokens" in n for n in export_quietly(NanoMolmo2(tiny), tmp_path))
    untied = replace(tiny, llm_config=replace(tiny.llm_config, tie_word_embeddings=False))
    model = NanoMolmo2(untied)
    notes = export_quietly(model, tmp_path)
    (note,) = [n for n in notes if "additional tokens" in n]
    assert "16 additional tokens" in note
    assert "128 rows" in note
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert again.config == untied
    assert same_weights(again, model)


def test_the_two_formats_refuse_each_others_models(tmp_path: Path) -> None:
    points, text = NanoMolmo2(PRESETS["tiny-point"]), NanoMolmo2(PRESETS["tiny"])
    with pytest.raises(ValueError, match=r"selecting visual tokens.*molmo-point-hf"):
        export_molmo2(points, tmp_path / "out")
    with pytest.raises(ValueError, match=r"writes coordinates.*export_molmo2"):
        export_molmo_point(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CANNOT: dict[str, Callable[[Any], Any]] = {
    "vit_layers None": lambda c: replace(c, connector_config=replace(c.connector, vit_layers=None)),
    "predict_additional_vocab False": lambda c: replace(
        c,
        llm_config=replace(c.llm_config, predict_additional_vocab=False),
        point_config=replace(
            c.point_config, patch_token_id=5, subpatch_token_id=6, location_token_id=7
        ),
    ),
}


@pytest.mark.parametrize("message", CANNOT)
def test_what_the_format_can_not_say(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        molmo_point_config_to_reference(CANNOT[message](PRESETS["tiny-point"]))


def test_quantised_models_are_not_exported(tmp_path: Path) -> None:
    model = load_nanomolmo2(str(CHECKPOINT), quantize="int8-weight-only")
    with pytest.raises(ValueError, match="the model is quantised"):
        export_molmo_point(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
