"""Linear layers with 4-bit or 8-bit weights that stay, for other weights to learn beside them.

A layer gives its input a gradient and has none itself. Its weights are made whole, in the dtype of
the input, whenever they are needed, and let go again: beside the codes there is one whole weight at
a time.

- ``nf4``: blocks of 64 weights are divided by their largest size and rounded to the nearest of 16
  values, the quantiles of a normal distribution: 4.5 bits a weight. The bytes are those of
  bitsandbytes, whose CUDA kernel is used where it is installed.
- ``int8``: one scale an output: 8 bits a weight.

N outputs, K inputs.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix E.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nanomolmo2.accelerate.kernels import quantize_weight
from nanomolmo2.accelerate.linear import OneDNNLinear, linear
from nanomolmo2.accelerate.swap import replace_layer

Model = TypeVar("Model", bound=nn.Module)
Format: TypeAlias = Literal["nf4", "int8"]

BLOCK = 64  # weights that share a scale in nf4
_PIECE = 2**21  # bytes that are unpacked at a time
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class FrozenLinear(nn.Module):
    """A linear layer whose weights are codes, and stay.

    Its state is ``codes`` (N * K / 2,) uint8 and ``scales`` (N * K / 64,) float32 for nf4, (N, K)
    int8 and (N,) float32 for int8; ``bias`` (N,) float32 or None.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    pairs: Tensor  # (256, 2): the two values of every byte of nf4, the higher half first

    def __init__(self, base: nn.Linear, format: Format) -> None:
        """
        Args:
            base: stays as it is; where its weights have no values (meta, fake), codes have none.
        Raises: ValueError for weights that are not finite.
        """
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        self.format: Format = format
        quantize = _to_nf4 if format == "nf4" else _to_int8
        codes, scales = quantize(base.weight.detach())
        bias = None if base.bias is None else base.bias.detach().float()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        # On the CPU at first also where codes are on the meta device, which get values later.
        values, byte = torch.tensor(NF4, device="cpu"), torch.arange(256, device="cpu")
        pairs = torch.stack((values[byte >> 4], values[byte & 15]), dim=1)
        here = "cpu" if codes.is_meta else codes.device
        self.register_buffer("pairs", pairs.to(here), persistent=False)
        self.train(base.training)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K), the rounded weights."""
        shape = self.out_features, self.in_features
        return _dequantized(self.codes, self.scales, self.pairs, shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        shape = self.out_features, self.in_features
        y: Tensor = _FrozenProduct.apply(x, self.codes, self.scales, self.pairs, shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format!r}"


def quantize_frozen(module: Model, format: Format) -> Model:
    """Replace every linear layer inside by a `FrozenLinear`, in place."""
    for name, layer in list(module.named_modules()):
        if name and isinstance(layer, nn.Linear):
            replace_layer(module, name, FrozenLinear(layer, format))
    return module


def dequantize_frozen(module: Model, dtype: torch.dtype = torch.float32) -> Model:
    """Replace every `FrozenLinear` inside by a linear layer of the same, rounded, values."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, FrozenLinear):
            replace_layer(module, name, plain_linear(layer.dequantized(dtype), layer.bias))
    return module


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these weights, which do not learn."""
    N, K = weight.shape
    layer = OneDNNLinear(K, N, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


class _FrozenProduct(torch.autograd.Function):
    """Nothing is kept for backward but the codes, which are there anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, pairs: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.shape = shape
        return linear(x, _dequantized(codes, scales, pairs, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, pairs = ctx.saved_tensors
        weight = _dequantized(codes, scales, pairs, ctx.shape, dy.dtype)
        return linear(dy, weight.t()), None, None, None, None


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    if _has_no_values(weight):
        codes = torch.empty_like(weight, dtype=torch.int8)
        return codes, weight.new_empty(len(weight), dtype=torch.float32)
    quantized = quantize_weight(weight, "int8-weight-only")
    assert quantized.scale is not None
    return quantized.weight, quantized.scale


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    scales = weight.new_empty(-(-count // BLOCK), dtype=torch.float32)
    if _has_no_values(weight):
        return codes, scales
    values = torch.tensor(NF4, device=weight.device)
    between = (values[1:] + values[:-1]) / 2
    flat = weight.flatten()
    for start in range(0, count, 2 * _PIECE):  # whole blocks
        part = flat[start : start + 2 * _PIECE].float()
        blocks = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            raise ValueError(
                "a linear layer holds weights that are not finite (NaN or infinity): start from a "
                "model whose weights are sound"
            )
        scales[start // BLOCK : start // BLOCK + len(largest)] = largest
        shares = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
        nearest = torch.bucketize(shares, between, out_int32=True).to(torch.uint8).view(-1, 2)
        both = (nearest[:, 0] << 4) | nearest[:, 1]
        used = (len(part) + 1) // 2
        codes[start // 2 : start // 2 + used] = both[:used]
    return codes, scales


def _has_no_values(weight: Tensor) -> bool:
    return weight.is_meta or isinstance(weight, FakeTensor)


def _dequantized(
    codes: Tensor, scales: Tensor, pairs: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    if codes.dtype is torch.int8:
        weight = torch.empty(shape, dtype=dtype, device=codes.device)
        size = max(1, 2 * _PIECE // shape[1])
        for start in range(0, shape[0], size):  # rounded once, from float32
            rows = slice(start, start + size)
            weight[rows] = codes[rows] * scales[rows, None]
        return weight
    kernel = _nf4_kernel() if codes.device.type == "cuda" else None
    if kernel is not None:
        return kernel(codes, scales, BLOCK, "nf4", list(shape), dtype)
    count = shape[0] * shape[1]
    result = torch.empty(count, dtype=dtype, device=codes.device)
    for start in range(0, len(codes), _PIECE):
        part = F.embedding(codes[start : start + _PIECE].int(), pairs).flatten()
        of_blocks = scales[2 * start // BLOCK : (2 * start + len(part) - 1) // BLOCK + 1]
        if len(part) % BLOCK:  # the last one
            part.mul_(of_blocks.repeat_interleave(BLOCK)[: len(part)])
        else:
            part.view(-1, BLOCK).mul_(of_blocks[:, None])
        end = min(2 * start + len(part), count)
        result[2 * start : end] = part[: end - 2 * start]
    return result.view(shape)


@functools.cache
def _nf4_kernel() -> Callable[..., Tensor] | None:
    """Of bitsandbytes (extra ``qlora``), where it is installed: faster, and the same numbers."""
    try:
        importlib.import_module("bitsandbytes")
    except Exception:  # also one that was built for another CUDA
        return None
    kernel: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit
    return kernel
