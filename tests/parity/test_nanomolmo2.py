"""The complete model with Molmo2's connector and mask, against transformers' Molmo2."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.molmo2.configuration_molmo2 import (
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VisionConfig,
)
from transformers.models.molmo2.modeling_molmo2 import Molmo2ForConditionalGeneration

from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.connector import window_index
from tests.nets import LLM, greatest_difference, pictures, small_model

TOLERANCE = 2e-5

# The rows behind the vocabulary, which are read and never written.
START, END, PATCH = LLM.vocab_size, LLM.vocab_size + 1, LLM.vocab_size + 2


@pytest.fixture(scope="module")
def model() -> NanoMolmo2:
    return small_model(
        "pooling",
        llm_config=replace(LLM, additional_vocab_size=5),
        image_token_id=PATCH,
        bidirectional_image_attention=True,
        image_special_token_ids=(START, END),
    )


@pytest.fixture(scope="module")
def reference(model: NanoMolmo2) -> Molmo2ForConditionalGeneration:
    vision, connector, llm = (
        model.config.vision_config,
        model.config.connector,
        model.config.llm_config,
    )
    config = Molmo2Config(
        vision_config=Molmo2VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            num_key_value_heads=vision.num_attention_heads,
            head_dim=vision.head_dim,
            image_size=[vision.image_size, vision.image_size],
            patch_size=vision.patch_size,
        ),
        adapter_config=Molmo2AdapterConfig(
            vision_feature_layer=list(connector.vit_layers or ()),
            hidden_size=connector.vision_dim,
            num_attention_heads=connector.num_attention_heads,
            num_key_value_heads=connector.num_attention_heads,
            head_dim=connector.vision_dim // connector.num_attention_heads,
            intermediate_size=connector.intermediate_size,
            text_hidden_size=connector.llm_dim,
        ),
        text_config=Molmo2TextConfig(
            **{k: v for k, v in llm.to_dict().items() if k not in ("tie_word_embeddings",)}
        ),
        image_patch_id=PATCH,
        attn_implementation="eager",
    )
    model_of_theirs = Molmo2ForConditionalGeneration(config)
    model_of_theirs.load_state_dict(molmo2_names(model), strict=True)
    return model_of_theirs.eval()


def molmo2_names(model: NanoMolmo2) -> dict[str, Tensor]:
    """Our weights under transformers' names; patches there are vectors, channel fastest."""
    homes = {
        "vision_encoder.": "model.vision_tower.",
        "connector.layers.": "model.multi_modal_projector.",
        "llm.": "model.language_model.",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        home = next(ours for ours in homes if name.startswith(ours))
        theirs = homes[home] + name.removeprefix(home).replace("out_proj", "o_proj")
        if theirs.endswith("patch_embedding.weight"):
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        weights[theirs.replace("position_embedding.weight", "positional_embedding")] = weight
    words = model.state_dict()["llm.embed_tokens.weight"]
    return {**weights, "lm_head.weight": words[: model.config.llm_config.vocab_size]}


def picture_inputs(model: NanoMolmo2, images: Tensor) -> dict[str, Tensor]:
    """(I, 3, H, W) in the words of the reference: patch vectors and which of them a token pools."""
    vision, count = model.config.vision_config, len(images)
    side, P = vision.patches_per_side, vision.patch_size
    patches = images[:, :, : side * P, : side * P].unfold(2, P, P).unfold(3, P, P)
    index = window_index(side, side, model.config.connector.pooling_size)
    index = torch.cat([torch.where(index < 0, -1, index + i * side**2) for i in range(count)])
    assert (index < 0).any(), "an odd grid was meant"
    windows = math.isqrt(model.config.num_visual_tokens)
    return {
        "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
        "image_token_pooling": index,
        "image_grids": torch.tensor([[windows, windows, 0, 0]] * count),
    }


def test_logits_of_several_pictures_in_padded_rows(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration
) -> None:
    """Two, one and no picture a row, odd grids, a mask in both directions, padding on the left."""
    images = pictures(3)
    image = [START, *[PATCH] * model.config.num_visual_tokens, END]
    rows = [[5, *image, 7, *image, 8, 9], [5, *image, 30, 31], [5, 40, 41, 42]]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    with torch.no_grad():
        expected = reference(
            ids,
            **picture_inputs(model, images),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            mm_token_type_ids=(ids >= LLM.vocab_size).long(),
        ).logits
        found = model(ids, images, attention_mask=mask)
    assert expected[mask].std() > 0.5
    assert greatest_difference(found[mask], expected[mask]) <= TOLERANCE


def test_greedy_generation(model: NanoMolmo2, reference: Molmo2ForConditionalGeneration) -> None:
    """The mask in both directions holds for the prompt only; the answer is causal."""
    images = pictures(1, seed=4)
    image = [START, *[PATCH] * model.config.num_visual_tokens, END]
    ids = torch.tensor([[5, *image, 30, 31, 32]])
    expected = ids
    for _ in range(8):
        with torch.no_grad():
            logits = reference(
                expected,
                **picture_inputs(model, images),
                mm_token_type_ids=(expected >= LLM.vocab_size).long(),
            ).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, images, max_new_tokens=8, eos_token_id=None), expected)


def test_trees_and_packs_equal_the_reference_with_a_mask_of_its_own(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration
) -> None:
    """Two packed examples with two branches each; mask and positions of the reference by loops.

    The reference's own packing lets pictures of other examples through; a 4-D mask is used as is.
    """
    crops = picture_inputs(model, pictures(2, seed=3))
    image = [START, *[PATCH] * model.config.num_visual_tokens, END]
    prefix = [5, *image]
    P, branches = len(prefix), ([11, 12, 13], [14, 15])
    ids, positions, subsegments, owner = [], [], [], []
    for example in range(2):
        for number, tokens in ((10_000, prefix), *enumerate(branches)):
            start = 0 if number == 10_000 else P
            ids += tokens
            positions += range(start, start + len(tokens))
            subsegments += [100_000 * example + number] * len(tokens)
            owner += [(example, number)] * len(tokens)
    T = len(ids)
    mask = torch.zeros(1, 1, T, T, dtype=torch.bool)
    for q in range(T):
        for k in range(T):
            (example_q, branch_q), (example_k, branch_k) = owner[q], owner[k]
            in_pictures = ids[q] >= START and ids[k] >= START
            if example_q == example_k:
                earlier = k <= q and branch_k in (10_000, branch_q)
                mask[0, 0, q, k] = earlier or in_pictures
    row = torch.tensor([ids])
    with torch.no_grad():
        expected = reference(
            row,
            **crops,
            attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9),
            position_ids=torch.tensor([positions]),
            mm_token_type_ids=(row >= LLM.vocab_size).long(),
        ).logits
        found = model(
            row,
            crops["pixel_values"],
            image_token_pooling=crops["image_token_pooling"],
            subsegment_ids=torch.tensor([subsegments]),
        )
    assert greatest_difference(found, expected) <= TOLERANCE
