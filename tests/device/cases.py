"""Both designs, small, on the CPU and on the simulated device, with a batch for each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanomolmo2.batch import PREFIX_SUBSEGMENT, Batch
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.connector import window_index
from tests.device.simulated import DEVICE
from tests.nets import LLM, VISION, pictures, small_model, text_ids

# Read and never written: an answer can not ask for one more picture.
IMAGE = LLM.vocab_size


@dataclass
class Case:
    """A model twice, and a batch on the CPU."""

    on_cpu: NanoMolmo2
    on_device: NanoMolmo2
    batch: Batch

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return self.batch.to(device).tensors()


def case(design: str) -> Case:
    """``base``: whole pictures, one image token each, rows padded on the right. ``molmo2``: crops,
    an image token for every visual token, pictures that see both ways. ``tree``: two branches
    behind a picture in one row, with positions, weights and masks of their own."""
    # With a tied head a random net says its last token again and again; training keeps it.
    llm_config = replace(LLM, additional_vocab_size=1)
    options: dict[str, Any] = {"llm_config": llm_config, "image_token_id": IMAGE}
    if design == "base":
        model = small_model("linear", seed=4, **options)
        batch = _base_batch()
    else:
        model = small_model("pooling", seed=4, bidirectional_image_attention=True, **options)
        batch = _crops_batch() if design == "molmo2" else _tree_batch()
    return Case(model, copy.deepcopy(model).to(DEVICE), batch)


def _base_batch() -> Batch:
    ids = text_ids(2, 9)
    ids[:, 2] = IMAGE
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 7:] = False
    labels = ids.masked_fill((ids == IMAGE) | ~real, -100)
    labels[:, :4] = -100
    return Batch(ids, attention_mask=real, labels=labels, pixel_values=pictures(2))


def _crops_batch() -> Batch:
    base = _base_batch()
    ids, tokens = base.input_ids.clone(), len(_windows(1))
    ids[:, 2 : 2 + tokens] = IMAGE
    assert base.attention_mask is not None
    return Batch(
        ids,
        attention_mask=base.attention_mask,
        labels=ids.masked_fill((ids == IMAGE) | ~base.attention_mask, -100),
        pixel_values=_patches(pictures(2)),
        image_token_pooling=_windows(2),
    )


def _tree_batch() -> Batch:
    ids, tokens = text_ids(1, 14), len(_windows(1))
    ids[0, 1 : 1 + tokens] = IMAGE
    places = torch.full((1, 14), PREFIX_SUBSEGMENT)
    places[0, 7:10], places[0, 10:13], places[0, 13] = 0, 1, -1
    return Batch(
        ids,
        attention_mask=places >= 0,
        labels=ids.masked_fill((places < 0) | (places == PREFIX_SUBSEGMENT), -100),
        loss_weights=torch.linspace(0.5, 1.5, 14)[None],
        subsegment_ids=places,
        pixel_values=_patches(pictures(1)),
        image_token_pooling=_windows(1),
    )


def _patches(images: Tensor) -> Tensor:
    """(M, 3, H, W) -> (M, N, 3*P*P): in a patch row, column, channel."""
    P = VISION.patch_size
    side = VISION.patches_per_side * P
    cells = images[..., :side, :side].unflatten(3, (-1, P)).unflatten(2, (-1, P))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _windows(crops: int) -> Tensor:
    """(n, 4), counted over all crops; some slots are empty."""
    one = window_index(VISION.patches_per_side, VISION.patches_per_side, 2)
    return torch.cat([one.where(one < 0, one + VISION.num_patches * c) for c in range(crops)])
