"""What layers keep for backward: as little as can be had without a product more.

Most memory of training is what forward keeps for backward. A product keeps its input, and where
that is a norm, a SwiGLU or a rotation of what is kept anyway, it is computed again when its turn in
backward comes: half of the memory, for a few hundredths of the time. Gradients stay the same bit
for bit.

Everything here is of the first order: gradients of gradients are not to be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Again = Callable[[], Tensor]
_LARGE = 2**20  # bytes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32 inside; keeps ``x`` alone."""
    if _learns(x, weight):
        y: Tensor = _RMSNorm.apply(x, weight, eps)
        return y
    return weight * _normalised(x, eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; keeps these two alone."""
    if _learns(gate, up):
        y: Tensor = _SwiGLU.apply(gate, up)
        return y
    return F.silu(gate) * up


def computed_again(
    *results: tuple[Tensor, Again], on: bool = True
) -> contextlib.AbstractContextManager[None]:
    """Within it, who would keep one of ``results`` for backward keeps how to compute it.

    Args:
        results: tensors, each with a function that computes the same from what is kept anyway.
        on: False = do nothing. Off in a checkpointed block, which keeps nothing of its inside.
    """
    if on and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _computed_again(list(results))
    return _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _computed_again(results: list[tuple[Tensor, Again]]) -> Iterator[None]:
    def pack(kept: Tensor) -> Any:
        for result, again in results:
            if _is(kept, result):
                return kept.shape, again
        return kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, again = kept
        with torch.no_grad():
            tensor: Tensor = again()
        return tensor if tensor.shape == shape else tensor.view(shape)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        results.clear()  # the graph holds on to `pack`


def tidy_behind(x: Tensor) -> None:
    """When backward has come to ``x``, :func:`tidy`."""
    if torch.is_grad_enabled() and x.requires_grad:
        x.register_hook(tidy)


def tidy(x: Tensor) -> None:
    """Give memory that was freed back to the system, where ``x`` is large and on a CPU.

    Backward frees activations and makes gradients, which are larger and do not fit into the gaps.
    glibc would hold on to these: a tenth of the peak of a training step. In a small model they are
    soon filled.
    """
    if x.device.type == "cpu" and x.nbytes >= _LARGE:
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Of glibc; None elsewhere."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def _learns(*inputs: Tensor) -> bool:
    """Whether what is kept matters; a compiler decides that better by itself."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return learns and not torch.compiler.is_compiling()


def _is(kept: Tensor, result: Tensor) -> bool:
    """The same numbers in the same order, be it in another shape."""
    if kept.untyped_storage()._cdata != result.untyped_storage()._cdata:
        return False
    if kept.dtype != result.dtype or kept.storage_offset() != result.storage_offset():
        return False
    if kept.shape == result.shape:
        return kept.stride() == result.stride()
    return kept.numel() == result.numel() and kept.is_contiguous() and result.is_contiguous()


def _normalised(x: Tensor, eps: float) -> Tensor:
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return weight * _normalised(x, eps).to(x.dtype)

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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate) if ctx.needs_input_grad[0] else None
        dup = F.silu(gate).mul_(dy) if ctx.needs_input_grad[1] else None
        return dgate, dup
