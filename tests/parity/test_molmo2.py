"""Molmo2 checkpoints in and out, against transformers' own Molmo2.

The checkpoint is written by hand from random tensors (``tests/convert/molmo2_checkpoint.py``) and
read by both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Molmo2ForConditionalGeneration

from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.molmo2_config import molmo2_config_from_reference
from nanomolmo2.convert.tensor_files import open_safetensors
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.connector import window_index
from tests.convert import molmo2_checkpoint as checkpoint
from tests.convert.molmo2_checkpoint import (
    COLUMN,
    END,
    IMAGE,
    LOW_START,
    MLP,
    PATCH,
    PATCHES,
    START,
    VIT_WIDTH,
    VOCAB,
    write_checkpoint,
)
from tests.nets import greatest_difference

TOLERANCE = 1e-5
NEW_TOKENS = 32

# Overview: start, 2 x 2 tokens, end; then a crop of 2 x 2 tokens with a column token a row.
PICTURE = [LOW_START, *[IMAGE] * 4, END, START, *([IMAGE] * 2 + [COLUMN]) * 2, END]
FRAME = [START, *[IMAGE] * 4, END]


def read_reference(folder: Path) -> Molmo2ForConditionalGeneration:
    model = Molmo2ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("molmo2")
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Molmo2ForConditionalGeneration:
    return read_reference(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> NanoMolmo2:
    return NanoMolmo2.from_pretrained(str(folder))


def crops(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, PATCHES, 3 * PATCH**2), generator=generator) * 2 - 1


def picture_index(first_crop: int) -> Tensor:
    """Windows of an overview and a crop, some of their slots empty."""
    index = torch.cat([window_index(4, 4, 2), window_index(4, 4, 2) + PATCHES])
    index[1, 3] = index[3, 1] = index[5, 0] = index[6, 1] = index[6, 2] = -1
    return torch.where(index < 0, -1, index + first_crop * PATCHES)


def batch(*rows: list[int], pictures: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments for ours and for theirs: rows filled up on the left, pictures in reading order."""
    T = max(map(len, rows))
    ids = torch.tensor([[checkpoint.PAD] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    ours = {"attention_mask": mask}
    theirs = {**ours, "mm_token_type_ids": (ids >= VOCAB).long()}
    if pictures:
        shown = {
            "pixel_values": crops(2 * pictures),
            "image_token_pooling": torch.cat([picture_index(2 * i) for i in range(pictures)]),
        }
        ours |= shown
        theirs |= shown
        theirs["image_grids"] = torch.tensor([[2, 2, 2, 2]] * pictures)
        theirs["image_num_crops"] = torch.tensor([2] * pictures)
    return {"ids": ids, **ours}, {"ids": ids, **theirs}


def video(frames: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frames of 3 x 3 windows, nine slots each, most of them partly empty."""
    row = [checkpoint.BOS]
    for i in range(frames):
        row += [20 + i, 9, *FRAME, 30]
    ids = torch.tensor([[*row, 40, 41]])
    index = window_index(4, 4, 3)
    assert index.shape == (4, 9)
    assert (index < 0).any()
    index = torch.cat([torch.where(index < 0, -1, index + i * PATCHES) for i in range(frames)])
    pixels = crops(frames, seed=3)
    ours = {"ids": ids, "pixel_values": pixels, "image_token_pooling": index}
    theirs = {
        "ids": ids,
        "pixel_values_videos": pixels,
        "video_token_pooling": index,
        "video_grids": torch.tensor([[frames, 2, 2]]),
        "mm_token_type_ids": (ids >= VOCAB).long(),
    }
    return ours, theirs


BOS = checkpoint.BOS
CASES: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]] = {
    "text": lambda: batch([BOS, 5, 6, 7, 8]),
    "one picture": lambda: batch([BOS, *PICTURE, 5, 6, 7], pictures=1),
    "two pictures": lambda: batch([BOS, 11, *PICTURE, 12, *PICTURE, 5, 6], pictures=2),
    "unequal rows": lambda: batch(
        [BOS, 11, *PICTURE, 12, *PICTURE, 5, 6],
        [BOS, *PICTURE, 7],
        [BOS, 8, 9],
        pictures=3,
    ),
    "video": video,
}


@torch.no_grad()
def logits_of(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, V) of our or their model, padding left out by zero."""
    arguments = dict(arguments)
    ids = arguments.pop("ids")
    mask = arguments.get("attention_mask", torch.ones_like(ids))
    if isinstance(model, NanoMolmo2):
        logits = model(ids, **arguments)
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, position_ids=positions, **arguments).logits
    return logits * mask[:, :, None]


def assert_same_logits(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    for name, case in CASES.items():
        for_us, for_them = case()
        found = logits_of(ours, for_us)
        expected = logits_of(theirs, for_them if not isinstance(theirs, NanoMolmo2) else for_us)
        assert found.shape == expected.shape == (*for_us["ids"].shape, VOCAB)
        assert expected.std() > 0.3, "flat logits would hide errors"
        assert greatest_difference(found, expected) <= tolerance, name


def greedy(model: NanoMolmo2, arguments: dict[str, Tensor]) -> Tensor:
    arguments = dict(arguments)
    ids = arguments.pop("ids")
    return model.generate(ids, **arguments, max_new_tokens=NEW_TOKENS, eos_token_id=None)


def their_greedy(model: Molmo2ForConditionalGeneration, arguments: dict[str, Tensor]) -> Tensor:
    arguments = dict(arguments)
    ids = arguments.pop("ids")
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **arguments, max_new_tokens=NEW_TOKENS, do_sample=False)


def test_every_vision_layer(model: NanoMolmo2, reference: Molmo2ForConditionalGeneration) -> None:
    pixels = crops(3)
    with torch.no_grad():
        expected = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        _, found = model.vision_encoder(pixels, layers=(-3, -9), output_hidden_states=True)
    assert len(found) == len(expected) == checkpoint.VIT_DEPTH - 2 + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert greatest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("case", ["one picture", "two pictures", "video"])
def test_pooled_features(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration, case: str
) -> None:
    ours, theirs = CASES[case]()
    with torch.no_grad():
        found = model.encode_images(ours["pixel_values"], ours["image_token_pooling"])
        if case == "video":
            names = ("pixel_values_videos", "video_token_pooling", "video_grids")
            output = reference.get_video_features(*(theirs[n] for n in names))
        else:
            names = ("pixel_values", "image_token_pooling", "image_grids")
            output = reference.get_image_features(*(theirs[n] for n in names))
    expected = torch.cat(output.pooler_output)
    assert expected.std() > 0.001
    assert greatest_difference(found, expected) <= TOLERANCE


def test_logits(model: NanoMolmo2, reference: Molmo2ForConditionalGeneration) -> None:
    assert_same_logits(model, reference)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration, case: str
) -> None:
    ours, theirs = CASES[case]()
    expected = their_greedy(reference, theirs)
    assert expected.shape[1] == ours["ids"].shape[1] + NEW_TOKENS
    assert torch.equal(greedy(model, ours), expected)  # with a cache


@pytest.mark.parametrize("case", ["one picture", "unequal rows", "video"])
def test_greedy_tokens_without_a_cache(model: NanoMolmo2, case: str) -> None:
    """The same tokens from the whole sequence anew each time; the answer stays causal."""
    ours, _ = CASES[case]()
    expected = greedy(model, ours)
    inputs = dict(ours)
    for _ in range(NEW_TOKENS):
        new = logits_of(model, inputs)[:, -1:].argmax(-1)
        inputs["ids"] = torch.cat([inputs["ids"], new], dim=1)
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(inputs["ids"], expected)


# ---- out again ----


def export_quietly(model: NanoMolmo2, folder: Path, **options: Any) -> None:
    """Without the remarks on what other programs will miss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, folder, **options)


@pytest.fixture(scope="module")
def exported(model: NanoMolmo2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    export_quietly(model, path, max_shard_size="200KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


def test_an_export_in_transformers(model: NanoMolmo2, exported: Path) -> None:
    theirs, report = Molmo2ForConditionalGeneration.from_pretrained(
        exported, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id == checkpoint.EOS
    theirs.eval().generation_config.eos_token_id = None
    assert_same_logits(model, theirs)
    for_us, for_them = CASES["two pictures"]()
    assert torch.equal(greedy(model, for_us), their_greedy(theirs, for_them))


def test_an_export_has_the_bits_of_the_file_it_came_from(exported: Path) -> None:
    found, expected = open_safetensors(exported), checkpoint.legacy_tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.read(), expected[name]), name


def test_an_export_in_our_loader(model: NanoMolmo2, exported: Path) -> None:
    again = NanoMolmo2.from_pretrained(str(exported))
    assert again.config == model.config
    assert_same_weights(again, model)


def assert_same_weights(found: NanoMolmo2, expected: NanoMolmo2) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_tied_model_is_exported_with_a_head_of_its_own(tmp_path: Path) -> None:
    """As the 4B: the stored head is a copy of the base rows."""
    torch.manual_seed(5)
    config = molmo2_config_from_reference(checkpoint.legacy_config())
    tied = NanoMolmo2(
        replace(config, llm_config=replace(config.llm_config, tie_word_embeddings=True))
    ).eval()
    with torch.no_grad():
        for parameter in tied.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    export_quietly(tied, tmp_path)
    assert_same_logits(tied, read_reference(tmp_path))
    assert_same_logits(NanoMolmo2.from_pretrained(str(tmp_path)), tied, tolerance=0)


# ---- the traps that are about weights ----


def with_tensors(folder: Path, **changes: Any) -> tuple[NanoMolmo2, dict[str, Tensor]]:
    tensors = write_checkpoint(folder, **changes)
    return NanoMolmo2.from_pretrained(str(folder)), tensors


def test_trap_01_up_before_gate_in_ff_proj(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration, tmp_path: Path
) -> None:
    tensors = checkpoint.legacy_tensors()
    name = "model.transformer.blocks.1.mlp.ff_proj.weight"
    mlp = model.llm.layers[1].mlp
    assert torch.equal(mlp.up_proj.weight, tensors[name][:MLP])
    assert torch.equal(mlp.gate_proj.weight, tensors[name][MLP:])
    projector = model.connector.layers.image_projector
    stored = "model.vision_backbone.image_projector"
    assert torch.equal(projector.gate_proj.weight, tensors[f"{stored}.w1.weight"])
    assert torch.equal(projector.up_proj.weight, tensors[f"{stored}.w3.weight"])
    # Swapped halves load without a word, and are another model.
    tensors[name] = tensors[name].roll(MLP, dims=0)
    swapped, _ = with_tensors(tmp_path, tensors=tensors)
    ours, theirs = CASES["one picture"]()
    assert greatest_difference(logits_of(swapped, ours), logits_of(reference, theirs)) > 1e-3


def test_trap_03_features_are_added_to_the_image_tokens_embedding(tmp_path: Path) -> None:
    """Nothing would show it with the zero row that programs which replace need."""
    tensors = checkpoint.legacy_tensors()
    tensors["model.transformer.wte.new_embedding"][IMAGE - VOCAB] += 1
    large, _ = with_tensors(tmp_path / "large", tensors=tensors)
    assert_same_logits(large, read_reference(tmp_path / "large"))
    tensors["model.transformer.wte.new_embedding"][IMAGE - VOCAB] = 0
    zero, _ = with_tensors(tmp_path / "zero", tensors=tensors)
    assert_same_logits(zero, read_reference(tmp_path / "zero"))
    ours, _ = CASES["one picture"]()
    assert greatest_difference(logits_of(large, ours), logits_of(zero, ours)) > 1e-2


def test_trap_04_the_deeper_layer_comes_first_and_no_norm_follows(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration, tmp_path: Path
) -> None:
    assert model.vision_encoder.post_layernorm is None
    assert len(model.vision_encoder.layers) == checkpoint.VIT_DEPTH - 2
    pixels = crops(1)
    with torch.no_grad():
        states = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        first, second = model.vision_encoder(pixels, layers=model.config.connector.vit_layers)
    assert greatest_difference(first, states[9 + 1]) <= TOLERANCE  # -3 of 12
    assert greatest_difference(second, states[3 + 1]) <= TOLERANCE  # -9 of 12
    assert model.connector.layers.image_pooling_2d.q_proj.in_features == 2 * VIT_WIDTH
    swapped, _ = with_tensors(tmp_path, adapter__vit_layers=[-9, -3])
    ours, theirs = CASES["one picture"]()
    assert greatest_difference(logits_of(swapped, ours), logits_of(reference, theirs)) > 1e-3


def test_trap_11_rope_theta_comes_from_the_config(
    reference: Molmo2ForConditionalGeneration, tmp_path: Path
) -> None:
    other, _ = with_tensors(tmp_path, text__rope_theta=1_000_000.0)
    assert other.config.llm_config.rope_theta == 1_000_000
    assert_same_logits(other, read_reference(tmp_path))
    ours, theirs = CASES["two pictures"]()
    assert greatest_difference(logits_of(other, ours), logits_of(reference, theirs)) > 1e-4


@pytest.mark.parametrize("original", [True, False], ids=["default", "native names"])
def test_trap_12_native_save_pretrained_cuts_the_embedding_in_halves(
    model: NanoMolmo2,
    reference: Molmo2ForConditionalGeneration,
    tmp_path: Path,
    original: bool,
) -> None:
    reference.save_pretrained(tmp_path, save_original_format=original)
    tensors = open_safetensors(tmp_path)
    halves = tensors.get("model.transformer.wte.embedding")
    assert (halves is not None) is original
    assert halves is None or halves.shape[0] == (VOCAB + checkpoint.ADDITIONAL) // 2
    loaded = NanoMolmo2.from_pretrained(str(tmp_path))
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, reference)
    # 10 blocks, of which 9 and 3, instead of 12, of which -3 and -9: the same two.
    assert loaded.config.vision_config.num_hidden_layers == 10
    assert loaded.config.connector.vit_layers == (9, 3)
    export_quietly(loaded, tmp_path / "out")
    assert_same_logits(model, read_reference(tmp_path / "out"))
