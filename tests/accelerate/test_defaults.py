"""What accelerate puts on a model changes no result, and can be left off."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanomolmo2
from nanomolmo2 import accelerate
from nanomolmo2.accelerate.checkpointing import SelectiveDecoderLayer
from nanomolmo2.accelerate.cross_entropy import ChunkedLoss, TiedEmbedding
from nanomolmo2.accelerate.flex import LongRowNanoMolmo2
from nanomolmo2.accelerate.fused import FusedAttention, FusedSwiGLU, FusedVisionAttention
from nanomolmo2.accelerate.linear import OneDNNLinear, OneDNNTiedHead
from nanomolmo2.accelerate.memory import GroupedVisionEncoder
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.language_model import DecoderLayer
from tests.nets import IMAGE, greatest_difference, pictures, small_model, text_ids

FUNCTIONS: list[Any] = [
    accelerate.onednn,
    accelerate.bf16_matmul,
    accelerate.fuse_projections,
    accelerate.lean_norms,
    accelerate.group_images,
    accelerate.chunked_loss,
    accelerate.checkpoint_activations,
    accelerate.block_masks,
    accelerate.trim_memory,
    accelerate.defaults,
]


def inputs(model: NanoMolmo2) -> dict[str, Tensor]:
    ids = text_ids(2, 12)
    ids[:, 2] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    labels[1, 9:] = -100
    return {
        "input_ids": ids,
        "pixel_values": pictures(2),
        "labels": labels,
        "attention_mask": mask,
    }


def gradients(model: NanoMolmo2) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("connector_type", ["linear", "resampler", "pooling"])
@pytest.mark.parametrize("apply", FUNCTIONS, ids=lambda f: f.__name__)
def test_logits_loss_and_gradients_stay(connector_type: str, apply: Any) -> None:
    plain = small_model(connector_type, freeze_vision=False, bidirectional_image_attention=True)
    changed = copy.deepcopy(plain)
    names = list(plain.state_dict())
    assert apply(changed) is changed
    assert list(changed.state_dict()) == names
    given, results = inputs(plain), []
    for model in (plain.train(), changed.train()):
        logits, _ = model(**given)
        loss = model.loss(**given)
        loss.backward()
        results.append((logits.detach(), loss.detach(), gradients(model)))
    (logits, loss, expected), (found_logits, found_loss, found) = results
    assert greatest_difference(found_logits, logits) < 1e-5
    assert greatest_difference(found_loss, loss) < 1e-5
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert greatest_difference(found[name], gradient) < 1e-5, name


@pytest.mark.parametrize("apply", FUNCTIONS, ids=lambda f: f.__name__)
def test_twice_is_as_once_and_copies_keep_it(apply: Any) -> None:
    model = apply(small_model())
    kinds = [type(m) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    apply(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == kinds
        ids = text_ids(1, 5)
        assert torch.equal(twin(ids), model(ids))


def test_the_bare_class_is_plain_and_a_loaded_model_has_all_of_it() -> None:
    bare = Counter(type(m) for m in NanoMolmo2(small_model().config).modules())
    assert not any(kind.__module__.startswith("nanomolmo2.accelerate") for kind in bare)
    model, _ = nanomolmo2.load("tiny")
    kinds = Counter(type(m) for m in model.modules())
    assert kinds[nn.Linear] == 0 and kinds[DecoderLayer] == 0
    for kind in (
        *(OneDNNLinear, OneDNNTiedHead, FusedAttention, FusedVisionAttention, FusedSwiGLU),
        *(GroupedVisionEncoder, ChunkedLoss, TiedEmbedding, SelectiveDecoderLayer),
        LongRowNanoMolmo2,
    ):
        assert kinds[kind] > 0, kind


def test_checkpointing_can_be_taken_off_again() -> None:
    model = small_model()
    kinds = [type(m) for m in model.modules()]
    accelerate.checkpoint_activations(model, "full")
    assert [type(m) for m in model.modules()] != kinds
    accelerate.checkpoint_activations(model, "none")
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ValueError, match="mode is 'some', expected 'selective', 'full' or 'none'"):
        accelerate.checkpoint_activations(model, "some")  # type: ignore[arg-type]
