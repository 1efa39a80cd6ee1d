"""A linear layer with 8-bit or 16-bit weights.

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate.kernels import (
    MODES,
    WEIGHT_DTYPE,
    DenseKernel,
    FusedSlice,
    Kernel,
    QuantizedWeight,
    kernel_for,
    quantize_weight,
)

_packing = threading.Lock()


def check_mode(mode: Any) -> None:
    """Raises: ValueError for what is none of `MODES`."""
    if mode not in MODES:
        raise ValueError(
            f"there is no quantisation mode {mode!r:.60}: choose one of {', '.join(MODES)} or auto"
        )


class QuantizedLinear(nn.Module):
    """A linear layer with quantised weights, for use without gradients.

    Its state is plain: ``weight`` (N, K) int8 or float16; for int8 ``scale`` (N,) float32 and, if
    calibrated, ``input_scale`` (K,) float32; ``bias`` (N,) float32. These keep their dtypes when
    the module is cast: the compute dtype is that of the input.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        mode: one of :data:`MODES`.
        calibrated: with a scale for every input.
    """

    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mode: str,
        *,
        bias: bool = False,
        calibrated: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        K, N = in_features, out_features
        has_scale = mode != "fp16-weights"
        floats = functools.partial(torch.ones, dtype=torch.float32, device=device)
        weight = torch.zeros(N, K, dtype=WEIGHT_DTYPE[mode], device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", floats(N) if has_scale else None)
        self.register_buffer("input_scale", floats(K) if has_scale and calibrated else None)
        self.register_buffer("bias", floats(N).zero_() if bias else None)
        self._packed: Kernel | FusedSlice | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mode: str, input_scale: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantise a layer; it stays as it is.

        Raises: ValueError for weights that are not finite.
        """
        plain = quantize_weight(linear.weight.detach(), mode, linear.bias, input_scale)
        layer = cls(linear.in_features, linear.out_features, mode, device="meta")
        layer.weight, layer.scale = plain.weight, plain.scale
        layer.bias, layer.input_scale = plain.bias, plain.input_scale
        return layer

    @property
    def calibrated(self) -> bool:
        return self.input_scale is not None

    @property
    def num_weights(self) -> int:
        """Parameters of the layer that this one stands for."""
        return self.out_features * (self.in_features + (self.bias is not None))

    def dequantized(self) -> nn.Linear:
        """A float32 layer of the same values."""
        self._unpack()
        plain = self._plain()
        weight = plain.weight.float()
        if plain.scale is not None:
            weight = weight * plain.scale[:, None]
        if plain.input_scale is not None:
            weight = weight / plain.input_scale
        linear = nn.Linear(
            self.in_features, self.out_features, plain.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight)
        if plain.bias is not None:
            linear.bias = nn.Parameter(plain.bias.clone())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x. Raises: ValueError where x needs a gradient."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "a quantised layer was asked for gradients, expected inference: train the model "
                "before it is quantised, or run this under torch.no_grad()"
            )
        packed = self._packed or self._pack()
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], self.out_features)
        return packed(rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.mode!r}, "
            f"bias={self.bias is not None}, calibrated={self.calibrated}"
        )

    def _pack(self) -> Kernel:
        """Pack the weights for their kernel; the plain ones are let go."""
        with _packing:
            if self._packed is None:
                plain = self._plain()
                self._packed, self.weight = _kernel(self.mode, plain.weight)(plain), None
            return self._packed

    def _plain(self) -> QuantizedWeight:
        assert self.weight is not None
        return QuantizedWeight(self.weight, self.scale, self.bias, self.input_scale)

    def _unpack(self) -> None:
        """Hold the plain weights again."""
        with _packing:
            if self._packed is not None:
                self.weight, self._packed = self._packed.unpack(), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._unpack()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)  # moved, but not cast
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[f"{prefix}weight"] = self._packed.unpack()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self._unpack()
        wrong = [
            f"{prefix}{name} is {found.dtype}, expected {own.dtype}: quantised and floating point "
            f"weights are different files"
            for name, own in self._buffers.items()
            if own is not None
            and (found := state_dict.get(f"{prefix}{name}")) is not None
            and found.dtype != own.dtype
        ]
        if wrong:
            lists[-1].extend(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()  # copies and pickles hold plain tensors only
        return self.__dict__.copy()


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of one input.

    Quantised layers of one mode are one product: small calls cost nearly as much as large ones, and
    the input is brought to int8 once.
    """
    whole = _shared_kernel(layers)
    if whole is None or (torch.is_grad_enabled() and x.requires_grad) or not x.numel():
        return tuple(layer(x) for layer in layers)
    y = whole(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    return y.split([int(layer.out_features) for layer in layers], dim=-1)  # type: ignore[arg-type]


def _shared_kernel(layers: Sequence[nn.Module]) -> Kernel | None:
    """The kernel that the layers share, packed at the first call; None if they cannot share one."""
    first = layers[0]
    if not isinstance(first, QuantizedLinear):
        return None
    packed = [layer._packed if isinstance(layer, QuantizedLinear) else None for layer in layers]
    if isinstance(packed[0], FusedSlice):
        whole = packed[0].whole
        if all(isinstance(slice, FusedSlice) and slice.whole is whole for slice in packed):
            return whole
    alike = [
        layer
        for layer in layers
        if isinstance(layer, QuantizedLinear)
        and layer.mode == first.mode
        and (layer.bias is None) == (first.bias is None)
        and not layer.calibrated  # each has scales of its own for the input
    ]
    if len(alike) < len(layers):
        return None
    for layer in alike:
        layer._unpack()
    with _packing:
        parts = [layer._plain() for layer in alike]
        weight = torch.cat([part.weight for part in parts])
        scales = [part.scale for part in parts if part.scale is not None]
        biases = [part.bias for part in parts if part.bias is not None]
        plain = QuantizedWeight(
            weight,
            torch.cat(scales) if scales else None,
            torch.cat(biases) if biases else None,
            None,
        )
        whole = _kernel(first.mode, weight)(plain)
        start = 0
        for layer in alike:
            stop = start + layer.out_features
            layer._packed, layer.weight, start = FusedSlice(whole, start, stop), None, stop
    return whole


def _kernel(mode: str, weight: Tensor) -> Callable[[QuantizedWeight], Kernel]:
    return kernel_for(mode) if weight.device.type == "cpu" else DenseKernel
