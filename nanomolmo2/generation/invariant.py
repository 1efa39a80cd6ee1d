"""FixedBlocks: the same bits for a position, whatever else is in the call.

A matrix product may round differently with another number of rows, and an elementwise function at
the end of a tensor, where no whole vector register is left. Inside this mode linear layers run in
blocks of ROW_BLOCK rows, and such functions run position by position. Norms, sums along the width,
products and sums of two tensors have no such seams; attention is cut by RaggedStep itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Rows of a linear layer's call. Small blocks make prompts slow, large ones single tokens: measured
# on (1024, 3072) in float32, one thread: 16 rows take 2.7 x the time of one, and 1.7 x the time a
# row takes in a block of 64.
ROW_BLOCK = 16

# Called as (rows, weight, ...). The packed kernels are named, torch makes them when they are used.
_LINEAR = {"linear", "linear_dynamic_fp16"}
_POSITIONWISE: set[Any] = {F.silu, F.gelu, Tensor.cos, Tensor.sin, Tensor.exp, Tensor.sigmoid}
_POSITIONWISE |= {torch.cos, torch.sin, torch.exp, torch.sigmoid}


class FixedBlocks(TorchFunctionMode):
    """Context manager; costs are in docs/generation.md."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if name in _LINEAR:
            return _in_blocks(func, args[0], args[1:], kwargs)
        if name == "_linear_pointwise":  # oneDNN's linear layer: input, weight, bias, ...
            return _in_blocks(F.linear, args[0], args[1:3], {})
        if func in _POSITIONWISE and args[0].ndim > 1:
            rows = args[0].reshape(-1, args[0].shape[-1])
            done = [func(row, *args[1:], **kwargs) for row in rows]
            return torch.stack(done).view(args[0].shape)
        return func(*args, **kwargs)


def _in_blocks(
    func: Callable[..., Tensor], x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    free = -len(rows) % ROW_BLOCK
    if free:
        rows = torch.cat([rows, rows.new_zeros(free, rows.shape[1])])
    done = [func(block, *rest, **kwargs) for block in rows.split(ROW_BLOCK)]
    y = done[0] if len(done) == 1 else torch.cat(done)
    return y[: len(y) - free].view(*x.shape[:-1], y.shape[-1])
