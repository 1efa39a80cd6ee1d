"""Linear layers by oneDNN and in bfloat16 against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nanomolmo2.accelerate.linear as linear_module
from nanomolmo2.accelerate import bf16_matmul, onednn
from nanomolmo2.accelerate.linear import OneDNNLinear, bf16_linear, has_bf16_matmul, linear
from nanomolmo2.emoji import train
from nanomolmo2.models import LanguageModel
from tests.nets import LLM, greatest_difference, randomize, text_ids


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 3, 16, 793])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs(rows: int, bias: bool) -> None:
    x, weight = random(2, rows, 40), random(24, 40, seed=1)
    b = random(24, seed=2) if bias else None
    assert torch.allclose(linear(x, weight, b), F.linear(x, weight, b), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "input", "weight"])
def test_its_gradients_are_torchs(bias: bool, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_WORTH_A_FUNCTION", 0)
    x, weight, dy = random(2, 7, 40), random(24, 40, seed=1), random(2, 7, 24, seed=2)
    b = random(24, seed=3) if bias else None
    named = {"input": x, "weight": weight, "bias": b}
    leaves = [t for name, t in named.items() if t is not None and name != frozen]
    for leaf in leaves:
        leaf.requires_grad_()
    found = torch.autograd.grad(linear(x, weight, b), leaves, dy)
    expected = torch.autograd.grad(F.linear(x, weight, b), leaves, dy)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_products_in_bfloat16(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_WORTH_A_FUNCTION", 0)
    x, weight, dy = random(2, 7, 40), random(24, 40, seed=1), random(2, 7, 24, seed=2)
    leaves = [x, weight, *([random(24, seed=3)] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()

    def both_ways(linear: Callable[..., Tensor]) -> list[Tensor]:
        y = linear(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    expected = both_ways(linear)
    found = both_ways(bf16_linear)
    with torch.no_grad():  # who does not learn stays exact
        assert torch.equal(bf16_linear(*leaves), expected[0])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()
    assert not torch.equal(found[0], expected[0])


def test_compiled_layers_multiply_in_bfloat16_too() -> None:
    """The same rounding of what goes in, written for a compiler; this backend needs none."""
    x, weight, bias = random(600, 256), random(256, 256, seed=1), random(256, seed=2)
    weight.requires_grad_()
    compiled = torch.compile(bf16_linear, backend="aot_eager")
    expected = bf16_linear(x, weight, bias)
    found = compiled(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), weight)
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-2)
    assert not torch.equal(found, F.linear(x, weight, bias))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_take_the_compilers_way(backend: str, learns: bool) -> None:
    """Inductor takes oneDNN's operator for constant weights only, and stops at others."""
    if backend == "inductor" and not train.has_compiler():
        pytest.skip("no compiler")
    x, weight, bias = random(600, 256), random(256, 256, seed=1), random(256, seed=2)
    weight.requires_grad_(learns)
    compiled = torch.compile(linear, backend=backend)
    with torch.set_grad_enabled(learns):
        found = compiled(x, weight, bias)
    assert found.requires_grad == learns
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    if learns:
        (gradient,) = torch.autograd.grad(found.sum(), weight)
        torch.testing.assert_close(gradient, x.sum(dim=0).expand(256, 256), rtol=1e-4, atol=1e-4)


def test_small_learners_autocast_and_other_dtypes_take_torchs_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_be_asked(*_: Any) -> Tensor:
        raise AssertionError("oneDNN was asked for")

    monkeypatch.setattr(linear_module, "_onednn", must_not_be_asked)
    layer = onednn(nn.Sequential(nn.Linear(40, 24)))
    assert type(layer[0]) is OneDNNLinear
    assert layer(random(3, 40)).requires_grad
    with torch.no_grad():
        assert layer.bfloat16()(random(3, 40).bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(random(3, 40)).dtype == torch.bfloat16
        assert layer(random(0, 40)).shape == (0, 24)


def test_without_onednn_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_onednn", lambda *_: torch.zeros(3, 24))
    linear_module._onednn_is_there.cache_clear()
    try:
        assert not linear_module._onednn_is_there()
        x, weight = random(3, 40), random(24, 40, seed=1)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        monkeypatch.undo()
        linear_module._onednn_is_there.cache_clear()


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_matmul_swaps_linear_layers_and_the_head_where_it_is_fast(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    llm, ids = randomize(LanguageModel(LLM)), text_ids(2, 9)
    names, expected = list(llm.state_dict()), llm(ids)
    assert bf16_matmul(onednn(llm)) is llm
    assert has_bf16_matmul(llm) == supported
    assert sum(type(m) is nn.Linear for m in llm.modules()) == 0
    assert list(llm.state_dict()) == names
    monkeypatch.setattr(linear_module, "_WORTH_A_FUNCTION", 0)
    difference = greatest_difference(llm(ids), expected)
    assert difference < 0.1 and (difference > 1e-3) == supported
