from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.accelerate.frozen_linear import (
    NF4,
    FrozenLinear,
    dequantize_frozen,
    quantize_frozen,
)

FORMATS = ("nf4", "int8")


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def random_linear(N: int, K: int, *, bias: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(N)
    weight = torch.randn(N, K, generator=generator)
    return linear(weight, torch.randn(N, generator=generator) if bias else None)


def test_nf4_by_hand():
    """Blocks of 64 by their largest size; two codes a byte, the first in its upper half."""
    first = torch.tensor(NF4 * 4) * 3.0  # codes 0, 1, ..., 15, four times
    second = torch.zeros(64)
    second[:3] = torch.tensor([0.5, -0.25, 0.04])  # of 0.5: 1, -0.5, 0.08
    layer = FrozenLinear(linear(torch.stack((first, second))), "nf4")
    assert layer.scales.tolist() == [3.0, 0.5]
    assert layer.codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert layer.codes[32:34].tolist() == [0xF2, 0x87]  # -0.5 is nearest to the third, 0 is 7
    found = layer.dequantized()
    assert torch.equal(found[0], first)
    expected = [0.5, -0.5250730514526367 * 0.5, 0.07958029955625534 * 0.5, 0.0]
    assert found[1, :4].tolist() == pytest.approx(expected, rel=1e-6)


def test_int8_by_hand():
    layer = FrozenLinear(linear(torch.tensor([[127.0, -1.2, 0.4], [0.0, 2.54, -1.0]])), "int8")
    assert layer.codes.tolist() == [[127, -1, 0], [0, 127, -50]]
    assert layer.dequantized().flatten().tolist() == pytest.approx([127, -1, 0, 0, 2.54, -1.0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(48, 64), (33, 7), (5, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_rounded_weights(format, N, K, dtype):
    base = random_linear(N, K, bias=True)
    layer = FrozenLinear(base, format)
    weight = layer.dequantized(dtype)
    assert torch.equal(weight, layer.dequantized().to(dtype)), "rounded once"
    x = torch.randn(4, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), F.linear(theirs, weight) + base.bias.detach().to(dtype)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(dy)
    expected.backward(dy)
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=5 * tolerance)
    assert not list(layer.parameters())


def test_rounding_is_small_and_takes_few_bytes():
    base = random_linear(256, 512)
    for format, bits, error in (("nf4", 4.5, 0.1), ("int8", 8.1, 0.01)):
        layer = FrozenLinear(base, format)
        taken = sum(t.nbytes for t in (layer.codes, layer.scales))
        assert taken * 8 / base.weight.numel() == pytest.approx(bits, abs=0.1)
        difference = layer.dequantized() - base.weight.detach()
        assert difference.norm() / base.weight.detach().norm() < error


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_whole_is_kept_between_forward_and_backward(format):
    layer = FrozenLinear(random_linear(64, 128), format)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.ones(2, 128, requires_grad=True))
    assert kept and all(t.data_ptr() in {b.data_ptr() for b in layer.buffers()} for t in kept)


@pytest.mark.parametrize("format", FORMATS)
def test_modules_go_there_and_back(format):
    module = nn.Sequential(random_linear(8, 64), nn.ReLU(), random_linear(16, 8, bias=True))
    quantize_frozen(module, format)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected, state = module(x), {n: t.clone() for n, t in module.state_dict().items()}
    with torch.device("meta"):  # as a checkpoint is read: shapes first, values then
        empty = nn.Sequential(nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 16))
        quantize_frozen(empty, format)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), expected)
    dequantize_frozen(module)
    assert type(module[0]).__mro__[1] is nn.Linear and not module[0].weight.requires_grad
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite_are_refused(format):
    base = random_linear(4, 64)
    with torch.no_grad():
        base.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        FrozenLinear(base, format)


@pytest.mark.parametrize(("N", "K"), [(96, 64), (33, 7), (5, 100), (300, 500)])
def test_nf4_is_that_of_bitsandbytes(N, K):
    """The same bytes, and the same values bit for bit: its kernel can take over."""
    functional = pytest.importorskip("bitsandbytes").functional
    base = random_linear(N, K)
    layer = FrozenLinear(base, "nf4")
    codes, state = functional.quantize_4bit(
        base.weight.detach(), quant_type="nf4", blocksize=64, compress_statistics=False
    )
    assert torch.equal(codes.flatten(), layer.codes)
    assert torch.equal(state.absmax, layer.scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernel = torch.ops.bitsandbytes.dequantize_4bit
        theirs = kernel(codes, state.absmax, 64, "nf4", [N, K], dtype)
        assert torch.equal(theirs, layer.dequantized(dtype))
