"""What our own checkpoints say of quantised weights: int8 with scales, or float16, always plain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nanomolmo2.accelerate.quantization import (
    Modes,
    apply_quantization_config,
    in_16_bit,
    is_quantized,
    quantization_config,
    quantize,
)
from nanomolmo2.convert.config_checks import in_file
from nanomolmo2.convert.folder import QUANTIZATION
from nanomolmo2.convert.parts import CONFIG_NAME, LLM, VISION, Part, read_config
from nanomolmo2.convert.tensor_files import Readable, open_safetensors
from nanomolmo2.models import NanoMolmo2, VisionEncoder

MODEL_TYPE = "nanomolmo2"
TABLE = "embed_tokens.weight"

Loaded = TypeVar("Loaded", bound=nn.Module)


def own_type(part: Part) -> str:
    """``model_type`` of a quantised part, which no other program reads."""
    return f"{MODEL_TYPE}_{part.component}"


def quantization_entry(model: nn.Module) -> dict[str, Any]:
    """``{"quantization": {part: ...}}`` for a config; empty where nothing is quantised."""
    named: Mapping[str, nn.Module]
    if isinstance(model, NanoMolmo2):
        named = dict(model.named_children())
    else:
        named = {(VISION if isinstance(model, VisionEncoder) else LLM).component: model}
    entries = {name: quantization_config(part) for name, part in named.items()}
    found = {name: entry for name, entry in entries.items() if entry is not None}
    return {QUANTIZATION: found} if found else {}


def open_own_tensors(directory: Path) -> tuple[Mapping[str, Readable], Any]:
    """The tensors of a folder in our format, and what its config says of their quantisation."""
    entry = read_config(directory).get(QUANTIZATION)
    return open_safetensors(directory, quantized=entry is not None), entry


def prepare_parts(parts: Mapping[str, nn.Module], entry: Any, directory: Path) -> None:
    """Give parts on the meta device the layers that a config's ``quantization`` names.

    Raises: ValueError naming the file for an entry that does not fit.
    """
    if entry is None:
        return
    if not isinstance(entry, Mapping) or not set(entry) <= set(parts):
        raise ValueError(
            f"{directory / CONFIG_NAME}: {QUANTIZATION} has one entry a part ({', '.join(parts)}), "
            f"found {entry!r:.80}"
        )
    for name, description in entry.items():
        with in_file(directory / CONFIG_NAME, f"{QUANTIZATION}.{name}"):
            apply_quantization_config(parts[name], description)


def quantize_loaded(module: Loaded, mode: Modes) -> Loaded:
    """Quantise what was loaded; a checkpoint that is quantised already may only be asked for that.

    Raises: ValueError for a checkpoint in another mode.
    """
    if mode is None or not is_quantized(module):
        return quantize(module, mode)
    stored = quantization_entry(module)[QUANTIZATION]
    found = {part: entry["mode"] for part, entry in stored.items()}
    wanted = mode if isinstance(mode, Mapping) else dict.fromkeys(found, mode)
    if mode != "auto" and any(found.get(part) != m for part, m in wanted.items()):
        raise ValueError(
            f"the checkpoint is quantised already, {_modes_text(found)}, and cannot become "
            f"{_modes_text(wanted)}: leave quantize out, or start from the floating point weights"
        )
    return module


def tables_in_16_bit(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Embedding tables of quantised decoders in 16 bit, which they were rounded to."""
    if not is_quantized(model.llm if isinstance(model, NanoMolmo2) else model):
        return state_dict
    return {n: in_16_bit(t) if n.endswith(TABLE) else t for n, t in state_dict.items()}


def _modes_text(modes: Mapping[str, str | None]) -> str:
    return ", ".join(f"{part} {mode}" for part, mode in modes.items())
