"""Where a model computes: the device of a name, or the best that there is, and its usual dtype."""

from __future__ import annotations

from typing import TypeAlias

import torch

Device: TypeAlias = torch.device | str | None
BEST = ("cuda", "mps")  # looked for in this order; then the CPU


def devices() -> list[torch.device]:
    """Every device that PyTorch can compute on here, the CPU last."""
    other = torch.accelerator.current_accelerator()  # xpu, or one that a package registered
    kinds = dict.fromkeys([*BEST, *([] if other is None else [other.type])])
    modules = {kind: torch.get_device_module(kind) for kind in kinds}
    found = [
        torch.device(kind, i)
        for kind, module in modules.items()
        if module.is_available()
        for i in range(module.device_count())
    ]
    return [*found, torch.device("cpu")]


def choose_device(name: Device = None) -> torch.device:
    """The device of a name, such as ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Args:
        name: None = CUDA where there is one, else MPS, else the CPU.
    Returns: with its number, as tensors there have it.
    Raises: ValueError for what is no device, or is not there, naming those that are.
    """
    there = devices()
    if name is None:
        name = next((kind for kind in BEST if any(d.type == kind for d in there)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r:.60} is no device: {_expected(there)}") from None
    if device.type == "meta":  # shapes alone, for those who know what they ask for
        return device
    if device.type == "cpu" and not device.index:
        return torch.device("cpu")
    if not any(d.type == device.type and device.index in (None, d.index) for d in there):
        built = ""
        if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            built = " (this PyTorch was built without CUDA)"
        raise ValueError(f"there is no device {str(name)!r:.60} here{built}: {_expected(there)}")
    return _with_number(device)


def usual_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that suits a device: float32 on a CPU, where 16-bit arithmetic is slow, bfloat16 on
    CUDA where its cores multiply it, else float32; None elsewhere = as stored.
    """
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return None


def device_text(device: torch.device) -> str:
    """A device for people: ``the CPU``, ``cuda:0 (NVIDIA H200)``."""
    if device.type == "cpu":
        return "the CPU"
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _with_number(device: torch.device) -> torch.device:
    """``cuda`` -> ``cuda:0``, or whichever is the current one."""
    return torch.empty(0, device=device).device


def _expected(there: list[torch.device]) -> str:
    *names, last = map(str, [there[-1], *there[:-1]])
    return f"choose {', '.join(names)} or {last}" if names else f"choose {last}"
