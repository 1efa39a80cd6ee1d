"""Linear layers in float32 by oneDNN, or multiplied in bfloat16, on a CPU.

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models.language_model import TiedHead

Model = TypeVar("Model", bound=nn.Module)

# Multiplications from which a layer that learns is worth an autograd function in Python.
_WORTH_A_FUNCTION = 2**25


def onednn(model: Model) -> Model:
    """Let float32 linear layers call oneDNN directly, where PyTorch would ask MKL.

    Swaps every ``nn.Linear`` for `OneDNNLinear` and the head of tied decoders for `OneDNNTiedHead`.
    Measured on AVX-512: a tenth less time for many rows, a quarter less for one row on one thread,
    half on two. docs/performance.md has the table.
    """
    return swap(model, {nn.Linear: OneDNNLinear, TiedHead: OneDNNTiedHead})


def bf16_matmul(model: Model) -> Model:
    """Let layers that learn in float32 multiply in bfloat16, on CPUs with instructions for that.

    Swaps every ``nn.Linear`` for `BF16MatmulLinear`, and the head likewise. Their products take
    less than half the time. Weights, gradients and all between the layers stay float32; with
    autocast they would not, which costs a small model more time than it saves. Without such
    instructions (AVX-512 BF16) nothing changes.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return model
    classes: dict[type[nn.Module], type[nn.Module]] = {
        nn.Linear: BF16MatmulLinear,
        OneDNNLinear: BF16MatmulLinear,
        TiedHead: BF16MatmulTiedHead,
        OneDNNTiedHead: BF16MatmulTiedHead,
    }
    return swap(model, classes)


def has_bf16_matmul(model: nn.Module) -> bool:
    """Whether any layer was swapped by :func:`bf16_matmul`."""
    return any(isinstance(m, (BF16MatmulLinear, BF16MatmulTiedHead)) for m in model.modules())


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class OneDNNTiedHead(TiedHead):
    """`TiedHead` by :func:`linear`."""

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return linear(hidden, table)


class BF16MatmulLinear(nn.Linear):
    """``nn.Linear`` by :func:`bf16_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return bf16_linear(x, self.weight, self.bias)


class BF16MatmulTiedHead(TiedHead):
    """`TiedHead` by :func:`bf16_linear`."""

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return bf16_linear(hidden, table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., K), (N, K), (N,) -> (..., N); by oneDNN in float32 on a CPU."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if _learns(x, weight):
        if not _is_worth_a_function(x, weight):
            return F.linear(x, weight, bias)
        product: Tensor = _OneDNNProduct.apply(x, weight, bias)
        return product
    return _onednn(x, weight, bias)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, multiplied in bfloat16 where a large float32 product learns."""
    on_cpu = weight.dtype is x.dtype is torch.float32 and weight.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and torch.compiler.is_compiling():
        # For a compiler, which joins the rounding with what is around it, and finds the gradients.
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y + bias
    if _is_for_onednn(x, weight) and _learns(x, weight) and _is_worth_a_function(x, weight):
        product: Tensor = _BF16Product.apply(x, weight, bias)
        return product
    return linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.dtype is torch.float32
        and x.dtype is torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # Inductor takes this operator's weights as constants
        and _onednn_is_there()
    )


def _learns(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _is_worth_a_function(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * len(weight) >= _WORTH_A_FUNCTION


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _onednn_is_there() -> bool:
    """Whether the operator exists on this machine and is right. It is none of PyTorch's public
    ones, so nothing depends on it, and its absence is no reason for a warning.

    The first call may come from within a checkpointed block, which would take this product for one
    of its own and miss it when it is recomputed: so no mode sees it.
    """
    generator = torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.no_grad():
        x, weight, bias = (torch.randn(n, generator=generator) for n in ((3, 40), (24, 40), (24,)))
        try:
            found = _onednn(x, weight, bias)
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        return torch.allclose(found, F.linear(x, weight, bias), atol=1e-4)


class _OneDNNProduct(torch.autograd.Function):
    """Gradients of the first order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        dy = dy.reshape(-1, dy.shape[-1])  # (M, N)
        if ctx.needs_input_grad[0]:
            dx = _onednn(dy, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = _onednn(dy.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0)
        return dx, dw, db


class _BF16Product(torch.autograd.Function):
    """What goes in is rounded to bfloat16, what comes out is float32; gradients of first order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight).float()
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        dy = dy.reshape(-1, dy.shape[-1])  # (M, N)
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0)
        dy = dy.bfloat16()
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).float().view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = (dy.t() @ x.reshape(-1, x.shape[-1])).float()
        return dx, dw, db
