"""RMSNorm with a gradient of its own: fewer passes over memory, and only its input is kept."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models.layers import RMSNorm

Model = TypeVar("Model", bound=nn.Module)


def lean_norms(model: Model) -> Model:
    """Give RMSNorms a gradient of their own, where autograd would go through each of their steps.

    Swaps `RMSNorm` for `LeanRMSNorm`. Gradients are of the first order.
    """
    return swap(model, {RMSNorm: LeanRMSNorm})


class LeanRMSNorm(RMSNorm):
    """`RMSNorm` that keeps its input alone for backward; a compiler finds that by itself."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not learns or torch.compiler.is_compiling():
            return super().forward(x)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return weight * y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        y = x.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + ctx.eps)
        y = y * scale
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            products = dy * y.to(x.dtype)
            dweight = products.flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dn = (dy * weight).float()
            # What would only lengthen a row is taken out of its gradient.
            along = (dn * y).mean(-1, keepdim=True)
            dx = dn.sub_(y.mul_(along)).mul_(scale).to(x.dtype)
        return dx, dweight, None
