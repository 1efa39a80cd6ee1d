"""What is computed again in backward equals what would have been kept."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nanomolmo2.models import LanguageModel
from nanomolmo2.models.recompute import computed_again, rms_norm, swiglu
from nanomolmo2.training.lora import LoraConfig, add_lora
from tests.nets import LLM, greatest_difference, randomize, text_ids

LANGUAGE_MODEL = "nanomolmo2.models.language_model"
DTYPES = [torch.float32, torch.bfloat16]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@given(rows=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_norm_and_its_gradients(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, width, generator=generator).mul_(3).requires_grad_()
    weight = torch.rand(width, generator=generator).add_(0.5).requires_grad_()
    dy = torch.randn(2, rows, width, generator=generator)
    found, expected = rms_norm(x, weight, 1e-6), plain_norm(x, weight, 1e-6)
    assert torch.equal(found, expected)
    wanted = torch.autograd.grad(expected, (x, weight), dy)
    for a, b in zip(torch.autograd.grad(found, (x, weight), dy), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradients(dtype: torch.dtype) -> None:
    gate, up, dy = torch.randn(3, 4, 5, 7).to(dtype)
    for inputs in ((gate, up.requires_grad_()), (gate.clone().requires_grad_(), up)):
        found, expected = swiglu(*inputs), F.silu(inputs[0]) * inputs[1]
        assert torch.equal(found, expected)
        learns = [x for x in inputs if x.requires_grad]
        wanted = torch.autograd.grad(expected, learns, dy)
        for a, b in zip(torch.autograd.grad(found, learns, dy), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_in_another_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(6, 40).mul_(300).to(dtype).requires_grad_()
    weight = torch.rand(40).to(dtype).requires_grad_()
    dy = torch.randn(6, 40).to(dtype)
    found, expected = rms_norm(x, weight, 1e-6), plain_norm(x, weight, 1e-6)
    assert torch.equal(found, expected)
    wanted = torch.autograd.grad(expected, (x, weight), dy)
    for a, b in zip(torch.autograd.grad(found, (x, weight), dy), wanted, strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_only_the_named_tensor_is_computed_again() -> None:
    """Whatever its form at the layer; a transposed view has other numbers at every place."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    weight, calls = torch.randn(5, 4, requires_grad=True), []

    def again() -> Tensor:
        calls.append(1)
        return x.exp()

    results = []
    for on in (False, True):
        y = x.exp()
        with computed_again((y, again), on=on):
            loss = F.linear(y, weight).square().sum()  # keeps (6, 4)
            loss = loss + (y.flatten(0, 1).t() * torch.randn(4, 6)).square().sum() * 0
            loss = loss + F.linear(y.flatten(0, 1).t(), torch.ones(7, 6)).square().sum()
            loss = loss + (y.flatten(0, 1).t() @ weight[:, :1].new_ones(6, 2)).sum()
        results.append(torch.autograd.grad(loss, (x, weight)))
        assert bool(calls) == on
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def off(*results: Any, on: bool = True) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@pytest.mark.parametrize("way", ["padded", "lora", "autocast", "bfloat16", "long"])
def test_gradients_of_the_decoder_are_the_same_bits(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "long": products are oneDNN's, as those of a real model are.
    config = LLM if way != "long" else replace(LLM, hidden_size=256, intermediate_size=1536)
    lean = randomize(LanguageModel(config)).train()
    if way == "lora":
        add_lora(lean, LoraConfig(rank=3))
        randomize(lean)
    if way == "bfloat16":
        lean.bfloat16()
    plain = copy.deepcopy(lean)
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
    with monkeypatch.context() as patch:
        patch.setattr(f"{LANGUAGE_MODEL}.computed_again", off)
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
        hidden = llm.transform(ids)
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert hidden.requires_grad  # the graph is still there
    return kept / 4 / ids.numel() / llm.config.num_hidden_layers


def test_what_a_layer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, q, k, v, attention, residual, gate and up: nothing else."""
    D, inner, width = 64, 192, 6 * 16
    config = replace(LLM, hidden_size=D, intermediate_size=inner, head_dim=16, num_hidden_layers=6)
    llm, ids = randomize(LanguageModel(config)).train(), text_ids(2, 60)
    least = 2 * D + (width + 2 * width // 3) + width + 2 * inner
    found = kept_numbers(llm, ids)
    # Beside the layers: embeddings, the last norm, rotary tables; and the softmax of attention.
    assert least <= found < 1.15 * least
    llm.gradient_checkpointing = True
    assert kept_numbers(llm, ids) < 2 * D
    llm.gradient_checkpointing = False
    monkeypatch.setattr(f"{LANGUAGE_MODEL}.computed_again", off)
    assert kept_numbers(llm, ids) > 1.4 * found


def test_checkpointing_and_computing_again_are_the_same_bits() -> None:
    lean = randomize(LanguageModel(LLM)).train()
    saving = copy.deepcopy(lean)
    saving.gradient_checkpointing = True
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
