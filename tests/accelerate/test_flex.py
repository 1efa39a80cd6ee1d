"""Rows without a dense mask against rows with one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanomolmo2.accelerate import block_masks, checkpoint_activations, flex
from nanomolmo2.batch import PREFIX_SUBSEGMENT, Batch
from nanomolmo2.models import NanoMolmo2
from tests.nets import IMAGE, greatest_difference, pictures, small_model, text_ids


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "QUERY_BLOCK", 16)
    monkeypatch.setattr(flex.LongRowNanoMolmo2, "dense_length", 32)
    yield


def packed(model: NanoMolmo2, T: int = 100) -> Batch:
    """Two rows of message trees with an image each; the second ends in padding."""
    n = model.config.num_visual_tokens
    ids = text_ids(2, T)
    ids[:, 3 : 3 + n] = IMAGE
    subsegments = torch.full((2, T), PREFIX_SUBSEGMENT)
    subsegments[:, 50:70], subsegments[:, 70:] = 0, 1
    subsegments[1, 90:] = -1
    labels = ids.masked_fill((subsegments == PREFIX_SUBSEGMENT) | (subsegments < 0), -100)
    return Batch(
        ids,
        attention_mask=subsegments >= 0,
        labels=labels,
        subsegment_ids=subsegments,
        pixel_values=pictures(2),
    )


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_long_rows_have_the_same_loss_and_gradients(checkpointing: Any) -> None:
    plain = small_model("pooling", bidirectional_image_attention=True).train()
    long = block_masks(checkpoint_activations(copy.deepcopy(plain), checkpointing))
    batch = packed(plain)
    losses = [model.loss(batch) for model in (plain, long)]
    assert greatest_difference(*losses) < 1e-5
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), long.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert greatest_difference(a.grad, b.grad) < 1e-5, name


@pytest.mark.usefixtures("short_blocks")
def test_no_tensor_of_long_rows_has_a_number_for_each_pair_of_positions() -> None:
    """Of any operator, forward or backward; the dense mask has B * T * T."""
    model = block_masks(small_model("pooling", bidirectional_image_attention=True)).train()
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = operator(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    T, batch = 127, packed(model, 127)
    with Recorder():
        model.loss(batch).backward()
    assert max(sizes) < T * T
    sizes.clear()
    with Recorder():
        model.attention_mask(batch)
    assert max(sizes) >= 2 * T * T


@pytest.mark.usefixtures("short_blocks")
def test_short_and_causal_rows_stay_with_the_plain_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("block by block")

    monkeypatch.setattr(flex, "whole_sequence", fail)
    model = block_masks(small_model())
    model(Batch(text_ids(1, 100)))  # causal: no mask at all
    both = block_masks(small_model(bidirectional_image_attention=True))
    both(Batch(text_ids(1, 32)))
    with pytest.raises(AssertionError, match="block by block"):
        both(Batch(text_ids(1, 33)))
