"""What is recomputed in backward equals what would have been kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nanomolmo2.accelerate import checkpoint_activations, lean_norms, onednn
from nanomolmo2.accelerate import linear as linear_module
from nanomolmo2.models import LanguageModel
from nanomolmo2.models.layers import RMSNorm
from nanomolmo2.training.lora import LoraConfig, add_lora
from tests.nets import LLM, greatest_difference, randomize, text_ids


@pytest.mark.parametrize("way", ["padded", "lora", "autocast", "bfloat16", "long"])
def test_gradients_of_the_decoder_are_the_same_bits(way: str) -> None:
    # "long": products are oneDNN's, as those of a real model are.
    config = LLM if way != "long" else replace(LLM, hidden_size=256, intermediate_size=1536)
    lean = randomize(LanguageModel(config)).train()
    if way == "lora":
        add_lora(lean, LoraConfig(rank=3))
        randomize(lean)
    if way == "bfloat16":
        lean.bfloat16()
    onednn(lean)
    plain = copy.deepcopy(lean)
    checkpoint_activations(lean)
    ids = text_ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :2] = way != "padded"

    def backward(llm: LanguageModel) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = llm.loss(ids, ids, attention_mask=mask)
        with Products() as products:
            loss.backward()
        return products.count

    found = backward(lean)
    assert backward(plain) == found, "a product ran twice"
    for (name, a), b in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad, b.grad), name


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += str(operator) in (
            "aten.mm.default",
            "aten.addmm.default",
            "mkldnn._linear_pointwise.default",
        )
        return operator(*args, **(kwargs or {}))


def kept_numbers(llm: LanguageModel, ids: Tensor) -> float:
    """Numbers that forward leaves allocated for backward, a token and layer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden = llm.hidden_states(llm.embed(ids), torch.arange(ids.shape[1])[None])
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert hidden.requires_grad  # the graph is still there
    return kept / 4 / ids.numel() / llm.config.num_hidden_layers


def test_what_a_layer_keeps() -> None:
    """Input, what its seven products and attention give, and the softmax: nothing else."""
    D, inner, width = 64, 192, 6 * 16
    config = replace(LLM, hidden_size=D, intermediate_size=inner, head_dim=16, num_hidden_layers=6)
    llm, ids = randomize(LanguageModel(config)).train(), text_ids(2, 60)
    checkpoint_activations(llm)
    least = 3 * D + (width + 2 * width // 3) + width + 2 * inner
    found = kept_numbers(llm, ids)
    # Beside the layers: embeddings, the last norm, rotary tables; and the softmax of attention.
    assert least <= found < 1.15 * least
    assert kept_numbers(checkpoint_activations(llm, "full"), ids) < 2 * D
    assert kept_numbers(checkpoint_activations(llm, "none"), ids) > 1.4 * found


def test_selective_and_full_checkpointing_are_the_same_bits() -> None:
    lean = checkpoint_activations(randomize(LanguageModel(LLM))).train()
    saving = checkpoint_activations(copy.deepcopy(lean), "full")
    ids = text_ids(2, 30)
    losses = []
    for net in (lean, saving):
        losses.append(net.loss(ids, ids))
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(lean.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name
    with torch.no_grad():
        assert greatest_difference(lean(ids), saving(ids)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_norm_and_its_gradients(dtype: torch.dtype) -> None:
    """Bit for bit forward; backward within the rounding of another order of steps."""
    plain = RMSNorm(40, 1e-6)
    with torch.no_grad():
        plain.weight.copy_(torch.rand(40) + 0.5)
    lean = lean_norms(copy.deepcopy(plain).to(dtype))
    plain.to(dtype)
    x = torch.randn(6, 40).mul_(300).to(dtype).requires_grad_()
    dy, found = torch.randn(6, 40).to(dtype), []
    for norm in (plain, lean):
        y = norm(x)
        found.append((y, *torch.autograd.grad(y, (x, norm.weight), dy)))
    (expected, *wanted), (y, *gradients) = found
    assert type(lean) is not RMSNorm and torch.equal(y, expected)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_the_self_test_of_onednn_is_no_product_of_a_checkpointed_block() -> None:
    """It ran within the first block, whose recomputation then met a product too few."""
    config = replace(LLM, hidden_size=256, intermediate_size=1536)
    llm = checkpoint_activations(onednn(randomize(LanguageModel(config)).train()))
    ids = text_ids(2, 60)
    linear_module._onednn_is_there.cache_clear()
    llm.loss(ids, ids).backward()
    assert all(p.grad is not None for p in llm.parameters())
