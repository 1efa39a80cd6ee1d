"""Batch: the parts that are there, by the names of the model's arguments."""

from __future__ import annotations

import inspect

import torch

from nanomolmo2.batch import Batch
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.face import MoreParts
from tests.nets import IMAGE, pictures, small_model, text_ids


def test_only_what_is_there_is_passed_on() -> None:
    ids = text_ids(2, 3)
    assert Batch(ids).tensors() == {"input_ids": ids}
    labels = ids.clone()
    assert set(Batch(ids, labels=labels).tensors()) == {"input_ids", "labels"}


def test_every_part_is_an_argument_of_the_model() -> None:
    parts = set(inspect.signature(Batch).parameters)
    arguments = set(inspect.signature(NanoMolmo2.forward).parameters) - {"more"}
    arguments |= set(MoreParts.__annotations__)
    assert arguments - parts == {"self", "output_hidden_states"}
    assert parts <= arguments


def test_moving_moves_every_part_and_leaves_the_original() -> None:
    ids = text_ids(2, 3)
    parts = {"labels": ids, "pixel_values": torch.zeros(1, 3, 4, 4), "loss_weights": ids.float()}
    parts["image_token_pooling"] = torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, **parts)
    moved = batch.to("meta")
    assert {name: t.device.type for name, t in moved.tensors().items()} == dict.fromkeys(
        batch.tensors(), "meta"
    )
    assert moved.attention_mask is None
    assert batch.input_ids.device.type == "cpu"


def test_the_model_takes_a_batch() -> None:
    model = small_model()
    ids = text_ids(2, 6)
    ids[:, 1] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    batch = Batch(ids, labels=labels, pixel_values=pictures(2))
    logits, loss = model(**batch.tensors())
    assert logits.shape == (2, 6 + model.config.num_visual_tokens - 1, 89)
    assert torch.equal(loss, model(ids, pictures(2), labels=labels)[1])
