"""Products with 8-bit and 16-bit weights: everything that touches their operators.

M rows, K inputs, N outputs.

A kernel packs plain tensors once and is then a function of (M, K). It proves itself before its
first use, on a small matrix; where it is missing or wrong the next one takes over with a warning.
The last one is plain PyTorch, which also runs where the weights are not on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MODES = ("int8", "int8-weight-only", "fp16-weights")
WEIGHT_DTYPE = {"int8": torch.int8, "int8-weight-only": torch.int8, "fp16-weights": torch.float16}

_BLOCK = 4096  # outputs that are converted at a time, so that no second copy of a head is made
_VECTOR = 32  # inputs that the weight-only operator takes at a time, on any CPU
# Multiplications from which a layer that learns is worth an autograd function in Python.
_WORTH_A_FUNCTION = 2**25
_TINY = torch.finfo(torch.float32).tiny


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., K), (N, K), (N,) -> (..., N).

    Float32 products on a CPU go to oneDNN directly, where PyTorch would ask MKL. Measured on
    AVX-512: a tenth less time for many rows, a quarter less for one row on one thread, half on two.
    docs/performance.md has the table.
    """
    is_float = weight.dtype is torch.float32 and x.dtype is torch.float32
    on_cpu = weight.device.type == "cpu"
    if _short and is_float and on_cpu and torch.is_grad_enabled() and torch.compiler.is_compiling():
        return _short_product(x, weight, bias)
    plain = (
        is_float
        and on_cpu
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # Inductor takes this operator's weights as constants
        and _onednn_is_there()
    )
    if not plain:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if x.numel() * len(weight) < _WORTH_A_FUNCTION:
            return F.linear(x, weight, bias)
        product: Tensor = (_ShortProduct if _short else _Product).apply(x, weight, bias)
        return product
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The same with gradients, of the first order."""

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


def _short_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `_ShortProduct` computes, for a compiler, which joins the rounding with what is around
    it and finds the gradients by itself."""
    y = F.linear(x.bfloat16(), weight.bfloat16()).float()
    return y if bias is None else y + bias


class _ShortProduct(torch.autograd.Function):
    """The same, multiplied in bfloat16: what goes in is rounded, what comes out is float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        short, short_weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(short, short_weight)
        y = F.linear(short, short_weight).float()
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


_short = False  # set by `bfloat16_products`


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Layers that learn in float32 multiply in bfloat16, on CPUs with instructions for that.

    Their products take less than half the time. Weights, gradients and all between the layers stay
    float32; with autocast they would not, which costs a small model more time than it saves.
    Without such instructions (AVX-512 BF16) nothing changes.
    """
    global _short
    before, _short = _short, bool(torch.cpu._is_avx512_bf16_supported())
    try:
        yield
    finally:
        _short = before


def products_are_short() -> bool:
    """Whether :func:`bfloat16_products` is in force."""
    return _short


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@functools.cache
def _onednn_is_there() -> bool:
    """Whether the operator exists on this machine and is right. It is none of PyTorch's public
    ones, so nothing depends on it, and its absence is no reason for a warning."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=generator) for n in ((3, 40), (24, 40), (24,)))
    try:
        found = _onednn(x, weight, bias)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(found, F.linear(x, weight, bias), atol=1e-4)


class Kernel(Protocol):
    """A packed layer; ``packed(x)`` maps (M, K) to (M, N) in the dtype of ``x``."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def unpack(self) -> Tensor:
        """The plain weight (N, K), bit for bit."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """The tensors of a quantised layer: y = (x / input_scale) @ (weight * scale).T + bias."""

    weight: Tensor  # (N, K) int8, or float16 without scales
    scale: Tensor | None  # (N,) float32
    bias: Tensor | None  # (N,) float32
    input_scale: Tensor | None  # (K,) float32


class Int8Kernel:
    """FBGEMM: int8 times int8, one activation scale a call.

    One scale a call would let a large row take the precision of all others. So every row is divided
    by its own absolute maximum before and multiplied after, and one more row, which holds the two
    ends of the range, fixes the scale. A row then gives the same bits in any company.
    """

    def __init__(self, plain: Plain) -> None:
        K = plain.weight.shape[1]
        assert plain.scale is not None
        self.scale, self.bias = plain.scale, plain.bias
        self.inverse = None if plain.input_scale is None else 1.0 / plain.input_scale
        self.packed = _prepack_int8(plain.weight, plain.scale)
        self.reduce_range = _activation_bits() == 7
        levels = 63 if self.reduce_range else 127
        # From -(levels + 1) to levels: zero and both ends of a row are whole steps.
        self.ends = torch.zeros(1, K)
        self.ends[0, 0] = 1.0
        self.ends[0, -1] = -(levels + 1) / levels
        if K == 1:
            self.ends = torch.tensor([[1.0], [-(levels + 1) / levels]])
        self.extra = len(self.ends)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float()
        if self.inverse is not None:
            rows = rows * self.inverse
        size = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
        # A row with NaN or infinity comes out as NaN by its size, and must not reach the range.
        rows = torch.cat((rows / size, self.ends)).nan_to_num_(0.0)
        y = torch.ops.quantized.linear_dynamic(rows, self.packed, self.reduce_range)
        y = y[: -self.extra]
        y = y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size)
        return y.to(x.dtype)

    def unpack(self) -> Tensor:
        with _quietly():
            return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()


class WeightOnlyKernel:
    """int8 weights, bfloat16 activations; a row gives the same bits in any company."""

    def __init__(self, plain: Plain) -> None:
        assert plain.scale is not None
        self.inputs = plain.weight.shape[1]
        # The operator reads whole vectors: with another K it returns nonsense, or crashes.
        self.padding = -self.inputs % _VECTOR
        self.weight = F.pad(plain.weight, (0, self.padding)).contiguous()
        self.scale, self.bias = plain.scale.bfloat16(), plain.bias
        self.inverse = None if plain.input_scale is None else 1.0 / plain.input_scale

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if self.inverse is None else x.float() * self.inverse
        rows = F.pad(rows.bfloat16(), (0, self.padding)).contiguous()
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return (y if self.bias is None else y.float() + self.bias).to(x.dtype)

    def unpack(self) -> Tensor:
        return self.weight[:, : self.inputs].contiguous()


class HalfKernel:
    """FBGEMM: float16 weights, float32 activations and sums."""

    def __init__(self, plain: Plain) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(plain.weight.float(), plain.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)

    def unpack(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].half()


class DenseKernel:
    """Plain PyTorch on any device: the weights in the dtype of the activations, block by block."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain

    def __call__(self, x: Tensor) -> Tensor:
        plain = self.plain
        rows = x if plain.input_scale is None else (x.float() / plain.input_scale).to(x.dtype)
        blocks = []
        for start in range(0, len(plain.weight), _BLOCK):
            stop = start + _BLOCK
            weight = plain.weight[start:stop]
            if plain.scale is not None:  # before the product, which could overflow float16
                weight = weight * plain.scale[start:stop, None]
            blocks.append(F.linear(rows, weight.to(x.dtype)))
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        return (y if plain.bias is None else y.float() + plain.bias).to(x.dtype)

    def unpack(self) -> Tensor:
        return self.plain.weight


class PackedSlice:
    """Some outputs of a kernel that several layers share: their weights, one above the other."""

    def __init__(self, whole: Kernel, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x)[:, self.start : self.stop]

    def unpack(self) -> Tensor:
        return self.whole.unpack()[self.start : self.stop].clone()


_KERNELS: dict[str, tuple[Callable[[Plain], Kernel], ...]] = {
    "int8": (Int8Kernel, WeightOnlyKernel, DenseKernel),
    "int8-weight-only": (WeightOnlyKernel, DenseKernel),
    "fp16-weights": (HalfKernel, DenseKernel),
}


@functools.cache
def kernel_for(mode: str) -> Callable[[Plain], Kernel]:
    """The first kernel of a mode that is there on this CPU and right; a warning if it is not the
    one that the mode is named after."""
    problems = []
    for kernel in _KERNELS[mode]:
        problem = _problem_of(kernel, mode)
        if problem is None:
            break
        problems.append(f"{kernel.__name__}: {problem}")
    if problems:
        warnings.warn(
            f"{mode} weights cannot be used on this machine as intended ({'; '.join(problems)}); "
            f"{kernel.__name__} takes over, which is right but slower",
            stacklevel=2,
        )
    return kernel


def _problem_of(kernel: Callable[[Plain], Kernel], mode: str) -> str | None:
    """Why a kernel cannot be used, by a small product against float32; None if it can."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    weight[0] = weight.abs().max()  # the largest weights times the largest inputs overflow first
    x = torch.randn(5, 96, generator=generator)
    x[0] = 1.0
    x[1] *= 1000.0
    plain = quantize_weight(weight, mode, bias=torch.randn(24, generator=generator))
    expected = F.linear(x, weight, plain.bias)
    try:
        found = kernel(plain)(x)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).split("\n")[0][:120] or type(error).__name__
    worst = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    return None if worst < 0.05 else f"a product is off by {worst:.0%}"


@functools.cache
def _activation_bits() -> int:
    """8, or 7 where two products of 8 bits overflow the 16-bit sums of FBGEMM's kernel.

    That is so on CPUs without VNNI instructions: there 255 * 127 * 2 does not fit into an int16 and
    is cut off silently.
    """
    K = 64
    packed = _prepack_int8(torch.full((16, K), 127, dtype=torch.int8), torch.ones(16))
    x = torch.ones(2, K)
    x[1, 0] = -128 / 127
    y = torch.ops.quantized.linear_dynamic(x, packed, False)
    return 8 if abs(float(y[0, 0]) - 127 * K) < 1 else 7


def _prepack_int8(weight: Tensor, scale: Tensor) -> Any:
    """FBGEMM's form of (N, K) int8 weights with scales (N,)."""
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with _quietly(), _fbgemm():
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without PyTorch's remark that quantized tensors will go: they are needed only to pack."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"torch\.quantize_per_tensor, torch\.quantize_per_channel"
        )
        yield


@contextlib.contextmanager
def _fbgemm() -> Iterator[None]:
    """Pack for FBGEMM, whatever engine the program has set for its own quantised layers."""
    chosen = torch.backends.quantized.engine
    if chosen in ("x86", "fbgemm"):
        yield
        return
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = chosen


def quantize_weight(
    weight: Tensor, mode: str, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Plain:
    """Quantise (N, K) weights, block by block."""
    N, K = weight.shape
    target = torch.empty(N, K, dtype=WEIGHT_DTYPE[mode], device=weight.device)
    scale = torch.ones(N, device=weight.device) if mode != "fp16-weights" else None
    for start in range(0, N, _BLOCK):
        block = weight[start : start + _BLOCK].float()
        if not bool(block.isfinite().all()):
            raise ValueError(
                "a linear layer holds weights that are not finite (NaN or infinity): quantise a "
                "model whose weights are loaded and sound"
            )
        if scale is None:
            limit = torch.finfo(torch.float16).max
            target[start : start + _BLOCK] = block.clamp(-limit, limit)
            continue
        if input_scale is not None:
            block = block * input_scale
        largest = block.abs().amax(dim=1)
        step = torch.where(largest > 0, largest / 127, 1.0).clamp_min(_TINY)
        scale[start : start + _BLOCK] = step
        target[start : start + _BLOCK] = (block / step[:, None]).round_().clamp_(-127, 127)
    bias = None if bias is None else bias.detach().float().clone()
    return Plain(target, scale, bias, input_scale)
