"""The complete model with Molmo2's connector and mask, against transformers' Molmo2."""

from __future__ import annotations

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
from tests.nets import LLM, greatest_difference, pictures, small_model, text_ids

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


def test_logits_of_several_pictures_in_padded_rows(
    model: NanoMolmo2, reference: Molmo2ForConditionalGeneration
) -> None:
    """Two, one and no picture a row; odd grids, the mask in both directions, padding on the left."""
    vision = model.config.vision_config
    side, P = vision.patches_per_side, vision.patch_size
    n = model.config.num_visual_tokens
    images = pictures(3)
    image = [START, *[PATCH] * n, END]
    rows = [[5, *image, 7, *image, 8, 9], [5, *image, 30, 31], [5, 40, 41, 42]]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows])

    crops = (
        images[:, :, : side * P, : side * P].unfold(2, P, P).unfold(3, P, P)
    )  # (I, 3, h, w, P, P)
    patches = crops.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (I, N, P * P * 3)
    index = window_index(side, side, model.config.connector.pooling_size)
    index = torch.cat([torch.where(index < 0, -1, index + i * side * side) for i in range(3)])
    windows = -(-side // 2)
    with torch.no_grad():
        expected = reference(
            ids,
            pixel_values=patches,
            image_token_pooling=index,
            image_grids=torch.tensor([[windows, windows, 0, 0]] * 3),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            mm_token_type_ids=(ids >= LLM.vocab_size).long(),
        ).logits
        found = model(ids, images, attention_mask=mask)
    assert (index < 0).any()
    assert expected[mask].std() > 0.5
    assert greatest_difference(found[mask], expected[mask]) <= TOLERANCE


def test_greedy_generation(model: NanoMolmo2, reference: Molmo2ForConditionalGeneration) -> None:
    """The mask in both directions holds for the prompt only; the answer is causal."""
    n = model.config.num_visual_tokens
    images = pictures(1, seed=4)
    ids = torch.cat([torch.tensor([[5, START, *[PATCH] * n, END]]), text_ids(1, 4)], dim=1)
    embedded, features = model.llm.embed(ids), model.encode_images(images)
    embedded = torch.where(
        (ids == PATCH)[..., None],
        embedded.index_put(torch.where(ids == PATCH), features[0] + embedded[ids == PATCH]),
        embedded,
    )
    types = (ids >= LLM.vocab_size).long()
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            grown = torch.cat([embedded, model.llm.embed(expected[:, ids.shape[1] :])], dim=1)
            padded = torch.nn.functional.pad(types, (0, grown.shape[1] - types.shape[1]))
            logits = reference(inputs_embeds=grown, mm_token_type_ids=padded).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    found = model.generate(ids, images, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(found, expected)
