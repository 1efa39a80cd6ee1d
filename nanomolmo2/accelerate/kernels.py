"""Products with 8-bit and 16-bit weights: everything that touches their operators.

M rows, K inputs, N outputs.

A kernel packs plain tensors once and is then a function of (M, K). It passes a self-test on a small
matrix before its first use; where it is missing or wrong the next one is the fallback, with a
warning. The last one is plain PyTorch, which also runs where the weights are not on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("int8", "int8-weight-only", "fp16-weights")
WEIGHT_DTYPE = {"int8": torch.int8, "int8-weight-only": torch.int8, "fp16-weights": torch.float16}

_BLOCK = 4096  # outputs that are converted at a time, so that no second copy of a head is made
_VECTOR = 32  # inputs that the weight-only operator takes at a time, on any CPU
_TINY = torch.finfo(torch.float32).tiny


class Kernel(Protocol):
    """A packed layer; ``packed(x)`` maps (M, K) to (M, N) in the dtype of ``x``."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def unpack(self) -> Tensor:
        """The plain weight (N, K), bit for bit."""
        ...


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of a quantised layer: y = (x / input_scale) @ (weight * scale).T + bias."""

    weight: Tensor  # (N, K) int8, or float16 without scales
    scale: Tensor | None  # (N,) float32
    bias: Tensor | None  # (N,) float32
    input_scale: Tensor | None  # (K,) float32


class Int8Kernel:
    """FBGEMM: int8 times int8, one activation scale a call.

    One scale a call would let a large row take the precision of all others. So every row is divided
    by its own absolute maximum before and multiplied after, and one more row, which holds the two
    ends of the range, fixes the scale. A row then gives the same bits in any batch.
    """

    def __init__(self, quantized: QuantizedWeight) -> None:
        K = quantized.weight.shape[1]
        assert quantized.scale is not None
        self.scale, self.bias = quantized.scale, quantized.bias
        self.inverse = None if quantized.input_scale is None else 1.0 / quantized.input_scale
        self.packed = _prepack_int8(quantized.weight, quantized.scale)
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
    """int8 weights, bfloat16 activations; a row gives the same bits in any batch."""

    def __init__(self, quantized: QuantizedWeight) -> None:
        assert quantized.scale is not None
        self.inputs = quantized.weight.shape[1]
        # The operator reads whole vectors: with another K it returns nonsense, or crashes.
        self.padding = -self.inputs % _VECTOR
        self.weight = F.pad(quantized.weight, (0, self.padding)).contiguous()
        self.scale, self.bias = quantized.scale.bfloat16(), quantized.bias
        self.inverse = None if quantized.input_scale is None else 1.0 / quantized.input_scale

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if self.inverse is None else x.float() * self.inverse
        rows = F.pad(rows.bfloat16(), (0, self.padding)).contiguous()
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return (y if self.bias is None else y.float() + self.bias).to(x.dtype)

    def unpack(self) -> Tensor:
        return self.weight[:, : self.inputs].contiguous()


class HalfKernel:
    """FBGEMM: float16 weights, float32 activations and sums."""

    def __init__(self, quantized: QuantizedWeight) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            quantized.weight.float(), quantized.bias
        )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)

    def unpack(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].half()


class DenseKernel:
    """Plain PyTorch on any device: the weights in the dtype of the activations, block by block."""

    def __init__(self, quantized: QuantizedWeight) -> None:
        self.quantized = quantized

    def __call__(self, x: Tensor) -> Tensor:
        quantized = self.quantized
        rows = (
            x if quantized.input_scale is None else (x.float() / quantized.input_scale).to(x.dtype)
        )
        blocks = []
        for start in range(0, len(quantized.weight), _BLOCK):
            stop = start + _BLOCK
            weight = quantized.weight[start:stop]
            if quantized.scale is not None:  # before the product, which could overflow float16
                weight = weight * quantized.scale[start:stop, None]
            blocks.append(F.linear(rows, weight.to(x.dtype)))
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        return (y if quantized.bias is None else y.float() + quantized.bias).to(x.dtype)

    def unpack(self) -> Tensor:
        return self.quantized.weight


class FusedSlice:
    """Some outputs of a kernel that several layers share: their weights, one above the other."""

    def __init__(self, whole: Kernel, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x)[:, self.start : self.stop]

    def unpack(self) -> Tensor:
        return self.whole.unpack()[self.start : self.stop].clone()


_KERNELS: dict[str, tuple[Callable[[QuantizedWeight], Kernel], ...]] = {
    "int8": (Int8Kernel, WeightOnlyKernel, DenseKernel),
    "int8-weight-only": (WeightOnlyKernel, DenseKernel),
    "fp16-weights": (HalfKernel, DenseKernel),
}


@functools.cache
def kernel_for(mode: str) -> Callable[[QuantizedWeight], Kernel]:
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


def _problem_of(kernel: Callable[[QuantizedWeight], Kernel], mode: str) -> str | None:
    """Why a kernel cannot be used, by a small product against float32; None if it can."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    weight[0] = weight.abs().max()  # the largest weights times the largest inputs overflow first
    x = torch.randn(5, 96, generator=generator)
    x[0] = 1.0
    x[1] *= 1000.0
    quantized = quantize_weight(weight, mode, bias=torch.randn(24, generator=generator))
    expected = F.linear(x, weight, quantized.bias)
    try:
        found = kernel(quantized)(x)
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


def _prepack_int8(weight: Tensor, scale: Tensor) -> torch.ScriptObject:
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
) -> QuantizedWeight:
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
    return QuantizedWeight(target, scale, bias, input_scale)
